"""The processes that train one lens together, each on its share of every step; or one alone, which needs none of this.

Beside the training loop, which is the same for one and for many: what each has found is added up where a step's
gradients are complete. Optimisers keep their moments in parts, one a process (ZeRO's first stage).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tuned_lens_fast.ranks import Ranks, check_not_sharded, shares, tensor_parallel_group
from tuned_lens_fast.training.states import States


class Workers:
    """Every method is to be called by all of them alike."""

    def __init__(self, model: Any) -> None:
        """Those of the default process group of ``torch.distributed``, if there is one.

        The ranks of a model that is split by tensor parallelism run the same sequences, of which each reads its own
        positions; sequences are shared out among such groups.

        Raises:
            ValueError: the model is in FSDP2.
        """
        self.ranks: Ranks | None = None
        self._model: Ranks | None = None  #: those that run one model
        self._groups, self._group = 1, 0  #: how many models there are, and which is this process's
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            check_not_sharded(model, "sequences")
            self.ranks = Ranks()
            self._groups, self._group = self.ranks.size, self.ranks.rank
            group = tensor_parallel_group(model)
            if group is not None:
                self._model = Ranks(group)
                members = self.ranks.gather_objects(dist.get_process_group_ranks(group))
                groups = sorted({tuple(ranks) for ranks in members})
                self._groups, self._group = len(groups), groups.index(tuple(members[self.ranks.rank]))

    @property
    def leads(self) -> bool:
        """Whether this process writes what there is to write."""
        return self.ranks is None or self.ranks.rank == 0

    @property
    def count(self) -> int:
        return 1 if self.ranks is None else self.ranks.size

    def together(self) -> AbstractContextManager[None]:
        """A block that all get through, or none; nothing of a model that is split may be gathered in it."""
        return nullcontext() if self.ranks is None else self.ranks.together()

    def checks_of_model(self) -> AbstractContextManager[None]:
        """The same where that may be; of a split model a check that fails on one process alone ends only this one."""
        return nullcontext() if self._model is not None else self.together()

    def agree(self, facts: Callable[[], dict[str, Any]]) -> None:
        """That ``facts()`` are the same on all: see :meth:`.Ranks.agree`."""
        if self.ranks is not None:
            self.ranks.agree(facts)

    def first(self, value: Any) -> Any:
        """The first's ``value``."""
        return value if self.ranks is None else self.ranks.first(value)

    def own(self, sequences: Tensor) -> tuple[float, Tensor]:
        """Which of ``sequences`` ``[n, ...]`` this process runs, maybe none, and what part of all they are."""
        if self._groups == 1:
            return 1.0, sequences
        part = sequences[shares(len(sequences), self._groups)[self._group]]
        return len(part) / len(sequences), part

    def own_rows(self, states: States) -> tuple[dict[str, float], States]:
        """Which rows of what it ran this process reads, maybe none, and what part of all that a mean is over they are:
        "kl" of all rows, "ce" of those with a target.
        """
        if self._model is None:
            return {"kl": 1.0, "ce": 1.0}, states
        at = shares(len(states.reference), self._model.size)[self._model.rank]
        own = States([h[at] for h in states.hidden], states.reference[at], states.last[at], states.targets[at])
        with_target = [int((s.targets >= 0).sum()) for s in (own, states)]
        return {"kl": len(own.targets) / len(states.targets), "ce": with_target[0] / with_target[1]}, own

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all processes in the place of each."""
        if self.ranks is not None:
            for tensor in tensors:
                self.ranks.sum_(tensor)

    def same(self, tensors: Iterable[Tensor]) -> None:
        """Put the first's in the place of each."""
        if self.ranks is not None:
            for tensor in tensors:
                self.ranks.copy_from_first_(tensor)

    def optimizer(
        self, kind: type[torch.optim.Optimizer], parameters: Sequence[nn.Parameter], **options: Any
    ) -> torch.optim.Optimizer:
        """One whose state is spread over the processes, of which each steps its share and gives it to the others."""
        if self.ranks is None:
            return kind(parameters, **options)
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(parameters, kind, **options)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take a step."""
        with nullcontext() if self.ranks is None else self.ranks.reached():
            optimizer.step()

    def state_of(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """All of its state, on the first process; others have nothing to write."""
        if self.ranks is not None:
            with self.ranks.reached():
                optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
            if not self.leads:
                return {}
        return optimizer.state_dict()
