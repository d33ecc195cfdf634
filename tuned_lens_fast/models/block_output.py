"""How blocks take and return residual streams: the shapes of these, and what they are wrapped in.

Models differ in it, and everything that watches or replaces what passes between blocks goes through here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a model holds its residual streams: ``[batch, positions, d]`` for most.

    Several streams are ``[batch, positions, streams, d]`` or ``[streams, batch, positions, d]``. To a lens they are
    one of width streams * d.
    """

    streams: int | None = None
    first: bool = False

    @classmethod
    def of(cls, stream: Tensor, positions: int) -> Layout:
        """That of ``stream``, from a batch of 1 and at least so many positions."""
        shape = stream.shape
        if stream.ndim == 3 and shape[0] == 1 and shape[1] >= positions:
            return cls()
        if stream.ndim == 4 and shape[0] == 1 and shape[1] >= positions:
            return cls(shape[2])
        if stream.ndim == 4 and shape[1] == 1 and shape[2] >= positions:
            return cls(shape[0], True)
        raise NotImplementedError(
            f"model: a block puts out {[*shape]} for {positions} tokens; wanted [1, {positions}, d] or several of these"
        )

    def flat(self, stream: Tensor) -> Tensor:
        """``[batch, positions, width]``."""
        if self.streams is None:
            return stream
        return (stream.movedim(0, -2) if self.first else stream).flatten(-2)

    def unflat(self, h: Tensor) -> Tensor:
        """The model's own shape of ``[batch, positions, width]``."""
        if self.streams is None:
            return h
        stream = h.unflatten(-1, (self.streams, -1))
        return stream.movedim(-2, 0) if self.first else stream


def stream_of(output: Any) -> Any:
    """The residual stream in what a block returns: itself, or the first of several things."""
    if isinstance(output, dict):
        return stream_of(next(iter(output.values()), None))
    return stream_of(output[0]) if isinstance(output, (tuple, list)) and output else output


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a block's arguments: the first floating tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point())


def with_stream(output: Any, stream: Tensor) -> Any:
    """What a block returns, with another residual stream in it."""
    if isinstance(output, dict):
        changed = copy.copy(output)
        changed[next(iter(output))] = stream
        return changed
    if isinstance(output, (tuple, list)):
        return _like(output, [with_stream(output[0], stream), *output[1:]])
    return stream


def mapped(output: Any, change: Callable[[Any], Any]) -> Any:
    """What a block returns, with all but its structure changed."""
    if isinstance(output, dict):
        changed = copy.copy(output)
        for key, value in output.items():
            changed[key] = mapped(value, change)
        return changed
    if isinstance(output, (tuple, list)):
        return _like(output, [mapped(item, change) for item in output])
    return change(output)


def _like(output: Any, items: list[Any]) -> Any:
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
