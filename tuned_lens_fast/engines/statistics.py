"""What a statistic is: its name, its meaning, what it needs, and its formula. Said here once, for all engines.

An engine brings a row's :class:`~tuned_lens_fast.engines.state.State`; the formulas below make every statistic of it
but the divergences, which compare with the model's own output and are sums over tokens of a term of both. What checks
a question, the loop over chunks, ``LensStats``, ``--help`` and the data sets read this list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import Head, Query
from tuned_lens_fast.engines.state import key_ids, key_logits


@dataclass(frozen=True)
class Statistic:
    """One number for every layer and position, or one for each top or watched token."""

    name: str
    meaning: str
    formula: Callable[[Any], Tensor] | None = None  #: of a closed State ``[rows]`` that has what ``running`` names
    #: Of a divergence, in place of a formula: what a token adds to it, of ``log_p, log_q, p, q``, p the model's.
    term: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    needs: Literal["targets", "reference", "top_k", "watch"] | None = None  #: what a caller has to give for it
    running: frozenset[str] = frozenset()  #: fields of the state that it reads, beyond m and s
    default: bool = True  #: given where nothing is named and its inputs are there
    dtype: torch.dtype = torch.float32

    def columns(self, query: Query) -> int | None:
        """Numbers for each layer and position; None for one that has no dimension of its own."""
        if self.needs == "watch":
            return 0 if query.watch is None else len(query.watch)
        return query.top_k if self.needs == "top_k" else None


def _js(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
    log_mean = torch.add(p, q).div_(2).log_().clamp_(min=LOG_FLOOR)
    of_p = torch.sub(log_p, log_mean).mul_(p)
    return torch.sub(log_q, log_mean, out=log_mean).mul_(q).add_(of_p).div_(2)


#: Stands for the logarithm of 0, so that its product with a probability of 0 is 0 and not NaN.
LOG_FLOOR = -1e30

LSE = Statistic("lse", "log of the sum of the exponentials of the logits", lambda row: row.m + row.log_s)

#: Those that a caller can name.
STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        Statistic(
            "log_prob",
            "log-probability of the target",
            # Not z - lse: near 1,000 an fp32 lse is only good to 6e-5.
            lambda row: (row.target - row.m) - row.log_s,
            needs="targets",
            running=frozenset({"target"}),
        ),
        Statistic(
            "rank",
            "1 + the number of tokens with a larger logit than the target",
            lambda row: row.r + 1,
            needs="targets",
            running=frozenset({"target", "r"}),
            dtype=torch.int64,
        ),
        Statistic(
            "entropy",
            "of the layer's distribution over the vocabulary",
            # With sum exp(z - m) z in place of t, logits near 1,000 would cancel. Rounding may put it below 0.
            lambda row: torch.addcdiv(row.s.log(), row.t, row.s, value=-1).clamp_(min=0),
            running=frozenset({"t"}),
        ),
        Statistic("max_prob", "probability of the likeliest token", lambda row: row.s.reciprocal()),
        Statistic(
            "kl", "KL(model's output || layer)", term=lambda log_p, log_q, p, _: torch.sub(log_p, log_q).mul_(p),
            needs="reference",
        ),
        Statistic(
            "reverse_kl", "KL(layer || model's output)",
            term=lambda log_p, log_q, _, q: torch.sub(log_q, log_p).mul_(q), needs="reference", default=False,
        ),
        Statistic(
            "js", "Jensen-Shannon divergence of the two, at most ln 2", term=_js, needs="reference", default=False,
        ),
        Statistic(
            "tv", "total variation, half the sum of the absolute differences",
            term=lambda _log_p, _log_q, p, q: torch.sub(p, q).abs_().div_(2), needs="reference", default=False,
        ),
    )
}  # fmt: skip

#: Those that are asked for by a number of tokens, or by the tokens.
OF_TOKENS = (
    Statistic("top_ids", "the k likeliest tokens", lambda row: key_ids(row.top), needs="top_k", dtype=torch.int64),
    Statistic(
        "top_log_probs",
        "their log-probabilities",
        lambda row: key_logits(row.top).sub_(row.m.unsqueeze(1)).sub_(row.log_s.unsqueeze(1)),
        needs="top_k",
    ),
    Statistic("watch_log_probs", "log-probabilities of tokens you name", needs="watch"),
)

#: The names of those that compare the lens with the model's own output, in the order in which engines sum them.
DIVERGENCES = tuple(name for name, statistic in STATISTICS.items() if statistic.term is not None)


def asked(query: Query) -> list[Statistic]:
    """What ``query`` is answered with, in order."""
    given = {"top_k": query.top_k > 0, "watch": query.watch is not None}
    tokens = [statistic for statistic in OF_TOKENS if given[statistic.needs or ""]]
    return [LSE, *(statistic for name, statistic in STATISTICS.items() if name in query.stats), *tokens]


def divergences(query: Query) -> tuple[str, ...]:
    """The divergences asked for."""
    return tuple(name for name in DIVERGENCES if name in query.stats)


def by_two_passes(query: Query, head: Head) -> tuple[str, ...]:
    """The divergences that need both logits of every token side by side; kl does only where z is not linear in x."""
    return tuple(name for name in divergences(query) if name != "kl" or head.softcap is not None)
