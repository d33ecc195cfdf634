"""What every kernel that meets a tile of logits does to it first, and the numbers that stand for nothing."""

from __future__ import annotations

import triton
import triton.language as tl

#: log2(e); exponentials are taken to base 2, which is what the hardware has.
LOG2E = tl.constexpr(1.4426950408889634)
#: ln(2)
LN2 = tl.constexpr(0.6931471805599453)
#: Where a running maximum starts. Finite, since (-inf) - (-inf) is NaN.
EMPTY = tl.constexpr(-1e30)
#: The logit of a masked column or of a bias of -inf: below EMPTY, so that it never counts, and finite like it.
MASKED = tl.constexpr(-2e30)


@triton.jit
def finish_logits(
    acc,  # fp32 [rows, tokens] or [tokens], sums of products
    bias,  # [vocab]
    token,  # int [tokens]
    valid,  # bool [tokens]
    scale, softcap,
    BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """z = g(acc + b), what the model makes of W x. With FLOOR a bias of -inf gives MASKED."""
    if BIAS:
        offset = tl.load(bias + token, mask=valid, other=0.0).to(tl.float32)
        if len(acc.shape) == 2:
            offset = offset[None, :]
        acc += offset
    if SCALE:
        acc *= scale
    if SOFTCAP:  # c tanh(z / c) = c - 2c / (exp(2z / c) + 1) needs one exponential
        acc = softcap - tl.fdiv(2.0 * softcap, tl.exp2(acc * (2.0 * LOG2E / softcap)) + 1.0)
    if BIAS and FLOOR:
        acc = tl.maximum(acc, MASKED, propagate_nan=tl.PropagateNan.ALL)
    return acc


@triton.jit
def tile_logits(
    x,  # [rows, D]
    w,  # [V, D]
    bias,  # [V]
    row,  # int64 [BM]
    token,  # int64 [BN]
    row_mask,  # bool [BM]
    token_mask,  # bool [BN]
    stride_x, stride_w, scale, softcap,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits ``[BM, BN]``."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, D, BK):
        depth = k + tl.arange(0, BK)
        deep = (depth < D)[None, :]
        a = tl.load(x + row[:, None] * stride_x + depth[None, :], mask=row_mask[:, None] & deep, other=0.0)
        b = tl.load(w + token[:, None] * stride_w + depth[None, :], mask=token_mask[:, None] & deep, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return finish_logits(acc, bias, token, token_mask, scale, softcap, BIAS, SCALE, SOFTCAP, True)


@triton.jit
def token_of(
    slot,  # int [...]
    place,  # int [...], of a member within the slot
    groups,
    MEMBERS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """The token id at a place of a slot, -1 if there is none (see vocabulary_pass.py for how they are numbered)."""
    tiles = groups // 8
    whole = (tiles + MERGED - 1) // MERGED
    member = place % MEMBERS
    after = slot // 8 - whole
    tile = tl.where(after < 0, slot // 8 * MERGED + place // MEMBERS, tiles + after)
    group = tile * 8 + slot % 8
    left_over = tile * 8 >= groups
    exists = tl.where(after < 0, tile < tiles, (place < MEMBERS) & (left_over | (group < groups)))
    return tl.where(exists, tl.where(left_over, MEMBERS * groups + member * 8 + slot % 8, member * groups + group), -1)
