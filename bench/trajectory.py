"""PredictionTrajectory beside decode_model: the same statistics of the same text, in time and memory.

    python bench/trajectory.py [--positions 2048] [--rounds 3] [--out FILE]

SmolLM2-135M, its logit lens, all layers: entropy, cross-entropy, rank and forward KL. Both run the model. They take
turns, after a short text that loads what either loads once. Memory is the growth of the resident peak (Linux only).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from measure import peak_growth, timed
from presets import license_ids, real_model
from record import heading, write
from torch import Tensor

from tuned_lens_fast import LogitLens, decode_model
from tuned_lens_fast.plotting import PredictionTrajectory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, tokenizer = real_model("smollm2-135m", torch.float32, "cpu")
    lens = LogitLens.from_model(model)
    ids = license_ids(tokenizer, options.positions)

    def trajectory(ids: Tensor) -> list[Any]:
        found = PredictionTrajectory.from_lens_and_model(lens, model, ids.tolist(), tokenizer, targets=ids.tolist())
        return [found.entropy(), found.cross_entropy(), found.rank(), found.forward_kl()]

    def decoded(ids: Tensor) -> Any:
        return decode_model(model, lens, ids, targets=ids, stats={"entropy", "log_prob", "rank", "kl"})

    calls = {"trajectory": trajectory, "decode_model": decoded}
    cpu = torch.device("cpu")
    for call in calls.values():
        call(ids[:64])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    mib = {
        name: round((peak_growth(lambda call=call: call(ids), cpu)[0] or 0) / 2**20, 1) for name, call in calls.items()
    }
    for turn in range(options.rounds):
        for name in (*calls,) if turn % 2 else (*reversed(calls),):
            seconds[name].append(timed(lambda call=calls[name]: call(ids), "cpu"))
            print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = median["trajectory"] / median["decode_model"]
    print(f"{options.positions} positions: {ratio:.2f} of decode_model's time; beyond the model, MiB: {mib}")
    if options.out:
        found = {"positions": options.positions, "seconds": seconds, "ratio": ratio, "growth_mib": mib}
        write(options.out, {**heading("trajectory.py", sys.argv[1:], "cpu"), "kind": "trajectory", **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
