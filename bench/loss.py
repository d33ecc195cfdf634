"""What a step of training costs: losses of all layers and their gradients, beside the bare two products and others.

    python bench/loss.py [--preset smollm2-135m] [--positions 256] [--loss kl|ce] [--budget-mib 256] [--out FILE]

Every contender has the hidden states, the model's output and W, and ends with the gradient of every translator. The
floor is two products of every row with W, each as it is quickest in PyTorch: a tile of logits, and that tile times W
again. tuned-lens's step is what its training script does with a batch, in fp32, its own lens and autograd: the model's
logits, then layer by layer logits, log_softmax, loss, backward. Memory is the growth of the peak during a call,
gradients included; "beside gradients" leaves their bytes out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contenders.adapter import head_inputs
from contenders.tuned_lens_trajectory import trainable_lens
from measure import Race, interleaved, peak_growth, quantiles
from presets import PRESETS, Problem, random_problem, real_problem
from record import heading, write

from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.interface import NO_TARGET, Readout
from tuned_lens_fast.engines.losses import Derivative, losses, question

#: Rows and tokens of the floor's products; the quickest of these counts.
TILES = {"cpu": ((512, 2048), (512, 4096), (1024, 2048)), "cuda": ((2048, 16_384), (8192, 8192), (8192, 32_768))}


def two_products(problem: Problem, rows: int, width: int) -> Callable[[], None]:
    """A tile of logits, then that tile times W, into the same memory again and again."""
    x, weight = head_inputs(problem), problem.head.weight
    rows = min(rows, len(x))
    z, sums = x.new_empty(rows * width), x.new_empty(rows, x.shape[1])

    def multiply() -> None:
        for some in x.split(rows):
            for tile in weight.split(width):
                logits = z[: len(some) * len(tile)].view(len(some), len(tile))
                torch.mm(some, tile.t(), out=logits)
                sums[: len(some)].addmm_(logits, tile)

    return multiply


def ours(problem: Problem, engine: str, kind: str, budget: int) -> Callable[[], Any]:
    readout = Readout(tuple(problem.translators), problem.norm, problem.head)
    asked = question(problem.query.targets, None) if kind == "ce" else question(None, problem.query.reference)
    shares = torch.full((1, 1), 1 / len(problem.hidden[0]), device=problem.device)
    derivative = Derivative(shares, weights=True, biases=True, hidden=False)
    return lambda: losses(ENGINES[engine], problem.hidden, readout, asked, derivative, budget)


def of_tuned_lens(problem: Problem, kind: str) -> Callable[[], None]:
    lens, head, query = trainable_lens(problem), problem.head, problem.query

    def step() -> None:
        if kind == "kl":
            with torch.no_grad():
                labels = F.linear(query.reference, head.weight, head.bias).log_softmax(-1)
        for i, h in enumerate(problem.hidden):
            logits = lens(h, i)
            if kind == "ce":
                loss = F.cross_entropy(logits, query.targets, ignore_index=NO_TARGET)
            else:
                loss = (labels.exp() * (labels - logits.log_softmax(-1))).sum(-1).mean()
            loss.backward()
        lens.zero_grad(set_to_none=True)

    return step


def linear_cross_entropy(problem: Problem) -> Callable[[], None]:
    """PyTorch's own fused loss, of what the head receives."""
    x = head_inputs(problem).requires_grad_()
    targets = problem.query.targets.repeat(problem.layers)
    options = torch.nn.LinearCrossEntropyOptions()

    def step() -> None:
        x.grad = None
        F.linear_cross_entropy(x, problem.head.weight, targets, options=options).backward()

    return step


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="smollm2-135m")
    parser.add_argument("--weights", choices=["real", "random"], default="random")
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--loss", choices=["kl", "ce"], default="kl")
    parser.add_argument("--budget-mib", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--with-linear-cross-entropy", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    device, dtype, budget = torch.device(options.device), getattr(torch, options.dtype), options.budget_mib * 2**20
    if options.weights == "real":
        problem = real_problem(options.preset, options.positions, dtype, options.device, budget)
    else:
        problem = random_problem(PRESETS[options.preset], options.positions, dtype, options.device, budget)

    calls: dict[str, Callable[[], Any]] = {
        f"two products, {rows} x {width:,}": two_products(problem, rows, width) for rows, width in TILES[device.type]
    }
    floors = [*calls]
    for name, engine in ENGINES.items():
        if engine.unavailable(device, dtype) is None:
            calls[name] = ours(problem, name, options.loss, budget)
    if dtype == torch.float32:
        try:
            calls["tuned-lens 0.2.0"] = of_tuned_lens(problem, options.loss)
        except ImportError as error:
            print(f"tuned-lens is left out: {error}", file=sys.stderr)
    if options.with_linear_cross_entropy:
        calls["linear_cross_entropy"] = linear_cross_entropy(problem)

    found: dict[str, Any] = {}
    gradients = sum(
        4 * d.numel() for t in problem.translators if t is not None for d in (t.weight, t.bias) if d is not None
    )
    for name, call in calls.items():
        call()
        growth, _ = peak_growth(call, device)
        found[name] = {"peak": growth}
    (times,) = interleaved([Race(calls, dict.fromkeys(calls, options.rounds))], device.type)
    floor = min(statistics.median(times[name][0]) for name in floors)
    library = statistics.median(times["tuned-lens 0.2.0"][0]) if "tuned-lens 0.2.0" in times else None
    print(f"{problem.layers} layers x {options.positions} positions, {options.loss}, {options.dtype}, {device}")
    for name, (seconds, _) in times.items():
        median, peak = statistics.median(seconds), found[name]["peak"]
        found[name] |= {"seconds": quantiles(seconds), "of_two_products": median / floor}
        line = f"{name:28} {median:8.3f} s  {median / floor:5.2f} of the bare two products"
        if name not in floors and peak is not None:
            beside = max(0, peak - gradients)
            found[name]["beside_gradients"] = beside
            line += f"  {beside / 2**20:8.1f} MiB beside gradients"
        if library is not None:
            found[name]["tuned_lens_over_it"] = library / median
            line += f"  tuned-lens takes {library / median:.2f} times as long"
        print(line)
    if options.out is not None:
        shape = {
            "loss": options.loss,
            "layers": problem.layers,
            "positions": options.positions,
            "vocab": problem.head.vocab,
            "d_model": problem.head.weight.shape[1],
            "dtype": options.dtype,
            "budget": budget,
            "gradients": gradients,
        }
        write(
            options.out,
            {"kind": "losses", **heading("loss.py", sys.argv[1:], device.type), **shape, "contenders": found},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
