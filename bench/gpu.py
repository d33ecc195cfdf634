"""The Triton engine on the GPU at hand: ceilings, errors at real sizes, time over the bare product, memory.

    python bench/gpu.py --out RESULTS.json

Timings are medians over interleaved rounds, so that a GPU that warms up or is throttled treats all alike; the product
they are divided by is ``torch.mm`` of the same x and W in the same rounds. bench/gpu.sh runs this together with the GPU
tests and a profile.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import scratch_pass

import tuned_lens_fast
from tuned_lens_fast.engines.seam import Head, Norm, Query, Translator
from tuned_lens_fast.engines.triton import TritonEngine

BUDGET = 256 * 2**20
ENGINE = TritonEngine()


@dataclass(frozen=True)
class Shape:
    """Layers x positions rows of a model's head."""

    layers: int
    positions: int
    d_model: int
    vocab: int

    @property
    def rows(self) -> int:
        return self.layers * self.positions


SHAPES = {
    "llama-3-8b": Shape(32, 1024, 4096, 128256),
    "qwen3-1.7b": Shape(28, 1024, 2048, 151936),
    "gemma-3-270m": Shape(18, 1024, 640, 262144),
    "smollm2-135m": Shape(30, 1024, 576, 49152),
}
ALL = frozenset({"entropy", "log_prob", "rank"})


def environment() -> dict[str, Any]:
    p = torch.cuda.get_device_properties(0)
    return {
        "device": p.name,
        "processors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": p.L2_cache_size,
        "driver": _driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "tuned_lens_fast": tuned_lens_fast.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _driver() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].split()
        return next(word for word in words if word[0].isdigit() and word.count(".") >= 1)
    except (OSError, StopIteration):
        return "unknown"


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each: median, fastest and slowest of ``rounds``, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            contender()
            end.record()
            torch.cuda.synchronize()
            if turn:
                times[name].append(begin.elapsed_time(end))
    return {name: {"ms": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()}


def ceilings() -> dict[str, Any]:
    """Copy bandwidth (bytes read and written) and the vendor's product at the shapes below."""
    source = torch.randint(0, 2**31 - 1, (2**29,), dtype=torch.int32, device="cuda")
    copy = torch.empty_like(source)
    times = interleaved({"copy": lambda: copy.copy_(source)}, 10)
    return {"copy_tb_per_s": 2 * source.nbytes / times["copy"]["ms"] / 1e9}


def problem(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, targets and reference, bf16; logits with a spread of 3, and one row in four peaked on its target."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16)

    weight = normal(shape.vocab, shape.d_model) * (3 / shape.d_model**0.5)
    x = normal(shape.rows, shape.d_model)
    targets = torch.randint(0, shape.vocab, (shape.positions,), generator=generator, device="cuda")
    x[::4] += weight[targets.repeat(shape.layers)[::4]] * 2
    return x, weight, targets, normal(shape.positions, shape.d_model)


def ask(
    x: Tensor, weight: Tensor, shape: Shape, stats: frozenset[str], targets: Tensor | None = None,
    reference: Tensor | None = None, top_k: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """The vocabulary pass alone: no translator, no norm."""
    return ENGINE.decode(
        list(x.view(shape.layers, shape.positions, -1)),
        [None] * shape.layers,
        Norm("identity"),
        Head(weight),
        Query(stats, targets, reference, None, top_k),
        BUDGET,
    )


def correctness(shape: Shape, sample: int = 48) -> dict[str, Any]:
    """Largest errors of a sample of rows against float64 of the same x and W, as shares of what is allowed."""
    x, weight, targets, reference = problem(shape, seed=1)
    stats = ALL | {"kl", "reverse_kl", "js", "tv", "max_prob"}
    found = ask(x, weight, shape, stats, targets, reference, 10)
    rows = torch.randperm(shape.rows, device="cuda")[:sample]
    at = rows % shape.positions
    wide = weight.double()
    z = x[rows].double() @ wide.t()
    z_reference = reference[at].double() @ wide.t()
    del wide
    log_q, log_p = z.log_softmax(-1), z_reference.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    expected = {
        "lse": z.logsumexp(-1),
        "entropy": -(q * log_q).sum(-1),
        "log_prob": log_q.gather(1, targets[at, None]).squeeze(1),
        "max_prob": q.amax(-1),
        "kl": (p * (log_p - log_q)).sum(-1),
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "js": 0.5 * ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)),
        "tv": 0.5 * (p - q).abs().sum(-1),
    }
    errors = {}
    for name, value in expected.items():
        loose = name in ("reverse_kl", "js", "tv")
        allowed = (5e-4 if loose else 1e-4) + (1e-4 if loose else 1e-5) * value.abs()
        errors[name] = float(((found[name].flatten()[rows].double() - value).abs() / allowed).max())
    own = z.gather(1, targets[at, None])
    band = 1e-4 * z.abs().amax(-1, keepdim=True)
    rank = found["rank"].flatten()[rows]
    low, high = ((z > own + shift).sum(-1) for shift in (band, -band))
    best = log_q.topk(10)
    ids = found["top_ids"].flatten(0, 1)[rows]
    same = (ids == best.indices) | ((log_q.gather(1, ids) - best.values).abs() <= band)
    top = found["top_log_probs"].flatten(0, 1)[rows].double()
    errors["top_log_probs"] = float(((top - best.values).abs() / (1e-4 + 1e-5 * best.values.abs())).max())
    peaked = torch.arange(0, shape.rows, 4, device="cuda")
    return {
        "errors_over_allowed": errors,
        "ranks_right": bool(((rank - 1 >= low) & (rank - 1 <= high)).all()),
        "top_ids_right": bool(same.all()),
        "top_1_is_rank_1": float(((found["top_ids"][..., 0] == targets) == (found["rank"] == 1)).float().mean()),
        "peaked_rows_rank_1": float((found["rank"].flatten()[peaked] == 1).float().mean()),
    }


def peers(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Fused losses of other libraries that are installed, and why the others are not here."""
    found: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy: loss"] = lambda: linear_cross_entropy(x, weight, targets, reduction="none")
        found["cut-cross-entropy: loss"]()
    except Exception as error:
        found.pop("cut-cross-entropy: loss", None)
        missing["cut-cross-entropy"] = f"{type(error).__name__}: {str(error)[:200]}"
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

        found["liger-kernel: loss (with gradients)"] = lambda: fused_linear_cross_entropy_forward(x, weight, targets)
        found["liger-kernel: loss (with gradients)"]()
    except Exception as error:
        found.pop("liger-kernel: loss (with gradients)", None)
        missing["liger-kernel"] = f"{type(error).__name__}: {str(error)[:200]}"
    return found, missing


def timings(shape: Shape, rounds: int) -> dict[str, Any]:
    x, weight, targets, reference = problem(shape)
    everyone = targets.repeat(shape.layers)
    logits = torch.empty(shape.rows, shape.vocab, dtype=torch.bfloat16, device="cuda")
    others, missing = peers(x, weight, everyone)
    generator = torch.Generator("cuda").manual_seed(2)
    translators = [
        Translator(
            torch.randn(shape.d_model, shape.d_model, generator=generator, device="cuda", dtype=torch.bfloat16)
            * (0.1 / shape.d_model**0.5),
            torch.zeros(shape.d_model, device="cuda", dtype=torch.bfloat16),
        )
        for _ in range(shape.layers)
    ]
    norm = Norm("rms", torch.ones(shape.d_model, device="cuda", dtype=torch.bfloat16), None, 1e-5)
    hidden = list(x.view(shape.layers, shape.positions, -1))
    head = Head(weight)

    def whole(query: Query) -> dict[str, Tensor]:
        return ENGINE.decode(hidden, translators, norm, head, query, BUDGET)

    times = interleaved(
        {
            "product": lambda: torch.mm(x, weight.t(), out=logits),
            "lse": lambda: ask(x, weight, shape, frozenset()),
            "loss": lambda: ask(x, weight, shape, frozenset({"log_prob"}), targets),
            "lse, entropy, log_prob": lambda: ask(x, weight, shape, frozenset({"entropy", "log_prob"}), targets),
            "lse, entropy, log_prob, rank": lambda: ask(x, weight, shape, ALL, targets),
            "+ top 10": lambda: ask(x, weight, shape, ALL, targets, None, 10),
            "+ top 10, kl": lambda: ask(x, weight, shape, ALL | {"kl"}, targets, reference, 10),
            "from hidden states, + top 10": lambda: whole(Query(ALL, targets, None, None, 10)),
            "from hidden states, + top 10, kl": lambda: whole(Query(ALL | {"kl"}, targets, reference, None, 10)),
            "scratch and one pass: lse, entropy, log_prob": lambda: scratch_pass.decode(x, weight, everyone, BUDGET),
            **others,
        },
        rounds,
    )
    product = times["product"]["ms"]
    return {
        "shape": vars(shape),
        "product_tflops": 2 * shape.rows * shape.d_model * shape.vocab / product / 1e9,
        "times": {name: {**t, "ratio": t["ms"] / product} for name, t in times.items()},
        "missing": missing,
    }


def memory(shape: Shape) -> dict[str, Any]:
    """Peak memory beyond inputs and results of a decode from hidden states, every one-pass statistic and top 10."""
    generator = torch.Generator("cuda").manual_seed(3)
    half = torch.bfloat16
    hidden = [
        torch.randn(shape.positions, shape.d_model, generator=generator, device="cuda", dtype=half)
        for _ in range(shape.layers)
    ]
    square = torch.randn(shape.d_model, shape.d_model, generator=generator, device="cuda", dtype=half) * 1e-3
    weight = torch.randn(shape.vocab, shape.d_model, generator=generator, device="cuda", dtype=half) * 0.05
    targets = torch.randint(0, shape.vocab, (shape.positions,), generator=generator, device="cuda")
    query = Query(ALL | {"kl", "max_prob"}, targets, hidden[-1], None, 10)
    norm = Norm("rms", torch.ones(shape.d_model, device="cuda", dtype=half), None, 1e-5)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    found = ENGINE.decode(hidden, [Translator(square)] * shape.layers, norm, Head(weight), query, BUDGET)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    results = sum(value.untyped_storage().nbytes() for value in found.values())
    return {
        "shape": vars(shape),
        "seconds": seconds,
        "peak_extra_bytes": torch.cuda.max_memory_allocated() - before - results,
        "budget_bytes": BUDGET,
        "results_bytes": results,
        "bf16_logits_bytes": 2 * shape.rows * shape.vocab,
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['environment']['device']}, driver {report['environment']['driver']}, torch "
        f"{report['environment']['torch']}, Triton {report['environment']['triton']}, "
        f"copy {report['ceilings']['copy_tb_per_s']:.2f} TB/s"
    ]
    for name, result in report["timings"].items():
        s = result["shape"]
        lines.append(
            f"\n{name}: {s['layers']} x {s['positions']} rows, d {s['d_model']}, V {s['vocab']}, "
            f"product at {result['product_tflops']:.0f} TFLOP/s"
        )
        lines += [f"  {n:48s} {t['ms']:9.3f} ms  {t['ratio']:.3f}" for n, t in result["times"].items()]
        lines += [f"  {n}: {why}" for n, why in result["missing"].items()]
    for name, result in report["correctness"].items():
        worst = max(result["errors_over_allowed"].items(), key=lambda item: item[1])
        lines.append(f"\n{name}: worst error {worst[1]:.2f} of what is allowed ({worst[0]}); {result}")
    for name, result in report["memory"].items():
        lines.append(
            f"\n{name}: {result['shape']}: {result['peak_extra_bytes'] / 2**20:.0f} MiB beyond inputs and results, "
            f"{result['seconds']:.2f} s; bf16 logits would be {result['bf16_logits_bytes'] / 2**30:.0f} GiB"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--long", type=int, default=8192, help="positions of the memory measurement")
    options = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = {"environment": environment(), "ceilings": ceilings()}
    report["correctness"], report["timings"], report["memory"] = {}, {}, {}
    for name in options.shapes:
        report["timings"][name] = timings(SHAPES[name], options.rounds)
        torch.cuda.empty_cache()
        report["correctness"][name] = correctness(SHAPES[name])
        torch.cuda.empty_cache()
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    report["memory"]["llama-3-8b"] = memory(Shape(32, options.long, 4096, 128256))
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
