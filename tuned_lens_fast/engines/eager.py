"""The eager engine: vocabulary tiles in plain PyTorch. It defines what the other engines compute.

Hidden states become x = norm(h + A h + c) for a chunk of rows (layers x positions); then the vocabulary is
walked tile by tile, and of each tile of logits only a :class:`~tuned_lens_fast.engines.state.State` stays.
Divergences need the model's own output as well: KL(reference || lens) a normaliser and one vector a position,
the others a second walk over both tiles side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import NO_TARGET, BudgetError, Head, Norm, Query, Tiling, Translator
from tuned_lens_fast.engines.state import GROUP, State, split_keys
from tuned_lens_fast.engines.tiling import empty_answer, even, slices
from tuned_lens_fast.progress import report

#: The narrowest tile worth a matmul. Below 64 columns, BLAS libraries take other paths with other roundings.
MIN_TILE = 256
#: The largest useful rows and tile. On a CPU a tile of logits should stay in cache.
CPU_CHUNK = (512, 2048)
GPU_CHUNK = (2048, 4096)
#: Stands for the logarithm of 0, so that its product with a probability of 0 is 0 and not NaN.
LOG_FLOOR = -1e30


@dataclass(frozen=True)
class Reference:
    """The model's own output at a chunk of positions."""

    x: Tensor  #: [positions, d_model], what the head receives
    m: Tensor  #: fp32 [positions], the largest logit
    log_s: Tensor  #: fp32 [positions], lse - m
    u: Tensor | None  #: [positions, d_model], W^T softmax(z), the head's scale included


def two_tile_stats(query: Query, head: Head) -> frozenset[str]:
    """The divergences that need both logits side by side; kl does only where z is not linear in x."""
    return query.divergences if head.softcap is not None else query.divergences - {"kl"}


def scratch_bytes(rows: int, tile: int, d_model: int, head: Head, query: Query, wide: int) -> int:
    """Upper bound on scratch beside inputs and results; ``wide``: bytes of an element of x."""
    logits = 3 if head.softcap is None else 5
    if two_tile_stats(query, head):
        logits += 7
    candidates = min(tile, (query.top_k + 1) * GROUP) + 2 * query.top_k if query.top_k else 0
    watched = 0 if query.watch is None else len(query.watch)
    vectors = 7 + 3 * bool(query.divergences)  # h, h A^T, x before, in and after the norm; reference, u
    return (
        rows * tile * 4 * logits
        + rows * (candidates + (tile // GROUP if query.top_k else 0)) * 8 * 5
        + rows * d_model * wide * vectors
        + tile * (d_model * wide * 2 + 64)
        + rows * (256 + watched * 4 * 3)
    )


def plan(
    layers: int,
    positions: int,
    d_model: int,
    head: Head,
    query: Query,
    wide: int,
    memory_budget: int,
    of_matmul: Callable[[int, int], int] = lambda rows, tile: 0,
) -> Tiling:
    """Rows and tokens of a chunk: the largest useful ones, halved in turn until they fit the budget.

    ``of_matmul``: bytes that a product of so many rows and tokens needs beside its operands and its result.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that works.
    """
    best_rows, best_tile = CPU_CHUNK if head.weight.device.type == "cpu" else GPU_CHUNK
    smallest = min(MIN_TILE, head.vocab)
    tile = min(best_tile, head.vocab)
    rows = min(best_rows, max(1, layers * positions))

    def needed(rows: int, tile: int) -> int:
        return scratch_bytes(rows, tile, d_model, head, query, wide) + of_matmul(rows, tile)

    while needed(rows, tile) > memory_budget and (rows > 1 or tile > smallest):
        if tile > smallest and (tile >= rows or rows == 1):
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


class EagerEngine:
    """Plain PyTorch, on any device and in any floating dtype."""

    name = "eager"

    def unavailable(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        return None

    def matmul(self, head: Head, hidden: torch.dtype) -> Matmul:
        """What multiplies hidden states of dtype ``hidden`` by tiles of the head."""
        return Matmul(head, hidden)

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
        """See :class:`~tuned_lens_fast.engines.interface.Engine`."""
        matmul = self.matmul(head, hidden)
        width = norm.hidden_width(head)
        return plan(layers, positions, width, head, query, matmul.wide, memory_budget, matmul.scratch)

    @torch.no_grad()
    def decode(
        self,
        hidden: Sequence[Tensor],
        translators: Sequence[Translator | None],
        norm: Norm,
        head: Head,
        query: Query,
        memory_budget: int,
    ) -> dict[str, Tensor]:
        """See :class:`~tuned_lens_fast.engines.interface.Engine`."""
        layers, positions = len(hidden), hidden[0].shape[0] if hidden else 0
        out = empty_answer(layers, positions, query, head.weight.device)
        if not layers or not positions:
            return out
        matmul = self.matmul(head, hidden[0].dtype)
        tiling = self.plan(layers, positions, hidden[0].dtype, translators, norm, head, query, memory_budget)
        for p in slices(positions, tiling.positions):
            reference = None
            if query.divergences:
                assert query.reference is not None
                reference = self._reference(query.reference[p], matmul, tiling.tile, "kl" in query.stats)
            for group in slices(layers, tiling.layers):
                rows = [
                    head_input(hidden[i][p], translators[i], norm, matmul.residual, tiling.tile)
                    for i in range(group.start, group.stop)
                ]
                x = matmul.round(torch.cat(rows) if len(rows) > 1 else rows[0])
                del rows
                for name, value in self._rows(x, matmul, query, p, reference, tiling.tile).items():
                    out[name][group, p] = value.unflatten(0, (group.stop - group.start, p.stop - p.start))
                report(x.shape[0])
        return out

    def _reference(self, reference: Tensor, matmul: Matmul, width: int, needs_u: bool) -> Reference:
        """Walk the model's own logits once: softmax's normaliser and, for KL by the identity, u."""
        head = matmul.head
        x = matmul.round(reference.to(matmul.residual))
        needs_u = needs_u and head.softcap is None
        state = self._walk(x, matmul, width, weighted=needs_u)
        u = None if state.u is None else state.u / state.s.unsqueeze(1) * head.scale
        return Reference(x, state.m, state.s.log(), u)

    def _rows(
        self,
        x: Tensor,
        matmul: Matmul,
        query: Query,
        p: slice,
        reference: Reference | None,
        width: int,
    ) -> dict[str, Tensor]:
        """Every statistic of x ``[layers * positions, d_model]``, named as results are, one row each."""
        head, stats = matmul.head, query.stats
        at_once = p.stop - p.start
        targets = threshold = None
        if query.targets is not None and stats & {"log_prob", "rank"}:
            targets = query.targets[p].repeat(x.shape[0] // at_once)
            if "rank" in stats and width < head.vocab:
                threshold = matmul.targets(x, query.targets[p], matmul.target_columns(at_once, width))
        state = self._walk(
            x,
            matmul,
            width,
            entropy="entropy" in stats,
            targets=targets,
            rank="rank" in stats,
            threshold=threshold,
            top_k=query.top_k,
        )
        log_s = state.s.log()
        void = ~(state.s > 0)
        if threshold is not None and matmul.can_look_back():
            assert state.target is not None
            if not bool(((threshold == state.target) | (targets == NO_TARGET) | void).all()):
                Matmul.narrow_differs = True
                again = self._walk(x, matmul, width, targets=targets, rank=True, threshold=state.target)
                state = replace(state, r=again.r)
        found = {"lse": state.m + log_s}
        if "entropy" in stats:
            assert state.t is not None
            found["entropy"] = log_s - state.t / state.s
        if "max_prob" in stats:
            found["max_prob"] = state.s.reciprocal()
        if "log_prob" in stats:
            assert state.target is not None
            assert targets is not None
            found["log_prob"] = (state.target - state.m - log_s).masked_fill(targets == NO_TARGET, math.nan)
        if reference is not None:
            found |= self._divergences(x, matmul, query, state.m, log_s, reference, width)
        if query.watch is not None:
            z = torch.cat([matmul(x, ids, width) for ids in query.watch.split(width)], 1)
            found["watch_log_probs"] = z.sub_(state.m.unsqueeze(1)).sub_(log_s.unsqueeze(1))
        if state.top is not None:
            z, found["top_ids"] = split_keys(state.top)
            found["top_log_probs"] = z.sub_(state.m.unsqueeze(1)).sub_(log_s.unsqueeze(1))
        if "rank" in stats:
            assert state.r is not None
            assert targets is not None
            found["rank"] = (state.r + 1).masked_fill(targets == NO_TARGET, 0)
        nothing = {"rank": 0, "top_ids": -1}
        return {
            name: value.masked_fill(void if value.ndim == 1 else void.unsqueeze(1), nothing.get(name, math.nan))
            for name, value in found.items()
        }

    def _walk(
        self,
        x: Tensor,
        matmul: Matmul,
        width: int,
        *,
        entropy: bool = False,
        targets: Tensor | None = None,
        rank: bool = False,
        threshold: Tensor | None = None,
        top_k: int = 0,
        weighted: bool = False,
    ) -> State:
        """The state of every row of x ``[rows, d_model]`` after the whole vocabulary, ``width`` tokens at a time.

        What is wanted of it: see :meth:`State.of_tile`; ``weighted``: whether u is.
        """
        state = None
        for tile in matmul.tiles(width):
            part = State.of_tile(
                matmul(x, tile, width),
                tile.start,
                entropy=entropy,
                targets=targets,
                rank=rank,
                threshold=threshold,
                top_k=top_k,
                weight=matmul.weight(tile).float() if weighted else None,
            )
            state = part if state is None else State.merge(state, part)
        assert state is not None
        return state

    def _divergences(
        self,
        x: Tensor,
        matmul: Matmul,
        query: Query,
        m: Tensor,
        log_s: Tensor,
        reference: Reference,
        width: int,
    ) -> dict[str, Tensor]:
        """Those of ``query``, clamped at 0, of rows x whose normaliser is m + log_s."""
        at_once = reference.x.shape[0]
        by_position = (x.shape[0] // at_once, at_once)
        m, log_s = m.unflatten(0, by_position), log_s.unflatten(0, by_position)
        found: dict[str, Tensor] = {}
        if reference.u is not None:
            # With z = W x + b, p = softmax(z_T), u = W^T p, the sum of p (z_T - z) is (x_T - x).u: b cancels.
            # The maxima are subtracted first, because near 1,000 an fp32 lse is only good to 6e-5.
            along = ((x.unflatten(0, by_position).to(m.dtype) - reference.x) * reference.u).sum(-1)
            found["kl"] = (m - reference.m) - along + (log_s - reference.log_s)
        wanted = two_tile_stats(query, matmul.head)
        if wanted:
            found |= self._walk_both(x, matmul, width, wanted, m, log_s, reference)
        return {name: value.clamp(min=0).flatten() for name, value in found.items()}

    def _walk_both(
        self,
        x: Tensor,
        matmul: Matmul,
        width: int,
        wanted: frozenset[str],
        m: Tensor,
        log_s: Tensor,
        reference: Reference,
    ) -> dict[str, Tensor]:
        """Divergences ``[layers, positions]`` from both tiles of logits side by side, before they are clamped.

        m and log_s, of rows x, are ``[layers, positions]``.
        """
        found: dict[str, Tensor] = {}
        for tile in matmul.tiles(width):
            log_p = matmul(reference.x, tile, width)
            log_p.sub_(reference.m.unsqueeze(-1)).sub_(reference.log_s.unsqueeze(-1))
            log_q = matmul(x, tile, width).unflatten(0, m.shape)
            log_q.sub_(m.unsqueeze(-1)).sub_(log_s.unsqueeze(-1))
            for name, part in _tile_divergences(log_p, log_q, wanted).items():
                found[name] = found[name] + part if name in found else part
        return found


class Matmul:
    """Logits of vocabulary tiles: operands in the head's dtype, accumulated and returned in fp32."""

    #: Set once a product with the targets' rows of W has rounded unlike a tile's, in any decode.
    narrow_differs = False

    def __init__(self, head: Head, hidden: torch.dtype) -> None:
        self.head = head
        wide = torch.promote_types(torch.float32, head.weight.dtype)
        #: Where PyTorch multiplies 16-bit numbers into fp32, they stay so; elsewhere both are widened.
        self.narrow = head.weight.is_cuda and head.weight.dtype in (torch.bfloat16, torch.float16)
        self.operand = head.weight.dtype if self.narrow else wide
        self.residual = torch.promote_types(torch.float32, hidden)
        self.wide = max(wide.itemsize, self.residual.itemsize)

    def round(self, x: Tensor) -> Tensor:
        """x in the head's precision, held in the dtype of the products."""
        return x.to(self.head.weight.dtype).to(self.operand)

    def weight(self, tokens: slice | Tensor) -> Tensor:
        """Their rows of W, in the dtype of the products."""
        return self.head.weight[tokens].to(self.operand)

    def tiles(self, width: int) -> Iterator[slice]:
        return slices(self.head.vocab, width)

    def __call__(self, x: Tensor, tokens: slice | Tensor, width: int) -> Tensor:
        """fp32 logits of a tile, or of the tokens with the ids given; [rows, tokens].

        The last tile's product is as wide as the others, for the same shapes give the same rounding; the
        columns it shares with the tile before are cut off.
        """
        skip = 0
        if isinstance(tokens, slice):
            skip = max(0, tokens.start - max(0, tokens.stop - width))
            tokens = slice(tokens.start - skip, tokens.stop)
        weight = self.weight(tokens)
        z = self.multiply(x, weight)
        if self.head.bias is not None:
            z += self.head.bias[tokens].float()
        return self.head.transform(z)[:, skip:]

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """fp32 x W^T of rows of W."""
        if self.narrow:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return torch.mm(x, weight.t()).float()

    def scratch(self, rows: int, tile: int) -> int:
        """Bytes that :meth:`multiply` needs beside its operands and its result."""
        return 0

    def can_look_back(self) -> bool:
        """Whether what a decode does next may depend on what it has found: not if it is compiled, or captured."""
        return self.head.weight.device.type == "cpu" and not torch.compiler.is_compiling()

    def target_columns(self, targets: int, width: int) -> int:
        """Columns for the product of so many targets, ``width`` being a tile's.

        A tile's own width is sure to be multiplied like a tile. Fewer are cheaper, and whether they were is seen when
        the tiles have been walked.
        """
        if Matmul.narrow_differs or not self.can_look_back():
            return width
        return min(width, max(MIN_TILE, targets))

    def targets(self, x: Tensor, targets: Tensor, width: int) -> Tensor:
        """Every row's target logit by a tile's own arithmetic: the diagonal of a product with the targets' rows of W.

        Another way of summing the same product may rank a token behind its equals. x ``[layers * positions,
        d_model]``, targets int64 ``[positions]``, no more than ``width`` of them; fp32 ``[layers * positions]``.
        """
        at_once = targets.shape[0]
        ids = torch.nn.functional.pad(targets.clamp(min=0), (0, width - at_once))
        z = self(x, ids, width)[:, :at_once].unflatten(0, (-1, at_once))
        return z.diagonal(dim1=1, dim2=2).flatten()


def head_input(hidden: Tensor, translator: Translator | None, norm: Norm, dtype: torch.dtype, block: int) -> Tensor:
    """norm(h + A h + c) of hidden [rows, d_model], in ``dtype`` throughout, ``block`` rows of A at a time."""
    residual = hidden.to(dtype)
    if translator is not None:
        parts = [residual @ part.to(dtype).t() for part in translator.weight.split(block)]
        translated = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        if translator.bias is not None:
            translated += translator.bias.to(dtype)
        residual = translated.add_(residual)
    return norm(residual)


def _tile_divergences(log_p: Tensor, log_q: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """One tile's share of the divergences between p (the model) and q (the lens), summed over its tokens.

    log_p [positions, width], log_q [layers, positions, width]; both are overwritten.
    """
    # A token of probability 0 contributes nothing; 0 * (-inf) would.
    log_p.clamp_(min=LOG_FLOOR)
    log_q.clamp_(min=LOG_FLOOR)
    p, q = log_p.exp(), log_q.exp()
    scratch = torch.empty_like(log_q)
    found = {}
    if "kl" in wanted:
        found["kl"] = torch.sub(log_p, log_q, out=scratch).mul_(p).sum(-1)
    if "reverse_kl" in wanted:
        found["reverse_kl"] = torch.sub(log_q, log_p, out=scratch).mul_(q).sum(-1)
    if "js" in wanted:
        log_mean = torch.add(p, q, out=scratch).div_(2).log_().clamp_(min=LOG_FLOOR)
        of_q = log_q.sub_(log_mean).mul_(q).sum(-1)
        of_p = torch.sub(log_p, log_mean, out=scratch).mul_(p).sum(-1)
        found["js"] = (of_p + of_q) / 2
    if "tv" in wanted:
        found["tv"] = torch.sub(p, q, out=scratch).abs_().sum(-1) / 2
    return found
