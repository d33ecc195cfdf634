"""The eager engine: vocabulary tiles in plain PyTorch, of which only a State stays. The others are held to it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tuned_lens_fast.engines.decoding import Engine, Reference
from tuned_lens_fast.engines.interface import BudgetError, Head, Norm, Query, Readout, Tiling, Translator
from tuned_lens_fast.engines.matmul import Matmul, Packed
from tuned_lens_fast.engines.state import GROUP, State, Wanted, decay
from tuned_lens_fast.engines.statistics import LOG_FLOOR, STATISTICS, by_two_passes, divergences
from tuned_lens_fast.engines.tiling import even

#: The narrowest tile worth a matmul. Below 64 columns, BLAS libraries take other paths with other roundings.
MIN_TILE = 256
#: Of a gradient, whose second product has a tile's tokens for its depth: fewer take longer than fewer rows.
GRADIENT_TILE = 512
#: The largest useful rows and tile. On a CPU a tile of logits should stay in cache.
CPU_CHUNK = (512, 2048)
GPU_CHUNK = (2048, 4096)


class EagerEngine(Engine):
    """Plain PyTorch, on any device and in any floating dtype."""

    name = "eager"

    def unavailable(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        return None

    def plan(
        self,
        positions: int,
        hidden: torch.dtype,
        readout: Readout,
        query: Query,
        memory_budget: int,
        gradient: bool = False,
    ) -> Tiling:
        matmul = self.matmul(readout.head)
        wide = max(torch.promote_types(torch.float32, dtype).itemsize for dtype in (hidden, readout.head.weight.dtype))
        layers = max(1, len(readout.translators))
        residual = torch.promote_types(torch.float32, hidden)
        cast = any(translator is not None and translator.weight.dtype != residual for translator in readout.translators)
        return plan(layers, positions, readout.width, matmul, query, wide, memory_budget, gradient, cast)

    def residual(self, hidden: Sequence[Tensor], translators: Sequence[Translator | None], tiling: Tiling) -> Tensor:
        rows = [translated(h, translator, tiling.tile) for h, translator in zip(hidden, translators, strict=True)]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def normed(self, residual: Tensor, norm: Norm, head: Head) -> Tensor:
        return norm(residual).to(head.weight.dtype)

    def vocabulary_pass(self, x: Tensor, head: Head, wanted: Wanted, tiling: Tiling) -> State:
        matmul, width = self.matmul(head), tiling.tile
        rows = matmul.pack(x)
        targets = threshold = None
        if wanted.targets is not None:
            targets = wanted.targets.repeat(x.shape[0] // len(wanted.targets))
            if "r" in wanted.running and (width < head.vocab or not matmul.shape_dependent):
                threshold = matmul.target_logits(rows, wanted.targets, width)
        return self.tile_passes(matmul, rows, wanted, targets, threshold, width).closed(targets)

    def tile_passes(
        self, matmul: Matmul, x: Packed, wanted: Wanted, targets: Tensor | None, threshold: Tensor | None, width: int
    ) -> State:
        """The state of every row after the whole vocabulary, ``width`` tokens at a time.

        targets: int64 ``[rows]``; threshold: fp32 ``[rows]``, see :meth:`State.of_tile`.
        """
        state = u = None
        room, scratch = matmul.room(x.rows, width), matmul.room(x.rows, width)
        for tile in matmul.tiles(width):
            z = matmul(x, tile, width, room)
            part = State.of_tile(
                z,
                tile.start,
                running=wanted.running,
                targets=targets,
                threshold=threshold,
                top_k=wanted.top_k,
                m=None if state is None or not wanted.u else state.m,
                scratch=scratch[:, : z.shape[1]],
            )
            if wanted.u:
                u = z.new_zeros(len(z), matmul.head.weight.shape[1]) if u is None else u
                if state is not None:
                    u.mul_(decay(state.m, part.m).unsqueeze(1))
                matmul.add_rows_of_weight(u, z, tile, wanted.u == "exact")
            state = part if state is None else State.merge(state, part)
        assert state is not None
        return state if u is None else replace(state, u=u)

    def divergence_pass(
        self, x: Tensor, state: State, reference: Reference, head: Head, names: Collection[str], tiling: Tiling
    ) -> dict[str, Tensor]:
        matmul, width = self.matmul(head), tiling.tile
        rows, own = matmul.pack(x), matmul.pack(reference.x)
        found = {name: torch.zeros_like(state.m) for name in names}
        rooms = [matmul.room(packed.rows, width) for packed in (own, rows)]
        for tile in matmul.tiles(width):
            log_p, log_q = (
                matmul(packed, tile, width, room)
                .sub_(of.m.unsqueeze(1))
                .sub_(of.log_s.unsqueeze(1))  # type: ignore[union-attr]
                .clamp_(min=LOG_FLOOR)  # a token of probability 0 contributes nothing; 0 * (-inf) would
                for packed, of, room in zip((own, rows), (reference.state, state), rooms, strict=True)
            )
            log_q = log_q.unflatten(0, (-1, len(log_p)))
            p, q = log_p.exp(), log_q.exp()
            for name, total in found.items():
                term = STATISTICS[name].term
                assert term is not None
                total += term(log_p, log_q, p, q).sum(-1).flatten()
        return found


def translated(hidden: Tensor, translator: Translator | None, block: int) -> Tensor:
    """h + A h + c of hidden ``[rows, width]`` in fp32, or float64 if it is of that; ``block`` rows of A at a time."""
    residual = hidden.to(torch.promote_types(torch.float32, hidden.dtype))
    if translator is None:
        return residual
    parts = [residual @ part.to(residual.dtype).t() for part in translator.weight.split(block)]
    change = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    if translator.bias is not None:
        change += translator.bias.to(residual.dtype)
    return change.add_(residual)


def scratch_bytes(
    rows: int, tile: int, d_model: int, head: Head, query: Query, wide: int, gradient: bool = False, cast: bool = True
) -> int:
    """Upper bound on scratch beside inputs and results.

    ``wide``: bytes of an element of x; ``cast``: translators have another dtype than what they are computed in.
    """
    logits = 3 if head.softcap is None else 5
    if by_two_passes(query, head) or (gradient and head.softcap is not None):
        logits += 7
    candidates = min(tile, (query.top_k + 1) * GROUP) + 2 * query.top_k if query.top_k else 0
    watched = 0 if query.watch is None else len(query.watch)
    vectors = 7 + 3 * bool(divergences(query))  # h, h A^T, x before, in and after the norm; reference, u
    if gradient:  # sum exp(z - m) W and a tile's, the residual, its gradient and what that is made of
        vectors += 7
    # Rows of W or A, for the dtype or the order that a product wants, and those of watched tokens and of targets.
    gathered = "rank" in query.stats or query.watch is not None
    plain = head.weight.dtype == torch.float32 and 1 in head.weight.stride() and not cast and not gathered
    copies = 0 if plain else 2
    return (
        rows * tile * 4 * logits
        + rows * (candidates + (tile // GROUP if query.top_k else 0)) * 8 * 5
        + rows * d_model * wide * vectors
        + tile * (d_model * wide * copies + 64)
        + rows * (256 + watched * 4 * 3)
    )


def plan(
    layers: int,
    positions: int,
    d_model: int,
    matmul: Matmul,
    query: Query,
    wide: int,
    memory_budget: int,
    gradient: bool = False,
    cast: bool = True,
) -> Tiling:
    """Rows and tokens of a chunk: the largest useful ones, halved in turn until they fit the budget.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that works.
    """
    head = matmul.head
    best_rows, best_tile = CPU_CHUNK if head.weight.device.type == "cpu" else GPU_CHUNK
    smallest = min(MIN_TILE, head.vocab)
    tile = min(best_tile, head.vocab)
    # Of a gradient half the products have a tile's tokens for their depth, and want more rows.
    rows = min(best_rows * (1 + gradient), max(1, layers * positions))

    def needed(rows: int, tile: int) -> int:
        sums = gradient or ("kl" in query.stats and "kl" not in by_two_passes(query, head))
        scratch = scratch_bytes(rows, tile, d_model, head, query, wide, gradient, cast)
        return scratch + matmul.scratch(rows, tile, query.top_k, sums)

    least = max(smallest, GRADIENT_TILE) if gradient else smallest
    while needed(rows, tile) > memory_budget and (rows > 1 or tile > smallest):
        if tile > smallest and ((tile >= rows and tile > least) or rows == 1):
            tile = max(smallest, tile // 2)
        else:
            rows = (rows + 1) // 2
    if needed(rows, tile) > memory_budget:
        raise BudgetError(memory_budget, needed(rows, tile))
    scratch = needed(rows, tile)
    tile = even(head.vocab, tile)
    # Every target of a chunk must fit into one tile of gathered rows of W, unless one tile is the vocabulary.
    at_once = even(positions, min(rows, tile) if tile < head.vocab else rows)
    return Tiling(even(layers, rows // at_once), at_once, tile, scratch)
