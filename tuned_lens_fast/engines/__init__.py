"""The engines, which of them work here, and which one `auto` takes.

The way through this folder: ``interface`` says what is asked, ``decoding`` is the loop over chunks that every engine
runs in, ``state`` what a pass over the vocabulary finds out of a row, ``statistics`` what is made of it. ``eager``,
``native`` and ``triton`` bring the passes; they differ in where they run and how fast. ``sharded`` runs one of them on
each rank's part of the vocabulary.
"""

from __future__ import annotations

import torch

from tuned_lens_fast.engines.decoding import Engine
from tuned_lens_fast.engines.eager import EagerEngine
from tuned_lens_fast.engines.native import NativeEngine
from tuned_lens_fast.engines.triton import TritonEngine

#: In order of preference: `auto` takes the first that works on the device.
ENGINES: dict[str, Engine] = {engine.name: engine for engine in (TritonEngine(), NativeEngine(), EagerEngine())}


def engines() -> dict[str, str]:
    """Engine name -> "ok", with the path it takes on this machine, or why it does not work and what would change that.

    Such as "ok (AVX-512 with bf16)", of what multiplies on a CPU.
    """
    paths = {name: engine.path() for name, engine in ENGINES.items()}
    return {
        name: engine.unavailable() or (f"ok ({paths[name]})" if paths[name] else "ok")
        for name, engine in ENGINES.items()
    }


def choose(name: str, device: torch.device, dtype: torch.dtype, of_a_part: bool = False) -> Engine:
    """The engine called ``name``, or for "auto" the fastest that works on ``device`` for a head of ``dtype``.

    With ``of_a_part`` one that can walk a part of the vocabulary, whose state others go on with (``sharded``).

    Raises:
        ValueError: no such engine, or it does not work there, or not so.
    """
    if of_a_part and name == "triton":
        raise ValueError("engine: 'triton' reads the whole vocabulary; use 'native', 'eager' or split='rows'")
    if name == "auto":
        # Triton's interpreter makes its engine work on a CPU: for its own tests, too slow for anything else.
        works = [engine for engine in ENGINES.values() if engine.unavailable(device, dtype) is None]
        return next(engine for engine in works if engine.name != "triton" or (device.type == "cuda" and not of_a_part))
    if name not in ENGINES:
        raise ValueError(f"engine: got {name!r}, wanted 'auto' or one of {', '.join(map(repr, ENGINES))}")
    reason = ENGINES[name].unavailable(device, dtype)
    if reason is not None:
        raise ValueError(f"engine: {name!r} does not work on {device} with {dtype}: {reason}")
    return ENGINES[name]
