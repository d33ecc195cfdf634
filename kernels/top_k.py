"""The exact top k from what the statistics kernel keeps of every group of columns.

Of a group there are two numbers: its largest logit, and its second largest with the lowest mantissa bits (6, with 64
members) replaced by the place of the largest, off by at most 2^-17 of its value. Three steps, a program a row each:

1. ``_candidates``: a bound that at least k logits reach, then every group whose largest logit reaches it. Where the
   second may reach it too, the group can hold more of the top k than its largest: all its members become candidates.
2. ``_searched_logits``: the logits of those members, as dot products. The largest keeps the logit it has, which was
   summed like the normaliser: next to a logit of 30, another way of summing is off by more than a log-prob may be.
3. ``_order``: the k best, ties to the lower id.

So the result is the top k of the logits, unless a row has more candidates than fit: such a row is reported, and the
engine decodes it again with all its logits. That takes many equal or nearly equal logits, as in a row of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuned_lens_fast.kernels.launch import Tile
from tuned_lens_fast.kernels.logits import MASKED, token_of, transform

#: The largest k these kernels serve; beyond it the engine keeps all logits of a few rows at a time.
LARGEST_K = 128


@triton.jit(do_not_specialize=["slots8", "groups"])
def _candidates(
    keys, logits, ids, groups_to_search, counts, slots8, groups,
    K: tl.constexpr, MEMBERS: tl.constexpr, MERGED: tl.constexpr, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr,
    SEARCHED: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = MEMBERS * MERGED
    row = tl.program_id(0).to(tl.int64)
    slots = slots8 * 8
    largest = keys + row * 2 * slots
    column = tl.arange(0, SEGMENTS)
    # The k-th largest of SEGMENTS maxima is no larger than the k-th largest logit, and seldom much smaller.
    maxima = tl.full((SEGMENTS,), 2 * MASKED, tl.float32)
    for start in range(0, slots, SEGMENTS):
        maxima = tl.maximum(maxima, tl.load(largest + start + column, mask=start + column < slots, other=2 * MASKED))
    for _ in range(K - 1):
        maxima = tl.where(maxima >= tl.max(maxima, 0), 2 * MASKED, maxima)
    bound = tl.max(maxima, 0)
    reach = bound - tl.abs(bound) * (WIDTH * 2.0**-21)

    # Places are given out in any order: _order sorts by value and id, so the result is the same every time.
    found = counts + row * 2 + tl.zeros((SEGMENTS,), tl.int32)
    for start in range(0, slots, SEGMENTS):
        slot = start + column
        z = tl.load(largest + slot, mask=slot < slots, other=2 * MASKED)
        chosen = z >= bound
        if tl.max(chosen.to(tl.int32), 0) > 0:
            second = tl.load(largest + slots + slot, mask=chosen, other=2 * MASKED)
            # Within twice the truncation it is not certain which of the two is the largest.
            doubtful = chosen & (second >= z - tl.abs(z) * (WIDTH * 2.0**-21))
            searched = doubtful | (chosen & (second >= reach))
            alone = chosen & (doubtful == 0)
            known = second.to(tl.int32, bitcast=True) & (WIDTH - 1)
            token = token_of(slot, known, groups, MEMBERS, MERGED)
            place = tl.atomic_add(found, 1, mask=alone, sem="relaxed")
            tl.store(logits + row * PLACES + place, z, mask=alone & (place < TOKENS))
            tl.store(ids + row * PLACES + place, token, mask=alone & (place < TOKENS))
            place = tl.atomic_add(found + 1, 1, mask=searched, sem="relaxed")
            code = slot * (2 * WIDTH) + tl.where(doubtful, WIDTH, known)
            tl.store(groups_to_search + row * SEARCHED + place, code, mask=searched & (place < SEARCHED))


@triton.jit
def _dots(x_row, w, bias, token, wanted, stride_w, scale, softcap,
          D: tl.constexpr, BK: tl.constexpr, N: tl.constexpr,
          BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """Logits of N tokens of one row: fp32 products and sums."""
    row_of_w = w + token.to(tl.int64)[:, None] * stride_w
    acc = tl.zeros((N, BK), tl.float32)
    for k in range(0, D, BK):
        depth = k + tl.arange(0, BK)
        a = tl.load(x_row + depth, mask=depth < D, other=0.0).to(tl.float32)
        b = tl.load(row_of_w + depth[None, :], mask=wanted[:, None] & (depth < D)[None, :], other=0.0).to(tl.float32)
        acc = tl.fma(b, a[None, :].broadcast_to(N, BK), acc)
    z = tl.sum(acc, 1)
    if BIAS:
        z += tl.load(bias + token, mask=wanted, other=0.0).to(tl.float32)
    return transform(z, scale, softcap, SCALE, SOFTCAP)


@triton.jit(do_not_specialize=["groups", "vocab"])
def _searched_logits(
    x, w, bias, groups_to_search, counts, logits, ids, groups, vocab, stride_x, stride_w, scale, softcap,
    D: tl.constexpr, BK: tl.constexpr, MEMBERS: tl.constexpr, MERGED: tl.constexpr, TOKENS: tl.constexpr,
    SEARCHED: tl.constexpr, PLACES: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = MEMBERS * MERGED
    STEP: tl.constexpr = 8
    row = tl.program_id(0).to(tl.int64)
    n_groups = tl.minimum(tl.load(counts + row * 2 + 1), SEARCHED)
    for start in range(0, n_groups * WIDTH, STEP):
        place = start + tl.arange(0, STEP)
        code = tl.load(groups_to_search + row * SEARCHED + start // WIDTH)
        token = token_of(code // (2 * WIDTH), place % WIDTH, groups, MEMBERS, MERGED)
        wanted = (token >= 0) & (token < vocab) & (place % WIDTH != code % (2 * WIDTH))
        z = _dots(
            x + row * stride_x, w, bias, token, wanted, stride_w, scale, softcap, D, BK, STEP, BIAS, SCALE, SOFTCAP
        )
        tl.store(logits + row * PLACES + TOKENS + place, tl.where(wanted, z, float("-inf")))
        tl.store(ids + row * PLACES + TOKENS + place, token)


@triton.jit(do_not_specialize=["rows"])
def _order(
    logits, ids, counts, normaliser, top_ids, top_log_probs, rows,
    K: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    n_tokens = tl.load(counts + row * 2)
    n_searched = tl.load(counts + row * 2 + 1) * WIDTH
    used = tl.where(place < TOKENS, place < n_tokens, place - TOKENS < n_searched)
    z = tl.load(logits + row * PLACES + place, mask=used, other=float("-inf"))
    token = tl.load(ids + row * PLACES + place, mask=used & (z > float("-inf")), other=2147483647)
    m = tl.load(normaliser + row)
    log_s = tl.load(normaliser + rows + row)
    known = log_s == log_s
    for k in range(K):
        best = tl.max(z, 0)
        first = tl.min(tl.where(z == best, token, 2147483647), 0)
        tl.store(top_ids + row * K + k, tl.where(known, first, -1).to(tl.int64))
        tl.store(top_log_probs + row * K + k, tl.where(known, (best - m) - log_s, float("nan")))
        z = tl.where(token == first, float("-inf"), z)


@dataclass(frozen=True)
class Room:
    """How many candidates a row can have."""

    tokens: int
    searched: int  #: groups whose members all are candidates
    places: int  #: tokens + members of all searched groups, rounded up to a power of two

    @staticmethod
    def of(top_k: int, tile: Tile) -> Room:
        tokens = triton.next_power_of_2(top_k + 6)
        searched = 4 if top_k <= 16 else 8 if top_k <= 64 else 16
        return Room(tokens, searched, triton.next_power_of_2(tokens + searched * tile.members * tile.merged))

    @property
    def bytes_per_row(self) -> int:
        return 4 * (self.searched + 2 + 2 * self.places)


def serves(top_k: int, slots: int) -> bool:
    """Whether these kernels can find the top k of a row with that many groups."""
    return top_k <= LARGEST_K and slots >= 8 * top_k


def top_k(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, keys: Tensor,
    normaliser: Tensor, k: int, tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The k most likely tokens of every row, the most likely first, ties to the lower id.

    Args:
        x: [rows, d_model]. weight: [vocab, d_model]. bias: [vocab] or None. scale, softcap: see ``Head``.
        keys: [rows, 2, slots] and normaliser: [2, rows], both from ``vocabulary_statistics`` with the same tile.

    Returns:
        ids int64 [rows, k] and log-probs fp32 [rows, k], nats (-1 and NaN in a row whose normaliser is NaN), and
        bool [rows]: the row had too many candidates, and its ids are not to be used.
    """
    rows, d_model = x.shape
    slots = keys.shape[2]
    members = tile.members
    groups = weight.shape[0] // members
    room = Room.of(k, tile)
    device = x.device
    searched = torch.empty(rows, room.searched, dtype=torch.int32, device=device)
    counts = torch.zeros(rows, 2, dtype=torch.int32, device=device)
    logits = torch.empty(rows, room.places, dtype=torch.float32, device=device)
    ids = torch.empty(rows, room.places, dtype=torch.int32, device=device)
    segments = 1024 if slots > 2048 else 512
    _candidates[(rows,)](
        keys, logits, ids, searched, counts, slots // 8, groups,
        K=k, MEMBERS=members, MERGED=tile.merged, SEGMENTS=segments, TOKENS=room.tokens, SEARCHED=room.searched,
        PLACES=room.places, num_warps=4,
    )  # fmt: skip
    _searched_logits[(rows,)](
        x, weight, bias, searched, counts, logits, ids, groups, weight.shape[0],
        x.stride(0), weight.stride(0), scale, softcap or 1.0,
        D=d_model, BK=min(512, triton.next_power_of_2(d_model)), MEMBERS=members, MERGED=tile.merged,
        TOKENS=room.tokens, SEARCHED=room.searched, PLACES=room.places,
        BIAS=bias is not None, SCALE=scale != 1.0, SOFTCAP=softcap is not None,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    top_ids = torch.empty(rows, k, dtype=torch.int64, device=device)
    top_log_probs = torch.empty(rows, k, dtype=torch.float32, device=device)
    _order[(rows,)](
        logits, ids, counts, normaliser, top_ids, top_log_probs, rows,
        K=k, WIDTH=members * tile.merged, TOKENS=room.tokens, PLACES=room.places, num_warps=1,
    )  # fmt: skip
    overflow = (counts[:, 0] > room.tokens) | (counts[:, 1] > room.searched)
    return top_ids, top_log_probs, overflow & ~normaliser[1].isnan()
