"""The processes that read one model together: who they are, and the few things that they tell each other.

Beside the way from hidden state to statistics. Answers are gathered and put together in the order of ranks, never
reduced on the way, so that all of them have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tuned_lens_fast.conditions import versions
from tuned_lens_fast.engines import choose
from tuned_lens_fast.messages import quoted, shortened
from tuned_lens_fast.models.alias import is_fully_sharded
from tuned_lens_fast.models.blocks import linear_head
from tuned_lens_fast.models.resident import is_spread

Split = Literal["rows", "vocabulary"]
#: The share of a GPU's free memory that the whole unembedding may take where nobody says how to split.
_WHOLE_HEAD = 0.25


class Ranks:
    """A process group of ``torch.distributed``; every method is to be called by all of its ranks."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)

    def shares(self, total: int) -> list[slice]:
        """0..total in as many parts as there are ranks, as even as can be; some are empty where there are too few."""
        return shares(total, self.size)

    def gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Every rank's ``tensors``, which have the same shapes and dtypes on all; by rank."""
        flat = torch.cat([t.new_empty(t.shape).copy_(t).view(-1).view(torch.uint8) for t in tensors])
        if not flat.numel():
            return [[*tensors] for _ in range(self.size)]
        found = [torch.empty_like(flat) for _ in range(self.size)]
        with self.reached():
            dist.all_gather(found, flat, group=self.group)
        return [_unflattened(bytes_, tensors) for bytes_ in found]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank; pickled."""
        found: list[Any] = [None] * self.size
        with self.reached():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def first(self, value: Any) -> Any:
        """The first rank's ``value``; pickled."""
        held = [value]
        with self.reached():
            dist.broadcast_object_list(held, group_src=0, group=self.group)
        return held[0]

    def sum_(self, tensor: Tensor) -> None:
        """Put the sum over all ranks in the place of ``tensor``; the same on all of them."""
        with self.reached():
            dist.all_reduce(tensor, group=self.group)

    def copy_from_first_(self, tensor: Tensor) -> None:
        """Put the first rank's in the place of ``tensor``."""
        with self.reached():
            dist.broadcast(tensor, group_src=0, group=self.group)

    def agree(self, facts: Callable[[], dict[str, Any]]) -> None:
        """That ``facts()`` are the same on all ranks.

        Raises:
            ValueError: they are not; it names what differs.
            Exception: ``facts`` raised it here; where it did on another rank, a RuntimeError that repeats it.
        """
        held: dict[str, Any] = {}
        with self.together():
            held = facts()
        others = self.gather_objects({name: repr(value) for name, value in held.items()})
        for name in held:
            values = [other.get(name) for other in others]
            if len(set(values)) > 1:
                at = next(rank for rank, value in enumerate(values) if value != values[0])
                raise ValueError(
                    f"{name}: got {shortened(values[0], 60)} on rank 0 and {shortened(values[at], 60)} on rank {at}; "
                    f"all ranks have to ask the same"
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block without collectives, behind which all ranks go on, or none.

        Raises:
            Exception: the block raised it here; where it did on another rank, a RuntimeError that repeats it.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        said = self.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [rank for rank, message in enumerate(said) if message is not None]
        if failed:
            raise RuntimeError(f"rank {failed[0]} failed: {shortened(said[failed[0]], 1000)}")

    @contextmanager
    def reached(self) -> Iterator[None]:
        """A block with collectives.

        Raises:
            RuntimeError: one of them failed, and what that means.
        """
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} cannot reach the others, of which one has ended or hangs: "
                f"{shortened(error, 200)}"
            ) from error


def shares(total: int, of: int) -> list[slice]:
    """0..total in ``of`` parts, as even as can be; some are empty where there is too little."""
    return [slice(part * total // of, (part + 1) * total // of) for part in range(of)]


def ranks_of(model: Any, split: Split | None) -> tuple[Ranks, Split] | None:
    """The ranks that read ``model`` together and how they split the work; None for a process that is alone.

    Those of a model that is split by tensor parallelism are the ranks of its head's or blocks' mesh. Of one that every
    rank has whole, those of the default process group, if ``split`` asks for it.

    Raises:
        ValueError: no such way to split, or no process group.
    """
    if split not in (None, "rows", "vocabulary"):
        raise ValueError(f"split: got {quoted(split)}, wanted 'rows', 'vocabulary' or None")
    if not (dist.is_available() and dist.is_initialized()):
        if split is not None:
            raise ValueError(
                f"split: got {split!r} and no process group; start with torchrun, and load the model with tp_plan or "
                f"call torch.distributed.init_process_group"
            )
        return None
    group = tensor_parallel_group(model)
    if group is None and split is None:
        return None
    ranks = Ranks(group)
    if ranks.size == 1:
        return None
    return ranks, split or _default(ranks, linear_head(model).weight)


def agree(together: tuple[Ranks, Split], model: Any, lens: Any, asked: dict[str, Any]) -> None:
    """That all ranks ask the same of the same model and lens with the same software, before any of them runs it.

    Raises:
        ValueError: they do not; it names what differs.
        RuntimeError: a check failed on another rank.
    """
    from tuned_lens_fast.data import fingerprint

    ranks, split = together

    def facts() -> dict[str, Any]:
        told: dict[str, Any] = {**versions(), "split": split, "lens": type(lens).__name__}
        head = linear_head(model).weight
        told["model"] = f"{type(model).__name__}, head {[*head.shape]} {head.dtype}"
        told |= {name: getattr(lens, name, None) for name in ("config", "translated_layers")}
        for name, value in asked.items():
            if isinstance(value, Tensor):
                value = f"{[*value.shape]} {fingerprint.of_tensors([value.cpu()])[:12]}"
            elif isinstance(value, Iterable) and not isinstance(value, (str, Sequence)):
                value = sorted(value)
            told[name] = value
        told["engine"] = choose(asked["engine"], head.device, head.dtype, of_a_part=split == "vocabulary").name
        return told

    ranks.agree(facts)


def check_not_sharded(model: Any, work: str) -> None:
    """Refuse a model in FSDP2 for ``work`` that is shared out among processes, whose passes are unequal in number.

    Raises:
        ValueError: it is in FSDP2.
    """
    if any(map(is_fully_sharded, model.modules())):
        raise ValueError(
            f"model: it is in FSDP2, of which all ranks have to run all that one runs, and {work} are shared out; "
            f"split it with tp_plan, or give each process a model of its own"
        )


def tensor_parallel_group(model: Any) -> Any:
    """The process group over which weights of the model are cut; None where they are whole, or FSDP2's."""
    if any(map(is_fully_sharded, model.modules())):
        return None
    for parameter in model.parameters():
        if is_spread(parameter):
            cut = [at for at, placement in enumerate(parameter.placements) if not placement.is_replicate()]
            if len(cut) > 1:
                raise ValueError("model: its weights are cut along two dimensions of a mesh of devices, wanted one")
            if cut:
                return parameter.device_mesh.get_group(cut[0])
    return None


def _default(ranks: Ranks, head: Tensor) -> Split:
    large = False
    if head.device.type == "cuda":
        large = head.numel() * head.element_size() > _WHOLE_HEAD * torch.cuda.mem_get_info(head.device)[0]
    return "vocabulary" if any(ranks.gather_objects(large)) else "rows"


def _unflattened(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    found, start = [], 0
    for tensor in like:
        size = tensor.numel() * tensor.dtype.itemsize
        # A copy, since numbers of 8 bytes may begin at any byte here.
        found.append(flat[start : start + size].clone().view(tensor.dtype).view(tensor.shape))
        start += size
    return found
