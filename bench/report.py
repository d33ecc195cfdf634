"""Writes docs/performance.md and its picture from bench/results: python bench/report.py

A folder of results (bench/run.py --suite, bench/gpu.sh) is a section, and a second folder whose name ends in -again is
the same comparison run another time. No figure in the document is typed by hand.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders import CONTENDERS
from run import AGREEMENT, SIZES, agreement
from suites import SUITES

from tuned_lens_fast.atomic_write import atomic_write

HERE = Path(__file__).parent
AGAIN = "-again"
Result = dict[str, Any]
#: Folder of results -> what its section is about. In this order, and those of other names after them.
TITLES = {
    "native": "On a CPU: the engines beside the bare product and tuned-lens",
    "cpu": "On a CPU: all contenders, and what time and memory grow with",
    "long-context": "On a CPU: long contexts",
    "training": "On a CPU: training a lens",
}
#: What may vary in a comparison -> how a value of it is told.
AXES = {
    "preset": "{}",
    "layers": "{:,} layers",
    "positions": "{:,} positions",
    "vocab": "{:,} tokens",
    "d_model": "d_model {:,}",
    "dtype": "{}",
    "threads": "{} threads",
}
PREFACE = """# Performance

What was measured, by which command, on which machine. `python bench/report.py` writes this page from the files in
`bench/results`; no figure is typed by hand.

To measure a machine of your own: `python bench/run.py --suite native` or `--suite cpu` (all parts, or `--part` of
them), or on a GPU `bash bench/gpu.sh 1`, `2` and `3`; `python bench/run.py --help` tells how to ask for other models,
sizes and statistics. `python bench/run.py --compare A B` tells how far two runs are apart, and `make bench` how far the
engines are from the last time. `python bench/static.py --architecture 80` (or 90, 100) needs no GPU: it predicts, from
the kernels' machine code, what the statistics of a tile cost over its product, and with `--ladder` what all of it does.

How to read the tables:

- A cell is the median time of calls that took turns, and then that time *over the product's*: divided by the median
  time of the bare matrix product of all rows with the unembedding, in the quickest of its forms; quartiles in
  parentheses.
- *MiB*: growth of the peak of memory during a call, for the columns in turn; the answer is part of it, what the
  allocator keeps for later is not.
- *Error*: the largest difference from float64 of any value, on a sample of rows, as a share of what this package
  promises (1e-4 + 1e-5 of the value; 5e-4 + 1e-4 of it for reverse_kl, js and tv), for the columns in turn. Ranks and
  top ids must be right. A contender whose numbers are wrong is refused and not timed.
- A commit with a + was measured with files that differed from it.

| contender | what it runs |
|---|---|
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


def machine(environment: Result) -> str:
    """The machine and its software in a sentence or two."""
    words = []
    if gpu := environment.get("gpu"):
        words.append(
            f"{gpu['name']}, {gpu['processors']} multiprocessors, {gpu['memory_gib']:.0f} GiB of memory, "
            f"{gpu['l2_mib']} MiB of L2, driver {gpu['driver']}, CUDA {gpu['cuda']}"
        )
    if cpu := environment.get("cpu"):
        flags = f" ({', '.join(cpu['flags'])})" if cpu["flags"] else ""
        words.append(
            f"{cpu['name']}, {environment['cores']} cores, {environment['threads']} threads{flags}, "
            f"{environment['memory_gib']:.0f} GiB of memory; {environment['system']}"
        )
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{'; '.join(words)}. Python {environment['python']}, {versions}."


def source(result: Result, suite: str, part: str) -> str:
    """The command that a result was made with, its commit and date."""
    command, environment = result["command"], result["environment"]
    if command == f"python bench/{SUITES[suite].get(part)}":
        command = f"python bench/run.py --suite {suite} --part {part}"
    commit = f"commit {environment['commit']}, " if environment["commit"] else ""
    return f"`{command}` ({commit}{environment['date']})\n"


def bold(name: str) -> str:
    return f"**{name}**" if name in CONTENDERS and CONTENDERS[name].ours else name


def told(case: Result, axes: Iterable[str]) -> str:
    return ", ".join(AXES[axis].format(case[axis]) for axis in axes if case[axis] is not None)


def comparison(result: Result) -> Iterator[str]:
    """One part of a suite: a line for every question and contender, a column for every size."""
    cases, per_second = result["cases"], 1e3 if result["device"] == "cuda" else 1
    varying = [axis for axis in AXES if len({case[axis] for case in cases}) > 1]
    columns = list(dict.fromkeys(told(case, varying) for case in cases))
    questions = list(dict.fromkeys(case["statistics"] for case in cases))
    weights = "its own weights" if result["weights"] == "real" else "random weights"
    start = ", from what the head receives" if result["start"] == "head" else ""
    asked = f": `{questions[0]}`" if len(questions) == 1 else ""
    same = told(cases[0], (axis for axis in AXES if axis not in varying))
    yield f"{same}, {weights}{start}{asked}\n"
    if "note" in result:
        yield f"> {result['note']}\n"
    rows: list[list[str]] = []
    missing: dict[str, dict[str, None]] = {}
    for question, name in itertools.product(questions, CONTENDERS):
        found = {
            told(case, varying): case["contenders"][name]
            for case in cases
            if case["statistics"] == question and name in case["contenders"]
        }
        for entry in found.values():
            if "why" in entry:
                missing.setdefault(f"{entry['status']}: {entry['why']}", {})[name] = None
        if all("why" in entry for entry in found.values()):
            continue
        entries = [found.get(column, {}) for column in columns]
        peaks = [number(entry["peak_extra_bytes"] / 2**20) for entry in entries if entry.get("peak_extra_bytes")]
        label = bold(name) if len(questions) == 1 else f"`{question}`: {bold(name)}"
        rows.append([label, *(cell(entry, per_second) for entry in entries), ", ".join(peaks), errors(entries)])
    unit = "ms" if per_second > 1 else "s"
    header = ["", *(f"{column}: {unit}" if column else f"{unit}, over product" for column in columns), "MiB", "error"]
    yield from table(header, rows)
    if missing:
        yield "Without a time: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in missing.items()) + ".\n"


def cell(entry: Result, per_second: float) -> str:
    """Time and its multiple of the product's, with quartiles where there were several calls."""
    if "seconds" not in entry:
        return entry.get("status", "not timed" if entry else "")
    seconds, ratio = entry["seconds"], entry.get("over_product")
    time = number(seconds["median"]) if per_second == 1 else f"{round(per_second * seconds['median'], 6):.2f}"
    if ratio is None:
        return time
    spread = f" ({ratio['q1']:.2f} to {ratio['q3']:.2f})" if seconds.get("calls", 0) > 1 else ""
    if "queued_over_product" in entry:
        spread += f", queued {entry['queued_over_product']:.2f}"
    return f"{time}, {ratio['median']:.2f}{spread}" + (" (one call)" if seconds.get("calls") == 1 else "")


def errors(entries: list[Result]) -> str:
    """The largest error of every column, and which statistic's that is where it is always the same."""
    of_columns = [entry["errors_over_allowed"] for entry in entries if entry.get("errors_over_allowed")]
    worst = [max(some.items(), key=lambda item: item[1]) for some in of_columns]
    names = {name for name, _ in worst}
    return ", ".join(f"{share:.2f}" for _, share in worst) + (f" ({names.pop()})" if len(names) == 1 else "")


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of size that values grow with: the slope of the least-squares line through their logarithms."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


@dataclass(frozen=True)
class Sweep:
    """A comparison where one size alone varies, eightfold or more."""

    axis: str
    sizes: list[int]
    entries: dict[str, list[Result]]  #: of every contender that has times at all sizes

    @classmethod
    def of(cls, cases: list[Result]) -> Sweep | None:
        """The sweep that these cases are, if they are one."""
        varying = [axis for axis in (*AXES, "statistics") if len({case[axis] for case in cases}) > 1]
        if len(varying) != 1 or varying[0] not in SIZES:
            return None
        cases = sorted(cases, key=lambda case: case[varying[0]])
        entries = {name: [case["contenders"].get(name, {}) for case in cases] for name in CONTENDERS}
        entries = {name: some for name, some in entries.items() if all("seconds" in entry for entry in some)}
        sizes = [case[varying[0]] for case in cases]
        return cls(varying[0], sizes, entries) if len(sizes) > 2 and sizes[-1] >= 8 * sizes[0] else None

    def grown(self, name: str) -> str:
        """The powers of the size that time and memory grow with, and MiB at both ends."""
        if name not in self.entries:
            return ""
        time = f"{exponent(self.sizes, [entry['seconds']['median'] for entry in self.entries[name]]):.3f}"
        peaks = [entry["peak_extra_bytes"] / 2**20 for entry in self.entries[name] if entry.get("peak_extra_bytes")]
        if len(peaks) < len(self.sizes):
            return time
        return f"{time}, {exponent(self.sizes, peaks):.3f} ({number(peaks[0])} to {number(peaks[-1])})"


def growth(sweeps: list[Sweep], picture: Path) -> Iterator[str]:
    """Exponents of all sweeps, what memory did, and a picture of both."""
    yield "### growth\n"
    yield (
        "The powers of a size that time, and then memory, grow with, by least squares through the logarithms of the "
        "tables above; in parentheses, MiB from the smallest size to the largest.\n"
    )
    yield from table(
        ["", *(f"{sweep.sizes[0]:,} to {AXES[sweep.axis].format(sweep.sizes[-1])}" for sweep in sweeps)],
        (
            [bold(name), *(sweep.grown(name) for sweep in sweeps)]
            for name in CONTENDERS
            if any(name in sweep.entries for sweep in sweeps)
        ),
    )
    draw(sweeps, picture)
    axes = ", ".join(sweep.axis for sweep in sweeps)
    yield f"![Time and memory against {axes}]({picture.parent.name}/{picture.name})\n"


#: Of every contender in the picture, a colour that the colour-blind can tell from the others, and a marker.
LOOKS = {
    "native": ("#D55E00", "o"),
    "triton": ("#CC3311", "D"),
    "eager": ("#E69F00", "s"),
    "product-tiles": ("#777777", ""),
    "product-native": ("#000000", ""),
    "loop": ("#0072B2", "^"),
}


def draw(sweeps: list[Sweep], path: Path) -> None:
    """Time, and memory below it, against every size, all axes logarithmic. The same results give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    values = {
        "seconds": lambda entry: entry["seconds"]["median"],
        "MiB beyond the inputs": lambda entry: (entry.get("peak_extra_bytes") or math.nan) / 2**20,
    }
    figure, panels = plt.subplots(2, len(sweeps), figsize=(10, 5), sharex="col", sharey="row", squeeze=False)
    for column, sweep in enumerate(sweeps):
        for row, (what, value) in enumerate(values.items()):
            panel = panels[row][column]
            for name, entries in sweep.entries.items():
                colour, marker = LOOKS.get(name, ("#56B4E9", "v"))
                style = {"color": colour, "marker": marker, "linestyle": "-" if marker else "--"}
                panel.plot(sweep.sizes, [value(entry) for entry in entries], label=name, **style)
            panel.set(xscale="log", yscale="log", ylabel="" if column else what)
            panel.set_xticks(sweep.sizes, ["" if i % 2 else f"{size:,}" for i, size in enumerate(sweep.sizes)])
            panel.yaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        panels[1][column].set_xlabel(AXES[sweep.axis].format(0)[2:])
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, names, frameon=False, loc="upper center", ncols=len(names))
    with plt.rc_context({"svg.hashsalt": "tuned_lens_fast", "svg.fonttype": "none"}), atomic_write(path) as aside:
        figure.savefig(aside, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
        aside.write_text(compact(aside.read_text()))
    plt.close(figure)


def compact(svg: str) -> str:
    """The same picture with tenths of a point, and without comments and names that nothing refers to."""
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"-?\d+\.\d{2,}", lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), svg)
    used = set(re.findall(r"#(\w+)", svg))
    svg = re.sub(r' id="(\w+)"', lambda match: match[0] if match[1] in used else "", svg)
    return re.sub(r">\s+<", "><", re.sub(r"[ \n]+", " ", svg)).replace("</g>", "</g>\n")


def profile(result: Result) -> Iterator[str]:
    """Parts of a decode and their shares of the ceilings."""
    ceilings, work = result["ceilings"], result["work"]
    peak, bandwidth = ceilings["operations_per_second"], ceilings["bytes_per_second"]
    weights = "its own weights" if result["weights"] == "real" else "random weights"
    size = f"{result['layers']} layers x {result['positions']} positions x {result['vocab']:,} tokens"
    yield (
        f"{result['preset']}, {size}, {result['dtype']}, {weights}. A part's time is what a decode takes longer when "
        "it is asked for that too; by noise it may fall below 0. Ceilings, measured in the same process: "
        f"{peak / 1e9:,.0f}e9 operations a second (a product of two matrices of {ceilings['product_size']:,} x "
        f"{ceilings['product_size']:,}) and {bandwidth / 1e9:,.1f}e9 bytes a second, read and written (a copy of "
        f"{ceilings['copy_mib']:,} MiB); in parentheses, a part's shares of the two. Bytes: a part's inputs read and "
        "its results written once; of a statistic, fp32 logits read once. Where those stay in cache or on the chip, "
        "their share of the copy's speed may pass 1.\n"
    )
    if result["model_seconds"] is not None:
        yield f"The model's own forward pass, without its head: {number(result['model_seconds'])} s.\n"

    def took(part: str, found: Result) -> str:
        seconds, need = found["parts"][part], work[part]
        shares = [(need["operations"], peak, "product"), (need["bytes"], bandwidth, "copy")]
        told = [f"{name} {count / seconds / speed:.2f}" for count, speed, name in shares if count and seconds > 0]
        share = f"{number(seconds)}, {seconds / found['whole']:.0%}"
        return f"{share} ({', '.join(told)})" if told else share

    engines = result["engines"].values()
    rows = [
        [
            part,
            number(need["operations"] / 1e9) if need["operations"] else "",
            number(need["bytes"] / 1e6),
            *(took(part, found) for found in engines),
        ]
        for part, need in work.items()
    ]
    rows.append(["the whole decode, asked at once", "", "", *(number(found["whole"]) for found in engines)])
    yield from table(["", "1e9 operations", "1e6 bytes", *(f"{name}: s" for name in result["engines"])], rows)


def long_contexts(result: Result) -> Iterator[str]:
    """What a decode of a long prompt, or of many, needs at every number of positions."""
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
            run["plan"],
        ]
        for run in result["runs"]
    ]
    times = ["model, s", "engine, s", "outside", "ms a position, model apart"]
    yield from table(["positions", "cache, MiB", "peak, MiB", *times, "planned, or written"], rows)


def repeated(first: Path, second: Path) -> Iterator[str]:
    """How far two runs are apart."""
    lines = agreement(first, second)
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
    if found := result["tests"]:
        broken = f": {', '.join(found['broken'])}" if found["broken"] else ""
        yield (
            f"Tests on this GPU (`pytest -m gpu tests/gpu`): {found['tests']} in {found['seconds']:.0f} s, "
            f"{found['failures'] + found['errors']} failed, {found['skipped']} skipped{broken}.\n"
        )
    for shape, counters in result.get("profiles", {}).items():
        yield f"The vocabulary pass under a profiler, {shape}:\n"
        yield from table(["counter", "value"], counters.items())


def kernels(result: Result) -> Iterator[str]:
    """The kernels of the vocabulary pass beside torch.mm."""
    yield (
        "The vocabulary pass alone, over torch.mm of the same rows; in parentheses, with all launches hidden behind "
        "other work.\n"
    )
    for asked, cases in _by(result["cases"], "asked"):
        header = [f"`{asked}`", *(f"{case['preset']}, {case['rows']:,} rows, d {case['d_model']}" for case in cases)]
        names = dict.fromkeys(name for case in cases for name in case["tiles"])
        found = [[case["tiles"].get(name) for case in cases] for name in names]
        yield from table(
            header,
            (
                [name, *((e and f"{e['over_product']:.3f} ({e['queued_over_product']:.3f})") or "" for e in entries)]
                for name, entries in zip(names, found, strict=True)
            ),
        )


def decode_kernels(result: Result) -> Iterator[str]:
    """Where a decode's time goes, by kernel."""
    for case in result["cases"]:
        yield f"{case['preset']}, `{case['statistics']}`:\n"
        rows = [
            [name[:60], f"{1e3 * entry['seconds']:.3f}", f"{entry['launches']:,}"]
            for name, entry in case["kernels"].items()
        ]
        yield from table(["kernel", "ms", "launches"], rows)


def small_decodes(result: Result) -> Iterator[str]:
    """Decodes of a few rows over reading W once."""
    names = [name for name in result["cases"][0]["seconds"] if not name.startswith("W")]
    rows = [
        [
            f"{case['preset']}, {case['rows']} rows",
            f"{1e6 * case['read']:.0f}",
            *(f"{case['seconds'][name]['median'] / case['read']:.2f}" for name in names),
        ]
        for case in result["cases"]
    ]
    yield from table(["", "W read once, us", *names], rows)


def _by(cases: list[Result], key: str) -> Iterator[tuple[str, list[Result]]]:
    for value in dict.fromkeys(case[key] for case in cases):
        yield value, [case for case in cases if case[key] == value]


def training_steps(result: Result) -> Iterator[str]:
    """What the losses of all layers and their gradients cost."""
    what = {"kl": "KL(model || lens)", "ce": "cross-entropy"}[result["loss"]]
    yield (
        f"{what} of {result['layers']} layers x {result['positions']:,} positions, d_model {result['d_model']:,}, "
        f"{result['vocab']:,} tokens, {result['dtype']}, and its gradient by every translator; memory_budget "
        f"{result['budget'] / 2**20:.0f} MiB. *Two products*: every row with W, and a tile of logits with W again, in "
        "the quickest of PyTorch's tiles. *MiB*: growth of the peak beside the gradients, which take "
        f"{result['gradients'] / 2**20:.0f} MiB.\n"
    )
    rows = [
        [
            name,
            number(found["seconds"]["median"]),
            f"{found['of_two_products']:.2f}",
            number(found["beside_gradients"] / 2**20) if "beside_gradients" in found else "",
            f"{found['tuned_lens_over_it']:.2f}" if "tuned_lens_over_it" in found else "",
        ]
        for name, found in result["contenders"].items()
    ]
    yield from table(["", "s", "of two products", "MiB", "tuned-lens's time over it"], rows)


def lens_training(result: Result) -> Iterator[str]:
    """Held-out KL of two recipes, measurement by measurement."""
    arguments = next(iter(result["recipes"].values()))["arguments"]
    yield (
        f"SmolLM2-135M, steps of {arguments['tokens_per_step']:,} tokens, held-out KL in nats by layer, measured on "
        f"{arguments['eval_tokens']:,} tokens. {result.get('note', '')}\n"
    )
    rows = []
    for name, found in result["recipes"].items():
        if not rows:
            rows.append(["logit lens", "", "", *_nats(found["logit_lens"])])
        rows += [[name, f"{one['step']}", f"{one['seconds']:,.0f}", *_nats(one["kl"])] for one in found["evaluations"]]
    yield from table(["recipe", "step", "s", *map(str, result["layers"]), "mean"], rows)


def _nats(kl: Sequence[float]) -> list[str]:
    return [f"{value:.2f}" for value in (*kl, statistics.mean(kl))]


KINDS = {
    "comparison": comparison,
    "profile": profile,
    "long contexts": long_contexts,
    "gpu checks": gpu_checks,
    "kernels": kernels,
    "kernels of a decode": decode_kernels,
    "small decodes": small_decodes,
    "losses": training_steps,
    "lens training": lens_training,
}


def section(folder: Path, pictures: Path) -> Iterator[str]:
    """A folder of results, in its suite's order."""
    suite = folder.name if folder.name in SUITES else "gpu"
    order = [*SUITES[suite]]
    paths = sorted(folder.glob("*.json"), key=lambda path: order.index(path.stem) if path.stem in order else len(order))
    read = {path.stem: json.loads(path.read_text()) for path in paths}
    results = {part: result for part, result in read.items() if "kind" in result}  # not tiles.json
    title = TITLES.get(folder.name, f"On a {'GPU' if next(iter(results.values()))['device'] == 'cuda' else 'CPU'}")
    yield f"## {title}{'' if folder.name in TITLES else f': {folder.name}'}\n"
    for words in dict.fromkeys(machine(result["environment"]) for result in results.values()):
        yield f"{words}\n"
    for part, result in results.items():
        yield f"### {part.replace('-', ' ')}\n"
        yield source(result, suite, part)
        yield from KINDS[result["kind"]](result)
    comparisons = (result["cases"] for result in results.values() if result["kind"] == "comparison")
    if sweeps := [sweep for cases in comparisons if (sweep := Sweep.of(cases))]:
        yield from growth(sweeps, pictures / f"{folder.name}-growth.svg")
    if (again := folder.with_name(folder.name + AGAIN)).is_dir():
        yield from repeated(folder, again)


def document(results: Path, pictures: Path) -> str:
    """The whole page."""
    folders = sorted(path for path in results.iterdir() if path.is_dir() and not path.name.endswith(AGAIN))
    order = [*TITLES]
    folders.sort(key=lambda path: order.index(path.name) if path.name in order else len(order))
    sections = [line for folder in folders for line in section(folder, pictures)]
    contenders = "".join(f"| {bold(name)} | {contender.what} |\n" for name, contender in CONTENDERS.items())
    return "\n".join([PREFACE + contenders, *sections])


def main() -> None:
    target = HERE.parent / "docs" / "performance.md"
    pictures = target.with_suffix("")
    pictures.mkdir(exist_ok=True)
    for old in pictures.glob("*.svg"):
        old.unlink()
    page = document(HERE / "results", pictures)
    with atomic_write(target) as aside:
        aside.write_text(page)
    print(f"written: {target}")


if __name__ == "__main__":
    main()
