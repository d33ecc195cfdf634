"""Permutations that leave nothing in its place, for resampling. The module's name is tuned-lens's."""

from __future__ import annotations

import torch
from torch import Tensor


def derange(batch: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``batch`` ``[n, ...]`` with its rows in a random order that leaves none in its place.

    Raises:
        ValueError: fewer than two rows.
    """
    return batch[sample_derangement(batch.shape[0], device=batch.device, generator=generator)]


def sample_derangement(n: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """A permutation int64 ``[n]`` without fixed points, each as likely as any other.

    Permutations are drawn until one has none, e times on average.

    Raises:
        ValueError: ``n`` is less than 2.
    """
    if n < 2:
        raise ValueError(f"n: got {n}, wanted 2 or more; one thing is always in its place")
    places = torch.arange(n, device=device)
    while True:
        found = torch.randperm(n, device=device, generator=generator)
        if not (found == places).any():
            return found
