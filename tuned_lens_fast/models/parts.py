"""What attention and MLP of every block add to the residual stream of a running model, and what lies between the two.

Where the way from hidden state to statistics begins, beside ``residual_stream``. The parts are recognised by what they
compute, not by names: the operations of a block are followed, from the stream that enters it through every addition to
it. What is added is attention's if it went through a softmax over positions, and else the MLP's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from tuned_lens_fast.inputs import Prompt, read_prompt
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.models.block_output import first_tensor, stream_of
from tuned_lens_fast.models.comparison import close
from tuned_lens_fast.models.forward_pass import input_device, model_inputs, name_of
from tuned_lens_fast.models.residual_stream import recorded
from tuned_lens_fast.models.wrappers import unwrapped

Place = Literal["attn", "mlp", "mid", "head"]
_PLACES = ("attn", "mlp", "mid", "head")
#: Values went through a softmax over positions, through a convolution, or come from the stream behind an addition.
_ATTENTION, _CONVOLUTION, _LATER = "attention", "convolution", "later"
_ADDITIONS = ("aten::add.Tensor", "aten::add_.Tensor")
#: Ops that hand a stream on as it is, in another shape or dtype.
_SAME = {
    f"aten::{name}"
    for name in ("view", "_unsafe_view", "reshape", "clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh")
}


@dataclass
class _Added:
    """One addition to the stream of a block."""

    marks: frozenset[str]
    value: Tensor
    of_parts: tuple[Tensor, Tensor] | None  #: attention's and the rest's, where they were added to each other before


class _Follower(TorchDispatchMode):
    """Follows the residual stream through the operations of one block after another."""

    def __init__(self) -> None:
        super().__init__()
        self.entering: Tensor | None = None  #: of the block that is running
        self.added: list[_Added] = []
        self.middle: Tensor | None = None
        self.batch = 0
        self._stream: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._marks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._sums: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def start(self, stream: Tensor) -> None:
        self.entering, self.added, self.middle, self.batch = stream.clone(), [], None, len(stream)
        self._marks, self._sums = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self._stream = WeakTensorKeyDictionary()
        self._stream[stream] = True

    def ends_in(self, output: Tensor) -> bool:
        """Whether what the block puts out is the stream, after what was added to it."""
        return output in self._stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.entering is None:
            return func(*args, **kwargs)
        name = func._schema.name
        given = _tensors((args, kwargs))
        marks = frozenset().union(*(self._marks.get(tensor, ()) for tensor in given))
        terms = self._terms(func.name(), args, kwargs)
        # Before the operation, which may be done in place.
        addition = None if terms is None else self._addition(*terms)
        parts = None if terms is None or addition is not None else self._parts(*terms)
        passes_on = name in _SAME and bool(given) and given[0] in self._stream
        output = func(*args, **kwargs)
        if addition is not None:
            self.added.append(addition)
            # In place, the entering tensor is the stream behind the addition from now on.
            self._stream = WeakTensorKeyDictionary()
            self._stream[output] = True
            self._marks[output] = frozenset({_LATER})
            if len(self.added) == 1:
                self.middle = output.clone()
            return output
        if passes_on and isinstance(output, Tensor) and output.numel() == given[0].numel():
            self._stream[output] = True
        for tensor in _tensors(output):
            new = marks | self._own_marks(name, tensor)
            if new:
                self._marks[tensor] = new
            if parts is not None:
                self._sums[tensor] = parts
            elif name in _SAME and given and given[0] in self._sums:
                self._sums[tensor] = self._sums[given[0]]
        return output

    def _terms(self, name: str, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """Both terms of a sum of two tensors of the stream's size."""
        if name not in _ADDITIONS or kwargs.get("alpha", 1) != 1 or self.entering is None:
            return None
        a, b = args[:2]
        size = self.entering.numel()
        alike = isinstance(a, Tensor) and isinstance(b, Tensor) and a.numel() == b.numel() == size
        return (a, b) if alike and a.is_floating_point() and b.is_floating_point() else None

    def _addition(self, a: Tensor, b: Tensor) -> _Added | None:
        """What is added to the stream, if one term is the stream."""
        if (a in self._stream) == (b in self._stream) or self.entering is None:
            return None
        value = b if a in self._stream else a
        parts = self._sums.get(value)
        return _Added(self._marks.get(value, frozenset()), value.clone().view(self.entering.shape), parts)

    def _parts(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
        """Attention's and the other term, of a sum of the two."""
        of = [_ATTENTION in self._marks.get(term, ()) for term in (a, b)]
        if of[0] == of[1]:
            return None
        attention, rest = (a, b) if of[0] else (b, a)
        if _CONVOLUTION in self._marks.get(rest, ()):
            return None
        assert self.entering is not None
        return attention.clone().view(self.entering.shape), rest.clone().view(self.entering.shape)

    def _own_marks(self, name: str, output: Tensor) -> frozenset[str]:
        if "scaled_dot_product" in name or "flash" in name or "flex_attention" in name:
            return frozenset({_ATTENTION})
        # That of a router over experts has no heads.
        if "softmax" in name and (output.ndim >= 4 or (output.ndim == 3 and len(output) != self.batch)):
            return frozenset({_ATTENTION})
        return frozenset({_CONVOLUTION}) if "convolution" in name else frozenset()


@torch.no_grad()
def capture(
    model: Any,
    input_ids: Prompt,
    at: Place,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
) -> Tensor:
    """What passes inside the blocks of ``model`` on a prompt, for ``lens.decode``. Builds no graph.

    The stream that enters a block plus what its attention and its MLP add is the stream that leaves it: this is
    checked for every block.

    Args:
        model: a transformers causal LM; it runs in evaluation mode and is left in the modes it was in.
        input_ids: as :func:`tuned_lens_fast.decode_model` takes them.
        at: "attn" or "mlp", what each block's attention or MLP adds to the residual stream; "mid", the stream between
            the two; "head", what the model's head receives.
        attention_mask: of the shape of ``input_ids``, 0 at padding on either side.
        tokenizer: that of the model, where ``input_ids`` are texts.

    Returns:
        ``[L, *input_ids.shape, d_model]``, in order of the blocks; of "head" ``[*input_ids.shape, d_model]``.

    Raises:
        ValueError: no such place; the middle of blocks whose attention and MLP read the same stream side by side; or as
            :func:`tuned_lens_fast.residual_stream`.
        NotImplementedError: blocks of other parts than one attention and one MLP, or that do more to the stream than
            add to it.
    """
    if at not in _PLACES:
        raise ValueError(f"at: got {at!r}, wanted one of {', '.join(map(repr, _PLACES))}")
    model = unwrapped(model)
    ids, mask = read_prompt(input_ids, attention_mask, tokenizer, input_device(model))
    if at == "head":
        with recorded(model, ()) as recorder:
            model(**model_inputs(model, ids, mask))
            return recorder.take()[1].reshape(*ids.shape, -1)
    found: list[Tensor] = []
    with recorded(model) as recorder:
        with _following(model, recorder.is_mine, at, found):
            model(**model_inputs(model, ids, mask))
        recorder.take()  # raises where a block ran more than once
    first = found[0]
    # Some models put positions of their own before the prompt's.
    parts = torch.stack([part[:, -ids.shape[-1] :].to(first) for part in found])
    return parts.reshape(len(found), *ids.shape, -1)


@contextmanager
def _following(model: Any, is_mine: Any, at: str, found: list[Tensor]) -> Iterator[None]:
    """Within it, each block's part is put to ``found``."""
    follower = _Follower()
    blocks = get_transformer_layers(model)[1]

    def start(_: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        if is_mine():  # else it may have no kwargs: see Recorder
            follower.start(first_tensor(args, kwargs or {}))

    def end(block: nn.Module, _: tuple, output: Any) -> None:
        if is_mine():
            found.append(_part(model, block, len(found), follower, stream_of(output), at))
            follower.entering = None

    hooks = []
    try:
        for block in blocks:
            hooks.append(block.register_forward_pre_hook(start, with_kwargs=True))
            hooks.append(block.register_forward_hook(end))
        with follower:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _part(model: Any, block: nn.Module, number: int, seen: _Follower, output: Any, at: str) -> Tensor:
    """What was asked for of a block that has just returned."""
    held = ", ".join(dict.fromkeys(type(child).__name__ for child in block.children()))
    where = f"model: block {number} of {name_of(model)}, a {type(block).__name__} of {held},"
    added, entering = seen.added, seen.entering
    assert entering is not None
    if entering.ndim != 3 or not isinstance(output, Tensor) or not seen.ends_in(output) or not added:
        raise NotImplementedError(f"{where} does more to the residual stream than to add to it")
    kinds = [_ATTENTION in one.marks for one in added]
    other = any(_CONVOLUTION in one.marks for one in added)
    middle = seen.middle
    if len(added) == 1 and added[0].of_parts is not None and not other:
        (attention, mlp), middle = added[0].of_parts, None
    elif sorted(kinds) == [False, True] and not other and not any(one.of_parts for one in added):
        attention, mlp = (added[i].value for i in (kinds.index(True), kinds.index(False)))
        if _LATER not in added[1].marks:
            middle = None
    else:
        raise NotImplementedError(
            f"{where} adds {len(added)} times to the residual stream; wanted once what its attention returns and once "
            f"what its MLP does"
        )
    entering = entering.to(attention.device)  # where the block before left it
    if not close(entering.double() + attention.double() + mlp.double(), output.double().view(entering.shape)) and (
        output.dtype in (torch.float32, torch.float64)
    ):
        raise NotImplementedError(f"{where} puts out something else than its attention and MLP add up to")
    if at == "mid":
        if middle is None:
            raise ValueError(
                f"at: got 'mid', and block {number} of {name_of(model)} has none: its attention and MLP read the same "
                f"stream, side by side"
            )
        return middle.view(entering.shape)
    return attention if at == "attn" else mlp


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in arguments or outputs of an operation, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
