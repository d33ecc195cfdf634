"""Finds a model's blocks and its head: by its config, by asking it, or by running it on a few tokens.

The first step from a model to a lens, before :mod:`~tuned_lens_fast.models.tracing` finds out what lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from tuned_lens_fast.models.alias import alias
from tuned_lens_fast.models.forward_pass import model_inputs, name_of, trial_ids, undisturbed


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of the model's blocks and its path: the list with as many modules as the text model's config says it
    has layers, outside of parts with configs of their own, such as a vision tower.

    Where there is none, the model is run on a few tokens: the list whose module is called last.

    Raises:
        ValueError: ``model`` has no config.
        NotImplementedError: no list of blocks.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(
            f"model: {type(model).__name__} has no config; wanted a transformers causal LM, or its parts in "
            f"Unembed.from_modules(norm, head)"
        )
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)

    def of_the_text(module: nn.Module) -> bool:
        own = getattr(module, "config", config)
        return own is config or own is text

    lists = dict(_outermost_lists(model, of_the_text))
    found = {path: blocks for path, blocks in lists.items() if len(blocks) == layers}
    if found:
        # As many other modules as layers are smaller ones.
        path = max(found, key=lambda path: sum(p.numel() for p in found[path].parameters()))
        return path, found[path]
    lists = dict(_outermost_lists(model, lambda _: True))
    if (last := _called_last(model, lists)) is None:
        raise NotImplementedError(f"model: no list of blocks found in {name_of(model)}")
    return last, lists[last]


def linear_head(model: Any) -> nn.Linear:
    """The head, a linear layer; the model's own.

    Raises:
        ValueError: ``model`` has no head, or one that is not linear.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    if head is None:
        raise ValueError(
            f"model: {type(model).__name__} has no head; load it with AutoModelForCausalLM, or pass its parts to "
            f"Unembed.from_modules(norm, head)"
        )
    if hasattr(head, "base_layer"):
        raise ValueError("model: its head has an adapter, such as LoRA's; merge it first, with merge_and_unload()")
    if not isinstance(head, nn.Linear):
        # TransformerLens's bridge puts a module around it.
        inside = [module for module in head.modules() if isinstance(module, nn.Linear)]
        head = inside[0] if len(inside) == 1 else head
    if not isinstance(head, nn.Linear):
        found = f"{type(head).__module__}.{type(head).__name__}"
        raise ValueError(f"model: its head is a {found}, wanted an nn.Linear, and not a quantised one")
    return head


def _outermost_lists(
    module: nn.Module, enter: Callable[[nn.Module], bool], path: str = ""
) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        at = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield at, child
        elif enter(child):
            yield from _outermost_lists(child, enter, at)


def _called_last(model: Any, lists: dict[str, nn.ModuleList]) -> str | None:
    """The path of the list whose module returns last in a run on a few tokens."""
    twin = alias(model, own_buffers=True).eval()
    twins = dict(zip(model.modules(), twin.modules(), strict=True))
    last: list[str] = []
    for path, modules in lists.items():
        for module in modules:
            twins[module].register_forward_hook(lambda *_, path=path: last.append(path))
    with undisturbed(model):
        twin(**model_inputs(twin, trial_ids(twin)))
    return last[-1] if last else None
