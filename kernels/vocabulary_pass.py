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

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tuned_lens_fast.engines.state import State
from tuned_lens_fast.kernels import cooperative, overlapped
from tuned_lens_fast.kernels.launch import Partition, Tile, head_arguments
from tuned_lens_fast.kernels.logits import EMPTY, LN2, LOG2E, MASKED
from tuned_lens_fast.kernels.running_state import add_tile, as_it_is, item_of, state_of, store_state

if TYPE_CHECKING:
    from tuned_lens_fast.engines.interface import Head

#: Arguments that change from launch to launch: one compiled kernel serves them all.
_SIZES = ["R", "V", "groups", "first_tile", "tiles", "row_blocks", "band", "splits", "last_splits", "slots8"]


@triton.jit(do_not_specialize=_SIZES)
def _vocabulary_pass(
    x,  # [R, D], or its descriptor
    w,  # [V, D], or that of [MEMBERS, groups, D]
    target_logits,  # fp32 [R]
    state,  # fp32, see running_state.py
    group_maxima,  # fp32 [R, 2, slots]
    R, V, groups, first_tile, tiles, row_blocks, band, splits, last_splits, slots8, place_mask, stride_x, stride_w,
    bias,  # [V]
    scale, softcap,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, MERGED: tl.constexpr,
    TMA: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr, TOP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One part of the state of a block of rows: a program walks its slice of the vocabulary tile by tile."""
    MEMBERS: tl.constexpr = BN // 8
    block, start, stop, split = item_of(tl.program_id(0), tiles, row_blocks, band, splits, last_splits, MERGED)
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
    largest = tl.full((BM, 8), MASKED, tl.float32)
    first = largest
    second = largest
    whole = groups // 8  # tiles of whole groups

    for tile in tl.range(first_tile + start, first_tile + stop, flatten=FLAT):
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
        m, s, t, above, largest, first, second = add_tile(
            acc, m, s, t, above, largest, first, second, target_logit, bias, token, valid, column // 8, part, slot,
            group_maxima, rows, row_mask, tl.arange(0, 8), slots8 * 8, scale, softcap, place_mask,
            BM, BN, MEMBERS, MERGED, BIAS, SCALE, SOFTCAP, MASK, ENTROPY, RANK, TOP, as_it_is,
        )  # fmt: skip
    store_state(
        m, s, t, above, state, block, rows, row_mask, split, R, row_blocks, band, splits, last_splits,
        BM, 1, ENTROPY, RANK,
    )  # fmt: skip


@triton.jit
def _merge_part(m, s, t, above, at, n_rows, there, ENTROPY: tl.constexpr, RANK: tl.constexpr):
    """The state of rows with one more part, of which m is at ``at``."""
    m_part = tl.load(at, mask=there, other=EMPTY)
    s_part = tl.load(at + n_rows, mask=there, other=0.0)
    m_new = tl.maximum(m, m_part)
    shift = m - m_new
    shift_part = m_part - m_new
    decay = tl.exp2(shift)
    decay_part = tl.exp2(shift_part)
    if ENTROPY:
        t_part = tl.load(at + 2 * n_rows, mask=there, other=0.0)
        t = decay * tl.fma(shift, s, t) + decay_part * tl.fma(shift_part, s_part, t_part)
    if RANK:
        above += tl.load(at + 3 * n_rows, mask=there, other=0.0)
    return m_new, s * decay + s_part * decay_part, t, above


@triton.jit(do_not_specialize=["R", "full_rows", "parts", "last_parts"])
def _merge(
    parts_of_rows,  # fp32, see running_state.py
    tail,  # fp32 [4, R]: one part more
    target_logits,  # fp32 [R]
    state,  # fp32 [5, R]: m, s, t, log s, the target's logit
    r,  # int64 [R]
    R, full_rows, parts, last_parts,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr, TARGETS: tl.constexpr, RANK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The closed state of rows, of the parts that slices of the vocabulary left; see engines/state.py."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < R
    m = tl.full((BLOCK,), EMPTY, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    t = tl.zeros((BLOCK,), tl.float32)
    above = tl.zeros((BLOCK,), tl.float32)
    first, n_rows = state_of(row >= full_rows, full_rows, R, parts)
    own_parts = tl.where(row >= full_rows, last_parts, parts)
    at = parts_of_rows + first + row
    for part in range(tl.max(own_parts, 0)):
        m, s, t, above = _merge_part(m, s, t, above, at, n_rows, inside & (part < own_parts), ENTROPY, RANK)
        at += n_rows.to(tl.int64) * 4
    if TAIL:
        m, s, t, above = _merge_part(m, s, t, above, tail + row, R, inside, ENTROPY, RANK)
    # Nothing can be said of a row without a finite logit.
    s = tl.where(s > 0.0, s, float("nan"))
    natural = m * LN2
    # Its rounding is made good in log s: all sums are relative to m to base 2.
    log_s = tl.log(s) + tl.fma(-natural, LOG2E, m) * LN2
    tl.store(state + row, natural, mask=inside)
    tl.store(state + R + row, s, mask=inside)
    if ENTROPY:
        tl.store(state + 2 * R + row, t * LN2, mask=inside)
    tl.store(state + 3 * R + row, log_s, mask=inside)
    if TARGETS:
        target = tl.load(target_logits + row, mask=inside, other=0.0)
        tl.store(state + 4 * R + row, tl.where(target <= MASKED, float("-inf"), target), mask=inside)
        if RANK:
            known = (target == target) & (s == s)
            tl.store(r + row, tl.where(known, above, -1.0).to(tl.int64), mask=inside)


def vocabulary_pass(
    x: Tensor,
    head: Head,
    tile: Tile,
    *,
    target_logits: Tensor | None = None,
    running: Collection[str] = (),
    group_maxima: bool = False,
) -> tuple[State, Tensor | None]:
    """The closed state of every row, its top k apart.

    Args:
        x: ``[rows, d_model]`` in the head's dtype, adjacent features, as the head's weight has them.
        tile: from ``launch.vocabulary_tile``.
        target_logits: fp32 ``[rows]`` from target_logits.py.
        running: see ``Wanted``; of "t" and "r".
        group_maxima: whether the second result is, fp32 ``[rows, 2, slots]``: what top_k.py needs to know of groups.
    """
    weight, device = head.weight, x.device
    rows, d_model = x.shape
    cut = Partition.of(rows, head, tile)
    partial = torch.empty(cut.state_bytes // 4, dtype=torch.float32, device=device)
    whole, tail = partial.split([4 * cut.states, partial.numel() - 4 * cut.states])
    maxima = torch.empty(rows, 2, cut.slots, dtype=torch.float32, device=device) if group_maxima else None
    sums = {"ENTROPY": "t" in running, "RANK": "r" in running}
    above = target_logits if sums["RANK"] else None
    asked = {**sums, "TOP": group_maxima}

    def launch(masked: bool, state: Tensor, block_rows: int, first_tile: int, items: int, *cut_in: int) -> None:
        tma = tile.tma and not masked
        a: Tensor | TensorDescriptor = x
        b: Tensor | TensorDescriptor = weight
        if tma:
            a = TensorDescriptor(x, [rows, d_model], [x.stride(0), 1], [block_rows, tile.block_depth])
            stride = weight.stride(0)
            shape = [tile.members, cut.groups, d_model]
            b = TensorDescriptor(weight, shape, [cut.groups * stride, stride, 1], [tile.members, 8, tile.block_depth])
        _vocabulary_pass[(items,)](
            a, b, above, state, maxima,
            rows, head.vocab, cut.groups, first_tile, *cut_in, cut.slots // 8, cut.place_mask, x.stride(0),
            weight.stride(0), **head_arguments(head),
            BM=block_rows, BN=tile.block_vocab, BK=tile.block_depth, D=d_model, MERGED=tile.merged,
            TMA=tma, FLAT=tile.flat and not masked, PRECISION=tile.precision, MASK=masked, **asked,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip

    if cut.tiles and (tile.overlapped or tile.cooperative):
        specialised = overlapped if tile.overlapped else cooperative
        specialised.whole_tiles(x, head, tile, cut, above, whole, maxima, asked)
    elif cut.tiles:
        launch(False, whole, tile.block_rows, 0, cut.items, *cut.arguments())
    if any(cut.tail):
        # Masks take registers; half the rows give them back.
        block_rows = tile.block_rows // 2 if tile.block_rows == 128 else tile.block_rows
        row_blocks = triton.cdiv(rows, block_rows)
        # The tile of left-over groups has number `tiles`, that of left-over tokens comes after all groups.
        first_tile = cut.tiles if cut.tail[0] else triton.cdiv(cut.groups, 8)
        launch(True, tail, block_rows, first_tile, row_blocks, sum(cut.tail), row_blocks, row_blocks, 1, 1)

    state = torch.empty(5, rows, dtype=torch.float32, device=device)
    r = torch.empty(rows, dtype=torch.int64, device=device) if sums["RANK"] else None
    block = 128
    _merge[(triton.cdiv(rows, block),)](
        whole, tail, target_logits, state, r,
        rows, cut.full_rows, cut.parts * cut.bands.splits, cut.parts * cut.bands.last_splits,
        BLOCK=block, TARGETS=target_logits is not None, TAIL=any(cut.tail), **sums,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    m, s, t, log_s, target = state
    return State(
        m, s, t if sums["ENTROPY"] else None, r, None if target_logits is None else target, log_s=log_s
    ), maxima
