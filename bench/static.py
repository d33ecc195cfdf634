"""Predicts, from machine code alone, what the statistics of a vocabulary tile cost over its product.

    python bench/static.py [--architecture 90] [--ladder]

The kernels of the vocabulary pass are cross-compiled (no GPU is needed) for several sets of statistics and widths, and
their machine code is split into the product's loop and the epilogue: what happens to a tile of logits once its product
is done. Two times are predicted for a tile, both relative to the product alone:

    serial       product, then epilogue, then the pipeline of loads fills again (not where the loop is flat)
    overlapped   the epilogue runs under another tile's product: the longest of the product, the instruction
                 issue of both, and any single pipe

Of cooperative.py, whose groups of warps have half a tile each, "serial" is with both groups in step, and "overlapped"
with the second held back: what is left of the epilogue beyond the steps that run under it.

The epilogue's own time is the longest of its pipes and of its issue slots. These are predictions from the
rates below, not measurements; they rank designs, and say which of them cannot reach a goal. --ladder puts them together
for the shapes of bench/gpu.sh: tile, schedule, the top k's bytes and kl's products, over the product of all rows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/kernels"))

from compiling import PROCESSORS, SHARED_LIMIT, Report, compile_launches, meta

WIDTHS = (576, 640, 2048, 4096)
#: Where overlapped.py has room, and what cooperative.py is for (sm_90).
FEW_FEATURES = (576, 640, 768)
MANY_FEATURES = (2048, 4096)
#: Sets of statistics, each with the cost of those before it: arguments of ``vocabulary_pass``.
STATISTICS: dict[str, dict[str, Any]] = {
    "lse": {},
    "+ entropy": {"running": "t"},
    "+ log_prob, rank": {"running": "tr"},
    "+ top-10 candidates": {"running": "tr", "group_maxima": True},
    "all, with softcap": {"running": "tr", "group_maxima": True, "softcap": True},
}

#: A clock and multiprocessor: dense bf16 operations of the matrix units, lane operations of the other pipes.
COMMON = {"alu": 64, "imad": 64, "mufu": 16, "shuffle": 32, "memory": 32}
RATES: dict[int, dict[str, int]] = {
    80: COMMON | {"matrix": 2048, "fma": 64, "convert": 16},
    90: COMMON | {"matrix": 4096, "fma": 128, "convert": 64},
    100: COMMON | {"matrix": 8192, "fma": 128, "convert": 64},
}
#: Share of the matrix units' rate that a good product reaches.
PRODUCT_EFFICIENCY = 0.80
#: Share of issue slots that are filled by one warp a scheduler, and by two or more.
ISSUE_EFFICIENCY = {1: 0.55, 2: 0.75}
#: Clocks to drain and fill the pipeline of loads between two tiles of a nested loop.
REFILL = 800
#: Of an H100: processors, clocks a second under a product's load, bytes a second of its memory.
H100 = 132, 1.6e9, 2.5e12
REGISTERS = 65_536
SCHEDULERS = 4

PIPES = {
    "fma": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2",
    "imad": "IMAD",
    "mufu": "MUFU",
    "shuffle": "SHFL REDUX",
    "memory": "LDS STS LDG STG LDSM STSM LDL STL RED ATOM ATOMG ATOMS LDGSTS LD ST LDTM STTM",
    "convert": "F2F F2FP I2F F2I I2FP",
    "matrix": "HMMA HGMMA UTCHMMA",
    # These take an issue slot and nothing else worth counting; so do all uniform instructions, U...
    "control": "BRA BRX BSYNC BSSY EXIT NOP WARPSYNC BAR DEPBAR LDGDEPBAR RET CALL YIELD SYNCS MEMBAR FENCE "
    "ELECT WARPGROUP CS2R S2R S2UR R2UR VOTEU LDC ERRBAR CCTL USETMAXREG",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}
#: Packed pairs of fp32 (sm_100): two lane operations.
PAIRS = {"FFMA2", "FADD2", "FMUL2"}


@dataclass(frozen=True)
class Instruction:
    opcode: str  #: without its modifiers
    text: str
    conditional: bool  #: under a predicate, in front or as an operand of the branch
    target: int | None  #: of a branch: index of the instruction it goes to

    @property
    def pipe(self) -> str:
        return PIPE_OF.get(self.opcode, "control" if self.opcode.startswith("U") else "alu")


def read(sass: str) -> list[Instruction]:
    """The output of ``nvdisasm -c`` as instructions."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1].strip().lstrip("{ "))
    program = []
    for text in lines:
        predicate, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        opcode = rest.split()[0].split(".")[0]
        label = re.search(r"\.L_\w+", rest) if opcode == "BRA" else None
        conditional = bool(predicate) or bool(label and re.search(r"\bU?P\d", rest[: label.start()]))
        program.append(Instruction(opcode, rest, conditional, labels.get(label[0]) if label else None))
    return program


@dataclass(frozen=True)
class Tile:
    """Where a kernel's machine code works on one tile: indices of instructions."""

    product: list[int]  #: the innermost loop with matrix instructions, one step of block_depth
    epilogue: list[int]
    flat: bool  #: the epilogue is a branch inside the product's loop, which runs on over tiles


def dissect(program: list[Instruction]) -> Tile:
    """Find the product's loop and the epilogue.

    The epilogue is the rest of the loop around the product's (nested loops) or, without such a loop, the
    largest block inside it that a branch skips and that takes exponentials (a flat loop). Other blocks that
    branches skip are left out: they are the rare cases.
    """

    def has(pipe: str, first: int, last: int) -> bool:
        return any(instruction.pipe == pipe for instruction in program[first : last + 1])

    def inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
        return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]

    def returns_from_a_wait(i: int) -> bool:
        """A wait for a barrier spins out of line: a short conditional loop, then the way back, no loop."""
        before = program[i - 1]
        spins = before.conditional and before.target is not None and i - 4 <= before.target < i
        return not program[i].conditional and spins

    ends: dict[int, int] = {}
    for i, instruction in enumerate(program):
        if instruction.target is not None and instruction.target <= i and not returns_from_a_wait(i):
            ends[instruction.target] = i
    loops = [loop for loop in ends.items() if has("matrix", *loop)]
    products = [loop for loop in loops if not any(inside(other, loop) for other in loops)]
    for product in products:
        around = [loop for loop in loops if inside(product, loop)]
        outer = min(around, key=lambda loop: loop[1] - loop[0], default=product)
        skipped = [
            (i + 1, branch.target - 1)
            for i, branch in enumerate(program[outer[0] : outer[1] + 1], outer[0])
            if branch.conditional and branch.target is not None and i + 24 < branch.target <= outer[1] + 1
        ]
        skipped = [block for block in skipped if not has("matrix", *block)]
        span = outer
        if not around:
            taking = [block for block in skipped if has("mufu", *block)]
            if not taking:
                continue  # a product alone, such as a last tile's that was peeled off
            span = max(taking, key=lambda block: block[1] - block[0])
        left_out = [loop for loop in products if inside(loop, span)]
        left_out += [block for block in skipped if inside(block, span)]
        epilogue = [i for i in range(span[0], span[1] + 1) if not any(first <= i <= last for first, last in left_out)]
        body = [i for i in range(product[0], product[1] + 1) if around or not span[0] <= i <= span[1]]
        return Tile(body, epilogue, flat=not around)
    raise ValueError("sass: found no loop of matrix instructions with an epilogue")


@dataclass(frozen=True)
class Prediction:
    instructions_per_logit: float
    serial: float  #: time of a tile over that of its product
    overlapped: float
    programs: int  #: that a multiprocessor holds; from two on, their epilogues can overlap
    flat: bool


def predict(report: Report, rows: int, vocab: int, depth: int, d_model: int, architecture: int) -> Prediction:
    """The cost of a ``[rows, vocab]`` tile's statistics; its product takes ``depth`` features a step."""
    rates = RATES[architecture]
    program = read(report.sass)
    tile = dissect(program)

    def operations(indices: list[int]) -> Counter[str]:
        count: Counter[str] = Counter()
        for i in indices:
            count[program[i].pipe] += 2 if program[i].opcode in PAIRS else 1
        return count

    halves = report.kernel == "_cooperative"
    warps = 4 if report.kernel == "_overlapped" or halves else report.warps  # that a tile is done by, or its half
    lanes = 32 * warps
    pipes = {pipe: n * lanes / rates[pipe] for pipe, n in operations(tile.epilogue).items() if pipe in rates}
    pipes["alu"] = pipes.get("alu", 0) + pipes.pop("convert", 0)  # they share a dispatch port
    issue = len(tile.epilogue) * warps / SCHEDULERS
    product_issue = len(tile.product) * warps / SCHEDULERS * d_model / depth
    product = 2 * rows * vocab * d_model / rates["matrix"] / PRODUCT_EFFICIENCY
    alone = max(issue / ISSUE_EFFICIENCY[min(2, max(1, warps // SCHEDULERS))], *pipes.values())
    overlapped = max(product, (issue + product_issue) / ISSUE_EFFICIENCY[2], *pipes.values())
    if halves:  # the second group's last steps run under the first one's epilogue, and the other way round
        lag = report.constants["LAG"]
        assert isinstance(lag, int)
        overlapped = product + max(0.0, alone - lag * product * depth / d_model / 2)
    programs = min(
        REGISTERS // (report.registers * 32 * report.warps), SHARED_LIMIT[architecture] // max(1, report.shared)
    )
    return Prediction(
        len(tile.epilogue) * lanes / (rows * vocab) * (1 + halves),
        (product + alone + (0 if tile.flat or halves else REFILL)) / product,
        overlapped / product,
        programs,
        tile.flat,
    )


def launch(d_model: int, kernel: str, softcap: bool = False, running: str = "", **wanted: bool) -> Callable[[], None]:
    """The vocabulary pass over 8,192 rows in bf16, with a vocabulary that leaves no tail."""

    def run() -> None:
        import torch

        from tuned_lens_fast.engines.interface import Head
        from tuned_lens_fast.kernels.launch import built_in_tile
        from tuned_lens_fast.kernels.search import cooperative_candidates, overlapped_candidates
        from tuned_lens_fast.kernels.vocabulary_pass import vocabulary_pass

        x = meta(8192, d_model)
        head = Head(meta(131_072, d_model), softcap=30.0 if softcap else None)
        tile = built_in_tile(torch.cuda.get_device_capability(), x.dtype, d_model)
        if kernel != "_vocabulary_pass":
            tile = next({"_overlapped": overlapped_candidates, "_cooperative": cooperative_candidates}[kernel](d_model))
        targets = meta(8192, dtype="float32") if "r" in running else None
        vocabulary_pass(x, head, tile, target_logits=targets, running=running, **wanted)

    return run


#: Name of a kernel -> the widths it is compiled for.
KERNELS = {"_vocabulary_pass": WIDTHS, "_overlapped": FEW_FEATURES, "_cooperative": MANY_FEATURES}
LAUNCHES = {
    f"{kernel}, {name}, d {d_model}": launch(d_model, kernel, **wanted)
    for kernel, widths in KERNELS.items()
    for name, wanted in STATISTICS.items()
    for d_model in widths
}


def table(kernel: str, architecture: int) -> Iterable[str]:
    """The predictions of a kernel as lines of a Markdown table; where widths differ, one after another."""
    widths = KERNELS[kernel]
    jobs = [(name, architecture) for name in LAUNCHES if name.startswith(kernel)]
    reports = compile_launches(__file__, jobs)
    of_widths = " / ".join(map(str, widths))
    yield f"| {kernel} | tile | programs an SM | instructions a logit | serial, d = {of_widths} | overlapped |"
    yield "|---|---|---|---|---|---|"
    for name in STATISTICS:
        found = []
        for d_model in widths:
            answer = reports[f"{kernel}, {name}, d {d_model}", architecture]
            if isinstance(answer, str):
                raise RuntimeError(f"{kernel}, {name}, d {d_model} does not compile:\n{answer}")
            report = next(r for r in answer if r.kernel == kernel)
            c = report.constants
            found.append((c, predict(report, c["BM"], c["BN"], c["BK"], d_model, architecture)))

        columns = zip(
            *(
                (
                    f"{c['BM']}x{c['BN']}x{c['BK']} {'flat' if p.flat else 'nested'}",
                    f"{p.programs}",
                    f"{p.instructions_per_logit:.1f}",
                    f"{p.serial:.2f}",
                    f"{p.overlapped:.2f}",
                )
                for c, p in found
            ),
            strict=True,
        )
        cells = (each[0] if len(set(each)) == 1 else " / ".join(each) for each in columns)
        yield f"| {' | '.join((name, *cells))} |"


def ladder() -> Iterable[str]:
    """What is predicted of every rung at 1,024 positions on an H100, kernel by kernel, as lines of a Markdown table."""
    from presets import PRESETS
    from suites import H100_SHAPES

    from tuned_lens_fast.kernels.launch import Bands, Tile, merged_tiles

    programs, clock, bandwidth = H100
    presets = [PRESETS[name] for name in H100_SHAPES.split()]
    wanted = {
        (kernel, name, shape.d_model): (f"{kernel}, {name}, d {shape.d_model}", 90)
        for kernel, widths in KERNELS.items()
        for name in STATISTICS
        for shape in presets
        if shape.d_model in widths
    }
    reports = compile_launches(__file__, list(wanted.values()))
    yield "| over torch.mm | " + " | ".join(f"d {shape.d_model}" for shape in presets) + " |"
    yield "|---|" + "---:|" * len(presets)
    for kernel in KERNELS:
        for name in (*(name for name in STATISTICS if "softcap" not in name), "+ kl"):
            cells = []
            for shape in presets:
                of_tile = "+ top-10 candidates" if name == "+ kl" else name
                job = wanted.get((kernel, of_tile, shape.d_model))
                if job is None:
                    cells.append("")
                    continue
                [report] = [r for r in reports[job] if not isinstance(r, str) and r.kernel == kernel]
                c = report.constants
                bm, bn, bk = (int(str(c[dimension])) for dimension in ("BM", "BN", "BK"))
                found = predict(report, bm, bn, bk, shape.d_model, 90)
                top = "top-10" in of_tile
                tile = Tile(bm, bn, bk, 8, 1)
                merged = merged_tiles(shape.vocab, tile, 10, 2 * shape.d_model) if top else 1
                rows = 1024 * shape.layers
                most = max(1, 24 * 2**20 // (2 * bm * shape.d_model))
                blocks, tiles = -(-rows // bm), shape.vocab // bn
                waves = Bands.of(blocks, tiles, merged, programs, most).over_ideal(blocks, tiles, merged, programs)
                product = 2 * rows * shape.d_model * shape.vocab / (programs * clock * RATES[90]["matrix"])
                seconds = product / PRODUCT_EFFICIENCY
                groups = shape.vocab / (tile.members * merged)
                searched = 100 / (2 * groups) * tile.members * merged * 2 * shape.d_model
                bytes_a_row = 12 * groups + searched if top else 0
                total = (found.serial if kernel == "_vocabulary_pass" else found.overlapped) * waves
                total += rows * bytes_a_row / bandwidth / seconds + (3 / shape.layers if name == "+ kl" else 0)
                cells.append(f"{total:.2f}")
            yield f"| {kernel}: {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, default=90, choices=sorted(PROCESSORS))
    parser.add_argument("--ladder", action="store_true", help="every rung at the shapes of bench/gpu.sh, on an H100")
    arguments = parser.parse_args()
    if arguments.ladder:
        print(*ladder(), sep="\n")
        return
    for kernel in KERNELS if arguments.architecture == 90 else ["_vocabulary_pass"]:
        print(*table(kernel, arguments.architecture), "", sep="\n")


if __name__ == "__main__":
    main()
