"""Times calls that take turns, and reads the memory one takes. CPU and GPU alike."""

from __future__ import annotations

import ctypes
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tuned_lens_fast.memory import PeakMemory

#: Of a call's seconds, what the floor takes before and after it, at least.
FLOOR_SHARE = 0.1
#: Some 3 ms at 2 GHz.
QUEUED_CLOCKS = 6_000_000


def timed(call: Callable[[], Any], device: str, queued: bool = False) -> float:
    """Seconds of one call; ``queued``: of a GPU's own work, behind which the launches are hidden.

    The GPU is kept busy while the call is launched. One that waits for an answer is not hidden from there on.
    """
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if queued:
            torch.cuda._sleep(QUEUED_CLOCKS)
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

    Of fewer than six values nothing can be said. Where calls end as soon as it is narrow, it holds somewhat less
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


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """What is kept of the times of one call: their extremes, quartiles and median, and how many there are."""
    found = torch.tensor(seconds, dtype=torch.float64).quantile(torch.linspace(0, 1, 5, dtype=torch.float64))
    return {**dict(zip(("min", "q1", "median", "q3", "max"), found.tolist(), strict=True)), "calls": len(seconds)}


def peak_growth(call: Callable[[], Any], device: torch.device) -> tuple[int | None, Any]:
    """Bytes by which memory in use grows at most during ``call``, the answer included, and the answer.

    Meanwhile the C library gives back every MiB that is freed, so that what it would keep for later is not counted.
    """
    try:
        _map_from(2**20)
        peak = PeakMemory(device, trim=True)
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
