"""What lies between a model's blocks and its head, as modules that take hidden states.

Between :mod:`~tuned_lens_fast.models.tracing`, which finds out what it is, and the norms of
:mod:`~tuned_lens_fast.nn`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tuned_lens_fast.models.alias import alias
from tuned_lens_fast.models.block_output import Layout, mapped, with_stream
from tuned_lens_fast.models.forward_pass import model_inputs


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
        self._given.stream = self.layout.unflat(rows).clone()  # the model may change it in place
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
