"""What an engine is asked and what it answers: the interface between lenses and engines.

A lens is taken apart into plain tensors, so that an engine needs to know nothing of models:

    x = factor * norm(h + A h + c)        Translator, Norm
    z = g(W x + b)                        Head;  g(z) = softcap * tanh(scale * z / softcap), or scale * z

and a :class:`Query` says which functions of z are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

#: Statistics a caller can name. ``lse`` is always computed; top k and watched tokens are asked for by number.
STATISTICS = ("log_prob", "rank", "entropy", "max_prob", "kl", "reverse_kl", "js", "tv")
#: Those that compare the lens with the model's own output.
DIVERGENCES = frozenset({"kl", "reverse_kl", "js", "tv"})
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

    kind: Literal["identity", "layer", "rms", "module"]
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


@dataclass(frozen=True)
class Query:
    """The statistics wanted of every layer and position. Checked before it reaches an engine."""

    stats: frozenset[str]  #: out of STATISTICS
    targets: Tensor | None = None  #: int64 [positions], ids or NO_TARGET
    reference: Tensor | None = None  #: [positions, d_model], what the head receives at the model's own output
    watch: Tensor | None = None  #: int64 [n_watch]
    top_k: int = 0

    @property
    def divergences(self) -> frozenset[str]:
        return self.stats & DIVERGENCES


@dataclass(frozen=True)
class Tiling:
    """How an engine cuts its work, so that scratch stays within the budget."""

    layers: int  #: layers of a chunk of rows, which go through the vocabulary together
    positions: int  #: positions of a chunk of rows
    tile: int  #: tokens of a vocabulary tile whose logits exist in memory at once
    scratch: int  #: bytes at most, beside inputs and results


class BudgetError(ValueError):
    """A memory budget that cannot work; ``smallest`` is one that can."""

    def __init__(self, memory_budget: int, smallest: int) -> None:
        super().__init__(f"memory_budget: got {memory_budget} bytes; the smallest that works here is {smallest}")
        self.smallest = smallest


class Engine(Protocol):
    """One way of computing the statistics."""

    name: str

    def unavailable(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        """None where the engine works (on ``device``, or at all; with a head of ``dtype``, or with some).

        Else why not, and what would change that.
        """
        ...

    def plan(
        self,
        layers: int,
        positions: int,
        hidden: torch.dtype,
        translators: Sequence[Translator | None],
        norm: Norm,
        head: Head,
        query: Query,
        memory_budget: int,
    ) -> Tiling:
        """How :meth:`decode` will cut hidden states of dtype ``hidden`` at so many layers and positions, at least 1.

        Of ``query`` only what is asked for counts, not the values of its tensors.

        Raises:
            BudgetError: the budget cannot work; it names the smallest that can.
        """
        ...

    def decode(
        self,
        hidden: Sequence[Tensor],
        translators: Sequence[Translator | None],
        norm: Norm,
        head: Head,
        query: Query,
        memory_budget: int,
    ) -> dict[str, Tensor]:
        """Statistics of L layers at P positions.

        Args:
            hidden: L tensors ``[positions, width]`` of one floating dtype on the head's device; views are fine.
            translators: one for every entry of ``hidden``; None reads the residual stream as it is.
            norm, head, query: see there.
            memory_budget: bytes of scratch beyond the inputs and the answer.

        Returns:
            ``lse`` fp32 ``[L, P]``; every name in ``query.stats`` as fp32 ``[L, P]`` (``rank``: int64);
            with ``top_k``: ``top_ids`` int64 and ``top_log_probs`` fp32 ``[L, P, k]``; with ``watch``:
            ``watch_log_probs`` fp32 ``[L, P, n_watch]``.

        Raises:
            BudgetError: see :meth:`plan`.
        """
        ...
