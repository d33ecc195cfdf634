"""Decodes of a few rows, as in generation or on an interactive page: their time over that of reading W once.

    python bench/small_decodes.py --preset llama-3-8b smollm2-135m --rows 1 8 64 [--out FILE]

Rows are layers at one position, as the head receives them, with every statistic of one pass and a top 10. On a GPU the
decode is captured in a CUDA graph (``graph``), and called from Python as well (``call``); W is read by a product with a
vector and by a sum of its bits, of which the quicker counts. Written preset by preset.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders.ours import decode
from measure import Race, interleaved, quantiles
from presets import BUDGET, PRESETS, Problem, problems, question
from record import heading, write
from suites import ONE_WALK

from tuned_lens_fast.engines import ENGINES


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and lets libraries take their workspaces
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def contenders(problem: Problem) -> dict[str, Callable[[], Any]]:
    weight, [x] = problem.head.weight, problem.hidden[0][:1]
    calls: dict[str, Callable[[], Any]] = {
        "W read by torch.mv": lambda: torch.mv(weight, x),
        "W read by a sum": lambda: weight.view(torch.int32).sum(),
    }
    call = functools.partial(decode, ENGINES["triton"], problem)
    if problem.device.type == "cuda":
        calls["graph"] = captured(call)
    return calls | {"call": call}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["smollm2-135m"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases: list[dict[str, Any]] = []
    for preset in options.preset:
        dtype = PRESETS[preset].dtype if device == "cuda" else torch.float32
        inputs: dict[str, Any] = {"dtype": dtype, "device": device, "budget": BUDGET, "start": "head"}
        for problem in problems(preset, options.rows, [1], [], "random", **inputs):
            calls = contenders(problem.asking(*question(ONE_WALK)))
            for call in calls.values():
                call()
            [times] = interleaved([Race(calls, dict.fromkeys(calls, options.rounds))], device)
            found = {name: quantiles(seconds) for name, (seconds, _) in times.items()}
            read = min(entry["median"] for name, entry in found.items() if name.startswith("W"))
            case = {"preset": preset, "rows": problem.rows, "vocab": problem.head.vocab, "seconds": found, "read": read}
            cases.append(case)
            ratios = {name: entry["median"] / read for name, entry in found.items()}
            told = (f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            print(f"{preset}, {problem.rows} rows:", *told, flush=True)
        if options.out:
            begins = {"kind": "small decodes", **heading("small_decodes.py", sys.argv[1:], device)}
            write(options.out, {**begins, "cases": cases})
    return 0


if __name__ == "__main__":
    sys.exit(main())
