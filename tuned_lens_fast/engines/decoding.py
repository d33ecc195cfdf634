"""The loop that every engine runs in: from hidden states to statistics, a chunk of rows after another.

For a chunk of positions the model's own output comes first, where divergences want it; then groups of layers: hidden
states to x = norm(h + A h + c), a pass over the vocabulary that leaves a row's
:class:`~tuned_lens_fast.engines.state.State`, and the formulas that make statistics of it (``statistics.py``). Nothing
of size rows x vocabulary outlives a tile. KL(reference || lens) costs a normaliser and one vector a position, the other
divergences a second pass over both outputs side by side.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import Head, Norm, Query, Readout, Tiling, Translator
from tuned_lens_fast.engines.matmul import Matmul
from tuned_lens_fast.engines.state import State, Wanted
from tuned_lens_fast.engines.statistics import STATISTICS, asked, by_two_passes, divergences
from tuned_lens_fast.engines.tiling import empty_answer, slices
from tuned_lens_fast.progress import report

#: Watched tokens whose logits are multiplied at once.
WATCH_TILE = 1024


@dataclass(frozen=True)
class Reference:
    """The model's own output at a chunk of positions."""

    x: Tensor  #: [positions, d_model] in the head's dtype, what the head receives
    state: State  #: [positions]
    u: Tensor | None  #: fp32 [positions, d_model], W^T softmax(z), the head's scale included


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Within it ``device`` is PyTorch's current GPU, on which kernels are started."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Engine(abc.ABC):
    """One way of computing the statistics; see each method for what another has to bring."""

    name: str

    @abc.abstractmethod
    def unavailable(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        """None where the engine works (on ``device``, or at all; with a head of ``dtype``, or with some).

        Else why not, and what would change that.
        """

    def path(self) -> str:
        """What of the machine it uses, where that differs from one to the next; else nothing."""
        return ""

    @abc.abstractmethod
    def plan(
        self,
        positions: int,
        hidden: torch.dtype,
        readout: Readout,
        query: Query,
        memory_budget: int,
        gradient: bool = False,
    ) -> Tiling:
        """How :meth:`decode` will cut hidden states of dtype ``hidden`` at so many positions, at least 1.

        Of ``query`` only what is asked for counts, not the values of its tensors. With ``gradient`` every row's
        gradient is wanted as well (``losses.py``).

        Raises:
            BudgetError: the budget cannot work; it names the smallest that can.
        """

    @abc.abstractmethod
    def residual(self, hidden: Sequence[Tensor], translators: Sequence[Translator | None], tiling: Tiling) -> Tensor:
        """h + A h + c of layers' hidden states ``[positions, width]``, each with a translator of its own.

        ``[layers * positions, width]``, layer by layer, in fp32 or wider; without any translator in h's dtype if need
        be.
        """

    @abc.abstractmethod
    def normed(self, residual: Tensor, norm: Norm, head: Head) -> Tensor:
        """x = norm(residual) ``[rows, d_model]`` in the head's dtype."""

    def head_input(
        self, hidden: Sequence[Tensor], translators: Sequence[Translator | None], norm: Norm, head: Head, tiling: Tiling
    ) -> Tensor:
        """x = norm(h + A h + c) ``[layers * positions, d_model]`` in the head's dtype, layer by layer."""
        return self.normed(self.residual(hidden, translators, tiling), norm, head)

    @abc.abstractmethod
    def vocabulary_pass(self, x: Tensor, head: Head, wanted: Wanted, tiling: Tiling) -> State:
        """The closed state of every row x ``[layers * positions, d_model]`` after the whole vocabulary."""

    @abc.abstractmethod
    def divergence_pass(
        self, x: Tensor, state: State, reference: Reference, head: Head, names: Collection[str], tiling: Tiling
    ) -> dict[str, Tensor]:
        """Those divergences of rows x from the reference, summed over the vocabulary; fp32 ``[rows]``.

        Both states are known, so that every token's term is (``Statistic.term``).
        """

    def matmul(self, head: Head) -> Matmul:
        """What multiplies rows by tiles of the head where no kernel does."""
        return Matmul(head)

    def kl_by_identity(self, x: Tensor, state: State, reference: Reference) -> Tensor:
        """KL(reference || lens) of rows x, where z is linear in x; fp32 ``[rows]``.

        With z = W x + b, p = softmax(z_T) and u = W^T p, the sum of p (z_T - z) is (x_T - x).u: b cancels, and

            KL = (lse - lse_T) - (x - x_T).u
        """
        assert state.log_s is not None
        along, at_once = self.along(x, reference), reference.x.shape[0]
        m, log_s = (part.unflatten(0, (-1, at_once)) for part in (state.m, state.log_s))
        # The maxima are subtracted first, because near 1,000 an fp32 lse is only good to 6e-5.
        return ((m - reference.state.m) - along + (log_s - reference.state.log_s)).flatten().float()

    def along(self, x: Tensor, reference: Reference) -> Tensor:
        """(x - x_T).u of rows x, ``[layers, positions]``."""
        assert reference.u is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide).unflatten(0, (-1, reference.x.shape[0])) - reference.x.to(wide)).mul_(reference.u).sum(-1)

    @torch.no_grad()
    def decode(self, hidden: Sequence[Tensor], readout: Readout, query: Query, memory_budget: int) -> dict[str, Tensor]:
        """Statistics of L layers at P positions.

        Args:
            hidden: L tensors ``[positions, width]`` of one floating dtype on the head's device; views are fine.
            readout: with a translator for every entry of ``hidden``.
            query: see there.
            memory_budget: bytes of scratch beyond the inputs and the answer.

        Returns:
            ``lse`` fp32 ``[L, P]``; every name in ``query.stats`` as fp32 ``[L, P]`` (``rank``: int64);
            with ``top_k``: ``top_ids`` int64 and ``top_log_probs`` fp32 ``[L, P, k]``; with ``watch``:
            ``watch_log_probs`` fp32 ``[L, P, n_watch]``. Also ``unsure``, where a state has it.

        Raises:
            BudgetError: see :meth:`plan`.
        """
        layers, positions = len(hidden), hidden[0].shape[0] if hidden else 0
        if not layers or not positions:
            return empty_answer(layers, positions, query, readout.head.weight.device)
        out: dict[str, Tensor] = {}
        tiling = self.plan(positions, hidden[0].dtype, readout, query, memory_budget)
        for p in slices(positions, tiling.positions):
            part = query.at(p)
            reference = None  # before the next one takes its place
            if divergences(query):
                reference = self.reference(part, readout.head, tiling)
            for group in slices(layers, tiling.layers):
                entering = [h[p] for h in hidden[group]]
                x = self.head_input(entering, readout.translators[group], readout.norm, readout.head, tiling)
                found = {
                    name: value.unflatten(0, (len(entering), -1))
                    for name, value in self._statistics(x, readout.head, part, reference, tiling).items()
                }
                report(x.shape[0])
                if tiling.layers >= layers and tiling.positions >= positions:
                    return found
                for name, value in found.items():
                    if name not in out:
                        out[name] = value.new_empty(layers, positions, *value.shape[2:])
                    out[name][group, p] = value
                del x, found, value
        return out

    def reference(self, query: Query, head: Head, tiling: Tiling) -> Reference:
        """One pass over the model's own logits: their normaliser and, for KL by the identity, u."""
        assert query.reference is not None
        x = query.reference.to(head.weight.dtype).contiguous()
        by_identity = "kl" in query.stats and "kl" not in by_two_passes(query, head)
        state = self.vocabulary_pass(x, head, Wanted(u="exact" if by_identity else ""), tiling)
        u = None if state.u is None else state.u / state.s.unsqueeze(1) * head.scale
        return Reference(x, state, u)

    def _statistics(
        self, x: Tensor, head: Head, query: Query, reference: Reference | None, tiling: Tiling
    ) -> dict[str, Tensor]:
        """Every statistic of x ``[layers * positions, d_model]``, named as results are, one row each."""
        running = frozenset(field for name in query.stats for field in STATISTICS[name].running)
        targets = query.targets if "target" in running else None
        state = self.vocabulary_pass(x, head, Wanted(running, targets, query.top_k), tiling)
        found = {statistic.name: statistic.formula(state) for statistic in asked(query) if statistic.formula}
        if reference is not None:
            two_passes = by_two_passes(query, head)
            sums = self.divergence_pass(x, state, reference, head, two_passes, tiling) if two_passes else {}
            if reference.u is not None:
                sums["kl"] = self.kl_by_identity(x, state, reference)
            found |= {name: total.clamp(min=0) for name, total in sums.items()}
        if query.watch is not None:
            found["watch_log_probs"] = self._watched(x, head, query.watch, state, tiling)
        if state.unsure is not None:
            found["unsure"] = state.unsure
        return found

    def _watched(self, x: Tensor, head: Head, watch: Tensor, state: State, tiling: Tiling) -> Tensor:
        """Log-probabilities ``[rows, n_watch]`` of the watched tokens: their logits need no pass."""
        matmul, width = self.matmul(head), min(tiling.tile, WATCH_TILE)
        rows = matmul.pack(x)
        assert state.log_s is not None
        m, log_s = state.m.unsqueeze(1), state.log_s.unsqueeze(1)
        found = m.new_empty(x.shape[0], len(watch))
        for at in slices(len(watch), width):
            torch.sub(matmul(rows, watch[at], width).sub_(m), log_s, out=found[:, at])
        return found
