"""The native engine: a product a tile, then one pass over the tile while it is in cache.

The work is tiling and put in order as in the eager engine, which walks memory several times a tile; here csrc/ takes a
tile's statistics in one pass. On a CPU no tile leaves the cache, so that of many rows the whole costs less than the
bare product that writes all logits to memory; for processors with AVX2 alone, and with AMX, csrc/ has the product as
well (matmuls.py). On a GPU the tile is in the engine's scratch.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.engines.eager import EagerEngine, Matmul, Reference
from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.engines.matmuls import FMA_DTYPES, AmxMatmul, FmaMatmul, bf16_split
from tuned_lens_fast.engines.state import NO_KEY, State, largest_keys, tile_top_keys

#: Above so many, the pass's sorted insertion costs more than a selection from the tile.
MOST_IN_PASS = 64
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
MISSING = _load("_native", "a C++ compiler and PyTorch 2.10 or newer", ("tile_pass", "tile_divergences", "fma_matmul"))


@functools.cache
def _cuda_library() -> str | None:
    return _load("_native_cuda", "nvcc and a CUDA build of PyTorch 2.10 or newer", ["has_gpu_code"])


@torch.compiler.assume_constant_result
def missing_on_cuda(index: int | None = None) -> str | None:
    """Why the engine does not work on the GPU of that number, or on the current one; None where it does."""
    if MISSING is not None or not torch.cuda.is_available():
        return MISSING or "PyTorch sees no NVIDIA GPU"
    missing = _cuda_library()
    index = torch.cuda.current_device() if index is None else index
    if missing is None and not torch.ops.tuned_lens_fast.has_gpu_code(index):
        return f"its library has no code for {torch.cuda.get_device_name(index)}; build it where PyTorch sees that GPU"
    return missing


if MISSING is None:

    @torch.library.register_fake("tuned_lens_fast::tile_pass")
    @torch.library.register_fake("tuned_lens_fast::tile_divergences")
    @torch.library.register_fake("tuned_lens_fast::fma_matmul")
    @torch.library.register_fake("tuned_lens_fast::amx_matmul")
    def _writes_only(*_: Any) -> None:
        """All write into tensors they are given."""


@torch.compiler.assume_constant_result
def has_amx() -> bool:
    """Whether products can run on this processor's AMX unit."""
    return MISSING is None and torch.ops.tuned_lens_fast.has_amx()


@torch.compiler.assume_constant_result
def has_fma() -> bool:
    """Whether products can run on this processor's AVX2 unit, and have no wider one to run on."""
    return MISSING is None and torch.ops.tuned_lens_fast.has_fma()


@torch.compiler.assume_constant_result
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

    def matmul(self, head: Head, hidden: torch.dtype) -> Matmul:
        on_cpu = head.weight.device.type == "cpu"
        if on_cpu and has_amx() and (split := bf16_split(head.weight.dtype, fp32_precision())):
            return AmxMatmul(head, hidden, *split)
        if on_cpu and has_fma() and head.weight.dtype in FMA_DTYPES:
            return FmaMatmul(head, hidden)
        return Matmul(head, hidden)

    def _walk(
        self,
        x: Tensor,
        matmul: Matmul,
        width: int,
        *,
        entropy: bool = False,
        targets: Tensor | None = None,
        rank: bool = False,
        threshold: Tensor | None = None,
        top_k: int = 0,
        weighted: bool = False,
    ) -> State:
        rows = x.shape[0]
        if threshold is not None:
            threshold = threshold.contiguous()

        def row_of(value: float, *columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return x.new_full((rows, *columns), value, dtype=dtype)

        m, s, t = row_of(-torch.inf), row_of(0), row_of(0)
        r = row_of(0, dtype=torch.int64) if rank else None
        target = None if targets is None else row_of(-torch.inf)
        top = row_of(NO_KEY, top_k, dtype=torch.int64) if top_k else None
        u, rescale = (row_of(0, x.shape[1]), row_of(0)) if weighted else (None, None)
        for tile in matmul.tiles(width):
            z = matmul(x, tile, width)
            in_pass = top
            if top is not None and top_k > MOST_IN_PASS:
                top = largest_keys(torch.cat([top, tile_top_keys(z, tile.start, top_k)], 1), top_k)
                in_pass = None
            torch.ops.tuned_lens_fast.tile_pass(z, tile.start, targets, threshold, m, s, t, r, target, in_pass, rescale)
            if u is not None and rescale is not None:
                u.mul_(rescale.unsqueeze(1)).add_(z @ matmul.weight(tile).float())
        return State(m, s, t if entropy else None, r, target, top, u)

    def _walk_both(
        self,
        x: Tensor,
        matmul: Matmul,
        width: int,
        wanted: frozenset[str],
        m: Tensor,
        log_s: Tensor,
        reference: Reference,
    ) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(m) for name in sorted(wanted)}
        flat = [found[name].view(-1) if name in found else None for name in ("kl", "reverse_kl", "js", "tv")]
        for tile in matmul.tiles(width):
            torch.ops.tuned_lens_fast.tile_divergences(
                matmul(reference.x, tile, width),
                matmul(x, tile, width),
                reference.m,
                reference.log_s,
                m.flatten(),
                log_s.flatten(),
                *flat,
            )
        return found
