"""Where training starts: a regression of the model's last residual stream on each layer's hidden state.

It takes one pass over some text, and no step. Rows are weighted by one over the square of what the final norm divides
the last residual stream by, so that the squared error is one of what the head receives. How much the solution is held
back is chosen layer by layer: whichever reads rows that were not fitted with the least KL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import NormKind
from tuned_lens_fast.engines.tiling import slices
from tuned_lens_fast.nn import LogitLens, TunedLens
from tuned_lens_fast.training.states import Reader
from tuned_lens_fast.training.translators import Translators
from tuned_lens_fast.training.workers import Workers

#: What is added to the inputs' correlations, whose diagonal is 1.
_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: Rows that the choice is made on, once for every entry of the grid.
_CHOOSING = 256
#: Rows whose products are summed at once, at most, and copies of such rows in float64.
_BLOCK, _COPIES = 2048, 8


class Moments:
    """Weighted sums of a layer's hidden states and of what is missing from them, float64: 16 bytes x width² a layer."""

    def __init__(self, width: int, device: torch.device, products: bool) -> None:
        """``products``: False keeps the means only."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._total, self._x, self._y = zeros(), zeros(width), zeros(width)
        self._xx = zeros(width, width) if products else None
        self._xy = zeros(width, width) if products else None

    def add(self, hidden: Tensor, last: Tensor, weights: Tensor, block_rows: int = _BLOCK) -> None:
        """Rows ``[rows, width]`` of both, with ``weights`` ``[rows]``; those that are not finite are passed over."""
        for block in slices(len(hidden), block_rows):
            x, y, w = hidden[block].double(), last[block].double(), weights[block]
            sound = x.isfinite().all(1) & y.isfinite().all(1) & w.isfinite()
            if not sound.all():
                x, y, w = x[sound], y[sound], w[sound]
            y = y - x
            weighted = x * w[:, None]
            self._total += w.sum()
            self._x += weighted.sum(0)
            self._y += w @ y
            if self._xx is not None and self._xy is not None:
                self._xx += weighted.t() @ x
                self._xy += weighted.t() @ y

    def sums(self) -> list[Tensor]:
        """All of them, as they are."""
        return [s for s in (self._total, self._x, self._y, self._xx, self._xy) if s is not None]

    def solved(self, bias: bool) -> Solutions:
        """The regressions that these sums determine, with or without a bias. The sums are not kept."""
        # Where no row was sound, all is zero.
        total = self._total.clamp(min=torch.finfo(torch.float64).tiny)
        x, y = (s / total if bias else torch.zeros_like(s) for s in (self._x, self._y))
        if self._xx is None or self._xy is None:
            return Solutions(x, y)
        covariance, cross = self._xx / total - torch.outer(x, x), self._xy / total - torch.outer(x, y)
        self._xx = self._xy = None
        # A feature that never changes keeps a scale of 1, and a weight of 0.
        scale = torch.where(covariance.diagonal() > 0, covariance.diagonal(), 1).sqrt()
        values, vectors = torch.linalg.eigh(covariance / scale[:, None] / scale)
        return Solutions(x, y, scale, values.clamp(min=0), vectors, vectors.t() @ (cross / scale[:, None]))


@dataclass(frozen=True)
class Solutions:
    """The ridge regressions of a layer, for every strength: the correlations' eigenvectors, and the target along them.

    Without those there is no matrix, and the solution is the mean of what is missing.
    """

    x: Tensor  #: [width], mean of the hidden states
    y: Tensor  #: [width], mean of what is missing from them
    scale: Tensor | None = None  #: [width], standard deviations of the hidden states
    values: Tensor | None = None  #: [width]
    vectors: Tensor | None = None  #: [width, width]
    along: Tensor | None = None  #: [width, width]

    def at(self, held_back: float) -> tuple[Tensor, Tensor]:
        """Weight ``[width, width]`` and bias ``[width]`` with ``held_back`` added to the correlations, float64."""
        if self.scale is None or self.values is None or self.vectors is None or self.along is None:
            return torch.zeros_like(torch.outer(self.y, self.x)), self.y
        weight = (self.vectors @ (self.along / (self.values + held_back)[:, None])) / self.scale[:, None]
        return weight.t(), self.y - self.x @ weight

    def of_rank(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """What of ``rank`` gives outputs nearest to those of ``weight`` on the rows that were summed."""
        assert self.scale is not None
        assert self.values is not None
        assert self.vectors is not None
        outputs = (weight * self.scale) @ self.vectors * self.values.sqrt()
        _, directions = torch.linalg.eigh(outputs @ outputs.t())
        cut = directions[:, -rank:] @ (directions[:, -rank:].t() @ weight)
        return cut, self.y - cut @ self.x


@dataclass(frozen=True)
class Chosen:
    """What a layer started with."""

    held_back: float | None  #: the grid's entry; None where there is none
    kl: float  #: nats, on the rows that were chosen on


@torch.no_grad()
def start(
    reader: Reader,
    lens: TunedLens,
    translators: Translators,
    sequences: Tensor,
    *,
    bias_only: bool,
    rank: int | None,
    engine: str,
    workers: Workers,
) -> list[Chosen]:
    """Give every layer of the reader its translator by regression on ``sequences`` ``[n, length]``.

    A layer that no solution reads better than the logit lens starts as that.
    """
    head, norm = lens.unembed.head, lens.unembed.norm
    width, device = norm.hidden_width(head), head.weight.device
    moments = [Moments(width, device, products=not bias_only) for _ in reader.numbers]
    length = sequences.shape[1]
    kept = min(max(1, 4 * _CHOOSING // length), max(1, len(sequences) // 4))
    # One sequence alone is fitted and chosen on.
    fitted = sequences[: max(1, len(sequences) - kept)]
    for _, states in reader.read(workers.own(fitted)[1]):
        _, states = workers.own_rows(states)
        block = max(1, min(_BLOCK, reader.scratch // (8 * _COPIES * states.last.shape[1])))
        weights = torch.cat([row_weights(rows, norm.kind) for rows in states.last.split(block)])
        for layer, hidden in zip(moments, states.hidden, strict=True):
            layer.add(hidden, states.last, weights, block)
    for layer in moments:
        workers.add_up(layer.sums())
    some = slice(None, None, -(-kept * length // _CHOOSING))
    rows = [([h[some].clone() for h in s.hidden], s.reference[some].clone()) for _, s in reader.read(sequences[-kept:])]
    entering = [torch.cat(of_layer) for of_layer in zip(*(hidden for hidden, _ in rows), strict=True)]
    reference = torch.cat([of_output for _, of_output in rows])
    solutions = [layer.solved(bias=lens.config.bias) for layer in moments]
    del moments
    grid = (_GRID[0],) if bias_only else _GRID  # a mean is the same for all

    def rated(reads: TunedLens | LogitLens) -> Tensor:
        asked: dict[str, Any] = {"layers": reader.numbers, "reference": reference, "stats": ["kl"]}
        stats = reads.decode(entering, **asked, engine=engine, memory_budget=reader.scratch)
        assert stats.kl is not None
        # Rows that a layer cannot be read at say nothing about which start is best.
        return stats.kl.double().nanmean(1)

    kl = [rated(LogitLens(lens.unembed))]
    for held_back in grid:
        for number, solution in zip(reader.numbers, solutions, strict=True):
            translators.assign(number, *solution.at(held_back))
        kl.append(rated(lens))
    least, places = torch.stack(kl).nan_to_num(torch.inf).min(0)
    found = []
    for number, solution, place in zip(reader.numbers, solutions, places.tolist(), strict=True):
        if place == 0:
            translators.zero(number)
        else:
            weight, bias = solution.at(grid[place - 1])
            translators.assign(number, *((weight, bias) if rank is None else solution.of_rank(weight, rank)))
        found.append(None if place == 0 or bias_only else grid[place - 1])
    return [Chosen(held_back, nats) for held_back, nats in zip(found, least.tolist(), strict=True)]


def row_weights(last: Tensor, norm: NormKind) -> Tensor:
    """One over the square of what the final norm divides rows ``[rows, width]`` by, float64 ``[rows]``."""
    last = last.double()
    square = last.var(1, correction=0) if norm == "layer" else last.square().mean(1)
    return 1 / square.clamp(min=torch.finfo(torch.float32).tiny)
