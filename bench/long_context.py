"""Long prompts in bounded memory, measured: what grows with the number of positions, and what decoding costs of each.

    python bench/long_context.py [--positions 2048,8192,32768,65536] [--layers 30] [--top-k 10] [--stats kl,entropy]
    python bench/long_context.py --to-disk --positions 8192

SmolLM2-135M reads one document as long as its context, and again and again up to the positions asked for. Printed of
each number of positions: by how much the resident peak grows beyond the model and its cache (Linux only), the seconds
of the model's own forward pass, of the engine, and of everything else. With --to-disk the rows are written as a data
set, into a temporary folder, and that is part of everything else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from presets import license_ids, real_model
from record import heading, write
from torch import Tensor

from tuned_lens_fast import LogitLens, decode_documents
from tuned_lens_fast.engines import choose
from tuned_lens_fast.engines.statistics import STATISTICS
from tuned_lens_fast.memory import PeakMemory
from tuned_lens_fast.streaming import prepare
from tuned_lens_fast.validation import DEFAULT_MEMORY_BUDGET

#: Positions of a document at most: the model's context.
CONTEXT = 8192


class Clock:
    """Seconds inside of a function that others call."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable) -> Callable:
        """The function, timed."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def to_nowhere(model: Any, lens: LogitLens, documents: list[Tensor], **question: Any) -> str:
    """Decode one document after another, nothing of what is found being kept. Returns how they were cut."""
    for ids in documents:
        prepared = prepare(model, lens, ids, **question)
        for _ in prepared.run():
            pass
    return str(prepared.plan)


def to_disk(model: Any, lens: LogitLens, documents: list[Tensor], **question: Any) -> str:
    """Decode all documents into a data set. Returns how large it is."""
    with tempfile.TemporaryDirectory() as folder:
        out = decode_documents(model, lens, documents, out=Path(folder, "run"), **question)
        return f"{sum(part.stat().st_size for part in out.glob('*.parquet')) / 2**20:.1f} MiB of Parquet"


def measured(decode: Callable[..., str], model: Any, text: Tensor, positions: int, **question: Any) -> dict[str, Any]:
    """What so many positions of the text took; ``plan``: how they were cut, or what they became."""
    lens, engine = LogitLens.from_model(model), choose("auto", torch.device("cpu"), torch.float32)
    documents = list(text.repeat(-(-positions // len(text)))[:positions].split(len(text)))
    of_model, of_engine = Clock(), Clock()
    with (
        patch.object(model, "forward", of_model.around(model.forward)),
        patch.object(engine, "decode", of_engine.around(engine.decode)),
    ):
        peak, start = PeakMemory(torch.device("cpu"), trim=True), time.perf_counter()
        plan = decode(model, lens, documents, **question)
        seconds, grown = time.perf_counter() - start, peak.growth()
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * len(documents[0])
    cache = numbers * model.dtype.itemsize
    return {
        "positions": positions,
        "plan": plan,
        "budget": question["memory_budget"],
        "cache": cache,
        "beyond_cache": None if grown is None else grown - cache,
        "seconds": seconds,
        "model_s": of_model.seconds,
        "engine_s": of_engine.seconds,
        "outside_share": 1 - (of_model.seconds + of_engine.seconds) / seconds,
        "decode_ms_per_position": 1000 * (seconds - of_model.seconds) / positions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", default="2048,8192,32768,65536", help="(default: 2048,8192,32768,65536)")
    parser.add_argument("--layers", type=int, help="only so many of the first (default: all)")
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--stats", default=",".join(STATISTICS), help="(default: every statistic)")
    parser.add_argument("--budget", type=int, default=DEFAULT_MEMORY_BUDGET, help="bytes (default: 256 MiB)")
    parser.add_argument("--to-disk", action="store_true", help="write a data set")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    stats = args.stats.split(",")
    question = {
        "layers": args.layers and range(args.layers),
        "top_k": args.top_k,
        "stats": stats,
        "memory_budget": args.budget,
    }
    model, tokenizer = real_model("smollm2-135m", torch.float32, "cpu")
    text, decode, runs = license_ids(tokenizer, CONTEXT), to_disk if args.to_disk else to_nowhere, []
    for positions in map(int, args.positions.split(",")):
        runs.append(row := measured(decode, model, text, positions, **question))
        memory = "not measured" if row["beyond_cache"] is None else f"{row['beyond_cache'] / 2**20:.0f} MiB"
        print(
            f"{row['positions']:>8,} positions ({row['plan']}): peak beyond model and cache {memory}; "
            f"{row['seconds']:.1f} s, of it model {row['model_s']:.1f}, engine {row['engine_s']:.1f}, "
            f"outside both {row['outside_share']:.1%}; {row['decode_ms_per_position']:.2f} ms a position "
            "beside the model",
            flush=True,
        )
    if args.out:
        result = {
            "kind": "long contexts",
            **heading("long_context.py", sys.argv[1:], "cpu"),
            "layers": args.layers or model.config.num_hidden_layers,
            "statistics": [*stats, f"top_{args.top_k}"],
            "runs": runs,
        }
        write(args.out, result)


if __name__ == "__main__":
    main()
