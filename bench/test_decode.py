"""What a change does to the engines and to the parts of a decode: `make bench` compares with the last saved run.

Small shapes, so that all of it takes a minute or two; bench/run.py measures real ones. A part is a decode that does
little else: translators and norm beside a small vocabulary, or one walk over a vocabulary without them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contenders import product
from presets import BUDGET, Problem, Shape, question, random_problem
from suites import EVERY, FULL

from tuned_lens_fast.engines import ENGINES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPE = Shape(layers=8, d_model=576, vocab=16384)
POSITIONS = 64 if DEVICE == "cpu" else 1024
#: One walk over the vocabulary, and one thing more than the first.
WALKS = {
    "lse": "",
    "entropy": "entropy",
    "log_prob and rank": "log_prob,rank",
    "top 10": "top_10",
    "kl": "kl",
    "js": "js",
}


def available(name: str) -> str:
    """``name``, or the test is skipped with the engine's own reason."""
    why = ENGINES[name].unavailable(torch.device(DEVICE), DTYPE)
    if why is not None:
        pytest.skip(why)
    return name


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> str:
    return available(request.param)


@pytest.fixture(scope="module")
def whole() -> Problem:
    return random_problem(SHAPE, POSITIONS, DTYPE, DEVICE, BUDGET)


@pytest.fixture(scope="module")
def at_head() -> Problem:
    return random_problem(SHAPE, POSITIONS, DTYPE, DEVICE, BUDGET, start="head")


def measure(benchmark, engine: str, problem: Problem, asked: str) -> None:
    problem = problem.asking(*question(asked))

    def decode() -> dict[str, torch.Tensor]:
        found = ENGINES[engine].decode(
            problem.hidden, problem.translators, problem.norm, problem.head, problem.query, problem.budget
        )
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return found

    answer = benchmark(decode)
    assert answer["lse"].isfinite().all()


@pytest.mark.parametrize("asked", [FULL, EVERY], ids=["usual", "every statistic"])
def test_decode(benchmark, engine, whole, asked):
    measure(benchmark, engine, whole, asked)


@pytest.mark.parametrize("positions", [1, 16])
def test_few_positions(benchmark, engine, whole, positions):
    measure(benchmark, engine, whole.cut(SHAPE.layers, positions), FULL)


def test_translators_and_norm(benchmark, engine, whole):
    few = replace(whole, head=replace(whole.head, weight=whole.head.weight[:256]))
    measure(benchmark, engine, few, "")


@pytest.mark.parametrize("part", WALKS)
def test_vocabulary_walk(benchmark, engine, at_head, part):
    measure(benchmark, engine, at_head, WALKS[part])


@pytest.mark.parametrize("contender", [product.ROWS, product.TILES], ids=lambda contender: contender.name)
def test_bare_product(benchmark, at_head, contender):
    call = contender.prepare(at_head)

    def multiply() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(multiply)
