"""One launch of the statistics kernel with everything asked for, for a profiler to look at; see bench/gpu.sh."""

from __future__ import annotations

import sys

#: What a profiler counts: time, the busiest unit of the processors, issue slots, L2 and memory traffic, registers.
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
)


def main() -> None:
    import gpu

    shape = gpu.Shape(4, 1024, 4096, 128256)
    x, weight, targets, _ = gpu.problem(shape)
    for _ in range(2):
        gpu.ask(x, weight, shape, gpu.ALL, targets, None, 10)


if __name__ == "__main__":
    if sys.argv[1:] == ["--metrics"]:
        print(",".join(METRICS))
    else:
        main()
