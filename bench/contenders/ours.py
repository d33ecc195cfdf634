"""This package's engines, as ``lens.decode`` calls them."""

from __future__ import annotations

from collections.abc import Callable

from presets import Problem

from contenders.adapter import Answer, Contender
from tuned_lens_fast.engines import ENGINES as OURS
from tuned_lens_fast.engines.interface import Engine


def _contender(engine: Engine) -> Contender:
    def prepare(problem: Problem) -> Callable[[], Answer]:
        return lambda: engine.decode(
            problem.hidden, problem.translators, problem.norm, problem.head, problem.query, problem.budget
        )

    return Contender(
        engine.name,
        f"tuned_lens_fast, engine={engine.name!r}",
        prepare,
        unavailable=lambda problem: engine.unavailable(problem.device, problem.dtype),
        ours=True,
    )


ENGINES = [_contender(engine) for engine in OURS.values()]
