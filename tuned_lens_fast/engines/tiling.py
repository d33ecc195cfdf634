"""Into which parts work is cut, and room for the answer that the parts fill."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import Query
from tuned_lens_fast.engines.statistics import asked


def slices(total: int, size: int) -> Iterator[slice]:
    """0..total in parts of ``size``, the last one smaller."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def even(total: int, most: int) -> int:
    """The size of equal parts of ``total``, none larger than ``most``."""
    return math.ceil(total / math.ceil(total / most)) if total else 1


def _flattens(entry: Tensor) -> bool:
    """Whether ``[..., d_model]`` is a view ``[positions, d_model]``."""
    lead = [(size, stride) for size, stride in zip(entry.shape[:-1], entry.stride()[:-1], strict=True) if size != 1]
    return not entry.numel() or all(
        stride == inner_size * inner for (_, stride), (inner_size, inner) in itertools.pairwise(lead)
    )


def flat_pieces(entries: Sequence[Tensor], query: Query) -> Iterator[tuple[list[Tensor], Query]]:
    """Entries ``[..., width]`` as rows ``[positions, width]``, which are views, and the question about these.

    Where positions do not lie evenly, as in a batch without its last position, the leading index goes one by one.
    """
    if all(map(_flattens, entries)):
        yield [entry.reshape(-1, entry.shape[-1]) for entry in entries], query
        return
    at_once = entries[0][0].numel() // entries[0].shape[-1]
    for i in range(entries[0].shape[0]):
        yield from flat_pieces([entry[i] for entry in entries], query.at(slice(i * at_once, (i + 1) * at_once)))


def empty_answer(layers: int, positions: int, query: Query, device: torch.device) -> dict[str, Tensor]:
    """Room for the answer, uninitialised; see Engine.decode for shapes."""
    shape = (layers, positions)
    sizes = {statistic: statistic.columns(query) for statistic in asked(query)}
    return {
        statistic.name: torch.empty(
            shape if columns is None else (*shape, columns), dtype=statistic.dtype, device=device
        )
        for statistic, columns in sizes.items()
    }
