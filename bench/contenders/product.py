"""The floor: the matrix product of all rows with W, and nothing else. Its logits are overwritten, or freed, at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from presets import Problem

from contenders.adapter import Answer, Contender, head_inputs
from contenders.ours import own_product

#: Rows whose logits exist at once when a product spans the whole vocabulary.
CPU_ROWS, GPU_ROWS = 256, 8192
#: Rows and tokens of a product whose logits stay in cache.
CPU_TILE, GPU_TILE = (512, 2048), (2048, 4096)


def _in_place(tiled: bool, problem: Problem) -> Callable[[], Answer]:
    """Into the same memory again and again."""
    x, weight = head_inputs(problem), problem.head.weight
    on_gpu = problem.device.type == "cuda"
    whole = (GPU_ROWS if on_gpu else CPU_ROWS, problem.head.vocab)
    at_once, width = (GPU_TILE if on_gpu else CPU_TILE) if tiled else whole
    scratch = torch.empty(min(at_once, problem.rows) * min(width, problem.head.vocab), dtype=x.dtype, device=x.device)

    def multiply() -> Answer:
        for rows in x.split(at_once):
            for tile in weight.split(width):
                torch.mm(rows, tile.t(), out=scratch[: len(rows) * len(tile)].view(len(rows), len(tile)))
        return {}

    return multiply


def _into_new(problem: Problem) -> Callable[[], Answer]:
    x, weight = head_inputs(problem), problem.head.weight

    def multiply() -> Answer:
        for rows in x.split(GPU_ROWS if problem.device.type == "cuda" else CPU_ROWS):
            torch.nn.functional.linear(rows, weight)
        return {}

    return multiply


def _own(problem: Problem) -> Callable[[], Answer]:
    product, x = own_product(problem), head_inputs(problem)
    assert product is not None

    def multiply() -> Answer:
        for rows in x.split(CPU_TILE[0]):
            product(rows, CPU_TILE[1])
        return {}

    return multiply


def _no_own(problem: Problem) -> str | None:
    return "the native engine takes PyTorch's product here" if own_product(problem) is None else None


def _read(problem: Problem) -> Callable[[], Answer]:
    weight = problem.head.weight

    def read() -> Answer:
        weight.sum()
        return {}

    return read


READ = Contender(
    "read", "no product: W read once, by its sum. Where it is there, multiples are of its time", _read, floor=True
)
ROWS_AT_ONCE = f"{CPU_ROWS} rows at once ({GPU_ROWS:,} on a GPU)"
LINEAR = Contender("linear", f"F.linear alone, {ROWS_AT_ONCE}, into new memory", _into_new, floor=True)
ROWS = Contender("product", f"torch.mm alone, {ROWS_AT_ONCE}", partial(_in_place, False), floor=True)
TILES = Contender(
    "product-tiles",
    f"torch.mm alone, {CPU_TILE[0]} rows x {CPU_TILE[1]:,} tokens at once ({GPU_TILE[0]:,} x {GPU_TILE[1]:,} on a GPU)",
    partial(_in_place, True),
    floor=True,
)
OWN = Contender(
    "product-native",
    f"the native engine's own product alone, {CPU_TILE[0]} rows x {CPU_TILE[1]:,} tokens at once, into new memory",
    _own,
    unavailable=_no_own,
    floor=True,
)
