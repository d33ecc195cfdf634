"""The native engine: on x86 logits that are met in a core's own caches and never leave them.

Elsewhere, and where something else needs a tile's logits, it cuts its work as the eager engine does, which walks memory
several times a tile: here csrc/ takes a tile's statistics in one pass. On a CPU no tile leaves the cache, so that of
many rows the whole costs less than the bare product that writes all logits to memory. On a GPU the tile is in the
engine's scratch. matmul.py says which product is whose.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.engines.decoding import Reference
from tuned_lens_fast.engines.eager import EagerEngine
from tuned_lens_fast.engines.interface import Head, Tiling
from tuned_lens_fast.engines.matmul import (
    MOST_IN_PASS,
    NATIVE_DTYPES,
    Matmul,
    NativeMatmul,
    Packed,
    bf16_split,
    constant_in_graphs,
)
from tuned_lens_fast.engines.state import NO_KEY, SUMS, State, Wanted, largest_keys, tile_top_keys
from tuned_lens_fast.engines.statistics import DIVERGENCES

#: What multiplies on CPUs, as it is named in TUNED_LENS_FAST_CPU and to people, in the order of csrc/processor.h.
UNITS = {
    "plain": "products by PyTorch",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_bf16": "AVX-512 with bf16",
    "amx": "AMX",
}
#: How a build that says what fails is had.
_BUILD = "pip install --no-build-isolation tuned-lens-fast (TUNED_LENS_FAST_NATIVE=1 makes the build say what fails)"


def _load(library: str, wants: str, operators: Sequence[str]) -> str | None:
    """Load what setup.py built from csrc/; None, or why it is not there and what would change that."""
    found = importlib.util.find_spec(f"tuned_lens_fast.{library}")
    if found is None or found.origin is None:
        return f"its library was not built when the package was installed; with {wants}: {_BUILD}"
    try:
        torch.ops.load_library(found.origin)
    except OSError as error:
        return f"its library does not load with this PyTorch, {torch.__version__}: {error}"
    if not all(hasattr(torch.ops.tuned_lens_fast, name) for name in operators):
        return f"its library is older than the package; reinstall: {_BUILD}"
    return None


#: Why the engine works nowhere; None where it does.
MISSING = _load(
    "_native", "a C++ compiler and PyTorch 2.10 or newer", ("tile_pass", "tile_divergences", "vocabulary_walk")
)


@functools.cache
def _cuda_library() -> str | None:
    return _load("_native_cuda", "nvcc and a CUDA build of PyTorch 2.10 or newer", ["runs_on_gpu"])


@constant_in_graphs
def missing_on_cuda(index: int | None = None) -> str | None:
    """Why the engine does not work on the GPU of that number, or on the current one; None where it does."""
    if MISSING is not None or not torch.cuda.is_available():
        return MISSING or "PyTorch sees no NVIDIA GPU"
    missing = _cuda_library()
    index = torch.cuda.current_device() if index is None else index
    if missing is None and not torch.ops.tuned_lens_fast.runs_on_gpu(index):
        return f"its library has no code for {torch.cuda.get_device_name(index)}; build it where PyTorch sees that GPU"
    return missing


if MISSING is None:

    @torch.library.register_fake("tuned_lens_fast::tile_pass")
    @torch.library.register_fake("tuned_lens_fast::tile_divergences")
    @torch.library.register_fake("tuned_lens_fast::logits")
    @torch.library.register_fake("tuned_lens_fast::vocabulary_walk")
    def _writes_only(*_: Any) -> None:
        """All write into tensors they are given."""


@constant_in_graphs
def product_unit() -> str:
    """The unit of this processor that csrc/ multiplies on, a key of UNITS; "plain": none, and PyTorch multiplies."""
    return list(UNITS)[0 if MISSING is not None else torch.ops.tuned_lens_fast.product_unit()]


@constant_in_graphs
def fp32_precision() -> str:
    """What PyTorch is told about fp32 products on CPUs."""
    return torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


class NativeEngine(EagerEngine):
    """The eager engine with the passes over a tile in C++ or CUDA, for a head of any floating dtype."""

    name = "native"

    def unavailable(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        if device is None or device.type == "cpu":
            return MISSING
        if device.type == "cuda":
            return missing_on_cuda(device.index)
        return "it runs on CPUs and NVIDIA GPUs; use engine='eager'"

    def path(self) -> str:
        return UNITS[product_unit()]

    def matmul(self, head: Head) -> Matmul:
        if head.weight.device.type != "cpu" or head.weight.dtype not in NATIVE_DTYPES or product_unit() == "plain":
            return Matmul(head)
        split = bf16_split(head.weight.dtype, fp32_precision()) if product_unit() == "amx" else None
        return NativeMatmul(head, *(split or ()))

    def tile_passes(
        self, matmul: Matmul, x: Packed, wanted: Wanted, targets: Tensor | None, threshold: Tensor | None, width: int
    ) -> State:
        threshold = None if threshold is None else threshold.contiguous()
        if isinstance(matmul, NativeMatmul) and matmul.walks(x.rows, wanted):
            return matmul.walk(x, wanted, targets, threshold)
        device = x.values.device
        sums = torch.zeros(x.rows, len(SUMS), dtype=torch.float32, device=device)
        sums[:, 0] = -torch.inf
        r = torch.zeros(x.rows, dtype=torch.int64, device=device) if "r" in wanted.running else None
        target = None if targets is None else sums.new_full((x.rows,), -torch.inf)
        k = wanted.top_k
        top = torch.full((x.rows, k), NO_KEY, dtype=torch.int64, device=device) if k else None
        u, rescale = None, None
        if wanted.u:
            u, rescale = sums.new_zeros(x.rows, matmul.head.weight.shape[1]), sums.new_empty(x.rows)
        room = matmul.room(x.rows, width)
        for tile in matmul.tiles(width):
            z = matmul(x, tile, width, room)
            in_pass = top
            if top is not None and k > MOST_IN_PASS:
                top = largest_keys(torch.cat([top, tile_top_keys(z, tile.start, k)], 1), k)
                in_pass = None
            torch.ops.tuned_lens_fast.tile_pass(z, tile.start, targets, threshold, sums, r, target, in_pass, rescale)
            if u is not None and rescale is not None:
                matmul.add_rows_of_weight(u.mul_(rescale.unsqueeze(1)), z, tile, wanted.u == "exact")
        return State(**dict(zip(SUMS, sums.unbind(1), strict=True)), r=r, target=target, top=top, u=u)

    def divergence_pass(
        self, x: Tensor, state: State, reference: Reference, head: Head, names: Collection[str], tiling: Tiling
    ) -> dict[str, Tensor]:
        matmul, width = self.matmul(head), tiling.tile
        rows, own = matmul.pack(x), matmul.pack(reference.x)
        sums = state.m.new_zeros(len(DIVERGENCES), x.shape[0])
        rooms = [matmul.room(packed.rows, width) for packed in (own, rows)]
        normalisers = [torch.stack([of.m, of.log_s]) for of in (reference.state, state)]  # type: ignore[list-item]
        for tile in matmul.tiles(width):
            torch.ops.tuned_lens_fast.tile_divergences(
                matmul(own, tile, width, rooms[0]),
                matmul(rows, tile, width, rooms[1]),
                *normalisers,
                "js" in names,
                sums,
            )
        return {name: total for name, total in zip(DIVERGENCES, sums, strict=True) if name in names}
