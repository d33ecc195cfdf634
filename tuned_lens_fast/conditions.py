"""Under which conditions a run is made: what the last bits of its results depend on beside what is asked."""

from __future__ import annotations

import functools
import platform
import warnings
from importlib.metadata import version
from typing import Any

import torch


@functools.cache
def versions() -> dict[str, str]:
    """Of this package and of what it computes with."""
    packages = {name.replace("-", "_"): version(name) for name in ("tuned-lens-fast", "torch", "transformers")}
    return {**packages, "python": platform.python_version()}


def machine(device: torch.device) -> dict[str, Any]:
    """What ``device`` is, and how many threads a CPU computes with."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def warn_of_changes(begun_with: dict[str, Any], goes_on_with: dict[str, Any], done: str, stacklevel: int) -> None:
    """Warn where a run goes on under other conditions than it began under; ``done`` is what is done to its rows."""
    changed = [
        f"{name} {begun_with.get(name)} then, {value} now"
        for name, value in goes_on_with.items()
        if begun_with.get(name) != value
    ]
    if changed:
        warnings.warn(
            f"out: the run began under other conditions ({'; '.join(changed)}), so that the last bits of what is "
            f"{done} now may differ from an undisturbed run's",
            stacklevel=stacklevel + 1,
        )
