"""Long prompts in bounded memory, measured: what grows with the number of positions, and what decoding costs of each.

    python bench/long_context.py [--positions 2048,8192,32768,65536] [--layers 30] [--top-k 10] [--stats kl,entropy]
    python bench/long_context.py --to-disk --positions 8192

SmolLM2-135M reads one document as long as its context, and further ones one after another up to the positions asked
for. Printed of each number of positions: by how much the resident peak grows beyond the model and its cache (Linux
only), the seconds of the model's own forward pass, of the engine, and of everything else. With --to-disk the rows are
written as a data set, into a temporary folder, and that is part of everything else.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import ResidentPeak, environment
from presets import license_ids, real_model
from run import command
from torch import Tensor

from tuned_lens_fast import LogitLens, decode_documents
from tuned_lens_fast.atomic_write import atomic_write
from tuned_lens_fast.engines import ENGINES, choose
from tuned_lens_fast.engines.interface import STATISTICS
from tuned_lens_fast.models.chunked_pass import cache_of
from tuned_lens_fast.streaming import prepare
from tuned_lens_fast.validation import DEFAULT_MEMORY_BUDGET


class Clock:
    """Seconds inside the model and inside the engine, and the bytes of the largest cache."""

    def __init__(self) -> None:
        self.model = self.engine = 0.0
        self.cache = 0

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Within the block, time the model's forward passes."""
        started: list[float] = []

        def stop(_module: Any, _args: Any, output: Any) -> None:
            self.model += time.perf_counter() - started.pop()
            caches = cache_of(model, output).values()
            held = sum(layer.keys.nbytes + layer.values.nbytes for cache in caches for layer in cache.layers)
            self.cache = max(self.cache, held)

        hooks = [
            model.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())),
            model.register_forward_hook(stop),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def row(self, positions: int, seconds: float, grown: int | None, budget: int, plan: str) -> dict[str, Any]:
        """What so many positions took.

        ``grown``: by how much the resident peak; ``plan``: how they were cut, or what they became.
        """
        return {
            "positions": positions,
            "plan": plan,
            "budget": budget,
            "cache": self.cache,
            "peak_growth": grown,
            "beyond_cache": None if grown is None else grown - self.cache,
            "seconds": seconds,
            "model_s": self.model,
            "engine_s": self.engine,
            "outside_share": 1 - (self.model + self.engine) / seconds,
            "decode_ms_per_position": 1000 * (seconds - self.model) / positions,
        }

    def timed(self, engine: Any) -> Any:
        """``engine``, whose decodes are timed."""
        clock = self

        class Timed(type(engine)):  # type: ignore[misc]
            def decode(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
                start = time.perf_counter()
                try:
                    return super().decode(*args, **kwargs)
                finally:
                    clock.engine += time.perf_counter() - start

        return Timed()


def measured(
    model: Any, documents: list[Tensor], wanted: list[int], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One after another, nothing of what is found being kept: what it took up to the positions ``wanted``."""
    lens, clock = LogitLens.from_model(model), Clock()
    positions, peak, start = 0, ResidentPeak(), time.perf_counter()
    with clock.watching(model):
        for ids in documents:
            prepared = prepare(
                model,
                lens,
                ids,
                layers=args.layers and range(args.layers),
                top_k=args.top_k,
                stats=args.stats,
                engine=args.engine,
                memory_budget=args.budget,
            )
            for _ in replace(prepared, engine=clock.timed(prepared.engine)).run():
                pass
            positions += len(ids)
            if positions not in wanted:
                continue
            yield clock.row(
                positions, time.perf_counter() - start, peak.growth(), prepared.plan.budget, str(prepared.plan)
            )


def written(
    model: Any, documents: list[Tensor], wanted: list[int], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """All documents into a data set: what that took in all."""
    lens, clock = LogitLens.from_model(model), Clock()
    engine = choose(args.engine, torch.device("cpu"), torch.float32)
    ENGINES[engine.name] = clock.timed(engine)
    peak, start = ResidentPeak(), time.perf_counter()
    with clock.watching(model), tempfile.TemporaryDirectory() as folder:
        out = decode_documents(
            model,
            lens,
            documents,
            out=Path(folder, "run"),
            layers=args.layers and range(args.layers),
            top_k=args.top_k,
            stats=args.stats,
            engine=args.engine,
            memory_budget=args.budget,
        )
        seconds, grown = time.perf_counter() - start, peak.growth()
        size = sum(part.stat().st_size for part in out.glob("*.parquet"))
    yield clock.row(sum(map(len, documents)), seconds, grown, args.budget, f"{size / 2**20:.1f} MiB of Parquet")


def documents(text: Tensor, positions: int) -> list[Tensor]:
    """Documents of the text, so many positions in all."""
    whole, rest = divmod(positions, len(text))
    return [text] * whole + [text[:rest]] * bool(rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", default="2048,8192,32768,65536", help="(default: 2048,8192,32768,65536)")
    parser.add_argument("--context", type=int, default=8192, help="positions of a document at most")
    parser.add_argument("--layers", type=int, help="only so many of the first (default: all)")
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--stats", default=",".join(STATISTICS), help="(default: every statistic)")
    parser.add_argument("--engine", choices=["auto", *ENGINES], default="auto")
    parser.add_argument("--budget", type=int, default=DEFAULT_MEMORY_BUDGET, help="bytes (default: 256 MiB)")
    parser.add_argument("--to-disk", action="store_true", help="write a data set, and read the last figure only")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    args.stats = [name for name in args.stats.split(",") if name]

    model, tokenizer = real_model("smollm2-135m", torch.float32, "cpu")
    text = license_ids(tokenizer, args.context)
    wanted = sorted(map(int, args.positions.split(",")))
    whole = [positions for positions in wanted if positions % args.context == 0]
    # Shorter prompts by themselves; of whole documents, what the first ones took is read on the way to the last.
    runs = [[positions] for positions in wanted if positions not in whole] + [whole] * bool(whole)
    found = []
    measure = written if args.to_disk else measured
    for row in (row for run in runs for row in measure(model, documents(text, run[-1]), run, args)):
        found.append(row)
        memory = "not measured" if row["beyond_cache"] is None else f"{row['beyond_cache'] / 2**20:.0f} MiB"
        print(row["plan"])
        print(
            f"{row['positions']:>8,} positions: peak beyond model and cache {memory} "
            f"(cache {row['cache'] / 2**20:.0f}, budget {row['budget'] / 2**20:.0f} MiB); "
            f"{row['seconds']:.1f} s, of it model {row['model_s']:.1f}, "
            f"engine {row['engine_s']:.1f}, outside both {row['outside_share']:.1%}; "
            f"{row['decode_ms_per_position']:.2f} ms a position beside the model",
            flush=True,
        )
    if args.out:
        result = {
            "kind": "long contexts",
            "command": command("long_context.py", sys.argv[1:]),
            "environment": environment("cpu"),
            "device": "cpu",
            "layers": model.config.num_hidden_layers if args.layers is None else args.layers,
            "statistics": [*args.stats, f"top_{args.top_k}"],
            "runs": found,
        }
        with atomic_write(args.out) as aside:
            aside.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
