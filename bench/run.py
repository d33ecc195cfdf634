"""Times, memory and errors of this package beside everything a user would otherwise run.

    python bench/run.py --preset smollm2-135m --weights real --positions 32 64 128 [--out RESULT.json]
    python bench/run.py --suite cpu [--part NAME ...] [--out FOLDER]
    python bench/run.py --compare A B

All contenders get the same inputs and must give the numbers of float64 on a sample of rows before any is timed; one
that does not is refused, one that cannot run says why. They take turns; times are medians with quartiles, and are told
as multiples of the bare matrix product's as well. --suite runs the comparisons that docs/performance.md is made of
(bench/report.py), each part in a process of its own, and leaves out those whose results are there, unless they are
asked for by --part. --compare tells how far two runs of the same comparison are apart. The exit status is 1 where an
engine of this package fails, or errs by more than it promises.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checking import Expected, expect, judge
from contenders import CONTENDERS, Contender
from measure import Race, interleaved, peak_growth, quantiles, timed
from presets import BUDGET, PRESETS, Problem, problems, question
from record import heading, write
from suites import FULL, SUITES

HERE = Path(__file__).parent
#: Ratios of two runs further apart than this are told apart.
AGREEMENT = 0.10
#: Seconds; of a shorter first call, what it loads and sets up is a part worth leaving out of its memory.
WARM_ENOUGH = 1.0
SIZES = ("layers", "positions", "vocab", "threads")
Case = dict[str, Any]


def measure(some: list[tuple[Case, Problem]], contenders: list[Contender], options: argparse.Namespace) -> None:
    """What every contender does with each problem, put into its case; the problems take turns."""
    races = []
    for case, problem in some:
        torch.set_num_threads(case["threads"])
        case["contenders"], race = admit_all(contenders, problem, options)
        races.append(replace(race, threads=case["threads"]))
    for (case, _), times in zip(some, interleaved(races, options.device, options.within), strict=True):
        for name, (seconds, _) in times.items():
            case["contenders"][name]["seconds"] = quantiles(seconds)
        sum_up(case)
    for (case, _), race in zip(some, races, strict=True):
        if options.queued and case["floor"] in race.calls:
            own = {
                name: min(timed(call, options.device, queued=True) for _ in range(3))
                for name, call in race.calls.items()
            }
            for name, seconds in own.items():
                case["contenders"][name]["queued_over_product"] = seconds / own[case["floor"]]


def admit_all(
    contenders: list[Contender], problem: Problem, options: argparse.Namespace
) -> tuple[dict[str, Case], Race]:
    """Name -> why a contender has no time, or what its first call told; and the race of those that are timed."""
    expected = expect(problem, options.sample)
    found: dict[str, Case] = {contender.name: {} for contender in contenders}
    race = Race({}, {})

    def enter(contender: Contender) -> None:
        found[contender.name], call, once = admit(contender, problem, expected)
        if call is None:
            return
        if once > options.patience and not contender.floor:
            found[contender.name]["seconds"] = quantiles([once])
        else:
            race.calls[contender.name] = call
            race.rounds[contender.name] = min(options.rounds, max(options.least, int(options.seconds / once)))

    for contender in contenders:
        if contender.floor:
            enter(contender)
    [tried] = interleaved([Race(race.calls, dict.fromkeys(race.calls, 3))], options.device)
    race = replace(race, floor=min(tried, key=lambda name: min(tried[name][0]), default=None))
    for contender in contenders:
        if not contender.floor:
            enter(contender)
    return found, race


def sum_up(case: Case) -> None:
    """Tell every time as a multiple of the quickest floor's median."""
    timed = {name: entry["seconds"] for name, entry in case["contenders"].items() if "seconds" in entry}
    floors = {name: seconds["median"] for name, seconds in timed.items() if CONTENDERS[name].floor}
    case["floor"] = min(floors, key=floors.__getitem__, default=None)
    for name, seconds in timed.items() if floors else ():
        multiples = {key: seconds[key] / floors[case["floor"]] for key in ("q1", "median", "q3")}
        case["contenders"][name]["over_product"] = multiples


def admit(contender: Contender, problem: Problem, expected: Expected) -> tuple[Case, Callable[[], Any] | None, float]:
    """A contender's entry, its call where it may be timed, and the seconds a call takes; memory is measured here."""
    try:
        why = contender.why_not(problem)
        if why is not None:
            return {"status": "not here", "why": why}, None, 0.0
        call = contender.prepare(problem)
        once, peak, answer = first_call(call, problem.device)
        entry: Case = {}
        if not contender.floor:
            verdict = judge(answer, problem, expected)
            if verdict.wrong is not None:
                return {"status": "refused", "why": f"wrong numbers: {verdict.wrong}"}, None, 0.0
            entry["errors_over_allowed"] = verdict.errors
        del answer
        if once < WARM_ENOUGH:
            once, peak, _ = first_call(call, problem.device)
        return entry if contender.floor else {"peak_extra_bytes": peak, **entry}, call, once
    except Exception as error:  # others' code: whatever it raises is the reason it has no time
        gc.collect()
        if problem.device.type == "cuda":
            torch.cuda.empty_cache()
        line = (str(error).strip() or "no message").splitlines()[0][:200]
        return {"status": "failed", "why": f"{type(error).__name__}: {line}"}, None, 0.0


def first_call(call: Callable[[], Any], device: torch.device) -> tuple[float, int | None, Any]:
    """Seconds, bytes of memory and answer of a call that is no part of the race."""
    start = time.perf_counter()
    peak, answer = peak_growth(call, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, peak, answer


def every_case(options: argparse.Namespace) -> Iterator[tuple[Case, Problem]]:
    """What is asked of which sizes, and the problem that this is."""
    for threads, preset in itertools.product(options.threads or [torch.get_num_threads()], options.preset):
        shape = PRESETS[preset]
        default = torch.float32 if options.device == "cpu" else shape.dtype
        inputs = {
            "dtype": getattr(torch, options.dtype) if options.dtype else default,
            "device": options.device,
            "budget": BUDGET,
            "start": options.start,
        }
        every = problems(preset, options.layers, options.positions, options.vocabulary, options.weights, **inputs)
        for whole, asked in itertools.product(every, options.statistics):
            problem = whole.asking(*question(asked))
            case = {
                "preset": preset,
                "statistics": asked,
                "layers": problem.layers,
                "positions": problem.positions,
                "vocab": problem.head.vocab,
                "d_model": shape.d_model,
                "dtype": str(problem.dtype).removeprefix("torch."),
                "threads": threads,
            }
            yield case, problem


def run(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """All cases of one comparison, as what is written to its JSON file; it is written after every case.

    Of a file that is there and unfinished, the cases are kept if it comes from the same command.
    """
    contenders = [CONTENDERS[name] for name in options.contenders]
    settings = {"kind": "comparison", "weights": options.weights, "start": options.start}
    result = {**heading("run.py", arguments, options.device), **settings}
    cases = kept(options.out, result["command"])
    every = every_case(options)
    for some in [list(every)] if options.together else ([one] for one in every):
        if all(any(case.items() <= old.items() for old in cases) for case, _ in some):
            continue
        measure(some, contenders, options)
        for case, _ in some:
            show(case)
            cases.append(case)
        if options.out:
            write(options.out, {**result, "unfinished": True, "cases": cases})
    return {**result, "cases": cases}


def kept(out: Path | None, command: str) -> list[Case]:
    """The cases of a run that was stopped."""
    if out is None or not out.exists():
        return []
    before = json.loads(out.read_text())
    return before["cases"] if before.get("unfinished") and before["command"] == command else []


def promises_broken(result: dict[str, Any]) -> Iterator[str]:
    """Where an engine of ours failed, was refused, or is further from float64 than it promises.

    Of 16-bit weights the promise holds for the vocabulary pass alone: from hidden states, x may be rounded otherwise.
    """
    for case in result["cases"]:
        size = f"{case['preset']}, {case['layers']} x {case['positions']} x {case['vocab']}"
        held_to_it = case["dtype"] in ("float32", "float64") or result["start"] == "head"
        for name, entry in case["contenders"].items():
            if not CONTENDERS[name].ours:
                continue
            if entry.get("status") in ("failed", "refused"):
                yield f"{size}: {name} {entry['status']}: {entry['why']}"
            for statistic, share in entry.get("errors_over_allowed", {}).items() if held_to_it else ():
                if share > 1:
                    yield f"{size}: {name}'s {statistic} is {share:.1f} times as far off as is allowed"


def show(case: Case) -> None:
    """One case as lines in the terminal."""
    sizes = f"{case['layers']} layers x {case['positions']} positions x {case['vocab']} tokens, d {case['d_model']}"
    print(f"\n{case['preset']}: {sizes}, {case['dtype']}, {case['threads']} threads; {case['statistics']}")
    print(f"{'':20} {'seconds':>9} {'quartiles':>19} calls  over product  over linear    MiB  error")
    linear = case["contenders"].get("linear", {}).get("seconds")
    for name, entry in case["contenders"].items():
        if "seconds" not in entry:
            print(f"{name:20} {entry['status']}: {entry['why']}")
            continue
        s, ratio = entry["seconds"], entry.get("over_product", {}).get("median")
        print(
            f"{name:20} {s['median']:9.4g} {s['q1']:8.4g} - {s['q3']:8.4g} {s['calls']:5d}",
            f"{'' if ratio is None else f'{ratio:.3f}':>13}",
            f"{'' if linear is None else format(s['median'] / linear['median'], '.3f'):>12}",
            f"{(entry.get('peak_extra_bytes') or 0) / 2**20:6.0f}",
            f"{max(entry.get('errors_over_allowed', {}).values(), default=0):6.2f}",
            flush=True,
        )


def run_suite(name: str, folder: Path, parts: list[str]) -> int:
    """Run the ``parts`` named, or all that are not in ``folder`` yet; the number of those that failed."""
    failed = 0
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts or SUITES[name]:
        out = folder / f"{part}.json"
        if out.exists() and not parts and not json.loads(out.read_text()).get("unfinished"):
            print(f"{part}: already in {out}")
            continue
        script, *arguments = shlex.split(SUITES[name][part])
        print(f"{part}: {shlex.join(['python', f'bench/{script}', *arguments])}", flush=True)
        start = time.perf_counter()
        status = subprocess.run([sys.executable, HERE / script, *arguments, "--out", out]).returncode
        failed += status != 0
        print(f"{part}: {'done' if not status else f'failed ({status})'} in {time.perf_counter() - start:.0f} s\n")
    return failed


def ratios(path: Path) -> dict[tuple, float]:
    """Every time over the product's in a result, or in a folder of them, by what it is the time of."""
    found = {}
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        result = json.loads(file.read_text())
        if result["kind"] != "comparison":
            continue
        for case in result["cases"]:
            sizes = (case[size] for size in SIZES)
            where = (file.stem, case["preset"], *sizes, case["statistics"], f"/ {case['floor']}")
            for name, entry in case["contenders"].items():
                key = (*where, name)
                if "over_product" in entry and name != case["floor"]:
                    found[key] = entry["over_product"]["median"]
    return found


def agreement(a: Path, b: Path) -> list[tuple[tuple, float, float, float]]:
    """What it is the time of, its ratio in either run, and how far they are apart, the furthest first."""
    one, two = ratios(a), ratios(b)
    if a.is_file() and b.is_file():  # the names of single files are no part of the comparison
        one, two = ({key[1:]: value for key, value in some.items()} for some in (one, two))
    both = [(key, one[key], two[key], abs(one[key] - two[key]) / min(one[key], two[key])) for key in one if key in two]
    return sorted(both, key=lambda line: -line[3])


def compare(a: Path, b: Path) -> int:
    """Print how far two runs of the same comparison are apart; 1 where further than AGREEMENT."""
    lines = agreement(a, b)
    if not lines:
        print("nothing in common", file=sys.stderr)
        return 1
    apart = [line for line in lines if line[3] > AGREEMENT]
    for key, first, second, off in apart or lines[:5]:
        print(f"{off:6.1%}  {first:8.3f}  {second:8.3f}  {' '.join(map(str, key))}")
    print(
        f"{len(lines)} ratios in common; {len(apart)} differ by more than {AGREEMENT:.0%}; "
        f"median {statistics.median(line[3] for line in lines):.1%}, largest {lines[0][3]:.1%}"
    )
    return 1 if apart else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, metavar="NAME", default=["smollm2-135m"])
    parser.add_argument("--weights", choices=("random", "real"), default="random")
    parser.add_argument("--positions", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--layers", nargs="+", type=int, default=[], help="instead of the model's")
    parser.add_argument("--vocabulary", nargs="+", type=int, default=[], help="instead of the model's")
    parser.add_argument(
        "--statistics", action="append", default=[], help=f"a question, such as {FULL}; may be given several times"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        help="all of them: " + ", ".join(CONTENDERS),
    )
    parser.add_argument("--start", choices=("hidden", "head"), default="hidden", help="head: no translator, no norm")
    parser.add_argument("--dtype", help="of weights and hidden states; default: fp32 on a CPU, the model's on a GPU")
    parser.add_argument("--threads", nargs="+", type=int, default=[], help="on a CPU, instead of PyTorch's choice")
    parser.add_argument("--rounds", type=int, default=11, help="at most")
    parser.add_argument("--seconds", type=float, default=4, help="of rounds for a contender and size")
    parser.add_argument("--least", type=int, default=3, help="rounds, however long they take (default: 3)")
    parser.add_argument(
        "--within",
        type=float,
        default=0.0,
        help="stop the rounds of a contender once the 95%% interval of its median multiple of the product's time is "
        "no wider than this share to either side",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="all sizes take turns, so that a machine's slower minutes meet them all; nothing is shown before the end",
    )
    parser.add_argument(
        "--queued",
        action="store_true",
        help="on a GPU, also the GPU's own time, with launches hidden behind other work",
    )
    parser.add_argument("--patience", type=float, default=10, help="seconds; a slower contender is called once")
    parser.add_argument("--sample", type=int, default=24, help="rows compared with float64")
    parser.add_argument("--out", type=Path, help="JSON file to write, or the folder of a suite")
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument("--part", nargs="+", default=[], help="of the suite; default: all that are not there")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="results, or folders of them")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.statistics = options.statistics or [FULL]
    for part in options.part:
        if options.suite is None or part not in SUITES[options.suite]:
            parser.error(f"--part {part}: wanted --suite, and one of its parts")
    for asked in options.statistics:
        try:
            question(asked)
        except ValueError as error:
            parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.compare:
        return compare(*options.compare)
    if options.suite:
        return run_suite(options.suite, options.out or HERE / "results" / options.suite, options.part)
    result = run(options, arguments)
    if options.out:
        write(options.out, result)
    broken = list(promises_broken(result))
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
