"""The native engine for CPUs: a vendor product a tile, then one pass over the tile while it is in cache.

The work is cut and put in order as in the eager engine, which walks memory several times a tile; here csrc/ takes a
tile's statistics in one pass, of every row on one of PyTorch's threads, for a few per cent of the product's time. And
since no tile leaves the cache, the whole costs less than the bare product that writes all logits to memory.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.engines.eager import EagerEngine, Product, Reference
from tuned_lens_fast.engines.state import NO_KEY, State, largest_keys, tile_top_keys

#: The library that setup.py builds from csrc/; None where it was not built.
_LIBRARY = importlib.util.find_spec("tuned_lens_fast._native")
#: Above so many, the pass's sorted insertion costs more than a selection from the tile.
MOST_IN_PASS = 64

if _LIBRARY is None or _LIBRARY.origin is None:
    MISSING: str | None = (
        "its library was not built when the package was installed; with a C++ compiler and PyTorch 2.10 or newer: "
        "pip install --no-build-isolation tuned-lens-fast (TUNED_LENS_FAST_NATIVE=1 makes the build say what fails)"
    )
else:
    try:
        torch.ops.load_library(_LIBRARY.origin)
    except OSError as error:
        MISSING = f"its library does not load with this PyTorch, {torch.__version__}: {error}"
    else:
        MISSING = None

        @torch.library.register_fake("tuned_lens_fast::tile_pass")
        @torch.library.register_fake("tuned_lens_fast::tile_divergences")
        def _writes_only(*_: Any) -> None:
            """Both write into tensors they are given."""


class NativeEngine(EagerEngine):
    """The eager engine with the passes over a tile in C++, on CPUs and for a head of any floating dtype."""

    name = "native"

    def unavailable(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        if MISSING is not None:
            return MISSING
        if device is not None and device.type != "cpu":
            return "it runs on CPUs; use engine='triton' or engine='eager'"
        return None

    def _walk(
        self,
        x: Tensor,
        product: Product,
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
        for tile in product.tiles(width):
            z = product(x, tile, width)
            in_pass = top
            if top is not None and top_k > MOST_IN_PASS:
                top = largest_keys(torch.cat([top, tile_top_keys(z, tile.start, top_k)], 1), top_k)
                in_pass = None
            torch.ops.tuned_lens_fast.tile_pass(z, tile.start, targets, threshold, m, s, t, r, target, in_pass, rescale)
            if u is not None and rescale is not None:
                u.mul_(rescale.unsqueeze(1)).add_(z @ product.weight(tile).float())
        return State(m, s, t if entropy else None, r, target, top, u)

    def _walk_both(
        self,
        x: Tensor,
        product: Product,
        width: int,
        wanted: frozenset[str],
        m: Tensor,
        log_s: Tensor,
        reference: Reference,
    ) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(m) for name in sorted(wanted)}
        flat = [found[name].view(-1) if name in found else None for name in ("kl", "reverse_kl", "js", "tv")]
        for tile in product.tiles(width):
            torch.ops.tuned_lens_fast.tile_divergences(
                product(reference.x, tile, width),
                product(x, tile, width),
                reference.m,
                reference.log_s,
                m.flatten(),
                log_s.flatten(),
                *flat,
            )
        return found
