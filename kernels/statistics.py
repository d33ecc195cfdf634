"""The vocabulary pass: running statistics of z = g(x W^T + b) without z ever leaving the chip.

A program owns a block of rows and walks a slice of the vocabulary tile by tile. A tile of logits lives in registers
for as long as its statistics take, and what the program writes in the end is one running state a row and slice.

How a tile is cut out of the vocabulary. The top k wants groups of columns that do not hold neighbouring token ids
(the digits are neighbours, and likely together). So the vocabulary is seen as ``[MEMBERS, groups]``, token =
member * groups + group, and a tile holds 8 groups with all their members: column = member * 8 + group. In the
accumulator's layout every thread then owns whole groups, and keeps a running state for each of its 8 group columns:
no value crosses a thread before the end of the slice.

The groups of ``Tile.merged`` tiles in a row are one group to the top k, which then has fewer to search: a place in it
is tile within the slot * MEMBERS + member.

The tokens that do not fill a tile (up to 7 groups, and up to MEMBERS - 1 tokens after the last group) are a second,
small launch with masks, so that the large one has none.

Tried on an H100 and lost (d_model 4,096, all statistics, time over the bare product): two programs of 128x128 on a
processor 1.40, tiles through plain pointers 1.26, a depth of 128 in two stages 1.58, loops that are not flattened
1.09 against 1.08. Automatic warp specialisation (Triton 3.6) does not compile this loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tuned_lens_fast.kernels.launch import Tile, processors, row_band, vocabulary_splits
from tuned_lens_fast.kernels.logits import EMPTY, LN2, LOG2E, MASKED, transform

#: Arguments that change from launch to launch: one compiled kernel serves them all.
_SIZES = [
    "R", "V", "groups", "first_tile", "stop_tile", "tiles_per_split", "row_blocks", "splits", "first_split", "slots8",
]  # fmt: skip


@triton.jit
def _best_two(a1, a2, b1, b2):
    return tl.maximum(a1, b1), tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2))


@triton.jit
def _as_it_is(value, like):
    return value


@triton.jit
def tile_statistics(
    acc, m, s, t, above, best, first, second, target_logit, bias, token, valid, member, part, slot, keys, rows,
    row_mask, group, slots, scale, softcap, key_mask,
    BM: tl.constexpr, BN: tl.constexpr, MEMBERS: tl.constexpr, MERGED: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
    ENTROPY: tl.constexpr, RANK: tl.constexpr, TOP: tl.constexpr, LAID_OUT_AS: tl.constexpr,
):  # fmt: skip
    """The rows' running state after one more tile, acc ``[BM, BN]``.

    m, s, t, above, best, first, second are ``[BM, 8]``, token, valid and member ``[BN]``, group ``[8]``. Where the
    compiler is not the one to choose layouts (overlapped.py), LAID_OUT_AS(value, like) gives ``value`` that of
    ``like``.
    """
    if BIAS:
        acc += tl.load(bias + token, mask=valid, other=0.0).to(tl.float32)[None, :]
    acc = transform(acc, scale, softcap, SCALE, SOFTCAP)
    if BIAS:
        acc = tl.maximum(acc, MASKED, propagate_nan=tl.PropagateNan.ALL)
    if MASK:
        acc = tl.where(valid[None, :], acc, MASKED)
    z = acc.reshape(BM, MEMBERS, 8)
    largest = tl.max(z, 1)
    if TOP:
        key = ((acc.to(tl.int32, bitcast=True) & key_mask) | member[None, :]).to(tl.float32, bitcast=True)
        low, high = tl.split(key.reshape(BM, MEMBERS // 2, 2, 8).permute(0, 1, 3, 2))
        tile_first, tile_second = tl.reduce((tl.maximum(low, high), tl.minimum(low, high)), 1, _best_two)
        tile_first, tile_second = LAID_OUT_AS(tile_first, largest), LAID_OUT_AS(tile_second, largest)
        if MERGED == 1:
            best, first, second = largest, tile_first, tile_second
        else:
            # What the tiles before it in the same slot had; the slot is written anew with every tile, and stays in L2.
            tile_first = (tile_first.to(tl.int32, bitcast=True) | part * MEMBERS).to(tl.float32, bitcast=True)
            tile_second = (tile_second.to(tl.int32, bitcast=True) | part * MEMBERS).to(tl.float32, bitcast=True)
            best = tl.maximum(tl.where(part == 0, MASKED, best), largest)
            first = tl.where(part == 0, MASKED, first)
            second = tl.where(part == 0, MASKED, second)
            first, second = _best_two(first, second, tile_first, tile_second)
        place = first.to(tl.int32, bitcast=True) & (MEMBERS * MERGED - 1)
        packed = ((second.to(tl.int32, bitcast=True) & key_mask) | place).to(tl.float32, bitcast=True)
        at = keys + rows.to(tl.int64)[:, None] * (2 * slots) + slot * 8 + group[None, :]
        tl.store(at, best, mask=row_mask[:, None])
        tl.store(at + slots, packed, mask=row_mask[:, None])
    # The running maximum is kept to base 2: multiplied by LOG2E anew at each use, its rounding would not cancel.
    m_new = tl.maximum(m, largest * LOG2E)
    shift = m - m_new
    decay = tl.exp2(shift)
    y = tl.fma(z, LOG2E, (-m_new)[:, None, :].broadcast_to(BM, MEMBERS, 8))
    p = tl.exp2(y)
    if ENTROPY:
        t = decay * tl.fma(shift, s, t) + tl.sum(p * y, 1)
    s = tl.fma(s, decay, tl.sum(p, 1))
    if RANK:
        above += tl.sum(tl.where(z > target_logit[:, None, None], 1.0, 0.0), 1)
    return m_new, s, t, above, best, first, second


@triton.jit
def store_state(m, s, t, above, state, rows, row_mask, part, R, ENTROPY: tl.constexpr, RANK: tl.constexpr):
    """What a program knows of its rows in the end: one part of state ``[parts, 4, R]``, which _merge adds up."""
    m_row = tl.max(m, 1)
    shift = m - m_row[:, None]
    decay = tl.exp2(shift)
    at = state + part.to(tl.int64) * 4 * R + rows
    tl.store(at, m_row, mask=row_mask)
    tl.store(at + R, tl.sum(s * decay, 1), mask=row_mask)
    if ENTROPY:
        tl.store(at + 2 * R, tl.sum(decay * tl.fma(shift, s, t), 1), mask=row_mask)
    if RANK:
        tl.store(at + 3 * R, tl.sum(above, 1), mask=row_mask)


@triton.jit
def program_of(pid, row_blocks, splits, BAND: tl.constexpr):
    """The block of rows and the slice of the vocabulary that are a program's.

    Programs that run together form a band of row blocks times a few slices, so that both operands stay in L2.
    """
    band = pid // (BAND * splits)
    band_rows = tl.minimum(row_blocks - band * BAND, BAND)
    within = pid - band * (BAND * splits)
    return band * BAND + within % band_rows, within // band_rows


@triton.jit(do_not_specialize=_SIZES)
def _statistics(
    x, w, bias, target_logits, state, keys,
    R, V, groups, first_tile, stop_tile, tiles_per_split, row_blocks, splits, first_split, slots8,
    scale, softcap, key_mask, stride_x, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BAND: tl.constexpr, MERGED: tl.constexpr,
    TMA: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, RANK: tl.constexpr, TOP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    MEMBERS: tl.constexpr = BN // 8
    block, split = program_of(tl.program_id(0), row_blocks, splits, BAND)
    rows = block * BM + tl.arange(0, BM)
    row_mask = rows < R
    column = tl.arange(0, BN)
    target_logit = tl.zeros((BM,), tl.float32)
    if RANK:
        target_logit = tl.load(target_logits + rows, mask=row_mask, other=0.0)
    m = tl.full((BM, 8), EMPTY, tl.float32)
    s = tl.zeros((BM, 8), tl.float32)
    t = tl.zeros((BM, 8), tl.float32)
    above = tl.zeros((BM, 8), tl.float32)
    best = tl.full((BM, 8), MASKED, tl.float32)
    first = best
    second = best
    whole = groups // 8  # tiles of whole groups
    start = first_tile + split * tiles_per_split
    stop = tl.minimum(start + tiles_per_split, stop_tile)

    for tile in tl.range(start, stop, flatten=FLAT):
        token = tile * 8 + column % 8 + (column // 8) * groups
        valid = token < V
        if MASK:
            left_over = tile * 8 >= groups  # the tile of the tokens that fill no group
            valid = tl.where(left_over, MEMBERS * groups + column < V, tile * 8 + column % 8 < groups)
            token = tl.where(left_over, MEMBERS * groups + column, token)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, D, BK):
            if TMA:
                a = x.load([block * BM, k])
                b = w.load([0, tile * 8, k]).reshape(BN, BK)
            else:
                kk = k + tl.arange(0, BK)
                inside = kk[None, :] < D
                at = rows.to(tl.int64)[:, None] * stride_x + kk[None, :]
                a = tl.load(x + at, mask=row_mask[:, None] & inside, other=0.0)
                b_mask = inside
                if MASK:
                    b_mask = inside & valid[:, None]
                b = tl.load(w + token.to(tl.int64)[:, None] * stride_w + kk[None, :], mask=b_mask, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        part = 0
        slot = (whole + MERGED - 1) // MERGED + tile - whole
        if not MASK:
            part = tile % MERGED
            slot = tile // MERGED
        m, s, t, above, best, first, second = tile_statistics(
            acc, m, s, t, above, best, first, second, target_logit, bias, token, valid, column // 8, part, slot, keys,
            rows, row_mask, tl.arange(0, 8), slots8 * 8, scale, softcap, key_mask,
            BM, BN, MEMBERS, MERGED, BIAS, SCALE, SOFTCAP, MASK, ENTROPY, RANK, TOP, _as_it_is,
        )  # fmt: skip
    store_state(m, s, t, above, state, rows, row_mask, first_split + split, R, ENTROPY, RANK)


@triton.jit(do_not_specialize=["R", "splits"])
def _merge(
    state, target_logits, targets, normaliser, log_prob, rank, entropy, max_prob, R, splits,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr, TARGETS: tl.constexpr, RANK: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < R
    m = tl.full((BLOCK,), EMPTY, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    t = tl.zeros((BLOCK,), tl.float32)
    above = tl.zeros((BLOCK,), tl.float32)
    at = state + row
    for _ in range(splits):
        m_part = tl.load(at, mask=inside, other=EMPTY)
        s_part = tl.load(at + R, mask=inside, other=0.0)
        m_new = tl.maximum(m, m_part)
        shift = m - m_new
        shift_part = m_part - m_new
        decay = tl.exp2(shift)
        decay_part = tl.exp2(shift_part)
        if ENTROPY:
            t_part = tl.load(at + 2 * R, mask=inside, other=0.0)
            t = decay * tl.fma(shift, s, t) + decay_part * tl.fma(shift_part, s_part, t_part)
        if RANK:
            above += tl.load(at + 3 * R, mask=inside, other=0.0)
        s = s * decay + s_part * decay_part
        m = m_new
        at += R.to(tl.int64) * 4
    # NaN, too, where no logit is finite: nothing can be said of such a row.
    log_s = tl.where(s > 0.0, tl.log(s), float("nan"))
    if ENTROPY:  # never below 0, which rounding would allow a row that is certain
        tl.store(entropy + row, tl.maximum(log_s - t / s * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL), mask=inside)
    if MAX:
        tl.store(max_prob + row, tl.exp2(-log_s * LOG2E), mask=inside)
    natural = m * LN2
    log_s += tl.fma(-natural, LOG2E, m) * LN2  # what rounding took from the product
    m = natural
    tl.store(normaliser + row, m, mask=inside)
    tl.store(normaliser + R + row, log_s, mask=inside)
    if TARGETS:
        target = tl.load(targets + row, mask=inside, other=-1)
        # (z - m) - log s and not z - (m + log s): the sum would cost a certain token the digits of its log-prob
        own = tl.load(target_logits + row, mask=inside, other=0.0)
        own = tl.where(own <= MASKED, float("-inf"), own)
        tl.store(log_prob + row, tl.where(target >= 0, (own - m) - log_s, float("nan")), mask=inside)
        if RANK:
            known = (target >= 0) & (log_s == log_s)
            tl.store(rank + row, tl.where(known, above + 1.0, 0.0).to(tl.int64), mask=inside)


@dataclass(frozen=True)
class RowStatistics:
    """What the vocabulary pass knows of every row: fp32 ``[rows]``, nats; None where it was not asked for.

    The normaliser stays in its two parts, because near 1,000 an fp32 lse is only good to 6e-5.
    """

    normaliser: Tensor  #: [2, rows]: the largest logit m and log sum exp(z - m); their sum is lse
    log_prob: Tensor | None
    rank: Tensor | None  #: int64
    entropy: Tensor | None
    max_prob: Tensor | None
    keys: Tensor | None  #: fp32 [rows, 2, slots]: what top_k.py needs to know of every group


def key_slots(vocab: int, tile: Tile) -> int:
    """Groups that a row's keys hold, eight to a slot: those of whole tiles, the left-over groups, left-over tokens."""
    groups = vocab // tile.members
    return 8 * (triton.cdiv(groups // 8, tile.merged) + (groups % 8 > 0) + (vocab % tile.members > 0))


def vocabulary_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    tile: Tile,
    *,
    targets: Tensor | None = None,
    target_logits: Tensor | None = None,
    entropy: bool = False,
    rank: bool = False,
    max_prob: bool = False,
    keys: bool = False,
    precision: str = "ieee",
) -> RowStatistics:
    """Statistics of ``g(x W^T + bias)`` for every row.

    Args:
        x: ``[rows, d_model]`` and weight: ``[vocab, d_model]``, one dtype, adjacent features.
        bias: ``[vocab]`` or None. scale, softcap: see ``Head``.
        tile: from ``launch.statistics_tile``.
        targets: int64 ``[rows]``, negative for none; with them ``target_logits`` from gather.py.
        entropy, rank, max_prob, keys: what is wanted besides lse, and log_prob where there are targets.
    """
    rows, d_model = x.shape
    vocab = weight.shape[0]
    device = x.device
    members = tile.members
    groups = vocab // members
    tiles = groups // 8
    tail = (1 if groups % 8 else 0, 1 if vocab % members else 0)
    row_blocks = triton.cdiv(rows, tile.block_rows)
    band = row_band(d_model, weight.element_size(), tile)
    per_split = triton.cdiv(tiles, vocabulary_splits(row_blocks, tiles, processors(device), band)) if tiles else 0
    per_split = triton.cdiv(per_split, tile.merged) * tile.merged  # a slot belongs to one program
    splits = triton.cdiv(tiles, per_split) if tiles else 0
    parts = (1 + tile.overlapped) * splits
    slots = key_slots(vocab, tile)
    state = torch.empty(parts + 2, 4, rows, dtype=torch.float32, device=device)
    pairs = torch.empty(rows, 2, slots, dtype=torch.float32, device=device) if keys else None
    key_mask = ~(members * tile.merged - 1)

    def launch(masked: bool, first_tile: int, stop_tile: int, tiles_per_split: int, n: int, first_split: int) -> None:
        tma = tile.tma and not masked
        # Masks take registers; half the rows give them back.
        block_rows = tile.block_rows // 2 if masked and tile.block_rows == 128 else tile.block_rows
        row_blocks = triton.cdiv(rows, block_rows)
        a: Tensor | TensorDescriptor = x
        b: Tensor | TensorDescriptor = weight
        if tma:
            a = TensorDescriptor(x, [rows, d_model], [x.stride(0), 1], [block_rows, tile.block_depth])
            stride = weight.stride(0)
            b = TensorDescriptor(
                weight, [members, groups, d_model], [groups * stride, stride, 1], [members, 8, tile.block_depth]
            )
        _statistics[(row_blocks * n,)](
            a, b, bias, target_logits, state, pairs,
            rows, vocab, groups, first_tile, stop_tile, tiles_per_split, row_blocks, n, first_split, slots // 8,
            scale, softcap or 1.0, key_mask, x.stride(0), weight.stride(0),
            BM=block_rows, BN=tile.block_vocab, BK=tile.block_depth, D=d_model, BAND=band, MERGED=tile.merged,
            TMA=tma, FLAT=tile.flat and not masked, PRECISION=precision,
            BIAS=bias is not None, SCALE=scale != 1.0, SOFTCAP=softcap is not None,
            ENTROPY=entropy, RANK=rank, TOP=keys, MASK=masked,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip

    if splits and tile.overlapped:
        from tuned_lens_fast.kernels.overlapped import whole_tiles

        whole_tiles(
            x, weight, bias, scale, softcap, tile, target_logits if rank else None, state, pairs,
            tiles, per_split, row_blocks, splits, slots // 8, key_mask, band, entropy,
        )  # fmt: skip
    elif splits:
        launch(False, 0, tiles, per_split, splits, 0)
    # The tile of left-over groups has number `tiles`, that of left-over tokens `whole`, after it.
    whole = triton.cdiv(groups, 8)
    first_tail = tiles if tail[0] else whole
    if any(tail):
        launch(True, first_tail, whole + tail[1], 1, sum(tail), parts)

    def empty(asked: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(rows, dtype=dtype, device=device) if asked else None

    normaliser = torch.empty(2, rows, dtype=torch.float32, device=device)
    log_prob, ranks = empty(targets is not None), empty(rank, torch.int64)
    entropies, largest = empty(entropy), empty(max_prob)
    block = 128
    _merge[(triton.cdiv(rows, block),)](
        state, target_logits, targets, normaliser, log_prob, ranks, entropies, largest, rows, parts + sum(tail),
        BLOCK=block, ENTROPY=entropy, TARGETS=targets is not None, RANK=rank, MAX=max_prob,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return RowStatistics(normaliser, log_prob, ranks, entropies, largest, pairs)
