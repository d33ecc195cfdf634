"""How engines cut their work, and the answer they fill."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import Query


def slices(total: int, size: int) -> Iterator[slice]:
    """0..total in parts of ``size``, the last one smaller."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def even(total: int, most: int) -> int:
    """The size of equal parts of ``total``, none larger than ``most``."""
    return math.ceil(total / math.ceil(total / most)) if total else 1


def empty_answer(layers: int, positions: int, query: Query, device: torch.device) -> dict[str, Tensor]:
    """Room for the answer, uninitialised; see Engine.decode for shapes."""
    shape = (layers, positions)
    out = {
        name: torch.empty(shape, dtype=torch.int64 if name == "rank" else torch.float32, device=device)
        for name in ("lse", *sorted(query.stats))
    }
    if query.top_k:
        out["top_ids"] = torch.empty((*shape, query.top_k), dtype=torch.int64, device=device)
        out["top_log_probs"] = torch.empty((*shape, query.top_k), dtype=torch.float32, device=device)
    if query.watch is not None:
        out["watch_log_probs"] = torch.empty((*shape, len(query.watch)), dtype=torch.float32, device=device)
    return out
