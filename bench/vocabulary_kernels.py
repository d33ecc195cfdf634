"""The kernels of the vocabulary pass side by side: whether they work on the GPU at hand, and their times.

    python bench/vocabulary_kernels.py compile --preset llama-3-8b       into Triton's cache; none of them runs
    python bench/vocabulary_kernels.py check --kernel cooperative        smallest cases first, each named before it runs
    python bench/vocabulary_kernels.py time --preset llama-3-8b smollm2-135m --tiles tiles.json --out kernels.json
    python bench/vocabulary_kernels.py parts --preset llama-3-8b         every kernel of a decode, by PyTorch's profiler

Times are over torch.mm of the same rows, between whose runs they are taken. The floor of a kernel is itself with all
but no statistics (--alone). The fastest tile of every preset goes into a file that TUNED_LENS_FAST_TILES may name.
Without a GPU bench/gpu.sh rehearses it at toy sizes in Triton's interpreter: times mean nothing there.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from contenders.ours import decode
from measure import Race, interleaved, quantiles, timed
from presets import BUDGET, PRESETS, problems, question
from record import heading, write
from suites import FULL, ONE_WALK

from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.kernels import cooperative, launch, overlapped, search, vocabulary_pass
from tuned_lens_fast.kernels.launch import Tile

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
#: What the module of a kernel is called -> the module.
KERNELS = {"vocabulary_pass": vocabulary_pass, "overlapped": overlapped, "cooperative": cooperative}
#: Features from which tiles of cooperative.py are tried.
MANY_FEATURES = 1024
ROWS = 8192


@triton.jit
def _hardly_anything(
    acc, m, s, t, above, largest, first, second, target_logit, bias, token, valid, member, part, slot, group_maxima,
    rows, row_mask, group, slots, scale, softcap, place_mask, BM: tl.constexpr, BN: tl.constexpr, MEMBERS: tl.constexpr,
    MERGED: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
    ENTROPY: tl.constexpr, RANK: tl.constexpr, TOP: tl.constexpr, LAID_OUT_AS: tl.constexpr,
):  # fmt: skip
    """In place of running_state.py's ``add_tile``: as little as keeps the product from being left out."""
    return tl.maximum(m, tl.max(acc.reshape(BM, MEMBERS, 8), 1)), s, t, above, largest, first, second


def rehearse() -> None:
    """Have kernels run without a GPU, as tests/kernels does."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("vocabulary_kernels.py: PyTorch sees no NVIDIA GPU; `REHEARSE=1 bash bench/gpu.sh 1` needs none")
    sys.path.append(str(Path(__file__).parent.parent / "tests/kernels"))
    from partitions import stand_in

    stand_in(overlapped, "_overlapped")
    stand_in(cooperative, "_cooperative")


def candidates(kernel: str, d_model: int, dtype: torch.dtype) -> list[Tile]:
    """The tiles of a kernel that are tried."""
    if not ON_GPU:
        toy = {
            "vocabulary_pass": Tile(16, 64, 32, 4, 1),
            "overlapped": Tile(16, 64, 32, 8, 3, tma=True, overlapped=True),
            "cooperative": Tile(32, 64, 32, 8, 3, tma=True, cooperative=True, lag=2),
        }
        return [toy[kernel]]
    if kernel == "vocabulary_pass":
        return [launch.built_in_tile(launch.architecture(DEVICE), dtype, d_model)]
    if launch.architecture(DEVICE)[0] != 9:
        return []
    if kernel == "overlapped":
        return list(search.overlapped_candidates(d_model))
    return list(search.cooperative_candidates(d_model)) if d_model >= MANY_FEATURES else []


def told(kernel: str, tile: Tile) -> str:
    lag = f", lag {tile.lag}" if tile.cooperative else ""
    return f"{kernel} {tile.block_rows}x{tile.block_vocab}x{tile.block_depth}, {tile.stages} stages{lag}"


def operands(rows: int, d_model: int, vocab: int) -> tuple[torch.Tensor, Head]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(rows, d_model, generator=generator, device=DEVICE).bfloat16()
    weight = torch.empty(vocab, d_model, dtype=torch.bfloat16, device=DEVICE)
    for part in weight.split(8192):
        part.copy_(torch.randn(part.shape, generator=generator, device=DEVICE) * 3 * d_model**-0.5)
    return x, Head(weight)


def shape(preset: str) -> tuple[int, int, int]:
    """Rows, d_model and vocabulary."""
    return (ROWS, PRESETS[preset].d_model, PRESETS[preset].vocab) if ON_GPU else (4, 64, 140)


def all_tiles(kernels: list[str], d_model: int) -> dict[str, Tile]:
    return {told(kernel, tile): tile for kernel in kernels for tile in candidates(kernel, d_model, torch.bfloat16)}


def compile_all(options: argparse.Namespace) -> int:
    """Every kernel of the passes that ``time`` will run, none of which runs."""
    run = triton.JITFunction.run
    if ON_GPU:
        triton.JITFunction.run = lambda self, *args, grid, warmup, **more: run(
            self, *args, grid=grid, warmup=True, **more
        )
    for preset in options.preset:
        _, d_model, vocab = shape(preset)
        x, head = operands(256 if ON_GPU else 16, d_model, vocab)
        for name, tile in all_tiles(options.kernel, d_model).items():
            if not ON_GPU and tile.tma:
                continue
            for with_top_k in (True, False):
                print(preset, name, "with" if with_top_k else "without", "a top k", flush=True)
                whole = search.merged(head, tile) if with_top_k else tile
                targets = x.new_zeros(len(x), dtype=torch.float32)
                vocabulary_pass.vocabulary_pass(
                    x, head, whole, target_logits=targets, running="tr", group_maxima=with_top_k
                )
    return 0


def check(options: argparse.Namespace) -> int:
    """One program and few tiles, then several, against the built-in tile; stops at the first that is wrong.

    A case is named before it runs, so that of one which hangs or faults it is known how many tiles it had.
    """
    [kernel] = options.kernel
    d_model = options.d_model or (96 if not ON_GPU else 576 if kernel == "overlapped" else 1024)
    plain = candidates("vocabulary_pass", d_model, torch.bfloat16)[0]
    of_device = launch.processors(DEVICE)
    cases = [(1, count, merged) for count in options.count for merged in options.merged]
    cases += [(of_device, 9, 2)] if len(options.count) > 1 else []
    for tile in candidates(kernel, d_model, torch.bfloat16):
        for programs, count, merged in cases:
            for module in (launch, cooperative):
                module.processors = lambda _, programs=programs: programs
            what = f"{told(kernel, tile)}: {programs} programs, {count} tiles, merged {merged}"
            print(what, end=" ", flush=True)
            rows, left_over = (5 * tile.block_rows // 4, 7) if programs > 1 else (tile.block_rows - 3, 0)
            x, head = operands(rows, d_model, count * tile.block_vocab + left_over)
            whole = replace(tile, merged=merged)
            members = replace(plain, block_vocab=tile.block_vocab, merged=merged)
            (a, best), (b, wanted) = (
                vocabulary_pass.vocabulary_pass(x, head, some, running="t", group_maxima=True)
                for some in (whole, members)
            )
            assert best is not None
            assert wanted is not None
            off = max(
                float((a.m + a.log_s - b.m - b.log_s).abs().max()),  # type: ignore[operator]
                float((best[:, 0] - wanted[:, 0]).abs().max()),
            )
            print("right" if off <= search.TOLERANCE else f"WRONG by {off:.3g}", flush=True)
            if not off <= search.TOLERANCE:
                return 1
    return 0


def product(x: torch.Tensor, head: Head) -> Callable[[], None]:
    """torch.mm of all rows, into the same memory again and again."""
    out = x.new_empty(len(x), head.vocab)

    def multiply() -> None:
        torch.mm(x, head.weight.t(), out=out)

    return multiply


def time_all(options: argparse.Namespace) -> int:
    """Every tile's time over the product's, preset by preset, written as soon as it is there."""
    result = {"kind": "kernels", **heading("vocabulary_kernels.py", options.arguments, DEVICE.type), "cases": []}
    if options.out is not None and options.out.exists():
        result["cases"] = json.loads(options.out.read_text())["cases"]
    if options.alone:
        for module in KERNELS.values():
            module.add_tile = _hardly_anything
    for preset in options.preset:
        rows, d_model, vocab = shape(preset)
        x, head = operands(rows, d_model, vocab)
        for with_top_k in (True,) if options.alone else (True, False):
            tiles = all_tiles(options.kernel, d_model)
            if options.alone:
                calls: dict[Tile, Callable[[], Any]] = {
                    tile: functools.partial(vocabulary_pass.vocabulary_pass, x, head, tile) for tile in tiles.values()
                }
                for call in calls.values():
                    call()
            else:
                calls = search.working(x, head, list(tiles.values()), with_top_k=with_top_k)
            race = {"torch.mm": product(x, head)} | {n: calls[t] for n, t in tiles.items() if t in calls}
            race["torch.mm"]()
            rounds = dict.fromkeys(race, options.rounds)
            [times] = interleaved([Race(race, rounds, floor="torch.mm")], DEVICE.type)
            queued = {n: min(timed(call, DEVICE.type, queued=True) for _ in range(3)) for n, call in race.items()}
            case = {
                "preset": preset, "rows": rows, "d_model": d_model, "vocab": vocab,
                "asked": "hardly anything" if options.alone else ONE_WALK if with_top_k else "all sums",
                "tiles": {
                    n: {
                        "seconds": quantiles(seconds),
                        "over_product": quantiles(ratios)["median"],
                        "queued_over_product": queued[n] / queued["torch.mm"],
                    }
                    for n, (seconds, ratios) in times.items()
                },
                "left_out": [n for n, tile in tiles.items() if tile not in calls],
            }  # fmt: skip
            for n, entry in case["tiles"].items():
                ratios = entry["over_product"], entry["queued_over_product"]
                print(f"{preset}, {case['asked']}: {n} {ratios[0]:.3f}, queued {ratios[1]:.3f}", flush=True)
            result["cases"] = [*result["cases"], case]
            if options.out is not None:
                write(options.out, result)
            if options.tiles is not None and not options.alone and calls:
                best = min((n for n in race if n != "torch.mm"), key=lambda n: case["tiles"][n]["over_product"])
                key = launch.entry_key(DEVICE, x.dtype, d_model, "ieee", with_top_k)
                search.add_entry(options.tiles, key, tiles[best])
    return 0


def parts(options: argparse.Namespace) -> int:
    """Seconds of every kernel of a decode with and without kl."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]
    result = {
        "kind": "kernels of a decode",
        **heading("vocabulary_kernels.py", options.arguments, DEVICE.type),
        "cases": [],
    }
    for preset in options.preset:
        inputs = {"dtype": torch.bfloat16 if ON_GPU else torch.float32, "device": DEVICE.type, "budget": BUDGET}
        of_model = ([], [1024], []) if ON_GPU else ([1], [2], [])
        [problem] = problems(preset, *of_model, "random", start="head", **inputs)
        for asked in (ONE_WALK, FULL):
            asked_of = problem.asking(*question(asked))
            call = functools.partial(decode, ENGINES["triton"], asked_of)
            call()
            with profiler(activities=activities) as seen:
                call()
            of_kernel = {
                event.key: {"seconds": _seconds(event), "launches": event.count}
                for event in sorted(seen.key_averages(), key=_seconds, reverse=True)[:16]
            }
            case = {"preset": preset, "statistics": asked, "kernels": of_kernel}
            result["cases"] = [*result["cases"], case]
            for name, entry in of_kernel.items():
                print(f"{preset}, {asked}: {entry['seconds'] * 1e3:9.3f} ms {entry['launches']:5d} {name[:60]}")
            if options.out is not None:
                write(options.out, result)
    return 0


def _seconds(event: Any) -> float:
    return (event.self_device_time_total if ON_GPU else event.self_cpu_time_total) / 1e6


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compile", "check", "time", "parts"))
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["smollm2-135m"])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--count", nargs="+", type=int, default=[1, 2, 3, 5], help="check: tiles, one after another")
    parser.add_argument("--tiles", type=Path, help="time: file of tiles that the fastest are added to")
    parser.add_argument("--merged", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--d-model", type=int, help="check: instead of 576, or 1,024 for cooperative.py")
    parser.add_argument("--alone", action="store_true", help="time: with all but no statistics")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, help="JSON file to write, or to go on with")
    options = parser.parse_args(arguments)
    options.arguments = arguments
    if options.what == "check" and len(options.kernel) != 1:
        parser.error("check: wanted one --kernel, since one that hangs takes its process with it")
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    if not ON_GPU:
        rehearse()
    return {"compile": compile_all, "check": check, "time": time_all, "parts": parts}[options.what](options)


if __name__ == "__main__":
    sys.exit(main())
