"""Calculates what a corpus and a training run cost on 1, 8 and 64 GPUs; prints the tables of docs/distributed.md.

    python bench/cost.py

Nothing here is measured. Every column has its formula, and every rate that a formula takes is in RATES, named as what
it is.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What is assumed, with where it comes from.
RATES = {
    "peak": (989e12, "FLOP/s of an H100 SXM in bf16 without sparsity, by its data sheet"),
    "utilisation": (0.4, "of the peak that a model's forward pass reaches, assumed"),
    "lens": (520e12, "FLOP/s of the fused engine, assumed for all shapes"),
    "link": (300e9, "bytes/s that a GPU sends to others in its node, assumed for NVLink"),
    "network": (50e9, "bytes/s that a GPU sends to other nodes, assumed for 400 Gbit/s a GPU"),
    "memory": (80e9, "bytes of a GPU"),
    "top 10": (80, "bytes of a row on disk with the top 10, assumed"),
    "row": (22, "bytes of a row on disk without, assumed"),
}
GPUS = (1, 8, 64)
CORPUS = 1e9  #: tokens
STEP = 2**18  #: tokens of a step of training


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    d_model: int
    vocab: int
    parameters: float
    active: float  #: parameters that a token meets
    group: int  #: GPUs that share one model

    @property
    def forward(self) -> float:
        """FLOP of a token: 2 x active parameters; attention to other tokens is left out."""
        return 2 * self.active

    @property
    def lens(self) -> float:
        """FLOP of a token: 2 x d_model x vocab for every layer, the output, and u = W^T p."""
        return 2 * (self.layers + 2) * self.d_model * self.vocab

    @property
    def translators(self) -> float:
        """FLOP of a token: 2 x d_model^2 for every layer."""
        return 2 * self.layers * self.d_model**2


MODELS = (
    Model("8B (Llama 3.1)", 32, 4096, 128256, 8.03e9, 8.03e9, 1),
    Model("70B (Llama 3.1)", 80, 8192, 128256, 70.6e9, 70.6e9, 8),
    Model("235B, 22B active (Qwen3)", 94, 4096, 151936, 235e9, 22e9, 8),
)


def rate(name: str) -> float:
    return RATES[name][0]


def seconds(model: Model) -> tuple[float, float]:
    """GPU seconds of a token: forward, and a tuned lens."""
    forward = model.forward / (rate("peak") * rate("utilisation"))
    return forward, (model.lens + model.translators) / rate("lens")


def corpus() -> list[str]:
    """Tokens/s, and hours and bytes of a corpus."""
    lines = [
        "| model | GFLOP a token: forward, lens | GPU time (µs) | GPUs | tokens/s | 1e9 tokens | on disk, top 10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        of_forward, of_lens = seconds(model)
        for gpus in GPUS:
            work = f"{model.forward / 1e9:.0f}, {(model.lens + model.translators) / 1e9:.0f}"
            start = f"| {model.name} | {work} | {1e6 * of_forward:.0f} + {1e6 * of_lens:.0f} | {gpus} |"
            if 2 * model.parameters > gpus * rate("memory"):
                lines.append(f"{start} does not fit | | |")
                continue
            speed = gpus / (of_forward + of_lens)
            plain, with_top = (CORPUS * (model.layers + 1) * rate(kind) / 1e12 for kind in ("row", "top 10"))
            size = f"{plain:.1f}, {with_top:.1f} TB"
            lines.append(f"{start} {_round(speed):,} | {CORPUS / speed / 3600:.1f} h | {size} |")
    return lines


def splits() -> list[str]:
    """What a group of 8 GPUs pays for each way to split."""
    lines = [
        '| model on 8 GPUs | gather W once | W on every GPU | exchange of a token, split="vocabulary" | of its time |',
        "|---|---|---|---|---|",
    ]
    for model in MODELS:
        head = 2 * model.vocab * model.d_model
        # 24 bytes of sums a row and 4 of the target's logit, 8 of each of the top 10; each GPU receives 7 others'.
        exchange = 7 * (model.layers + 1) * (24 + 4 + 8 * 10)
        share = exchange / rate("link") / (sum(seconds(model)) / 8)
        gather = 1e3 * 7 / 8 * head / rate("link")
        lines.append(
            f"| {model.name} | {gather:.0f} ms | {head / 1e9:.1f} GB | {exchange / 1e3:.0f} kB | {100 * share:.1f}% |"
        )
    return lines


def training() -> list[str]:
    """Memory beside the model, and time of a step of 2^18 tokens."""
    lines = [
        "| model | translators, gradients (GB) | Adam's moments on 1, 8, 64 (GB) | step on 8 | on 64 | all-reduce |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        size = 4 * model.layers * (model.d_model**2 + model.d_model)
        moments = ", ".join(f"{3 * size / gpus / 1e9:.1f}" for gpus in GPUS)
        of_forward, _ = seconds(model)
        # The walk and W^T q of every layer, the translator, its input's gradient and its own.
        of_loss = (2 * model.lens + 3 * model.translators) / rate("lens")
        steps = {gpus: STEP * (of_forward + of_loss) / gpus for gpus in GPUS}
        reduced = {gpus: 2 * (gpus - 1) / gpus * size / rate("link" if gpus <= 8 else "network") for gpus in GPUS}
        lines.append(
            f"| {model.name} | {size / 1e9:.1f}, {size / 1e9:.1f} | {moments} | {steps[8] + reduced[8]:.1f} s "
            f"| {steps[64] + reduced[64]:.2f} s | {100 * reduced[64] / (steps[64] + reduced[64]):.0f}% |"
        )
    return lines


def rates() -> list[str]:
    return [f"- {name}: {value:,g}, {meaning}" for name, (value, meaning) in RATES.items()]


def _round(value: float) -> int:
    """Two digits."""
    return int(float(f"{value:.2g}"))


if __name__ == "__main__":
    print("\n\n".join("\n".join(table) for table in (corpus(), splits(), training(), rates())))
