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
    """The device called ``name``; for "cuda" a GPU of this process's own, and for None too, if there is one.

    Raises:
        ValueError: it cannot be used.
    """
    if not name or name == "cuda":
        own = f"cuda:{os.environ['LOCAL_RANK']}" if processes() > 1 and "LOCAL_RANK" in os.environ else "cuda"
        name = own if name or torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
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


def check_place(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a place for the model that not every process on a machine can have."""
    for name in ("device", "device_map", "gguf_file"):
        if (args.tp or 1) > 1 and getattr(args, name):
            parser.error(
                f"--tp: each process has its part of the model on a GPU of its own; drop --{name.replace('_', '-')}"
            )
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if beside == 1:
        return
    if args.device_map:
        parser.error(f"--device-map: {beside} processes on this machine would each spread a model over the same GPUs")
    # A process that sees no other GPU may have this one to itself.
    if (args.device or "").startswith("cuda:") and torch.cuda.device_count() > 1:
        parser.error(
            f"--device: {beside} processes on this machine would share {quoted(args.device, 150)}; wanted cuda"
        )


@contextmanager
def group_of(size: int, name: str | None) -> Iterator[bool]:
    """Within the block this process is in a process group with ``size`` of those that were launched, if that is more
    than one: with its neighbours by rank. Groups do not know of each other. They compute on devices called ``name``,
    see :func:`device_of`.

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
    device = device_of(name)
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
