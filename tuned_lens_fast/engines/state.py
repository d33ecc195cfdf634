"""A row's running state over the vocabulary, and the merge of two states: the definition all engines share.

Logits are met a vocabulary tile at a time. What is kept of a tile is, for every row,

    m = max z    s = sum exp(z - m)    t = sum exp(z - m) (z - m)    r = #{z > z_target}    the top k (z, id)

and, where wanted, the target's own logit and ``sum exp(z - m) W``, of which u = W^T softmax(z) is made.
``merge`` puts two disjoint parts of the vocabulary together; it is associative and commutative, so parts may
be met in any order, on any thread or device (Milakov and Gimelshein, 2018, for m and s). ``closed`` ends it: what
cannot be said of a row is marked in the state, and the formulas of ``statistics.py`` need no exceptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import NO_TARGET

#: exp of anything below is 0 in fp32: clamping z - m here changes no sum, and keeps 0 * (-inf) out of them.
EXP_FLOOR = -1000.0
#: Tokens a group in the search for a tile's top k. Two levels cost tile / GROUP + k * GROUP keys a row.
GROUP = 16
#: The fp32 fields of a state that engines keep for every row, in the order of csrc/row.h's ``Running``.
SUMS = ("m", "s", "t")
#: The key that stands for "no token".
NO_KEY = torch.iinfo(torch.int64).min


def top_keys(logits: Tensor, ids: Tensor) -> Tensor:
    """int64 keys ordered as (logit, lower id first): fp32 logits and int64 ids below 2^31, broadcast together.

    All keys of a row differ, so the largest k are the same in whatever order they are met. The upper half
    holds the logit's bits, those of negative numbers reversed, the lower half the complement of the id.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 tie
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (0xFFFFFFFF - ids)


def key_logits(keys: Tensor) -> Tensor:
    """The fp32 logits that :func:`top_keys` packed; NaN for NO_KEY."""
    ordered = keys.view(torch.int32)[..., 1::2]
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def key_ids(keys: Tensor) -> Tensor:
    """The int64 ids that :func:`top_keys` packed; -1 for NO_KEY."""
    return (~keys.view(torch.int32)[..., ::2]).to(torch.int64)


def tile_top_keys(z: Tensor, first: int, k: int) -> Tensor:
    """Keys of a superset of a tile's top k: at most k * GROUP + GROUP a row, [rows, candidates].

    A token of the top k lies in one of the k groups with the largest maxima (the lower group first on a tie):
    else each of those groups would hold a token that comes before it.
    """
    rows, width = z.shape
    groups = width // GROUP
    ids = torch.arange(first, first + width, device=z.device)
    if groups <= k:
        return top_keys(z, ids)
    grouped = z[:, : groups * GROUP].unflatten(1, (groups, GROUP))
    group_ids = torch.arange(groups, device=z.device)
    best = key_ids(top_keys(grouped.amax(2), group_ids).topk(k, dim=1).values).unsqueeze(2)
    inside = grouped.gather(1, best.expand(rows, k, GROUP))
    inside_ids = first + best * GROUP + torch.arange(GROUP, device=z.device)
    keys = top_keys(inside, inside_ids).flatten(1)
    tail = groups * GROUP
    return keys if tail == width else torch.cat([keys, top_keys(z[:, tail:], ids[tail:])], 1)


@dataclass(frozen=True)
class Wanted:
    """What a pass over the vocabulary is to find out of every row, beside m and s."""

    running: frozenset[str] = frozenset()  #: out of "t", "r", "target", fields of a State; the last two want targets
    targets: Tensor | None = None  #: int64 [positions], ids or NO_TARGET; rows are layers x positions
    top_k: int = 0  #: how many keys to keep
    #: sum exp(z - m) W: to fp32's rounding, or as rough as a gradient may be, whose terms average out.
    u: Literal["", "exact", "rough"] = ""


@dataclass(frozen=True)
class State:
    """What is known of every row after some part of the vocabulary; what was not asked for may be None.

    A row with a NaN or +inf among its logits has a NaN ``s``. Once ``closed``, so has one without any finite logit;
    ``target`` is NaN where a row has no target, ``r`` is -1 and all of ``top`` NO_KEY where nothing is known.
    """

    m: Tensor  #: fp32 [rows]; -inf where all logits are
    s: Tensor  #: fp32 [rows], relative to m
    t: Tensor | None = None  #: fp32 [rows], relative to m
    r: Tensor | None = None  #: int64 [rows]
    target: Tensor | None = None  #: fp32 [rows], the target's logit; -inf while it has not been met
    top: Tensor | None = None  #: int64 [rows, k] keys in descending order; NO_KEY where there are fewer tokens
    u: Tensor | None = None  #: fp32 [rows, d_model], sum exp(z - m) W, relative to m
    log_s: Tensor | None = None  #: fp32 [rows], log sum exp(z - m), of a closed state
    unsure: Tensor | None = None  #: bool [rows], where ``top`` may be wrong and has to be found anew

    @staticmethod
    def of_tile(
        z: Tensor,
        first: int,
        *,
        running: frozenset[str] = frozenset(),
        targets: Tensor | None = None,
        threshold: Tensor | None = None,
        top_k: int = 0,
        m: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> State:
        """The state of one vocabulary tile, whose logits are overwritten with exp(z - m).

        Args:
            z: fp32 ``[rows, width]``, the logits of tokens first .. first + width - 1.
            first: the tile's first token id.
            running: see :class:`Wanted`.
            targets: int64 ``[rows]``; ids outside of the tile are not found in it.
            threshold: fp32 ``[rows]``, the target's logit by the same arithmetic as z, to count r against;
                not needed where the tile holds every target.
            top_k: how many keys to keep.
            m: fp32 ``[rows]``, the least that the state's m is to be: that of the tiles before, so that exp(z - m) can
                be added to theirs.
            scratch: fp32 like z, which is written over; its own if None.
        """
        found, r, top = None, None, None
        scratch = torch.empty_like(z) if scratch is None else scratch
        if targets is not None:
            column = (targets - first).unsqueeze(1)
            met = (column >= 0) & (column < z.shape[1])
            own = z.gather(1, column.clamp(0, z.shape[1] - 1))
            found = own.masked_fill(~met, float("-inf")).squeeze(1)
            if "r" in running:
                threshold = found if threshold is None else threshold
                # A float comparison and sum: those of bool and int64 take five times as long on a CPU.
                larger = torch.gt(z, threshold.unsqueeze(1), out=scratch).sum(1).to(torch.int64)
                r = larger - (met.squeeze(1) & (found > threshold)).to(torch.int64)
        if top_k:
            keys = tile_top_keys(z, first, top_k)
            top = largest_keys(keys, top_k)
        m = z.amax(1) if m is None else torch.maximum(z.amax(1), m)
        d = torch.sub(z, _finite(m).unsqueeze(1), out=scratch).clamp_(min=EXP_FLOOR)
        e = torch.exp(d, out=z)
        s = e.sum(1)
        t = d.mul_(e).sum(1) if "t" in running else None
        return State(m, s, t, r, found, top)

    @staticmethod
    def merge(a: State, b: State) -> State:
        """The state of two disjoint parts of the vocabulary together."""
        m = torch.maximum(a.m, b.m)
        shift_a, shift_b = _shift(a.m, m), _shift(b.m, m)
        scale_a, scale_b = shift_a.exp(), shift_b.exp()
        t = r = target = top = u = None
        if a.t is not None and b.t is not None:
            t = scale_a * (a.t + a.s * shift_a) + scale_b * (b.t + b.s * shift_b)
        if a.r is not None and b.r is not None:
            r = a.r + b.r
        if a.target is not None and b.target is not None:
            target = torch.maximum(a.target, b.target)
        if a.top is not None and b.top is not None:
            top = largest_keys(torch.cat([a.top, b.top], 1), a.top.shape[1])
        if a.u is not None and b.u is not None:
            u = (a.u * scale_a.unsqueeze(1)).addcmul_(b.u, scale_b.unsqueeze(1))
        return State(m, scale_a * a.s + scale_b * b.s, t, r, target, top, u)

    def closed(self, targets: Tensor | None = None) -> State:
        """The state of the whole vocabulary; ``targets``: int64 ``[rows]``, where target or r were wanted."""
        void = ~(self.s > 0)
        target, r, top = self.target, self.r, self.top
        if targets is not None:
            none = targets == NO_TARGET
            target = None if target is None else target.masked_fill(none, math.nan)
            r = None if r is None else r.masked_fill(none | void, -1)
        if top is not None:
            top = top.masked_fill(void.unsqueeze(1), NO_KEY)
        s = self.s.masked_fill(void, math.nan)
        return replace(self, s=s, r=r, target=target, top=top, log_s=s.log())


def decay(before: Tensor, m: Tensor) -> Tensor:
    """What sums relative to ``before`` are multiplied by once ``m``, which is no less, is the maximum."""
    return _shift(before, m).exp_()


def _shift(before: Tensor, m: Tensor) -> Tensor:
    return (before - _finite(m)).clamp_(min=EXP_FLOOR)


def _finite(m: Tensor) -> Tensor:
    """m, or 0 where every logit so far is -inf: (-inf) - (-inf) would be NaN."""
    return m.masked_fill(m == float("-inf"), 0.0)


def largest_keys(keys: Tensor, k: int) -> Tensor:
    """The k largest keys [rows, k] in descending order, filled up with NO_KEY."""
    missing = k - keys.shape[1]
    keys = keys.topk(min(k, keys.shape[1]), dim=1).values
    return keys if missing <= 0 else torch.nn.functional.pad(keys, (0, missing), value=NO_KEY)
