"""What an engine is asked and what it answers: the interface between lenses and engines.

A lens is taken apart into plain tensors, so that an engine needs to know nothing of models:

    x = factor * norm(h + A h + c)        Translator, Norm
    z = g(W x + b)                        Head;  g(z) = softcap * tanh(scale * z / softcap), or scale * z

These are a :class:`Readout`; a :class:`Query` says which functions of z are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

NormKind = Literal["identity", "layer", "rms", "module"]
#: The target id that stands for "no target here": log_prob is NaN and rank 0.
NO_TARGET = -100


@dataclass(frozen=True)
class Translator:
    """One layer's affine map, added to the residual stream: h + weight h + bias."""

    weight: Tensor  #: [d_model, d_model]
    bias: Tensor | None = None  #: [d_model]


@dataclass(frozen=True)
class Norm:
    """All that happens to the residual stream before the head's linear layer receives it.

    ``layer``: (x - mean) / sqrt(var + eps) * weight + bias, the biased variance (Ba et al., 2016).
    ``rms``: x / sqrt(mean(x^2) + eps) * weight + bias (Zhang and Sennrich, 2019).
    ``module``: ``module`` is called; for norms that fit neither formula.
    ``identity``: nothing.
    """

    kind: NormKind
    weight: Tensor | None = None  #: [d_model]; None for all ones
    bias: Tensor | None = None  #: [d_model]
    eps: float = 0.0
    unit_offset: bool = False  #: the stored weight is w - 1, as in Gemma
    module: nn.Module | None = None
    factor: float = 1.0  #: the model multiplies the normed state by this
    width: int | None = None  #: of a hidden state of several residual streams side by side; None for d_model

    def hidden_width(self, head: Head) -> int:
        """Numbers in a hidden state."""
        return self.width or head.weight.shape[1]

    def __call__(self, residual: Tensor) -> Tensor:
        """The plain definition. residual: fp32 (or float64) [..., width]; [..., d_model] of the same dtype out."""
        x = residual
        if self.kind == "module":
            assert self.module is not None
            parameter = next((p for p in self.module.parameters() if p.is_floating_point()), None)
            x = self.module(x if parameter is None else x.to(parameter.dtype)).to(residual.dtype)
        elif self.kind != "identity":
            if self.kind == "layer":
                x = x - x.mean(-1, keepdim=True)
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
            if self.weight is not None:
                weight = self.weight.to(x.dtype)
                x = x * (weight + 1 if self.unit_offset else weight)
            if self.bias is not None:
                x = x + self.bias.to(x.dtype)
        return x if self.factor == 1.0 else x * self.factor


@dataclass(frozen=True)
class Head:
    """The unembedding and what the model does to its logits."""

    weight: Tensor  #: [vocab, d_model]; its dtype is the one products are computed in
    bias: Tensor | None = None  #: [vocab]
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def transform(self, z: Tensor) -> Tensor:
        """g: what the model does to W x + b."""
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    def without_numbers(self, vocab: int) -> Head:
        """One of that many tokens, of the same dtype and on the same device, which takes no memory."""
        weight = self.weight.new_empty(()).expand(vocab, self.weight.shape[1])
        return replace(self, weight=weight, bias=None if self.bias is None else weight[:, 0])


@dataclass(frozen=True)
class Shard:
    """A rank's part of the vocabulary."""

    head: Head  #: of its own tokens; there may be none
    first: int  #: the id of the first of them
    vocab: int  #: tokens of all ranks
    largest: int  #: tokens of the rank that has most

    @property
    def whole(self) -> Head:
        """A head of the whole vocabulary's shape, dtype and device, without its numbers."""
        return self.head.without_numbers(self.vocab)


@dataclass(frozen=True)
class Readout:
    """How hidden states become logits: a translator for each of the layers, then one norm and one head."""

    translators: tuple[Translator | None, ...]  #: None reads the residual stream as it is
    norm: Norm
    head: Head

    @classmethod
    def of(cls, lens: AffineLens, layers: Iterable[int], head: Head | None = None) -> Readout:
        """That of the lens's ``layers``; ``head`` stands in for the lens's own."""
        return cls(tuple(map(lens.translator, layers)), lens.unembed.norm, head or lens.unembed.head)

    @classmethod
    def of_output(cls, head: Head) -> Readout:
        """Of the model's own output: what the head receives, as it is."""
        return cls((None,), Norm("identity"), head)

    @property
    def width(self) -> int:
        """Numbers in a hidden state."""
        return self.norm.hidden_width(self.head)


class ModelEnd(Protocol):
    """What is left of a model behind its last block."""

    @property
    def norm(self) -> Norm: ...

    @property
    def head(self) -> Head: ...


class DecodableLens(Protocol):
    """A lens as far as decoding knows it: what it does to a hidden state, and a model's end."""

    @property
    def unembed(self) -> ModelEnd: ...

    def transform_hidden(self, h: Tensor, idx: int) -> Tensor: ...


class AffineLens(DecodableLens, Protocol):
    """One that says by which affine map it does it."""

    def translator(self, idx: int) -> Translator | None: ...


@dataclass(frozen=True)
class Query:
    """The statistics wanted of every layer and position. Checked before it reaches an engine."""

    stats: frozenset[str]  #: names out of STATISTICS
    targets: Tensor | None = None  #: int64 [positions], ids or NO_TARGET
    reference: Tensor | None = None  #: [positions, d_model], what the head receives at the model's own output
    watch: Tensor | None = None  #: int64 [n_watch]
    top_k: int = 0

    def at(self, positions: slice) -> Query:
        """The same question about some of the positions."""
        return replace(
            self,
            targets=None if self.targets is None else self.targets[positions],
            reference=None if self.reference is None else self.reference[positions],
        )

    def on(self, device: torch.device) -> Query:
        """The same question, its tensors on ``device``."""
        tensors: dict[str, Any] = {n: value.to(device) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Tiling:
    """How an engine cuts its work, so that scratch stays within the budget."""

    layers: int  #: layers of a chunk of rows, which go through the vocabulary together
    positions: int  #: positions of a chunk of rows
    tile: int  #: tokens of a vocabulary tile whose logits exist in memory at once
    scratch: int  #: bytes at most, beside inputs and results
    all_logits: int = 0  #: rows, if all are so few that scratch has room for all their logits, should they be needed


class BudgetError(ValueError):
    """A memory budget that cannot work; ``smallest`` is one that can."""

    def __init__(self, memory_budget: int, smallest: int) -> None:
        super().__init__(f"memory_budget: got {memory_budget} bytes; the smallest that works here is {smallest}")
        self.memory_budget, self.smallest = memory_budget, smallest

    def __reduce__(self) -> tuple:
        return BudgetError, (self.memory_budget, self.smallest)  # what Exception gives is the message
