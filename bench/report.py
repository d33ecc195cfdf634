"""Writes docs/performance.md and its pictures from bench/results: python bench/report.py [RESULTS] [DOCUMENT].

A folder of results (bench/run.py --suite) is a section, and a second folder whose name ends in -again is the same
comparison run another time. Nothing in the document is typed by hand.
"""

from __future__ import annotations

import json
import math
import operator
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pictures
from run import AGREEMENT, agreement

from tuned_lens_fast.atomic_write import atomic_write

HERE = Path(__file__).parent
AGAIN = "-again"
Result = dict[str, Any]
PREFACE = """# Performance

Written by `python bench/report.py` from the files in `bench/results`.

Times are medians of interleaved rounds. *Over product*: divided by the median time of the bare matrix product of all
rows with the unembedding in the quickest of its forms; quartiles in parentheses. *rows/s*: layers x positions
a second, at the largest size. *MiB*: growth of the peak of memory during a call, for the sizes in turn; the answer is
part of it, what the allocator keeps for later is not. *Error*: the largest difference from float64 of any value, on a
sample of rows, as a share of what this package promises (1e-4 + 1e-5 of the value; 5e-4 + 1e-4 of it for reverse_kl, js
and tv); ranks and top ids must be right. *Over linear*: divided by the time of `F.linear` alone, which writes all
logits to new memory. A contender whose numbers are wrong is refused and not timed.
"""


def number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Lines of a Markdown table, the first column to the left."""
    header = list(header)
    yield "| " + " | ".join(header) + " |"
    yield "|---|" + "---:|" * (len(header) - 1)
    for row in rows:
        yield "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"
    yield ""


def machine(environment: dict[str, Any], device: str) -> str:
    """The machine, its software and the date in a sentence or two."""
    cpu = environment["cpu"]
    words = f"{cpu['name']}, {environment['cores']} cores, {environment['threads']} threads"
    words += f" ({', '.join(cpu['flags'])})" if cpu["flags"] else ""
    words += f", {environment['memory_gib']:.0f} GiB of memory; {environment['system']}"
    if device == "cuda":
        gpu = environment["gpu"]
        words = (
            f"{gpu['name']}, {gpu['processors']} multiprocessors, {gpu['memory_gib']:.0f} GiB of memory, "
            f"{gpu['l2_mib']} MiB of L2, driver {gpu['driver']}, CUDA {gpu['cuda']}; {words}"
        )
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    commit = f", commit {environment['commit']}" if environment["commit"] else ""
    return f"{words}. Python {environment['python']}, {versions}{commit}. {environment['date']}."


def same(cases: list[Result]) -> dict[tuple, list[Result]]:
    """Cases by what was asked of which model, in the order they were run."""
    found: dict[tuple, list[Result]] = {}
    for case in cases:
        found.setdefault((case["preset"], case["statistics"]), []).append(case)
    return found


def varying(cases: list[Result]) -> str:
    """The size that differs between cases."""
    axes = ("layers", "vocab", "threads", "positions")
    return next((axis for axis in axes if len({case[axis] for case in cases}) > 1), "positions")


def comparison(result: Result, name: str, title: str, folder: Path) -> Iterator[str]:
    """One part of a suite: its tables, and pictures where one size grows."""
    yield f"### {title}\n"
    yield f"`{result['command']}`\n"
    for (preset, asked), cases in same(result["cases"]).items():
        axis = varying(cases)
        case = cases[0]
        sizes = {"layers": "layers", "positions": "positions", "vocab": "tokens", "threads": "threads"}
        fixed = " x ".join(f"{case[size]:,} {word}" for size, word in sizes.items() if size != axis or len(cases) == 1)
        weights = "its own weights" if result["weights"] == "real" else "random weights"
        start = "" if result["start"] == "hidden" else ", from what the head receives"
        yield f"{preset} ({fixed}, d_model {case['d_model']}, {case['dtype']}, {weights}{start}): `{asked}`\n"
        yield from contenders(cases, axis, result["ours"])
        if len({case[axis] for case in cases}) >= 3:
            picture = f"{name}-{preset}-{asked.replace(',', '-')}.svg"
            pictures.growth(cases, axis, result["ours"], folder / picture)
            yield f"![Time and memory against {axis}: {preset}, {asked}]({folder.name}/{picture})\n"


def contenders(cases: list[Result], axis: str, ours: list[str]) -> Iterator[str]:
    """A table with a line for every contender: what it took at every size, or why it took nothing."""
    header = [""]
    for case in cases:
        header += [f"{case[axis]:,} {pictures.AXES[axis].split()[0]}: s", "over product"]
    linear = "linear" in cases[0]["contenders"]
    rows = []
    for name in cases[0]["contenders"]:
        entries = [case["contenders"][name] for case in cases]
        bold = f"**{name}**" if name in ours else name
        if not any("seconds" in entry for entry in entries):
            rows.append([bold, f"{entries[0]['status']}: {entries[0]['why']}", *[""] * (len(header) + 1 + linear)])
            continue
        last = next(entry for entry in reversed(entries) if "seconds" in entry)
        worst = [max(entry["errors_over_allowed"].values()) for entry in entries if entry.get("errors_over_allowed")]
        peaks = [entry.get("peak_extra_bytes") for entry in entries if "seconds" in entry]
        rows.append(
            [
                bold,
                *(text for entry in entries for text in (seconds(entry), ratio(entry))),
                number(last["rows_per_second"]),
                ", ".join(number(peak / 2**20) for peak in peaks if peak is not None),
                f"{max(worst):.2f}" if worst else "",
                *([number(over_linear(cases[-1], name))] if linear else []),
            ]
        )
    yield from table([*header, "rows/s", "MiB", "error", *["over linear"] * linear], rows)


def over_linear(case: Result, name: str) -> float:
    """Time over that of F.linear alone, which writes all logits to new memory: both as multiples of the product's."""
    multiples = (case["contenders"][one].get("over_product", {}).get("median", math.nan) for one in (name, "linear"))
    return operator.truediv(*multiples)


def seconds(entry: Result) -> str:
    """The median, or why there is none."""
    return number(entry["seconds"]["median"]) if "seconds" in entry else f"{entry['status']}: {entry['why']}"


def ratio(entry: Result) -> str:
    """Time over the product's, with its quartiles where there are several rounds."""
    found = entry.get("over_product")
    if found is None:
        return ""
    many = entry["seconds"]["rounds"] > 1
    return f"{found['median']:.2f}" + (f" ({found['q1']:.2f} to {found['q3']:.2f})" if many else " (one round)")


def growth(results: dict[str, Result]) -> Iterator[str]:
    """Exponents of all sweeps, and what memory did."""
    lines = [
        line for result in results.values() for line in result.get("exponents", []) if line["to"] >= 8 * line["from"]
    ]
    if not lines:
        return
    yield "### Growth\n"
    yield "Time and memory grow with these powers of a size, by least squares through the logarithms.\n"
    rows = [
        [
            line["contender"],
            f"{line['from']:,} to {line['to']:,} {pictures.AXES[line['axis']].split()[0]}",
            f"{line['time']:.3f}",
            "" if line["memory"] is None else f"{line['memory']:.3f}",
            "" if line["peaks"] is None else " to ".join(number(peak / 2**20) for peak in line["peaks"]),
        ]
        for line in sorted(lines, key=lambda line: line["axis"])
        if line["contender"] not in pictures.FLOORS
    ]
    yield from table(["", "from … to", "time", "memory", "MiB"], rows)


def profile(result: Result, name: str, folder: Path) -> Iterator[str]:
    """Parts of a decode and their shares of the ceilings."""
    peak, bandwidth = (result["ceilings"][name] for name in ("operations_per_second", "bytes_per_second"))
    weights = "its own weights" if result["weights"] == "real" else "random weights"
    yield "### Where the time goes\n"
    yield f"`{result['command']}`\n"
    size = f"{result['layers']} layers x {result['positions']} positions x {result['vocab']:,} tokens"
    ceilings = result["ceilings"]
    yield (
        f"{result['preset']}, {size}, {result['dtype']}, {weights}. A part's time is what a decode takes longer when "
        "it is asked for that too; by noise it may fall below 0. Ceilings, measured in the same process: "
        f"{peak / 1e9:,.0f}e9 operations a second (a product of two matrices of {ceilings['product_size']:,} x "
        f"{ceilings['product_size']:,}) and {bandwidth / 1e9:,.1f}e9 bytes a second, read and written (a copy of "
        f"{ceilings['copy_mib']:,} MiB). Bytes: a part's inputs read and its results written once; of a statistic, "
        "fp32 logits read once. Where those stay in cache or on the chip, their share of the copy's speed may pass 1.\n"
    )
    if result["model_seconds"] is not None:
        yield f"The model's own forward pass, without its head: {number(result['model_seconds'])} s.\n"
    for engine, found in result["engines"].items():
        if "why" in found:
            yield f"{engine}: {found['why']}\n"
            continue
        rows = []
        for part, seconds in found["parts"].items():
            need = result["work"][part]
            shown = [number(need["operations"] / 1e9) if need["operations"] else "", number(need["bytes"] / 1e6)]
            shares = ["", ""]
            if seconds > 0:
                shares = [
                    f"{need['operations'] / seconds / peak:.2f}" if need["operations"] else "",
                    f"{need['bytes'] / seconds / bandwidth:.2f}",
                ]
            rows.append([part, number(seconds), f"{seconds / found['whole']:.0%}", *shown, *shares])
        rows.append(["the whole decode, asked at once", number(found["whole"]), "100%", "", "", "", ""])
        header = [engine, "s", "share", "1e9 operations", "1e6 bytes", "of the product's speed", "of the copy's speed"]
        yield from table(header, rows)
    if any("parts" in found for found in result["engines"].values()):
        pictures.profile(result, folder / f"{name}.svg")
        pictures.roofline(result, folder / f"{name}-roofline.svg")
        yield f"![Parts of a decode]({folder.name}/{name}.svg)\n"
        yield f"![Roofline]({folder.name}/{name}-roofline.svg)\n"


def long_contexts(result: Result, part: str) -> Iterator[str]:
    """What a decode of a long prompt, or of many, needs at every number of positions."""
    yield f"### {part}\n"
    yield f"`{result['command']}`\n"
    yield (
        f"SmolLM2-135M, the model's own output and {result['layers']} layers: `{','.join(result['statistics'])}`, "
        f"memory_budget {result['runs'][0]['budget'] / 2**20:.0f} MiB. *Peak*: growth of the resident peak beyond the "
        "model and its cache; *outside*: the share of the time that is spent neither in the model's forward pass nor "
        "in the engine.\n"
    )
    rows = [
        [
            f"{run['positions']:,}",
            number(run["cache"] / 2**20),
            "" if run["beyond_cache"] is None else number(run["beyond_cache"] / 2**20),
            number(run["model_s"]),
            number(run["engine_s"]),
            f"{run['outside_share']:.2%}",
            number(run["decode_ms_per_position"]),
        ]
        for run in result["runs"]
    ]
    header = ["positions", "cache, MiB", "peak, MiB", "model, s", "engine, s", "outside", "ms a position, model apart"]
    yield from table(header, rows)
    yield "Planned, or written: " + "; ".join(dict.fromkeys(run["plan"] for run in result["runs"])) + ".\n"


def repeated(first: Path, second: Path) -> Iterator[str]:
    """How far two runs are apart."""
    lines = agreement(first, second)
    if not lines:
        return
    apart = [line for line in lines if line[3] > AGREEMENT]
    yield "### The same comparison a second time\n"
    yield f"`python bench/run.py --compare bench/results/{first.name} bench/results/{second.name}`\n"
    middle = statistics.median(line[3] for line in lines)
    yield (
        f"{len(lines)} times over the product's are in both runs. They differ by {middle:.1%} in the median and by "
        f"{lines[0][3]:.1%} at most; {len(apart)} by more than {AGREEMENT:.0%}.\n"
    )
    if apart:
        rows = [[" ".join(map(str, key)), f"{a:.2f}", f"{b:.2f}", f"{off:.0%}"] for key, a, b, off in apart]
        yield from table(["", "first", "second", "apart"], rows)


def gpu_checks(result: Result) -> Iterator[str]:
    """The GPU tests and the profiler's counters of bench/gpu.sh."""
    found = result["tests"]
    if found.get("ran"):
        yield (
            f"Tests on this GPU (`pytest -m gpu tests/gpu`): {found['tests']} in {found['seconds']:.0f} s, "
            f"{found['failures'] + found['errors']} failed, {found['skipped']} skipped"
            + (f": {', '.join(found['broken'])}" if found["broken"] else "")
            + ".\n"
        )
    if result["profile"]:
        yield "The statistics kernel under a profiler:\n"
        yield from table(["counter", "value"], result["profile"].items())


def recorded(result: Result, source: str) -> Iterator[str]:
    """A result in the layout that bench/gpu.sh wrote first: times of one engine's questions over the product's."""
    e = result["environment"]
    yield (
        f"{e['device']}, {e['processors']} multiprocessors, {e['memory_bytes'] / 2**30:.0f} GiB of memory, driver "
        f"{e['driver']}, CUDA {e['cuda']}. Python {e['python']}, torch {e['torch']}, Triton {e['triton']}, "
        f"tuned_lens_fast {e['tuned_lens_fast']}. {e['date']}. `bash bench/gpu.sh`, recorded in {source}.\n"
    )
    if "note" in result:
        yield f"> {result['note']}\n"
    shapes = {name: part["shape"] for name, part in result["timings"].items()}
    names = [
        f"{name}: {s['layers']} x {s['positions']:,} rows, d {s['d_model']}, V {s['vocab']:,}"
        for name, s in shapes.items()
    ]
    labels = dict.fromkeys(label for part in result["timings"].values() for label in part["times"])
    yield "Milliseconds, and time over the bare product's in the same run, bf16:\n"
    rows = []
    for label in labels:
        times = [part["times"].get(label) for part in result["timings"].values()]
        rows.append([label, *("" if t is None else f"{t['ms']:.2f} ({t['ratio']:.2f})" for t in times)])
    yield from table(["", *names], rows)
    rows = []
    for name, part in result["correctness"].items():
        worst, share = max(part["errors_over_allowed"].items(), key=lambda item: item[1])
        exact = "yes" if part["ranks_right"] and part["top_ids_right"] else "no"
        rows.append([name, f"{share:.2f} ({worst})", exact])
    yield "Largest error against float64, as a share of what is allowed:\n"
    yield from table(["", "error", "ranks and top ids right"], rows)
    for name, part in result["memory"].items():
        s = part["shape"]
        yield (
            f"{name}, {s['layers']} x {s['positions']:,} rows from hidden states: {part['seconds']:.2f} s and "
            f"{part['peak_extra_mib']} MiB beyond hidden states and answer, of a budget of {part['budget_mib']} MiB.\n"
        )
    yield from gpu_checks(result)


def section(folder: Path, pictures_folder: Path) -> Iterator[str]:
    """A folder of results."""
    results: dict[str, Result] = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    measured = [result for result in results.values() if "environment" in result]
    if not measured:
        return
    device = measured[0]["device"]
    name = measured[0]["environment"]["gpu"]["name"] if device == "cuda" else measured[0]["environment"]["cpu"]["name"]
    yield f"## {folder.name.replace('-', ' ')}: on a {'GPU' if device == 'cuda' else 'CPU'}, {name}\n"
    for words in dict.fromkeys(machine(result["environment"], device) for result in measured):
        yield f"{words}\n"
    what = {name: text for result in measured for name, text in result.get("what", {}).items()}
    ours = {name for result in measured for name in result.get("ours", [])}
    if what:
        rows = [[f"**{name}**" if name in ours else name, text] for name, text in what.items()]
        yield from table(["contender", "what it runs"], rows)
    for part, result in results.items():
        if result.get("kind") == "comparison":
            yield from comparison(result, f"{folder.name}-{part}", part.replace("-", " "), pictures_folder)
    yield from growth(results)
    for part, result in results.items():
        if result.get("kind") == "profile":
            yield from profile(result, f"{folder.name}-{part}", pictures_folder)
        elif result.get("kind") == "long contexts":
            yield from long_contexts(result, part.replace("-", " "))
        elif result.get("kind") == "gpu checks":
            yield from gpu_checks(result)
    again = folder.with_name(folder.name + AGAIN)
    if again.is_dir():
        yield from repeated(folder, again)


def document(results: Path, pictures_folder: Path) -> str:
    """The whole page."""
    lines = [PREFACE]
    for folder in sorted(path for path in results.iterdir() if path.is_dir() and not path.name.endswith(AGAIN)):
        lines += section(folder, pictures_folder)
    for path in sorted(results.glob("*.json")):
        lines.append(f"## On a GPU, recorded: {path.stem}\n")
        lines += recorded(json.loads(path.read_text()), f"`bench/results/{path.name}`")
    return "\n".join(lines)


def main() -> int:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE.parent / "docs" / "performance.md"
    folder = target.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    with atomic_write(target) as aside:
        aside.write_text(document(results, folder))
    print(f"written: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
