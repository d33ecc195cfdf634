"""An engine over ranks of which each holds a part of the vocabulary: each walks its own, and their states are merged.

What travels is a few numbers a row, in one exchange after the walk, and before it the targets' logits, which ranks are
counted against. u = W^T softmax(z) stays where its rows of W are: of KL's identity only the ranks' shares of
(x - x_T).u do not. Everything is put together in the order of ranks, so that all have the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tuned_lens_fast.engines.decoding import Engine, Reference
from tuned_lens_fast.engines.eager import EagerEngine
from tuned_lens_fast.engines.interface import (
    NO_TARGET,
    BudgetError,
    Head,
    Norm,
    Query,
    Readout,
    Shard,
    Tiling,
    Translator,
)
from tuned_lens_fast.engines.matmul import Matmul, Packed
from tuned_lens_fast.engines.state import NO_KEY, State, Wanted, decay
from tuned_lens_fast.ranks import Ranks


class ShardedEngine(Engine):
    """Another engine's walk over each rank's tokens; the head that it is given is the rank's own."""

    def __init__(self, engine: EagerEngine, shard: Shard, ranks: Ranks) -> None:
        self.name = engine.name
        self._engine, self._shard, self._ranks = engine, shard, ranks

    def unavailable(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        return self._engine.unavailable(device, dtype)

    def plan(
        self,
        positions: int,
        hidden: torch.dtype,
        readout: Readout,
        query: Query,
        memory_budget: int,
        gradient: bool = False,
    ) -> Tiling:
        # All cut rows as the rank with most tokens wants, or their exchanges would not match.
        readout = replace(readout, head=readout.head.without_numbers(self._shard.largest))
        watched = 0 if query.watch is None else len(query.watch)
        exchanged = (3 * self._ranks.size + 4) * (32 + 8 * query.top_k + 4 * watched)  # bytes of a row, of all ranks
        try:
            tiling = self._engine.plan(positions, hidden, readout, query, memory_budget, gradient)
            rows = tiling.layers * tiling.positions
            if tiling.scratch + rows * exchanged > memory_budget:
                left = memory_budget - rows * exchanged
                tiling = self._engine.plan(positions, hidden, readout, query, max(1, left), gradient)
        except BudgetError as error:
            raise BudgetError(memory_budget, error.smallest + max(1, len(readout.translators)) * exchanged) from None
        rows = tiling.layers * tiling.positions
        return self._ranks.first(replace(tiling, scratch=tiling.scratch + rows * exchanged))

    def residual(self, hidden: Sequence[Tensor], translators: Sequence[Translator | None], tiling: Tiling) -> Tensor:
        return self._engine.residual(hidden, translators, tiling)

    def normed(self, residual: Tensor, norm: Norm, head: Head) -> Tensor:
        return self._engine.normed(residual, norm, head)

    def matmul(self, head: Head) -> Matmul:
        return self._engine.matmul(head)

    def vocabulary_pass(self, x: Tensor, head: Head, wanted: Wanted, tiling: Tiling) -> State:
        matmul, width = self.matmul(head), tiling.tile
        rows = matmul.pack(x)
        targets = own = threshold = None
        if wanted.targets is not None:
            layers = x.shape[0] // len(wanted.targets)
            targets = wanted.targets.repeat(layers)
            here = self._own(wanted.targets)
            own = here.repeat(layers)
            if "r" in wanted.running:
                threshold = self._target_logits(matmul, rows, here, layers, width)
        if head.vocab:
            state = self._engine.tile_passes(matmul, rows, wanted, own, threshold, width)
        else:
            state = _neutral(x, wanted)
        if state.top is not None:
            state = replace(state, top=torch.where(state.top == NO_KEY, NO_KEY, state.top - self._shard.first))
        u, m = state.u, state.m
        names = ["m", "s", *wanted.running.intersection({"t", "r"}), *["target"] * (targets is not None)]
        sent = {name: getattr(state, name) for name in sorted(names + ["top"] * (wanted.top_k > 0))}
        parts = [State(**dict(zip(sent, values, strict=True))) for values in self._ranks.gather([*sent.values()])]
        merged = functools.reduce(State.merge, parts).closed(targets)
        return merged if u is None else replace(merged, u=u * decay(m, merged.m).unsqueeze(1))

    def divergence_pass(
        self, x: Tensor, state: State, reference: Reference, head: Head, names: Collection[str], tiling: Tiling
    ) -> dict[str, Tensor]:
        if head.vocab:
            found = self._engine.divergence_pass(x, state, reference, head, names, tiling)
        else:
            found = {name: torch.zeros_like(state.m) for name in names}
        parts = self._ranks.gather([found[name] for name in names])
        return {
            name: functools.reduce(torch.add, sums) for name, sums in zip(names, zip(*parts, strict=True), strict=True)
        }

    def along(self, x: Tensor, reference: Reference) -> Tensor:
        (parts,) = zip(*self._ranks.gather([super().along(x, reference)]), strict=True)
        return functools.reduce(torch.add, parts)

    def _watched(self, x: Tensor, head: Head, watch: Tensor, state: State, tiling: Tiling) -> Tensor:
        own = self._own(watch)
        here = own != NO_TARGET
        found = state.m.new_zeros(x.shape[0], len(watch))
        if here.any():
            found[:, here] = super()._watched(x, head, own[here], state, tiling)
        (parts,) = zip(*self._ranks.gather([found]), strict=True)
        return functools.reduce(torch.add, parts)  # of which all but one are 0

    def _own(self, ids: Tensor) -> Tensor:
        """Ids as the numbers of this rank's tokens; NO_TARGET for those of others."""
        own = ids - self._shard.first
        return own.masked_fill((own < 0) | (own >= self._shard.head.vocab) | (ids == NO_TARGET), NO_TARGET)

    def _target_logits(self, matmul: Matmul, x: Packed, own: Tensor, layers: int, width: int) -> Tensor:
        """Every row's target logit, by the product of the tiles of the rank that has it; ``own``: ``[positions]``."""
        found = x.values.new_full((layers, len(own)), -torch.inf, dtype=torch.float32)
        here = (own != NO_TARGET).nonzero()[:, 0]
        # A product with the rows of as many targets as a tile has tokens, whatever position they belong to.
        for at in here.split(width) if len(here) else ():
            z = matmul.logits_of(x, own[at], width).unflatten(0, (layers, -1))
            found[:, at] = z[:, at, torch.arange(len(at), device=at.device)]
        (parts,) = zip(*self._ranks.gather([found.flatten()]), strict=True)
        return functools.reduce(torch.maximum, parts)


def _neutral(x: Tensor, wanted: Wanted) -> State:
    """The state of rows x after no tokens."""

    def sums(value: float) -> Tensor:
        return x.new_full((x.shape[0],), value, dtype=torch.float32)

    return State(
        m=sums(-torch.inf),
        s=sums(0.0),
        t=sums(0.0),
        r=x.new_zeros(x.shape[0], dtype=torch.int64) if "r" in wanted.running else None,
        target=None if wanted.targets is None else sums(-torch.inf),
        top=x.new_full((x.shape[0], wanted.top_k), NO_KEY, dtype=torch.int64) if wanted.top_k else None,
        u=torch.zeros_like(x, dtype=torch.float32) if wanted.u else None,
    )
