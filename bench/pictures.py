"""The pictures of docs/performance.md: growth of time and memory, parts of a decode, the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from measure import exponent

from tuned_lens_fast.atomic_write import atomic_write

#: A contender looks the same in every picture: colour and marker (colours that the colour-blind can tell apart).
LOOKS = {
    "native": ("#D55E00", "o"),
    "triton": ("#CC3311", "D"),
    "eager": ("#E69F00", "s"),
    "linear": ("#AAAAAA", ""),
    "product": ("#000000", ""),
    "product-tiles": ("#777777", ""),
    "loop": ("#0072B2", "^"),
    "compiled": ("#56B4E9", "v"),
    "scratch": ("#009E73", "P"),
    "tuned-lens": ("#CC79A7", "X"),
    "linear_cross_entropy": ("#882255", "<"),
    "cut-cross-entropy": ("#999933", ">"),
    "liger-kernel": ("#332288", "h"),
}
FLOORS = ("linear", "product", "product-tiles")
AXES = {"positions": "positions", "layers": "layers", "vocab": "tokens in the vocabulary", "threads": "threads"}


def save(figure: Any, path: Path) -> None:
    """The same figure gives the same bytes."""
    with plt.rc_context({"svg.hashsalt": "tuned_lens_fast"}), atomic_write(path) as aside:
        figure.savefig(aside, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def growth(cases: list[dict[str, Any]], axis: str, ours: list[str], path: Path) -> None:
    """Time and memory of every contender against one size, both axes logarithmic, with the slopes of the lines."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    values = {
        "seconds": lambda entry: entry.get("seconds", {}).get("median"),
        "MiB beyond the inputs, answer included": lambda entry: (entry.get("peak_extra_bytes") or 0) / 2**20 or None,
    }
    cases = sorted(cases, key=lambda case: case[axis])
    for panel, (what, value) in zip(panels, values.items(), strict=True):
        for name in cases[0]["contenders"]:
            points = [(case[axis], value(case["contenders"].get(name, {}))) for case in cases]
            points = [point for point in points if point[1] is not None]
            if points:
                colour, marker = LOOKS.get(name, ("#555555", "."))
                floor = name in FLOORS
                slope = f", {exponent(*zip(*points, strict=True)):.2f}" if len(points) > 2 else ""
                panel.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker=marker,
                    label=name + slope,
                    linestyle="--" if floor else "-",
                    linewidth=2.5 if name in ours else 1.3,
                )
        panel.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=what)
        panel.set_xticks(sizes := sorted({case[axis] for case in cases}), [f"{size:,}" for size in sizes])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    save(figure, path)


def profile(result: dict[str, Any], path: Path) -> None:
    """The parts of every engine's decode, end to end."""
    engines = {name: found for name, found in result["engines"].items() if "parts" in found}
    figure, panel = plt.subplots(figsize=(11, 0.8 + 0.6 * len(engines)))
    names = list(next(iter(engines.values()))["parts"])
    colours = matplotlib.color_sequences["tab10"]
    for row, found in enumerate(engines.values()):
        left = 0.0
        for name, colour in zip(names, colours, strict=False):
            seconds = max(0.0, found["parts"][name])
            panel.barh(row, seconds, left=left, color=colour, label=name if row == 0 else None, height=0.7)
            left += seconds
    panel.set_yticks(range(len(engines)), list(engines))
    panel.set_xlabel("seconds")
    panel.invert_yaxis()
    panel.legend(frameon=False, fontsize=8, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(figure, path)


def roofline(result: dict[str, Any], path: Path) -> None:
    """Operations a second of every part with products, against operations a byte, under the measured ceilings."""
    peak, bandwidth = (result["ceilings"][name] for name in ("operations_per_second", "bytes_per_second"))
    figure, panel = plt.subplots(figsize=(6.5, 4.2))
    low, high = peak / bandwidth / 50, peak / bandwidth * 50
    for name, found in result["engines"].items():
        for part, marker in (("translators and norm", "s"), ("vocabulary pass", "o"), ("kl", "^")):
            if "parts" not in found:
                continue
            need, seconds = work_of(result, part), seconds_of(found["parts"], part)
            if seconds > 0 and need["operations"]:
                intensity = need["operations"] / need["bytes"]
                high = max(high, 2 * intensity)
                colour = LOOKS.get(name, ("#555555", ""))[0]
                label = f"{name}: {part}"
                panel.plot(intensity, need["operations"] / seconds / 1e9, marker, color=colour, label=label)
    panel.plot(
        [low, peak / bandwidth, high], [low * bandwidth / 1e9, peak / 1e9, peak / 1e9], color="black", label="ceilings"
    )
    panel.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="1e9 operations a second")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)


#: The parts that make up one walk over the vocabulary, kl apart.
VOCABULARY_PASS = ("product", "logsumexp", "entropy", "log_prob and rank", "top 10")


def seconds_of(parts: dict[str, float], part: str) -> float:
    """Of a part, or of the vocabulary pass, which is several."""
    return sum(parts[name] for name in VOCABULARY_PASS) if part == "vocabulary pass" else parts[part]


def work_of(result: dict[str, Any], part: str) -> dict[str, float]:
    """Operations and bytes of a part; the vocabulary pass has those of its product, as logits may stay in cache."""
    return result["work"]["product" if part == "vocabulary pass" else part]
