"""Lets a caller watch a long decode: engines report the rows they have finished to whoever listens.

It runs beside the way from hidden state to statistics, so that no function on it needs an argument for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_LOCK = threading.Lock()
_listener: ContextVar[Callable[[int], None] | None] = ContextVar("listener", default=None)
_expecting: ContextVar[Callable[[int], None] | None] = ContextVar("expecting", default=None)


@contextmanager
def listen(callback: Callable[[int], None], expecting: Callable[[int], None] | None = None) -> Iterator[None]:
    """Within the block, call ``callback(rows)`` for every ``rows`` (layers x positions) newly decoded.

    ``expecting(rows)`` is called for every ``rows`` that will be reported, where they are known in advance.
    """
    tokens = _listener.set(callback), _expecting.set(expecting)
    try:
        yield
    finally:
        _listener.reset(tokens[0])
        _expecting.reset(tokens[1])


def report(rows: int) -> None:
    """For engines: ``rows`` more rows are done."""
    if torch.compiler.is_compiling():
        return  # a compiled decode runs as one piece
    callback = _listener.get()
    if callback is not None:
        with _LOCK:  # devices are read in a thread each
            callback(rows)


def expect(rows: int) -> None:
    """For what calls engines many times: ``rows`` more rows will be reported."""
    callback = _expecting.get()
    if callback is not None:
        callback(rows)
