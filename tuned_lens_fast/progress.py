"""Lets a caller watch a long decode: engines report the rows they have finished to whoever listens.

It runs beside the way from hidden state to statistics, so that no function on it needs an argument for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_listener: ContextVar[Callable[[int], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listen(callback: Callable[[int], None]) -> Iterator[None]:
    """Within the block, call ``callback(rows)`` for every ``rows`` (layers x positions) newly decoded."""
    token = _listener.set(callback)
    try:
        yield
    finally:
        _listener.reset(token)


def report(rows: int) -> None:
    """For engines: ``rows`` more rows are done."""
    if torch.compiler.is_compiling():
        return  # a compiled decode runs as one piece
    callback = _listener.get()
    if callback is not None:
        callback(rows)
