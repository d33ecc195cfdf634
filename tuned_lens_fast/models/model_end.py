"""What lies between a model's blocks and its head, as modules that take hidden states.

Between :mod:`~tuned_lens_fast.models.tracing`, which finds out what it is, and the norms of
:mod:`~tuned_lens_fast.nn`. Here is also how blocks take and return their residual streams, which differs between
models.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuned_lens_fast.models.alias import alias


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


class Tail(nn.Module):
    """A model from its last block's output to its head, by running it with blocks that return what is given.

    For models whose end is no chain of modules. It holds all of the model but the blocks' insides and the head.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], head: nn.Module, output: Any, layout: Layout):
        """``output``: what the last block returned."""
        super().__init__()
        self.model = alias(model).eval()
        twins = dict(zip(model.modules(), self.model.modules(), strict=True))
        self.layout = layout
        self.vocab = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        self._given = _Given()
        template = mapped(output, lambda _: None)
        for block in blocks:
            twin = twins[block]
            twin.__dict__ |= {"_modules": {}, "_parameters": {}, "_buffers": {}}
            twin.__dict__["forward"] = _Return(self._given, template)
        twins[head].__dict__ |= {"_parameters": {}, "_buffers": {}, "forward": _raise_arrival}

    def forward(self, h: Tensor) -> Tensor:
        """What the head receives, ``[..., d_model]``, for hidden states ``[..., width]``."""
        rows = h.reshape(-1, 1, h.shape[-1])
        # Every row is a text of one token, which does not matter.
        ids = torch.full(rows.shape[:2], min(5, self.vocab - 1), device=h.device)
        self._given.stream = self.layout.unflat(rows)
        try:
            self.model(**model_inputs(self.model, ids))
        except _Arrival as arrival:
            return arrival.x.reshape(*h.shape[:-1], arrival.x.shape[-1])
        finally:
            self._given.stream = None
        raise ValueError(f"model: {type(self.model).__name__} did not call its head")


class Chain(nn.Module):
    """Modules that a model calls one after the other, with constant factors between."""

    def __init__(self, modules: Sequence[nn.Module], factors: Sequence[float], layout: Layout) -> None:
        """``factors[i]`` stands before module i; ``layout`` is how the first takes hidden states."""
        super().__init__()
        self.layout = layout
        self.steps = nn.ModuleList(modules)
        self.factors = list(factors)

    def forward(self, h: Tensor) -> Tensor:
        """``[..., d_model]`` of ``[..., width]``."""
        x = self.layout.unflat(h.reshape(1, -1, h.shape[-1]))
        for step, factor in zip(self.steps, self.factors, strict=True):
            x = step(x if factor == 1.0 else x * factor)
        return x.reshape(*h.shape[:-1], x.shape[-1])


class _Given(threading.local):
    """What the blocks of a Tail return, in the thread that runs it."""

    stream: Tensor | None = None

    def __reduce__(self) -> tuple:
        return _Given, ()


class _Return:
    """Stands for a block's forward and returns what is given, in the form of ``template``."""

    def __init__(self, given: _Given, template: Any) -> None:
        self.given = given
        self.template = template

    def __call__(self, *_: Any, **__: Any) -> Any:
        assert self.given.stream is not None
        return with_stream(self.template, self.given.stream)


class _Arrival(BaseException):
    """Carries what the head receives out of a model's forward pass, past its ``except Exception``."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


def _raise_arrival(x: Tensor) -> Tensor:
    raise _Arrival(x)


def model_inputs(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
    """Keyword arguments of a plain forward pass on ids ``[..., positions]``, as a batch."""
    inputs: dict[str, Any] = {"input_ids": input_ids.reshape(-1, input_ids.shape[-1])}
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known:
        inputs["use_cache"] = False
    if attention_mask is not None:
        mask = attention_mask.reshape(inputs["input_ids"].shape)
        inputs["attention_mask"] = mask
        if "position_ids" in known:
            # Without them, padding on the left would shift every position of models with absolute ones.
            inputs["position_ids"] = (mask.to(torch.int64).cumsum(-1) - 1).clamp(min=0)
    return inputs


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


def name_of(model: Any) -> str:
    """Class and model type, for messages."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (model type {model_type!r})"


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
