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

from tuned_lens_fast.ranks import Ranks, tensor_parallel_group


class Workers:
    """Every method is to be called by all of them alike."""

    def __init__(self, model: Any) -> None:
        """Those of the default process group of ``torch.distributed``, if there is one.

        The ranks of a model that is split by tensor parallelism run the same sequences, and the first of them writes.

        Raises:
            ValueError: the model is split over some of the processes only.
        """
        self.ranks: Ranks | None = None
        self.split = False  #: whether all of them run one model
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.ranks = Ranks()
            group = tensor_parallel_group(model)
            self.split = group is not None
            if group is not None and dist.get_world_size(group) != self.ranks.size:
                raise ValueError(
                    f"model: it is split over {dist.get_world_size(group)} of {self.ranks.size} processes; wanted all "
                    f"of them, or a whole model in each"
                )

    @property
    def leads(self) -> bool:
        """Whether this process writes what there is to write."""
        return self.ranks is None or self.ranks.rank == 0

    @property
    def count(self) -> int:
        return 1 if self.ranks is None else self.ranks.size

    def checks(self) -> AbstractContextManager[None]:
        """A block that all get through, or none; its checks may gather what is split."""
        return nullcontext() if self.ranks is None or self.split else self.ranks.together()

    def alone(self) -> AbstractContextManager[None]:
        """A block in which the first does something; where it fails, all do."""
        return nullcontext() if self.ranks is None else self.ranks.together()

    def agree(self, facts: Callable[[], dict[str, Any]]) -> None:
        """That ``facts()`` are the same on all: see :meth:`.Ranks.agree`."""
        if self.ranks is not None:
            self.ranks.agree(facts)

    def first(self, value: Any) -> Any:
        """The first's ``value``."""
        return value if self.ranks is None else self.ranks.first(value)

    def own(self, sequences: Tensor) -> tuple[float, Tensor]:
        """This process's share of ``sequences`` ``[n, ...]``, as a part of 1 and as those that it has; maybe none."""
        if self.ranks is None or self.split:
            return 1.0, sequences
        part = sequences[self.ranks.shares(len(sequences))[self.ranks.rank]]
        return len(part) / len(sequences), part

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all processes in the place of each."""
        if self.ranks is not None and not self.split:
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

    def state_of(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """All of its state, on the first process; others have nothing to write."""
        if self.ranks is not None:
            optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
            if not self.leads:
                return {}
        return optimizer.state_dict()
