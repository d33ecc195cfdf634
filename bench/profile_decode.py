"""Where the time of a decode goes, part by part, beside what the machine could do at best.

    python bench/profile_decode.py --preset smollm2-135m --weights real --positions 128 [--out RESULT.json]

A decode is asked for one thing more at a time, and what that adds to its time is the part's; so every engine is taken
apart the same way, whatever it does inside. Operations (of matrix products) and bytes (every input of a part read once,
every result written once) are counted from the shapes; the two ceilings, a large matrix product and a large copy, are
measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import product
from contenders.adapter import head_inputs
from measure import Race, environment, interleaved
from presets import BUDGET, PRESETS, Problem, license_ids, problems, real_model
from run import command

from tuned_lens_fast.atomic_write import atomic_write
from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.interface import Norm

#: Vocabulary beside which translators and norm take nearly all of the time.
FEW_TOKENS = 256
#: One thing more at a time: name of the part, what is asked for with it.
STEPS: tuple[tuple[str, frozenset[str], int], ...] = (
    ("logsumexp", frozenset(), 0),
    ("entropy", frozenset({"entropy"}), 0),
    ("log_prob and rank", frozenset({"entropy", "log_prob", "rank"}), 0),
    ("top 10", frozenset({"entropy", "log_prob", "rank"}), 10),
    ("kl", frozenset({"entropy", "log_prob", "rank", "kl"}), 10),
)


@dataclass(frozen=True)
class Work:
    """What a part has to do at least."""

    operations: float  #: of matrix products, a multiplication and an addition being two
    bytes: float


def ceilings(dtype: torch.dtype, device: str, mib: int, rounds: int) -> dict[str, float]:
    """Operations a second of a large square product and bytes a second, read and written, of a large copy."""
    size = int((mib * 2**20 / 64) ** 0.5)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.ones(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)  # its pages are there before the first copy
    calls: dict[str, Callable[[], Any]] = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    [found] = interleaved([Race(calls, dict.fromkeys(calls, rounds + 1))], device)
    times = {name: min(seconds) for name, (seconds, _) in found.items()}
    return {
        "operations_per_second": 2 * size**3 / times["product"],
        "bytes_per_second": 2 * source.numel() / times["copy"],
        "product_size": size,
        "copy_mib": mib,
    }


def work(problem: Problem) -> dict[str, Work]:
    """Of every part of a decode, from the shapes."""
    rows, positions = problem.rows, problem.positions
    vocab, d = problem.head.weight.shape
    wide, state = problem.head.weight.element_size(), problem.hidden[0].element_size()
    translators = sum(t is not None for t in problem.translators)
    logits = 4.0 * rows * vocab
    found = {
        "translators and norm": Work(
            2.0 * translators * positions * d * d, rows * d * (state + wide) + translators * d * d * state
        ),
        "product": Work(2.0 * rows * d * vocab, vocab * d * wide + rows * d * wide),
        # The model's own logits, and W^T softmax of them; then a dot product a row.
        "kl": Work(4.0 * positions * d * vocab, 2.0 * vocab * d * wide + 2 * positions * d * wide + rows * d * wide),
    }
    return found | {name: Work(0.0, logits) for name, _, _ in STEPS if name not in found}


def parts(problem: Problem, engine: Any, rounds: int) -> dict[str, Any]:
    """Seconds of the whole decode and of its parts by ``engine``, whichever order they would run in."""
    at_head = replace(
        problem,
        hidden=list(head_inputs(problem).view(problem.layers, problem.positions, -1)),
        translators=[None] * problem.layers,
        norm=Norm("identity"),
    )
    own = engine.name == "native" and product.OWN.why_not(problem) is None
    products = [product.OWN] if own else [product.ROWS, product.TILES]
    floors = [contender.name for contender in products]
    few = replace(problem, head=replace(problem.head, weight=problem.head.weight[:FEW_TOKENS], bias=None))

    def decode(problem: Problem, stats: frozenset[str], top_k: int) -> Callable[[], Any]:
        asked = problem.asking(stats, top_k)
        return lambda: engine.decode(asked.hidden, asked.translators, asked.norm, asked.head, asked.query, asked.budget)

    calls = {
        "translators and norm": decode(few, frozenset(), 0),
        **{name: decode(at_head, stats, top_k) for name, stats, top_k in STEPS},
        "whole": decode(problem, *STEPS[-1][1:]),
        **{contender.name: contender.prepare(problem) for contender in products},
    }
    interleaved([Race(calls, dict.fromkeys(calls, 1))], problem.device.type)  # warms up
    [times] = interleaved([Race(calls, dict.fromkeys(calls, rounds), floors[-1])], problem.device.type)
    beside = median(times[floors[-1]][0])
    # Differences of times are small: each is its multiple of the product's beside it, and all are of one product.
    seconds = {name: median(ratios) * beside for name, (_, ratios) in times.items()}
    floor = min(seconds[name] for name in floors)
    found = {"translators and norm": seconds["translators and norm"], "product": floor}
    before = floor
    for name, _, _ in STEPS:
        found[name] = seconds[name] - before
        before = seconds[name]
    return {"whole": seconds["whole"], "parts": found}


def run(options: argparse.Namespace, said: str) -> dict[str, Any]:
    """What is written to the JSON file."""
    shape, device = PRESETS[options.preset], options.device
    dtype = getattr(torch, options.dtype) if options.dtype else torch.float32 if device == "cpu" else shape.dtype
    problem = next(
        problems(
            options.preset, [], [options.positions], [], options.weights, dtype=dtype, device=device, budget=BUDGET
        )
    )
    result: dict[str, Any] = {
        "kind": "profile",
        "command": said,
        "environment": environment(device),
        "device": device,
        "preset": options.preset,
        "weights": options.weights,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": problem.layers,
        "positions": problem.positions,
        "vocab": problem.head.vocab,
        "d_model": shape.d_model,
        "ceilings": ceilings(dtype, device, options.ceiling_mib, 5),
        "work": {name: vars(amount) for name, amount in work(problem).items()},
        "model_seconds": None,
        "engines": {},
    }
    if options.weights == "real":
        model, tokenizer = real_model(options.preset, dtype, device)
        ids = license_ids(tokenizer, options.positions)[None].to(device)

        @torch.inference_mode()
        def forward() -> Any:
            return model.base_model(ids, use_cache=False)

        forward()
        [times] = interleaved([Race({"model": forward}, {"model": options.rounds})], device)
        result["model_seconds"] = median(times["model"][0])
    for name, engine in ENGINES.items():
        why = engine.unavailable(problem.device, problem.dtype)
        result["engines"][name] = {"why": why} if why else parts(problem, engine, options.rounds)
        print(f"{name}: {json.dumps(result['engines'][name])}", flush=True)
    print(f"ceilings: {json.dumps(result['ceilings'])}; model: {result['model_seconds']} s")
    return result


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="smollm2-135m")
    parser.add_argument("--weights", choices=("random", "real"), default="random")
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: fp32 on a CPU, the model's on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ceiling-mib", type=int, default=512, help="of the copy; of a matrix in fp32, a sixteenth")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    result = run(options, command("profile_decode.py", arguments))
    if options.out:
        with atomic_write(options.out) as aside:
            aside.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
