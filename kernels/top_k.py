"""The exact top k from what the vocabulary pass keeps of every group of columns.

Of a group there are two numbers: its largest logit, and its second largest with the lowest mantissa bits (6, with 64
members) replaced by the place of the largest, off by at most 2^-17 of its value. Three steps:

1. ``_candidates``, a program a row: a bound that at least k logits reach, then every group whose largest logit reaches
   it. Where the second may reach it too, the group can hold more of the top k than its largest: all its members become
   candidates.
2. ``_searched_logits``: the logits of those members, as dot products. Few rows have such groups, and one of these has
   a megabyte of W: all are one list, which all processors share. The largest keeps the logit it has, which was summed
   like the normaliser: next to a logit of 30, another way of summing is off by more than a log-prob may be.
3. ``_order``, a program a row: the k best, ties to the lower id.

So the result is the top k of the logits, unless a row has more candidates than fit: such a row is reported, and the
engine decodes it again with all its logits. That takes many equal or nearly equal logits, as in a row of zeros. Of few
rows ``of_every_logit`` does so without being asked, and nobody has to wait for the report.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuned_lens_fast.engines import state as running
from tuned_lens_fast.engines.state import State
from tuned_lens_fast.kernels.launch import Tile, head_arguments, processors
from tuned_lens_fast.kernels.logits import MASKED, finish_logits, tile_logits, token_of

if TYPE_CHECKING:
    from tuned_lens_fast.engines.interface import Head

#: engines/state.py's key that stands for no token.
NO_KEY = tl.constexpr(running.NO_KEY)
#: The largest k these kernels serve; beyond it the engine keeps all logits of a few rows at a time.
LARGEST_K = 128
#: Rows of which all logits may exist, should it be unsure what their top k is.
MOST_ROWS = 64
#: Programs that search groups, a processor.
SEARCHERS = 8


@triton.jit(do_not_specialize=["slots8", "groups"])
def _candidates(
    group_maxima,  # fp32 [rows, 2, slots]
    logits,  # fp32 [rows, PLACES]: of candidates
    ids,  # int32 [rows, PLACES]: theirs
    groups_to_search,  # int32 [rows, SEARCHED]
    searches,  # int32 [1 + rows * SEARCHED]: how many groups there are to search, and where each is in the former
    counts,  # int32 [rows, 2]: candidates that are known, and groups to search
    slots8, groups,
    K: tl.constexpr, MEMBERS: tl.constexpr, MERGED: tl.constexpr, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr,
    SEARCHED: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Step 1, a program a row: groups that may hold some of the top k."""
    WIDTH: tl.constexpr = MEMBERS * MERGED
    row = tl.program_id(0).to(tl.int64)
    slots = slots8 * 8
    largest = group_maxima + row * 2 * slots
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
            searched &= place < SEARCHED
            tl.store(groups_to_search + row * SEARCHED + place, code, mask=searched)
            listed = tl.atomic_add(searches + tl.zeros((SEGMENTS,), tl.int32), 1, mask=searched, sem="relaxed")
            tl.store(searches + 1 + listed, row.to(tl.int32) * SEARCHED + place, mask=searched)


@triton.jit
def _dots(
    x_row,  # [D]
    w,  # [V, D]
    bias,  # [V]
    token,  # int [N]
    wanted,  # bool [N]
    stride_w, scale, softcap,
    D: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits of N tokens of one row: fp32 products and sums."""
    row_of_w = w + token.to(tl.int64)[:, None] * stride_w
    acc = tl.zeros((N, BK), tl.float32)
    for k in range(0, D, BK):
        depth = k + tl.arange(0, BK)
        a = tl.load(x_row + depth, mask=depth < D, other=0.0).to(tl.float32)
        b = tl.load(row_of_w + depth[None, :], mask=wanted[:, None] & (depth < D)[None, :], other=0.0).to(tl.float32)
        acc = tl.fma(b, a[None, :].broadcast_to(N, BK), acc)
    return finish_logits(tl.sum(acc, 1), bias, token, wanted, scale, softcap, BIAS, SCALE, SOFTCAP, False)


@triton.jit(do_not_specialize=["groups", "vocab", "programs"])
def _searched_logits(
    x,  # [rows, D]
    w,  # [V, D]
    groups_to_search,  # int32 [rows, SEARCHED]
    searches,  # int32 [1 + rows * SEARCHED]
    logits,  # fp32 [rows, PLACES]
    ids,  # int32 [rows, PLACES]
    groups, vocab, programs, stride_x, stride_w,
    bias,  # [V]
    scale, softcap,
    D: tl.constexpr, BK: tl.constexpr, MEMBERS: tl.constexpr, MERGED: tl.constexpr, TOKENS: tl.constexpr,
    SEARCHED: tl.constexpr, PLACES: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Step 2: the logits of all members of the groups to search, a few members at a time."""
    WIDTH: tl.constexpr = MEMBERS * MERGED
    STEP: tl.constexpr = 8
    for i in range(tl.program_id(0), tl.load(searches) * (WIDTH // STEP), programs):
        search = tl.load(searches + 1 + i // (WIDTH // STEP)).to(tl.int64)
        row = search // SEARCHED
        place = i % (WIDTH // STEP) * STEP + tl.arange(0, STEP)
        code = tl.load(groups_to_search + search)
        token = token_of(code // (2 * WIDTH), place, groups, MEMBERS, MERGED)
        wanted = (token >= 0) & (token < vocab) & (place != code % (2 * WIDTH))
        z = _dots(
            x + row * stride_x, w, bias, token, wanted, stride_w, scale, softcap, D, BK, STEP, BIAS, SCALE, SOFTCAP
        )
        at = row * PLACES + TOKENS + search % SEARCHED * WIDTH + place
        tl.store(logits + at, tl.where(wanted, z, float("-inf")))
        tl.store(ids + at, token)


@triton.jit
def _key(z, token):
    """What orders tokens by their logits, equal ones by descending id; see engines/state.py."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)  # -0.0 and 0.0 tie
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (ordered << 32) | (0xFFFFFFFF - token.to(tl.int64))


@triton.jit
def _order(
    logits,  # fp32 [rows, PLACES]
    ids,  # int32 [rows, PLACES]
    counts,  # int32 [rows, 2]
    log_s,  # fp32 [rows], NaN in a row of which nothing can be said
    top,  # int64 [rows, K]: keys, see engines/state.py
    unsure,  # bool [rows]
    K: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, SEARCHED: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Step 3, a program a row: the K best candidates, and whether there was no room for all."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    n_tokens = tl.load(counts + row * 2)
    n_searched = tl.load(counts + row * 2 + 1)
    used = tl.where(place < TOKENS, place < n_tokens, place - TOKENS < n_searched * WIDTH)
    z = tl.load(logits + row * PLACES + place, mask=used, other=float("-inf"))
    token = tl.load(ids + row * PLACES + place, mask=used & (z > float("-inf")), other=2147483647)
    row_log_s = tl.load(log_s + row)
    known = row_log_s == row_log_s
    for k in range(K):
        best = tl.max(z, 0)
        first = tl.min(tl.where(z == best, token, 2147483647), 0)
        tl.store(top + row * K + k, tl.where(known, _key(best, first), NO_KEY))
        z = tl.where(token == first, float("-inf"), z)
    tl.store(unsure + row, known & ((n_tokens > TOKENS) | (n_searched > SEARCHED)))


@triton.jit(do_not_specialize=["rows", "vocab"])
def _every_logit(
    x,  # [rows, D]
    w,  # [V, D]
    unsure,  # bool [rows]
    logits,  # fp32 [rows, V]
    rows, vocab, stride_x, stride_w,
    bias,  # [V]
    scale, softcap,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A program a tile of the vocabulary: logits of the rows that are unsure, summed as the normaliser was."""
    row = tl.arange(0, BM)
    wanted = tl.load(unsure + row, mask=row < rows, other=0) != 0
    if tl.max(wanted.to(tl.int32), 0) > 0:
        token = tl.program_id(0) * BN + tl.arange(0, BN)
        z = tile_logits(
            x, w, bias, row.to(tl.int64), token.to(tl.int64), wanted, token < vocab, stride_x, stride_w, scale, softcap,
            BM, BN, BK, D, PRECISION, BIAS, SCALE, SOFTCAP,
        )  # fmt: skip
        at = logits + row.to(tl.int64)[:, None] * vocab + token[None, :]
        tl.store(at, z, mask=wanted[:, None] & (token < vocab)[None, :])


@triton.jit(do_not_specialize=["vocab"])
def _order_every_logit(
    logits,  # fp32 [rows, V]
    log_s,  # fp32 [rows]
    unsure,  # bool [rows]
    top,  # int64 [rows, K]
    vocab,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a row, at work if that is unsure: its K best, one after another, each the largest below the last."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(unsure + row) != 0:
        row_log_s = tl.load(log_s + row)
        last = tl.full((1,), 0x7FFFFFFFFFFFFFFF, tl.int64)
        for k in range(K):
            best = tl.full((BLOCK,), NO_KEY, tl.int64)
            for start in range(0, vocab, BLOCK):
                token = start + tl.arange(0, BLOCK)
                z = tl.load(logits + row * vocab + token, mask=token < vocab, other=0.0)
                key = _key(tl.where(z <= MASKED, float("-inf"), z), token)
                best = tl.maximum(best, tl.where((token < vocab) & (key < last), key, NO_KEY))
            last = tl.max(best, 0, keep_dims=True)
            tl.store(top + row * K + k + tl.arange(0, 1), tl.where(row_log_s == row_log_s, last, NO_KEY))


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
        return 4 * (2 * self.searched + 2 + 2 * self.places)


def serves(top_k: int, slots: int) -> bool:
    """Whether these kernels can find the top k of a row with that many groups."""
    return top_k <= LARGEST_K and slots >= 8 * top_k


def top_k(x: Tensor, head: Head, group_maxima: Tensor, state: State, k: int, tile: Tile) -> State:
    """``state`` with the k most likely tokens of every row, the most likely first, ties to the lower id.

    It is ``unsure`` of rows that had too many candidates.

    Args:
        x: ``[rows, d_model]`` in the head's dtype.
        group_maxima, state: both from ``vocabulary_pass`` with the same tile.
    """
    rows, d_model = x.shape
    slots = group_maxima.shape[2]
    members = tile.members
    groups = head.vocab // members
    room = Room.of(k, tile)
    device = x.device
    searched = torch.empty(rows, room.searched, dtype=torch.int32, device=device)
    tallies = torch.zeros(2 * rows + 1 + rows * room.searched, dtype=torch.int32, device=device)
    counts, searches = tallies[: 2 * rows], tallies[2 * rows :]
    logits = torch.empty(rows, room.places, dtype=torch.float32, device=device)
    ids = torch.empty(rows, room.places, dtype=torch.int32, device=device)
    segments = 1024 if slots > 2048 else 512
    room_for = {"TOKENS": room.tokens, "SEARCHED": room.searched, "PLACES": room.places}
    _candidates[(rows,)](
        group_maxima, logits, ids, searched, searches, counts, slots // 8, groups,
        K=k, MEMBERS=members, MERGED=tile.merged, SEGMENTS=segments, **room_for, num_warps=4,
    )  # fmt: skip
    programs = SEARCHERS * processors(device)
    _searched_logits[(programs,)](
        x, head.weight, searched, searches, logits, ids, groups, head.vocab, programs, x.stride(0),
        head.weight.stride(0), **head_arguments(head), D=d_model, BK=min(512, triton.next_power_of_2(d_model)),
        MEMBERS=members, MERGED=tile.merged, **room_for, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    top = torch.empty(rows, k, dtype=torch.int64, device=device)
    unsure = torch.empty(rows, dtype=torch.bool, device=device)
    _order[(rows,)](
        logits, ids, counts, state.log_s, top, unsure, K=k, WIDTH=members * tile.merged, **room_for, num_warps=1
    )
    return replace(state, top=top, unsure=unsure)


def of_every_logit(x: Tensor, head: Head, state: State, tile: Tile) -> State:
    """``state`` with the top k of rows that it is unsure of taken from all their logits, so that it is sure of all.

    The other rows cost two launches that find nothing to do, and scratch of ``[rows, vocab]`` fp32 that is not touched.

    Args:
        x: ``[rows, d_model]`` in the head's dtype, ``MOST_ROWS`` at most.
        state: from ``top_k`` with the same tile.
    """
    assert state.top is not None
    rows, d_model = x.shape
    logits = torch.empty(rows, head.vocab, dtype=torch.float32, device=x.device)
    bm = max(16, triton.next_power_of_2(rows))
    bn = 16 if tile.block_rows < 64 else 64
    _every_logit[(triton.cdiv(head.vocab, bn),)](
        x, head.weight, state.unsure, logits, rows, head.vocab, x.stride(0), head.weight.stride(0),
        **head_arguments(head), BM=bm, BN=bn, BK=tile.block_depth, D=d_model, PRECISION=tile.precision,
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    _order_every_logit[(rows,)](
        logits, state.log_s, state.unsure, state.top, head.vocab, K=state.top.shape[1], BLOCK=2048, num_warps=8
    )
    return replace(state, unsure=None)
