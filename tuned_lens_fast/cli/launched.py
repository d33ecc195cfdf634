"""What torchrun, or another launcher, tells a command by the environment: how many processes there are, and which.

Beside the commands that several processes may run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from tuned_lens_fast.messages import quoted, shortened


def processes() -> int:
    """How many make this call."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_of(name: str | None = None) -> torch.device:
    """The device called ``name``; a GPU of this process's own, if there is one, for None.

    Raises:
        ValueError: it cannot be used.
    """
    try:
        own = f"cuda:{os.environ['LOCAL_RANK']}" if processes() > 1 and "LOCAL_RANK" in os.environ else "cuda"
        device = torch.device(name or (own if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {quoted(name, 150)}: {shortened(error)}") from error
    return device


def add_tp(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tp",
        type=int,
        metavar="N",
        help="under torchrun: N processes share one model, by tensor parallelism (default: each has a whole one)",
    )


def check_tp(parser: argparse.ArgumentParser, tp: int | None) -> None:
    """Refuse a number of processes that those there are cannot be cut into."""
    if tp is None:
        return
    if tp < 1 or processes() % tp:
        parser.error(
            f"--tp: got {tp} and {processes()} processes, wanted a number that divides them; start as many with "
            f"torchrun --nproc-per-node {max(tp, 2)} -m tuned_lens_fast ..."
        )


@contextmanager
def group_of(size: int) -> Iterator[bool]:
    """Within the block this process is in a process group with ``size`` of those that were launched, if that is more
    than one: with its neighbours by rank. Groups do not know of each other.

    Yields:
        Whether this process is the first of its group.
    """
    if size == 1:
        yield True
        return
    if dist.is_initialized():
        yield dist.get_rank() == 0
        return
    store, rank, _ = next(iter(dist.rendezvous("env://")))
    device = device_of()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"{size} from {rank - rank % size}", store),
        rank=rank % size,
        world_size=size,
    )
    try:
        yield rank % size == 0
    finally:
        dist.destroy_process_group()
