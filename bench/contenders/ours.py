"""This package's engines, as ``lens.decode`` calls them, and the product that is the native engine's own.

All that the benchmarks know of an engine's inside is in this file, beside bench/static.py and bench/split_products.py.
"""

from __future__ import annotations

from collections.abc import Callable

from presets import Problem
from torch import Tensor

from contenders.adapter import Answer, Contender
from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.decoding import Engine
from tuned_lens_fast.engines.interface import Readout
from tuned_lens_fast.engines.matmul import Matmul


def decode(engine: Engine, problem: Problem) -> Answer:
    """What the engine answers to the problem."""
    readout = Readout(tuple(problem.translators), problem.norm, problem.head)
    return engine.decode(problem.hidden, readout, problem.query, problem.budget)


def own_product(problem: Problem) -> Callable[[Tensor, int], None] | None:
    """The native engine's product of x ``[rows, d_model]`` with W, in tiles of a width; nothing of it is kept.

    None where it has none of its own and takes PyTorch's.
    """
    matmul = ENGINES["native"].matmul(problem.head)
    if type(matmul) is Matmul:
        return None

    def multiply(x: Tensor, width: int) -> None:
        packed = matmul.pack(x)
        for tile in matmul.tiles(width):
            matmul.multiply(packed, problem.head.weight[tile])

    return multiply


def _contender(engine: Engine) -> Contender:
    return Contender(
        engine.name,
        f"tuned_lens_fast, engine={engine.name!r}",
        lambda problem: lambda: decode(engine, problem),
        unavailable=lambda problem: engine.unavailable(problem.device, problem.dtype),
        ours=True,
    )


CONTENDERS = [_contender(engine) for engine in ENGINES.values()]
