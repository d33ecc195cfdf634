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
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import product
from contenders.adapter import head_inputs
from contenders.ours import decode
from measure import Race, Times, interleaved
from presets import BUDGET, PRESETS, Problem, license_ids, problems, question, real_model
from record import heading, write

from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.decoding import Engine
from tuned_lens_fast.engines.interface import Norm

#: Vocabulary beside which translators and norm take nearly all of the time.
FEW_TOKENS = 256
ROUNDS = 5
#: One thing more at a time: name of the part -> what is asked for with it.
STEPS = {
    "logsumexp": "lse",
    "entropy": "entropy",
    "log_prob and rank": "log_prob,rank,entropy",
    "top 10": "log_prob,rank,entropy,top_10",
    "kl": "log_prob,rank,entropy,kl,top_10",
}


def measured(calls: dict[str, Callable[[], Any]], device: str, floor: str | None = None) -> Times:
    """The times of calls that have been made once before."""
    interleaved([Race(calls, dict.fromkeys(calls, 1))], device)
    return interleaved([Race(calls, dict.fromkeys(calls, ROUNDS), floor)], device)[0]


def ceilings(dtype: torch.dtype, device: str, mib: int) -> dict[str, float]:
    """Operations a second of a large square product and bytes a second, read and written, of a large copy."""
    size = int((mib * 2**20 / 64) ** 0.5)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.ones(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)  # its pages are there before the first copy
    times = measured({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device)
    return {
        "operations_per_second": 2 * size**3 / min(times["product"][0]),
        "bytes_per_second": 2 * source.numel() / min(times["copy"][0]),
        "product_size": size,
        "copy_mib": mib,
    }


def work(problem: Problem) -> dict[str, dict[str, float]]:
    """What every part of a decode has to do at least: operations, a multiply-add being two, and bytes."""
    rows, positions = problem.rows, problem.positions
    vocab, d = problem.head.weight.shape
    wide, state = problem.head.weight.element_size(), problem.hidden[0].element_size()
    translators = sum(t is not None for t in problem.translators)
    found = {
        "translators and norm": (
            2.0 * translators * positions * d * d,
            rows * d * (state + wide) + translators * d * d * state,
        ),
        "product": (2.0 * rows * d * vocab, vocab * d * wide + rows * d * wide),
        # The model's own logits, and W^T softmax of them; then a dot product a row.
        "kl": (4.0 * positions * d * vocab, 2.0 * vocab * d * wide + 2 * positions * d * wide + rows * d * wide),
    }
    logits = (0.0, 4.0 * rows * vocab)
    found = dict.fromkeys(("translators and norm", "product", *STEPS), logits) | found
    return {name: {"operations": operations, "bytes": count} for name, (operations, count) in found.items()}


def parts(problem: Problem, engine: Engine) -> dict[str, Any]:
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

    def asked(problem: Problem, question_: str) -> Callable[[], Any]:
        problem = problem.asking(*question(question_))
        return lambda: decode(engine, problem)

    calls = {
        "translators and norm": asked(few, "lse"),
        **{name: asked(at_head, step) for name, step in STEPS.items()},
        "whole": asked(problem, STEPS["kl"]),
        **{contender.name: contender.prepare(problem) for contender in products},
    }
    times = measured(calls, problem.device.type, floors[-1])
    beside = median(times[floors[-1]][0])
    # Differences of times are small: each is its multiple of the product's beside it, and all are of one product.
    seconds = {name: median(ratios) * beside for name, (_, ratios) in times.items()}
    before = min(seconds[name] for name in floors)
    found = {"translators and norm": seconds["translators and norm"], "product": before}
    for name in STEPS:
        found[name] = seconds[name] - before
        before = seconds[name]
    return {"whole": seconds["whole"], "parts": found}


def forward_seconds(preset: str, positions: int, dtype: torch.dtype, device: str) -> float:
    """The median time of the model's own forward pass, without its head."""
    model, tokenizer = real_model(preset, dtype, device)
    ids = license_ids(tokenizer, positions)[None].to(device)

    @torch.inference_mode()
    def forward() -> Any:
        return model.base_model(ids, use_cache=False)

    return median(measured({"model": forward}, device)["model"][0])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="smollm2-135m")
    parser.add_argument("--weights", choices=("random", "real"), default="random")
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--ceiling-mib", type=int, default=512, help="of the copy; of a matrix in fp32, a sixteenth")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    shape, device = PRESETS[options.preset], "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else shape.dtype
    inputs: dict[str, Any] = {"dtype": dtype, "device": device, "budget": BUDGET}
    [problem] = problems(options.preset, [], [options.positions], [], options.weights, **inputs)
    real = options.weights == "real"
    result = {
        "kind": "profile",
        **heading("profile_decode.py", arguments, device),
        "preset": options.preset,
        "weights": options.weights,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": problem.layers,
        "positions": problem.positions,
        "vocab": problem.head.vocab,
        "d_model": shape.d_model,
        "ceilings": ceilings(dtype, device, options.ceiling_mib),
        "work": work(problem),
        "model_seconds": forward_seconds(options.preset, options.positions, dtype, device) if real else None,
        "engines": {
            name: parts(problem, engine)
            for name, engine in ENGINES.items()
            if engine.unavailable(problem.device, problem.dtype) is None
        },
    }
    print(json.dumps({name: result[name] for name in ("ceilings", "model_seconds", "engines")}, indent=1))
    if options.out:
        write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
