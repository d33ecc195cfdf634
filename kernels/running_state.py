"""A block of rows' running state in registers, and what one more tile of logits does to it.

The state of engines/state.py, kept for each of 8 columns of groups: m to base 2, s and t relative to it, and how many
logits are above the target's. For the top k a row's groups leave their two largest logits in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tuned_lens_fast.kernels.logits import LOG2E, MASKED, finish_logits

#: Its interpreter has no instructions.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _best_two(a1, a2, b1, b2):
    """The two largest of a1 >= a2 and b1 >= b2."""
    return tl.maximum(a1, b1), tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2))


@triton.jit
def _two_maxima(a1, a2, b1, b2):
    return tl.maximum(a1, b1), tl.maximum(a2, b2)


@triton.jit
def steepness(target):
    """A power of two by which ``target`` stays finite, and logits that differ from it by 2^-100 are 1 apart from it."""
    return tl.where(tl.abs(target) < 2.0**27, 2.0**100, 2.0**20)


@triton.jit
def is_above(z, target, BM: tl.constexpr, MEMBERS: tl.constexpr):
    """1.0 where a logit of z ``[BM, MEMBERS, 8]`` is above its row's target, else 0.0.

    A comparison is work for the pipe that has most to do. (z - target) * 2^100, clamped to [0, 1] by the very
    instruction that computes it, is work for another; its product is exact, so that its sign is right.
    """
    if INTERPRETED:
        above = tl.where(z > target[:, None, None], 1.0, 0.0)
    else:
        steep = steepness(target)
        below = (target * -steep)[:, None, None].broadcast_to(BM, MEMBERS, 8)
        steep = steep[:, None, None].broadcast_to(BM, MEMBERS, 8)
        above = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [z, steep, below], tl.float32, True, 1
        )
    return above


@triton.jit
def as_it_is(value, like):
    """For kernels whose compiler chooses layouts."""
    return value


@triton.jit
def add_tile(
    acc,  # fp32 [BM, BN], sums of products
    m,  # fp32 [BM, 8], as s, t, above, largest, first and second
    s, t, above,
    largest,  # the largest logit of a slot so far
    first,  # it and the second largest, their places in the lowest bits
    second,
    target_logit,  # fp32 [BM]
    bias,  # [vocab]
    token,  # int [BN]
    valid,  # bool [BN]
    member,  # int [BN]
    part,  # the tile's number within its slot
    slot,
    group_maxima,  # fp32 [R, 2, slots]
    rows,  # int [BM]
    row_mask,  # bool [BM]
    group,  # int [8]
    slots, scale, softcap,
    place_mask,  # clears the bits that hold a place
    BM: tl.constexpr, BN: tl.constexpr, MEMBERS: tl.constexpr, MERGED: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr,
    TOP: tl.constexpr, LAID_OUT_AS: tl.constexpr,
):  # fmt: skip
    """The rows' running state after one more tile.

    Where the compiler is not the one to choose layouts (overlapped.py), LAID_OUT_AS(value, like) gives ``value`` that
    of ``like``.
    """
    acc = finish_logits(acc, bias, token, valid, scale, softcap, BIAS, SCALE, SOFTCAP, True)
    if MASK:
        acc = tl.where(valid[None, :], acc, MASKED)
    z = acc.reshape(BM, MEMBERS, 8)
    if TOP:
        # Of every two members the larger gets a place; which of the two it is, the maxima of even and odd members tell.
        even, odd = tl.split(acc.reshape(BM, MEMBERS // 2, 2, 8).permute(0, 1, 3, 2))
        of_even, of_odd = tl.reduce((even, odd), 1, _two_maxima)
        places = (acc.to(tl.int32, bitcast=True) & 0) | member[None, :]  # in the layout of acc
        place, _ = tl.split(places.reshape(BM, MEMBERS // 2, 2, 8).permute(0, 1, 3, 2))
        key = ((tl.maximum(even, odd).to(tl.int32, bitcast=True) & place_mask) | place).to(tl.float32, bitcast=True)
        tile_first, tile_second = tl.reduce((key, tl.minimum(even, odd)), 1, _best_two)
        of_even, of_odd = LAID_OUT_AS(of_even, m), LAID_OUT_AS(of_odd, m)
        tile_first, tile_second = LAID_OUT_AS(tile_first, m), LAID_OUT_AS(tile_second, m)
        tile_largest = tl.maximum(of_even, of_odd)
        is_odd = tl.where(of_odd > of_even, 1, 0)
        tile_first = (tile_first.to(tl.int32, bitcast=True) | is_odd).to(tl.float32, bitcast=True)
        if MERGED == 1:
            largest, first, second = tile_largest, tile_first, tile_second
        else:
            # What the tiles before it in the same slot had; the slot is written anew with every tile, and stays in L2.
            tile_first = (tile_first.to(tl.int32, bitcast=True) | part * MEMBERS).to(tl.float32, bitcast=True)
            largest = tl.maximum(tl.where(part == 0, MASKED, largest), tile_largest)
            first = tl.where(part == 0, MASKED, first)
            second = tl.where(part == 0, MASKED, second)
            first, second = _best_two(first, second, tile_first, tile_second)
        place = first.to(tl.int32, bitcast=True) & (MEMBERS * MERGED - 1)
        packed = ((second.to(tl.int32, bitcast=True) & place_mask) | place).to(tl.float32, bitcast=True)
        at = group_maxima + rows.to(tl.int64)[:, None] * (2 * slots) + slot * 8 + group[None, :]
        tl.store(at, largest, mask=row_mask[:, None])
        tl.store(at + slots, packed, mask=row_mask[:, None])
    else:
        tile_largest = tl.max(z, 1)
    # The running maximum is kept to base 2: multiplied by LOG2E anew at each use, its rounding would not cancel.
    m_new = tl.maximum(m, tile_largest * LOG2E)
    shift = m - m_new
    decay = tl.exp2(shift)
    y = tl.fma(z, LOG2E, (-m_new)[:, None, :].broadcast_to(BM, MEMBERS, 8))
    p = tl.exp2(y)
    if ENTROPY:
        t = decay * tl.fma(shift, s, t) + tl.sum(p * y, 1)
    s = tl.fma(s, decay, tl.sum(p, 1))
    if RANK:
        above += tl.sum(is_above(z, target_logit, BM, MEMBERS), 1)
    return m_new, s, t, above, largest, first, second


@triton.jit
def store_state(
    m,  # fp32 [BM, 8], as s, t and above
    s, t, above,
    state,  # fp32 [...], the parts of all rows: see state_of
    block,
    rows,  # int [BM]
    row_mask,  # bool [BM]
    part,
    R, row_blocks, band, splits, last_splits,
    BM: tl.constexpr, PARTS: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """What a program knows of its rows in the end, as one part of their state."""
    m_row = tl.max(m, 1)
    shift = m - m_row[:, None]
    decay = tl.exp2(shift)
    full_rows = (row_blocks - 1) // band * band * BM
    first, n_rows = state_of(block * BM >= full_rows, full_rows, R, splits * PARTS)
    at = state + first + part.to(tl.int64) * 4 * n_rows + rows
    tl.store(at, m_row, mask=row_mask)
    tl.store(at + n_rows, tl.sum(s * decay, 1), mask=row_mask)
    if ENTROPY:
        tl.store(at + 2 * n_rows, tl.sum(decay * tl.fma(shift, s, t), 1), mask=row_mask)
    if RANK:
        tl.store(at + 3 * n_rows, tl.sum(above, 1), mask=row_mask)


@triton.jit
def state_of(in_last_band, full_rows, R, parts):
    """Where the state of rows lies: that of the bands' rows as fp32 [parts, 4, full_rows], then that of the last
    band's, which has as many parts as the last band has.

    Of row r the first number is at the first result + r; the second is the distance from one number to the next.
    """
    first = tl.where(in_last_band, (4 * parts).to(tl.int64) * full_rows - full_rows, 0)
    return first, tl.where(in_last_band, R - full_rows, full_rows)


@triton.jit
def item_of(item, tiles, row_blocks, band, splits, last_splits, MERGED: tl.constexpr):
    """Of one item of a Partition: the block of rows, the first tile, the tile after the last, the slice's number.

    Items follow one another band by band, so that programs that run together have their operands in L2; the last band
    is cut anew (launch.py). Slices begin where a slot does.
    """
    full_blocks = (row_blocks - 1) // band * band
    in_last = item >= full_blocks * splits
    first_block = tl.where(in_last, full_blocks, item // (band * tl.maximum(splits, 1)) * band)
    within = item - first_block * splits
    blocks = tl.where(in_last, row_blocks - full_blocks, band)
    count = tl.where(in_last, last_splits, splits)
    split = within // blocks
    units = (tiles + MERGED - 1) // MERGED
    longer = units % count
    start = (units // count * split + tl.minimum(split, longer)) * MERGED
    length = (units // count + tl.where(split < longer, 1, 0)) * MERGED
    return first_block + within % blocks, start, tl.minimum(start + length, tiles), split
