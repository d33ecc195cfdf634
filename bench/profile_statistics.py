"""One launch of the statistics kernel with everything asked for, for a profiler to look at; see bench/gpu.sh."""

from __future__ import annotations

import sys
from dataclasses import replace

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
    import torch
    from contenders import CONTENDERS
    from presets import BUDGET, PRESETS, random_problem

    shape = replace(PRESETS["llama-3-8b"], layers=4)
    problem = random_problem(shape, 1024, torch.bfloat16, "cuda", BUDGET, start="head")
    call = CONTENDERS["triton"].prepare(problem.asking(frozenset({"entropy", "log_prob", "rank"}), 10))
    for _ in range(2):
        call()


if __name__ == "__main__":
    if sys.argv[1:] == ["--metrics"]:
        print(",".join(METRICS))
    else:
        main()
