"""Runs functions on several ranks of a process group, on processes forked from the one that runs the tests."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(world: int, *functions: Callable[[], Any]) -> list[dict[str, Any]]:
    """What each function returned, or the exception that it raised, by its name and on every rank.

    The functions run one after the other on all of ``world`` processes, in one group of gloo. Of a process that a
    function ends there is nothing.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    Path(folder, str(rank)).write_bytes(_run(rank, world, port, functions))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(pid)
        codes = [os.waitpid(pid, 0)[1] for pid in children]
        assert codes == [0] * world
        files = [Path(folder, str(rank)) for rank in range(world)]
        return [pickle.loads(file.read_bytes()) if file.exists() else {} for file in files]


def _run(rank: int, world: int, port: int, functions: tuple[Callable[[], Any], ...]) -> bytes:
    # As torchrun sets them, for libraries that look there.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for function in functions:
        try:
            found[function.__name__] = function()
        except Exception as error:
            traceback.print_exc()
            found[function.__name__] = error
    dist.destroy_process_group()
    return pickle.dumps(found)
