"""How good a lens gets for how many tokens: tuned-lens's recipe beside this package's, on the same text and seeds.

    pip download --no-deps --no-binary :all: django==5.2.8 && tar xzf django-5.2.8.tar.gz     # English, BSD licence
    python bench/train_lens.py --text django-5.2.8/docs [--steps 100] [--layers 0,4,9,14,19,24,29] [--out FILE]

SmolLM2-135M. tuned-lens's recipe is its training script's: translators of zero, SGD with Nesterov momentum of 0.9 at a
rate of 1, weight decay of 1e-3, one clipped norm of 1, the rate falling linearly; it is run by this package's loop,
which takes the same steps. Held-out KL is measured on documents that neither was trained on. Seconds are of the run so
far, its measurements included.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from presets import real_model
from record import heading, write

import tuned_lens_fast as tl

#: Name -> what ``train`` is told.
RECIPES: dict[str, dict[str, Any]] = {
    "tuned-lens": {"init": "zero", "optimizer": "sgd"},
    "ours": {},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a folder of plain text")
    parser.add_argument("--layers", default="0,4,9,14,19,24,29")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens-per-step", type=int, default=512)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--init-tokens", type=int, default=16_384)
    parser.add_argument("--eval-tokens", type=int, default=2_048)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--draw", type=Path, nargs=2, metavar=("RESULT", "PNG"), help="a picture of an --out, and no run"
    )
    options = parser.parse_args()
    if options.draw is not None:
        draw(json.loads(options.draw[0].read_text()), options.draw[1])
        return 0
    if options.text is None:
        parser.error("--text: wanted a folder of plain text")
    model, tokenizer = real_model("smollm2-135m", torch.float32, "cpu")
    files = sorted(options.text.rglob("*.txt"))
    texts = [text for file in files if (text := file.read_text(encoding="utf-8"))]
    documents = tokenizer(texts, verbose=False)["input_ids"]
    numbers = [int(layer) for layer in options.layers.split(",")]
    found: dict[str, Any] = {}
    for name in options.recipes.split(","):
        report = tl.train(
            model,
            tl.TunedLens.from_model(model),
            documents,
            layers=numbers,
            steps=options.steps,
            tokens_per_step=options.tokens_per_step,
            sequence_length=options.sequence_length,
            init_tokens=options.init_tokens,
            eval_tokens=options.eval_tokens,
            eval_every=max(1, options.steps // 4),
            **RECIPES[name],
        )
        found[name] = {
            "arguments": report.arguments,
            "logit_lens": report.logit_lens,
            "evaluations": report.evaluations,
            "seconds": report.seconds,
            "tokens_per_second": report.tokens_per_second,
        }
        show(name, numbers, report)
    if len(found) == len(RECIPES):
        theirs, mine = (found[name]["evaluations"] for name in RECIPES)
        last = sum(theirs[-1]["kl"])
        reached = next((one for one in mine if sum(one["kl"]) <= last), None)
        less = 1 - sum(mine[-1]["kl"]) / last
        worse = [n for n, a, b in zip(numbers, mine[-1]["kl"], theirs[-1]["kl"], strict=True) if a > b]
        print(f"mean KL {less:.0%} lower; layers that are worse: {worse or 'none'}")
        if reached is not None:
            faster = theirs[-1]["seconds"] / reached["seconds"]
            print(f"its final KL is reached at step {reached['step']}, in a {faster:.1f}th of its time")
    if options.out is not None:
        write(
            options.out,
            {
                "kind": "lens training",
                **heading("train_lens.py", sys.argv[1:], "cpu"),
                "layers": numbers,
                "recipes": found,
            },
        )
    return 0


def show(name: str, numbers: list[int], report: tl.TrainingReport) -> None:
    """A line for every measurement, held-out KL in nats by layer and their mean."""

    def line(label: str, kl: list[float]) -> str:
        return f"{label:24}" + "".join(f"{value:9.3f}" for value in (*kl, sum(kl) / len(kl)))

    print(line(name, numbers).rsplit(maxsplit=1)[0] + "     mean")
    print(line("  logit lens", report.logit_lens))
    for one in report.evaluations:
        print(line(f"  step {one['step']}, {one['seconds']:,.0f} s", one["kl"]), flush=True)


def draw(result: dict[str, Any], path: Path) -> None:
    """The means over layers against the step, and KL by layer where both recipes end and ours begins."""
    from matplotlib.figure import Figure

    layers, steps = result["layers"], result["recipes"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour, label in (
        ("tuned-lens", "#d55e00", "tuned-lens's recipe"),
        ("ours", "#0072b2", "ours: ridge, then Adam"),
    ):
        found = steps[name]["evaluations"]
        means = [sum(one["kl"]) / len(layers) for one in found]
        left.plot([one["step"] for one in found], means, marker=".", color=colour, label=label)
        right.plot(layers, found[-1]["kl"], marker=".", color=colour, label=f"{label}, {found[-1]['step']} steps")
    right.plot(layers, found[0]["kl"], marker=".", linestyle=":", color=colour, label="ours before the first step")
    right.plot(layers, steps["ours"]["logit_lens"], marker=".", color="0.5", label="logit lens")
    tokens = steps["ours"]["arguments"]["tokens_per_step"]
    left.set(xlabel=f"step of {tokens:,} tokens", ylabel="mean KL(model || lens), nats", yscale="log")
    left.set_title(f"SmolLM2-135M, mean of {len(layers)} layers")
    right.set(xlabel="layer", ylabel="KL(model || lens), nats", yscale="log", title="by layer")
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, format="png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
