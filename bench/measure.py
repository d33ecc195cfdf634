"""Times, memory and what they were measured on. CPU and GPU alike."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: What decides how fast a CPU multiplies.
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "sve", "i8mm")
#: Of a call's seconds, what the floor takes before and after it, at least.
FLOOR_SHARE = 0.1
PACKAGES = ("torch", "triton", "numpy", "transformers", "tuned-lens", "cut-cross-entropy", "liger-kernel")


def environment(device: str) -> dict[str, Any]:
    """Machine, versions and date."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"tuned-lens-fast": _version("tuned-lens-fast")} | {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": gpu.name,
            "processors": gpu.multi_processor_count,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "l2_mib": round(gpu.L2_cache_size / 2**20),
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit checked out, with a + where files differ from it; None outside of a repository."""
    folder = Path(__file__).parent
    try:
        said = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0] + ("+" if said[1] else "")


def _cpu() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "name": fields.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def _driver() -> str | None:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def confidence(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the median of the values' distribution, whatever that is.

    Of fewer than six values nothing can be said. Where rounds end as soon as it is narrow, it holds somewhat less
    often. After Conover (1999), "Practical nonparametric statistics".
    """
    count, outside, rank = len(values), 0.0, 0
    while (outside := outside + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    if not rank:
        return -math.inf, math.inf
    ordered = sorted(values)
    return ordered[rank - 1], ordered[count - rank]


def settled(ratios: Sequence[float], within: float) -> bool:
    """Whether the 95% interval of the median is no wider than this share of it to either side."""
    low, high = confidence(ratios)
    return high - low <= 2 * within * statistics.median(ratios) if ratios else False


@dataclass(frozen=True)
class Race:
    """Calls that are compared with each other, and how often each is made.

    The one named ``floor`` runs between any two of the others, for a machine's speed may change within a round, and as
    often as it takes to last ``FLOOR_SHARE`` of the longer of them, by what the later one took before.
    """

    calls: dict[str, Callable[[], Any]]
    rounds: dict[str, int]
    floor: str | None = None
    threads: int | None = None  #: of PyTorch, where not those it has now


#: Seconds of every round of each call, and their multiples of the floor's just before and after.
Times = dict[str, tuple[list[float], list[float]]]


def interleaved(races: Sequence[Race], device: str, within: float = 0.0) -> list[Times]:
    """The times of each race's calls.

    Races take turns, and calls within a race, each round in an order of its own, so that a machine that warms up or is
    throttled treats all alike, and none always follows the same other; those with fewer rounds have them spread over
    the whole time. A floor alone runs as often as the call with the most rounds. A call whose multiples are
    :func:`settled` ``within`` a share has no further rounds.
    """
    most = max((rounds for race in races for rounds in race.rounds.values()), default=0)
    found: list[Times] = [{name: ([], []) for name in race.calls} for race in races]
    threads = torch.get_num_threads()
    shuffled = random.Random(most)
    order = list(range(len(races)))
    for turn in range(most):
        shuffled.shuffle(order)
        for i in order:
            race, times = races[i], found[i]
            names = [name for name in race.calls if name != race.floor]
            shuffled.shuffle(names)
            due = [
                name
                for name in names
                if (turn + 1) * race.rounds[name] // most > turn * race.rounds[name] // most
                and not settled(times[name][1], within)
            ]
            if race.threads is not None:
                torch.set_num_threads(race.threads)
            _take_turns(race, due, times, device, alone=not names)
    torch.set_num_threads(threads)
    for race, times in zip(races, found, strict=True):
        if race.floor is not None:
            times[race.floor][1].extend(1.0 for _ in times[race.floor][0])
    return found


def _take_turns(race: Race, due: list[str], times: Times, device: str, alone: bool) -> None:
    """One round of those that are due; of the floor by itself where there are no others."""

    def beside(least: float) -> float:
        if race.floor is None:
            return math.nan
        seconds: list[float] = []
        while not seconds or sum(seconds) < least:
            seconds.append(timed(race.calls[race.floor], device))
        times[race.floor][0].extend(seconds)
        return statistics.mean(seconds)

    expected = [*(times[name][0][-1] if times[name][0] else 0.0 for name in due), 0.0]
    before = beside(FLOOR_SHARE * expected[0]) if due or alone else math.nan
    for name, following in zip(due, expected[1:], strict=True):
        seconds, ratios = times[name]
        seconds.append(timed(race.calls[name], device))
        if race.floor is not None:
            after = beside(FLOOR_SHARE * max(seconds[-1], following))
            ratios.append(2 * seconds[-1] / (before + after))
            before = after


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def _resident(field: str) -> int:
    """VmRSS (resident now) or VmHWM (the peak since the last reset) in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class ResidentPeak:
    """How far the resident peak rises from now on, on Linux.

    What the allocator kept of former calls is given back first, or it would hide the growth.
    """

    def __init__(self) -> None:
        gc.collect()
        self._before: int | None = None
        if Path("/proc/self/clear_refs").exists():
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):
                libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident("VmRSS")

    def growth(self) -> int | None:
        """Bytes; None where the system does not tell."""
        return None if self._before is None else max(0, _resident("VmHWM") - self._before)


def peak_growth(call: Callable[[], Any], device: str) -> tuple[int | None, Any]:
    """Bytes by which memory in use grows at most during ``call``, the answer included, and the answer.

    On a CPU the resident peak, which Linux alone lets one reset; elsewhere None. Meanwhile the allocator gives back
    every MiB that is freed, so that what it would keep for later is not counted.
    """
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        answer = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, answer
    try:
        _map_from(2**20)
        peak = ResidentPeak()
        answer = call()
        return peak.growth(), answer
    finally:
        _map_from(2**25)  # what glibc itself goes up to


def _map_from(size: int) -> None:
    """Have glibc map allocations of this size and more by themselves, and keep twice as much of what is freed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 * size)  # M_TRIM_THRESHOLD, which glibc moves along until either is set


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of size that values grow with: the slope of the least-squares line through their logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope
