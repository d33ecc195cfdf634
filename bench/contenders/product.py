"""The floor: the matrix product of all rows with W, and nothing else. Its logits are overwritten, or freed, at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from presets import Problem

from contenders.adapter import Answer, Contender, head_inputs
from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.eager import Matmul
from tuned_lens_fast.engines.native import NativeEngine

#: Rows whose logits exist at once when a product spans the whole vocabulary.
CPU_ROWS, GPU_ROWS = 256, 8192
#: Rows and tokens of a product whose logits stay in cache.
CPU_TILE, GPU_TILE = (512, 2048), (2048, 4096)

NATIVE = ENGINES["native"]
assert isinstance(NATIVE, NativeEngine)


def _prepare(at_once: int, width: int | None, problem: Problem) -> Callable[[], Answer]:
    x, weight = head_inputs(problem), problem.head.weight
    width = min(width or problem.head.vocab, problem.head.vocab)
    scratch = torch.empty(min(at_once, problem.rows), width, dtype=x.dtype, device=x.device)

    def multiply() -> Answer:
        for rows in x.split(at_once):
            for tile in weight.split(width):
                whole = scratch[: len(rows)].flatten()[: len(rows) * len(tile)]
                torch.mm(rows, tile.t(), out=whole.view(len(rows), len(tile)))
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
    product, x = NATIVE.matmul(problem.head, problem.dtype), head_inputs(problem)

    def multiply() -> Answer:
        for rows in x.split(CPU_TILE[0]):
            rounded = product.round(rows)
            for tile in product.tiles(CPU_TILE[1]):
                product.multiply(rounded, product.weight(tile))
        return {}

    return multiply


def _no_own(problem: Problem) -> str | None:
    if type(NATIVE.matmul(problem.head, problem.dtype)) is Matmul:
        return "the native engine takes PyTorch's product here"
    return None


def _by_rows(problem: Problem) -> Callable[[], Answer]:
    return _prepare(GPU_ROWS if problem.device.type == "cuda" else CPU_ROWS, None, problem)


def _by_tiles(problem: Problem) -> Callable[[], Answer]:
    return _prepare(*(GPU_TILE if problem.device.type == "cuda" else CPU_TILE), problem)


LINEAR = Contender(
    "linear", f"F.linear alone, {CPU_ROWS} rows at once ({GPU_ROWS:,} on a GPU), into new memory", _into_new, floor=True
)
ROWS = Contender("product", f"torch.mm alone, {CPU_ROWS} rows at once ({GPU_ROWS:,} on a GPU)", _by_rows, floor=True)
TILES = Contender(
    "product-tiles",
    f"torch.mm alone, {CPU_TILE[0]} rows x {CPU_TILE[1]:,} tokens at once ({GPU_TILE[0]:,} x {GPU_TILE[1]:,} on a GPU)",
    _by_tiles,
    floor=True,
)
OWN = Contender(
    "product-native",
    f"the native engine's own product alone, {CPU_TILE[0]} rows x {CPU_TILE[1]:,} tokens at once, into new memory",
    _own,
    unavailable=_no_own,
    floor=True,
)
