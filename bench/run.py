"""Times, memory and errors of this package beside everything a user would otherwise run.

    python bench/run.py --preset smollm2-135m --weights real --positions 32 64 128 [--out RESULT.json]
    python bench/run.py --suite cpu [--out FOLDER] [--part NAME ...] [--again]
    python bench/run.py --compare A B

All contenders get the same inputs and must give the numbers of float64 on a sample of rows before any is timed; one
that does not is refused, one that cannot run says why. They take turns; times are medians with quartiles, and are told
as multiples of the bare matrix product's as well. --suite runs the comparisons that docs/performance.md
is made of (bench/report.py), each part in a process of its own, and goes on where it was stopped.
The exit status is 1 where an engine of this package fails, or errs by more than it promises.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
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
from measure import Race, environment, exponent, interleaved, peak_growth, spread
from presets import BUDGET, PRESETS, Problem, problems, question
from suites import FULL, SUITES

from tuned_lens_fast.atomic_write import atomic_write
from tuned_lens_fast.engines.native import has_amx

HERE = Path(__file__).parent
#: Ratios of two runs further apart than this are told apart.
AGREEMENT = 0.10
#: Seconds; of a shorter first call, what it loads and sets up is a part worth leaving out of its memory.
WARM_ENOUGH = 1.0
SIZES = ("layers", "positions", "vocab")
Case = dict[str, Any]


def measure(some: list[tuple[Case, Problem]], contenders: list[Contender], options: argparse.Namespace) -> None:
    """What every contender does with each problem, put into its case; the problems take turns."""
    races = []
    for case, problem in some:
        torch.set_num_threads(case["threads"])
        case["contenders"], race = admit_all(contenders, problem, options)
        races.append(replace(race, threads=case["threads"]))
    device = some[0][1].device.type
    for (case, problem), times in zip(some, interleaved(races, device, options.within), strict=True):
        for name, (seconds, _) in times.items():
            case["contenders"][name]["rounds"] = seconds
        sum_up(case, problem.rows)


def admit_all(
    contenders: list[Contender], problem: Problem, options: argparse.Namespace
) -> tuple[dict[str, Case], Race]:
    """Name -> status of every contender, why it has no time or what a first call told; and those that are timed."""
    device = problem.device.type
    expected = expect(problem, options.sample)
    found: dict[str, Case] = {contender.name: {} for contender in contenders}
    race = Race({}, {})

    def enter(contender: Contender) -> None:
        found[contender.name], call, once = admit(contender, problem, expected, options.patience)
        if call is None:
            return
        if once > options.patience and not contender.floor:
            found[contender.name]["rounds"] = [once]
        else:
            race.calls[contender.name] = call
            race.rounds[contender.name] = min(options.rounds, max(options.least, int(options.seconds / once)))

    for contender in contenders:
        if contender.floor:
            enter(contender)
    [tried] = interleaved([Race(race.calls, dict.fromkeys(race.calls, 3))], device)
    race = replace(race, floor=min(tried, key=lambda name: min(tried[name][0]), default=None))
    for contender in contenders:
        if not contender.floor:
            enter(contender)
    return found, race


def sum_up(case: Case, rows: int) -> None:
    """Put the medians of its rounds into a case, and by how much they are those of the quickest floor."""
    timed = {name: entry for name, entry in case["contenders"].items() if entry.get("rounds")}
    for entry in timed.values():
        entry["seconds"] = {**spread(entry["rounds"]), "rounds": len(entry["rounds"])}
        entry["rows_per_second"] = rows / entry["seconds"]["median"]
    floors = {name: entry["seconds"]["median"] for name, entry in timed.items() if CONTENDERS[name].floor}
    case["floor"] = min(floors, key=floors.__getitem__, default=None)
    for entry in timed.values() if floors else ():
        entry["over_product"] = {
            name: entry["seconds"][name] / floors[case["floor"]] for name in ("median", "q1", "q3")
        }


def admit(
    contender: Contender, problem: Problem, expected: Expected, patience: float
) -> tuple[dict[str, Any], Callable[[], Any] | None, float]:
    """A contender's entry, its call where it may be timed, and the seconds a call takes; memory is measured here.

    One whose first call takes longer than ``patience`` seconds is called only that once.
    """
    device = problem.device.type
    try:
        why = contender.why_not(problem)
        if why is not None:
            return {"status": "not here", "why": why}, None, 0.0
        call = contender.prepare(problem)
        start = time.perf_counter()
        peak, answer = peak_growth(call, device)
        once = time.perf_counter() - start
        if not contender.floor:
            verdict = judge(answer, problem, expected)
            if verdict.wrong is not None:
                return {"status": "refused", "why": f"wrong numbers: {verdict.wrong}"}, None, 0.0
            errors = verdict.errors
        held = sum(value.numel() * value.element_size() for value in answer.values())
        del answer
        if once < WARM_ENOUGH:
            start = time.perf_counter()
            peak, _ = peak_growth(call, device)
            once = time.perf_counter() - start
    except Exception as error:  # others' code: whatever it raises is the reason it has no time
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        line = (str(error).strip() or "no message").splitlines()[0][:200]
        return {"status": "failed", "why": f"{type(error).__name__}: {line}"}, None, 0.0
    if contender.floor:
        return {"status": "ok"}, call, once
    entry = {"status": "ok", "peak_extra_bytes": peak, "answer_bytes": held, "errors_over_allowed": errors}
    return entry, call, once


def exponents(cases: list[Case]) -> list[dict[str, Any]]:
    """The powers of layers, positions and vocabulary that time and memory grow with, where one alone varies."""
    found = []
    for axis in SIZES:
        others = [size for size in SIZES if size != axis]

        def fixed(case: Case, others: list[str] = others) -> tuple:
            return (case["preset"], case["statistics"], case["threads"], *(case[size] for size in others))

        for _, group in itertools.groupby(sorted(cases, key=fixed), fixed):
            line = sorted(group, key=lambda case: case[axis])
            for name in line[0]["contenders"]:
                entries = [(case[axis], case["contenders"].get(name, {})) for case in line]
                entries = [(size, entry) for size, entry in entries if "seconds" in entry]
                if len({size for size, _ in entries}) < 3:
                    continue
                sizes = [size for size, _ in entries]
                peaks = [entry.get("peak_extra_bytes") for _, entry in entries]
                found.append(
                    {
                        "axis": axis,
                        "preset": line[0]["preset"],
                        "statistics": line[0]["statistics"],
                        "contender": name,
                        "from": sizes[0],
                        "to": sizes[-1],
                        "time": exponent(sizes, [entry["seconds"]["median"] for _, entry in entries]),
                        "memory": exponent(sizes, peaks) if all(peaks) else None,
                        "peaks": [peaks[0], peaks[-1]] if all(peaks) else None,
                    }
                )
    return found


def every_case(options: argparse.Namespace, dtype: torch.dtype | None) -> Iterator[tuple[Case, Problem]]:
    """What is asked of which sizes, and the problem that this is."""
    for threads, preset in itertools.product(options.threads or [torch.get_num_threads()], options.preset):
        shape = PRESETS[preset]
        inputs = {
            "dtype": dtype or (torch.float32 if options.device == "cpu" else shape.dtype),
            "device": options.device,
            "budget": options.budget,
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
                "product_operations": 2 * problem.rows * problem.head.vocab * shape.d_model,
            }
            yield case, problem


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """All cases of one comparison, as what is written to its JSON file."""
    contenders = [CONTENDERS[name] for name in options.contenders if name in CONTENDERS]
    for name in options.contenders:
        if name not in CONTENDERS:
            print(f"no contender {name!r} here", file=sys.stderr)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    if options.fp32_precision:
        torch.backends.mkldnn.matmul.fp32_precision = options.fp32_precision
    cases: list[Case] = []
    every = every_case(options, dtype)
    for some in [list(every)] if options.together else ([one] for one in every):
        measure(some, contenders, options)
        for case, _ in some:
            show(case)
            cases.append(case)
    return {
        "kind": "comparison",
        "command": command,
        "environment": environment(options.device),
        "device": options.device,
        "weights": options.weights,
        "start": options.start,
        "budget": options.budget,
        "fp32_precision": options.fp32_precision,
        "what": {contender.name: contender.what for contender in contenders},
        "ours": [contender.name for contender in contenders if contender.ours],
        "cases": cases,
        "exponents": exponents(cases),
    }


def promises_broken(result: dict[str, Any]) -> list[str]:
    """Where an engine of ours failed, was refused, or is further from float64 than it promises.

    Of 16-bit weights the promise holds for the vocabulary pass alone: from hidden states, x may be rounded otherwise.
    """
    found = []
    for case in result["cases"]:
        size = f"{case['preset']}, {case['layers']} x {case['positions']} x {case['vocab']}"
        held_to_it = case["dtype"] in ("float32", "float64") or result["start"] == "head"
        held_to_it &= result["fp32_precision"] in (None, "ieee")  # less was asked for
        for name in result["ours"]:
            entry = case["contenders"][name]
            if entry["status"] in ("failed", "refused"):
                found.append(f"{size}: {name} {entry['status']}: {entry['why']}")
            for statistic, share in entry.get("errors_over_allowed", {}).items() if held_to_it else ():
                if share > 1:
                    found.append(f"{size}: {name}'s {statistic} is {share:.1f} times as far off as is allowed")
    return found


def show(case: Case) -> None:
    """One case as a table in the terminal."""
    title = (
        f"{case['preset']}: {case['layers']} layers x {case['positions']} positions x {case['vocab']} tokens, "
        f"d {case['d_model']}, {case['dtype']}, {case['threads']} threads; {case['statistics']}"
    )
    header = ("", "s", "quartiles", "rounds", "over product", "rows/s", "MiB", "error")
    lines = []
    for name, entry in case["contenders"].items():
        if "seconds" not in entry:
            lines.append((name, f"{entry['status']}: {entry['why']}", *[""] * 6))
            continue
        s, ratio = entry["seconds"], entry.get("over_product")
        errors, peak = entry.get("errors_over_allowed"), entry.get("peak_extra_bytes")
        lines.append(
            (
                name,
                f"{s['median']:.4g}",
                f"{s['q1']:.4g} - {s['q3']:.4g}",
                str(s["rounds"]),
                "" if ratio is None else f"{ratio['median']:.3f}",
                f"{entry['rows_per_second']:.0f}",
                "" if peak is None else f"{peak / 2**20:.0f}",
                f"{max(errors.values()):.2f}" if errors else "",
            )
        )
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a GPU machine may have PyTorch and nothing else
        print(title, *("\t".join(line) for line in (header, *lines)), sep="\n", flush=True)
        return
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 2 and not name else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    Console(width=150).print(table)


def run_suite(name: str, folder: Path, parts: list[str], again: bool) -> int:
    """Run the parts that are not in ``folder`` yet; the number of those that failed."""
    failed = 0
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts or SUITES[name]:
        out = folder / f"{part}.json"
        if out.exists() and not again:
            print(f"{part}: already in {out}")
            continue
        words = shlex.split(SUITES[name][part])
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        settings, script, arguments = words[:at], words[at], words[at + 1 :]
        print(f"{part}: {shlex.join([*settings, 'python', f'bench/{script}', *arguments])}", flush=True)
        start = time.perf_counter()
        variables = os.environ | dict(setting.split("=", 1) for setting in settings)
        status = subprocess.run([sys.executable, HERE / script, *arguments, "--out", out], env=variables).returncode
        failed += status != 0
        print(f"{part}: {'done' if not status else f'failed ({status})'} in {time.perf_counter() - start:.0f} s\n")
    return failed


def pointless(options: argparse.Namespace) -> str | None:
    """Why what was asked for would measure nothing of its own here, or None."""
    if options.fp32_precision not in (None, "ieee") and not has_amx():
        return "--fp32-precision: fp32 is split on AMX alone, and there is none"
    wanted = os.environ.get("TUNED_LENS_FAST_CPU")
    flag = {"amx": "amx_bf16", "avx512": "avx512f", "avx2": "avx2"}.get(wanted or "")
    flags = environment(options.device)["cpu"]["flags"]
    if flag is not None and flag not in flags:
        return f"TUNED_LENS_FAST_CPU={wanted}: this processor has no {flag}"
    if wanted == "avx2" and "avx512f" not in flags:
        return f"TUNED_LENS_FAST_CPU={wanted}: this processor takes it anyway"
    return None


def ratios(path: Path) -> dict[tuple, float]:
    """Every time over the product's in a result, or in a folder of them, by what it is the time of."""
    found = {}
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        result = json.loads(file.read_text())
        if result.get("kind") != "comparison":
            continue
        for case in result["cases"]:
            sizes = (case[size] for size in (*SIZES, "threads"))
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
    parser.add_argument("--contenders", nargs="+", metavar="NAME", default=list(CONTENDERS), help=", ".join(CONTENDERS))
    parser.add_argument("--start", choices=("hidden", "head"), default="hidden", help="head: no translator, no norm")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of weights and hidden states; default: fp32 on a CPU, the model's on a GPU")
    parser.add_argument("--threads", nargs="+", type=int, default=[], help="on a CPU, instead of PyTorch's choice")
    parser.add_argument(
        "--fp32-precision",
        choices=("ieee", "tf32", "bf16"),
        help="torch.backends.mkldnn.matmul.fp32_precision; of the native engine's products where there is AMX",
    )
    parser.add_argument("--budget", type=int, default=BUDGET, help="bytes of scratch (default: 256 MiB)")
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
    parser.add_argument("--patience", type=float, default=10, help="seconds; a slower contender is called once")
    parser.add_argument("--sample", type=int, default=24, help="rows compared with float64")
    parser.add_argument("--out", type=Path, help="JSON file to write, or the folder of a suite")
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument("--part", nargs="+", default=[], help="of the suite; default: all")
    parser.add_argument("--again", action="store_true", help="run parts of the suite that are there already")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="results, or folders of them")
    options = parser.parse_args(arguments)
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
        return run_suite(options.suite, options.out or HERE / "results" / options.suite, options.part, options.again)
    why = pointless(options)
    if why is not None:
        print(f"not measured: {why}")
        return 0
    result = run(options, command("run.py", arguments))
    if options.out:
        with atomic_write(options.out) as aside:
            aside.write_text(json.dumps(result, indent=1) + "\n")
    broken = promises_broken(result)
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


def command(script: str, arguments: list[str]) -> str:
    """The command as a reader would type it again, with the engine's own settings, without where its result went."""
    settings = [f"{name}={value}" for name, value in os.environ.items() if name == "TUNED_LENS_FAST_CPU"]
    kept = [word for before, word in zip(["", *arguments], arguments, strict=False) if "--out" not in (before, word)]
    return shlex.join([*settings, "python", f"bench/{script}", *kept])


if __name__ == "__main__":
    sys.exit(main())
