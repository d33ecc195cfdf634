"""Finds the parts of a model that a lens reads: its blocks, its final norm, its head, and what follows the head; and
puts other blocks in their place.

This is where the way from hidden state to statistics begins: everything after this module sees plain descriptions
(:class:`~tuned_lens_fast.nn.Unembed`), never a model. Parts are found by running the model on a few tokens
(:mod:`tuned_lens_fast.models.tracing`), not by the names of classes or attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from tuned_lens_fast.models.blocks import find_blocks, linear_head
from tuned_lens_fast.models.tracing import LogitTransform, TracedModel
from tuned_lens_fast.models.wrappers import is_hooked_transformer, unwrapped

Model = Any  #: a causal LM of transformers, or another library's that holds one; see :class:`~tuned_lens_fast.Unembed`
Norm = nn.LayerNorm | nn.RMSNorm | nn.Module  #: any will do
T = TypeVar("T")


def get_final_norm(model: Any) -> nn.Module:
    """The norm between the last block and the head; the model's own module, not a copy.

    Of a model with more than one module there, one that calls them all; of one with none an ``nn.Identity``. The
    model runs on a few tokens, all but its blocks.

    Raises:
        ValueError: ``model`` is no causal LM, or its weights are not loaded.
        NotImplementedError: no lens can read the model.
    """
    model = unwrapped(model)
    if is_hooked_transformer(model):
        return getattr(model, "ln_final", nn.Identity())  # there is none with normalization_type=None
    return TracedModel(model, run_blocks=False).norm


def get_unembedding_matrix(model: Any) -> nn.Linear:
    """The head, the linear layer from the normed hidden state to the logits.

    The model's own module; for a TransformerLens ``HookedTransformer``, which has none, a new one on the same
    storage.

    Raises:
        ValueError: ``model`` has no head, or one that is not linear.
    """
    model = unwrapped(model)
    return as_linear(model.unembed) if is_hooked_transformer(model) else linear_head(model)


def get_transformer_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The model's blocks: the path of their list from ``model``, such as "base_model.h", and the list itself.

    Raises:
        ValueError: ``model`` has no config.
        NotImplementedError: no list of blocks is found.
    """
    model = unwrapped(model)
    if is_hooked_transformer(model):
        return "blocks", model.blocks
    path, blocks = find_blocks(model)
    prefix = getattr(model, "base_model_prefix", None)
    if prefix and path.startswith(f"{prefix}."):
        path = f"base_model.{path.removeprefix(f'{prefix}.')}"
    return path, blocks


def get_logit_transform(model: Any) -> LogitTransform:
    """The factor before the model's head, and the scale, softcap and cut after it; all neutral for most models.

    Measured by running the model on a few tokens, all but its blocks.

    Raises:
        ValueError, NotImplementedError: see :func:`get_final_norm`.
    """
    model = unwrapped(model)
    if is_hooked_transformer(model):
        softcap = getattr(model.cfg, "output_logits_soft_cap", None)
        return LogitTransform(softcap=softcap if softcap and softcap > 0 else None)
    return TracedModel(model, run_blocks=False).transform


def as_linear(head: Any) -> nn.Linear:
    """``head`` if it is an ``nn.Linear``; for TransformerLens's ``Unembed`` one on the same storage."""
    if isinstance(head, nn.Linear):
        return head
    d_model, vocab = head.W_U.shape
    linear = nn.Linear(d_model, vocab, device="meta")
    linear.weight = nn.Parameter(head.W_U.detach().T, requires_grad=False)
    bias = getattr(head, "b_U", None)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return linear


def get_value_for_key(obj: Any, key: str) -> Any:
    """``obj[int(key)]`` where the key is a number, else its attribute."""
    return obj[int(key)] if key.isdigit() else getattr(obj, key)


def set_value_for_key_(obj: Any, key: str, value: Any) -> None:
    """Set ``obj[int(key)]`` where the key is a number, else its attribute."""
    if key.isdigit():
        obj[int(key)] = value
    else:
        setattr(obj, key, value)


def get_key_path(model: Any, key_path: str) -> Any:
    """What lies at a path of keys, such as "layers.0.attention.query.weight"."""
    for key in key_path.split("."):
        model = get_value_for_key(model, key)
    return model


def set_key_path_(model: Any, key_path: str, value: nn.Module | Tensor) -> None:
    """Put something else at a path of keys."""
    parent, _, key = key_path.rpartition(".")
    set_value_for_key_(get_key_path(model, parent) if parent else model, key, value)


@contextmanager
def assign_key_path(model: T, key_path: str, value: Any) -> Iterator[T]:
    """Something else at a path of keys, until the block is left."""
    before = get_key_path(model, key_path)
    set_key_path_(model, key_path, value)
    try:
        yield model
    finally:
        set_key_path_(model, key_path, before)


@contextmanager
def delete_layers(model: T, indices: Sequence[int]) -> Iterator[T]:
    """The model without those of its blocks, until the block is left; see :func:`permute_layers`."""
    count = len(get_transformer_layers(model)[1])
    out = {range(count)[index] for index in indices}
    with permute_layers(model, [index for index in range(count) if index not in out]):
        yield model


@contextmanager
def permute_layers(model: T, indices: Sequence[int]) -> Iterator[T]:
    """The model with its blocks in the order of ``indices``, until the block is left; some may be left out, or be there
    several times.

    The config's number of layers, and what it says of each, follow. A block keeps its place in a cache: run the model
    with ``use_cache=False`` where one is there several times.

    Raises:
        IndexError: no such block.
    """
    undo = _permute(model, indices)
    try:
        yield model
    finally:
        undo()


def permute_layers_(model: Any, indices: Sequence[int]) -> None:
    """:func:`permute_layers` for good."""
    _permute(model, indices)


@contextmanager
def replace_layers(model: T, indices: Sequence[int], replacements: Sequence[nn.Module]) -> Iterator[T]:
    """The model with other blocks in the place of those, until the block is left.

    Raises:
        IndexError: no such block.
        ValueError: as many are not given.
    """
    if len(indices) != len(replacements):
        raise ValueError(f"replacements: got {len(replacements)} for {len(indices)} indices")
    path, blocks = get_transformer_layers(model)
    changed = list(blocks)
    for index, replacement in zip(indices, replacements, strict=True):
        changed[index] = replacement
    with assign_key_path(unwrapped(model), path, nn.ModuleList(changed)):
        yield model


def _permute(model: Any, indices: Sequence[int]) -> Callable[[], None]:
    """Put the blocks in another order; what is returned puts them back."""
    model = unwrapped(model)
    path, blocks = get_transformer_layers(model)
    if is_hooked_transformer(model):
        config, counts = model.cfg, ("n_layers",)
    else:
        config, counts = model.config.get_text_config(), ("num_hidden_layers",)
    before: dict[str, Any] = {name: getattr(config, name) for name in counts if hasattr(config, name)}
    after: dict[str, Any] = dict.fromkeys(before, len(indices))
    for name, value in vars(config).items():
        # One entry a block, such as which of them attend to a window.
        if isinstance(value, (list, tuple)) and len(value) == len(blocks) and name.endswith(("_types", "_layers")):
            before[name], after[name] = value, type(value)(value[index] for index in indices)
    order = nn.ModuleList([blocks[index] for index in indices])

    def put(modules: nn.ModuleList, values: dict[str, Any]) -> None:
        set_key_path_(model, path, modules)
        for name, value in values.items():
            setattr(config, name, value)

    put(order, after)
    return lambda: put(blocks, before)
