"""Times the two ways in which ranks split a decode, and the share of it that their exchanges take.

    torchrun --nproc-per-node 2 bench/ranks.py --rounds 5

A random model of SmolLM2-135M's shape is on every rank; calls that split rows and calls that split the vocabulary take
turns. Prints medians, their ratio, the share of the time that is spent in collectives, and whether all ranks have the
same bits. On GPUs each rank takes its own.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

import tuned_lens_fast as tl
from tuned_lens_fast.ranks import Ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--top-k", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.d_model, intermediate_size=args.d_model * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=args.d_model // 64, max_position_embeddings=8192,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval().to(device)
    lens = tl.LogitLens.from_model(model)
    ids = torch.randint(0, args.vocab, (args.positions,), device=device)

    exchanged = [0.0]
    for name in ("gather", "gather_objects", "first"):
        setattr(Ranks, name, timed(getattr(Ranks, name), exchanged, device))
    taken: dict[str, list[float]] = {"rows": [], "vocabulary": []}
    shares: dict[str, list[float]] = {"rows": [], "vocabulary": []}
    found: dict[str, tl.LensStats] = {}
    for turn in range(args.rounds + 1):
        for split in taken:
            dist.barrier()
            exchanged[0], start = 0.0, time.perf_counter()
            found[split] = tl.decode_model(model, lens, ids, top_k=args.top_k, split=split)
            wait(device)
            seconds = time.perf_counter() - start
            if turn:  # the first is to warm up
                taken[split].append(seconds)
                shares[split].append(exchanged[0] / seconds)
    alike = {split: all_alike(stats) for split, stats in found.items()}
    if dist.get_rank() == 0:
        for split, seconds in taken.items():
            print(
                f"{split}: {statistics.median(seconds):.3f} s, {statistics.median(shares[split]):.1%} in collectives, "
                f"waiting included, {'the same bits on all ranks' if alike[split] else 'RANKS DIFFER'}"
            )
        ratio = statistics.median(taken["vocabulary"]) / statistics.median(taken["rows"])
        print(f"vocabulary over rows: {ratio:.3f} on {dist.get_world_size()} processes")
    dist.destroy_process_group()


def timed(method: Any, exchanged: list[float], device: torch.device) -> Any:
    """The method, whose time is added to ``exchanged``."""

    @functools.wraps(method)
    def inner(*args: Any) -> Any:
        wait(device)
        start = time.perf_counter()
        answer = method(*args)
        wait(device)
        exchanged[0] += time.perf_counter() - start
        return answer

    return inner


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def all_alike(stats: tl.LensStats) -> bool:
    bits = torch.cat([value.flatten().view(torch.uint8).cpu() for name, value in stats.items() if name != "layers"])
    everybodys: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, bits.numpy().tobytes())
    return len(set(everybodys)) == 1


if __name__ == "__main__":
    main()
