"""Launch parameters: one deterministic function of the GPU, the dtype and the shape; nothing is searched at run time.

The entries for sm_90 were chosen from measurements on an H100 (see vocabulary_pass.py for what lost), those for other
GPUs from what compiles without spills. A file of one's own measurements, written by search.py and named by
TUNED_LENS_FAST_TILES, goes before them.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import triton

if TYPE_CHECKING:
    from tuned_lens_fast.engines.interface import Head

#: Of fp32 products: exact, or with 10 bits of the operands' mantissas.
Precision = Literal["ieee", "tf32"]


@dataclass(frozen=True)
class Tile:
    """How a program of the vocabulary pass works."""

    block_rows: int
    block_vocab: int  #: 8 groups of block_vocab / 8 members
    block_depth: int
    warps: int
    stages: int
    tma: bool = False  #: operands come through the bulk tensor copy engine (sm_90 and newer)
    flat: bool = False  #: one loop over tiles and depth, so that loads run on under the statistics of a tile
    merged: int = 1  #: tiles whose groups of columns are one group to the top k
    overlapped: bool = False  #: by overlapped.py: two groups of warps in turn, half of ``warps`` each
    precision: Precision = "ieee"

    @property
    def members(self) -> int:
        return self.block_vocab // 8

    def without_tma(self) -> Tile:
        return replace(self, tma=False, flat=False, overlapped=False)


def head_arguments(head: Head) -> dict[str, Any]:
    """What kernels are told of a head beside its weight, by name."""
    return {
        "bias": head.bias,
        "scale": head.scale,
        "softcap": head.softcap or 1.0,
        "BIAS": head.bias is not None,
        "SCALE": head.scale != 1.0,
        "SOFTCAP": head.softcap is not None,
    }


def architecture(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) on a CPU, where the kernels run in Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def vocabulary_tile(
    device: torch.device, dtype: torch.dtype, d_model: int, precision: Precision = "ieee", top_k: bool = True
) -> Tile:
    """The vocabulary pass's tile for operands of ``dtype`` ``[rows, d_model]``; ``top_k``: whether one is wanted.

    Raises:
        ValueError: TUNED_LENS_FAST_TILES names no file of entries.
    """
    named = os.environ.get("TUNED_LENS_FAST_TILES")
    entry = entries(named).get(entry_key(device, dtype, d_model, precision, top_k)) if named else None
    tile = entry or built_in_tile(architecture(device), dtype, d_model, precision, top_k)
    return replace(tile, precision=precision if dtype == torch.float32 else "ieee")


def entry_key(device: torch.device, dtype: torch.dtype, d_model: int, precision: str, top_k: bool) -> str:
    """What a measured tile was measured for: the GPU's name, Triton's version, and the operands."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    precision = precision if dtype == torch.float32 else "ieee"  # of 16-bit numbers all products are exact
    operands = f"{str(dtype).removeprefix('torch.')}, {precision}, d_model {d_model}, {'' if top_k else 'no '}top k"
    return f"{name}, Triton {triton.__version__}, {operands}"


@functools.cache
def entries(path: str) -> dict[str, Tile]:
    """The measured tiles in a file that search.py wrote."""
    try:
        return {key: Tile(**values) for key, values in json.loads(Path(path).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"TUNED_LENS_FAST_TILES: {path!r} holds no tiles of kernels/search.py: {error}") from error


def built_in_tile(
    capability: tuple[int, int], dtype: torch.dtype, d_model: int, precision: str = "ieee", top_k: bool = True
) -> Tile:
    """The tile where nothing was measured by the user."""
    if capability == (0, 0):
        return Tile(block_rows=16, block_vocab=64, block_depth=32, warps=4, stages=1)
    if dtype == torch.float32:
        if precision == "ieee":  # no matrix unit multiplies in full fp32
            return Tile(64, 64, 16, warps=8, stages=3)
        return Tile(128, 64, 32, warps=8, stages=3)
    if d_model * dtype.itemsize % 16:  # neither the copy engine nor wide loads read such rows
        return Tile(64, 64, 32, warps=8, stages=2)
    if capability[0] == 9:
        return Tile(128, 256, 64, warps=8, stages=3, tma=True, flat=True)
    if capability[0] == 10:
        return Tile(128, 128, 64, warps=8, stages=4, tma=True)
    return Tile(128, 64, 64, warps=8, stages=3) if top_k else Tile(128, 128, 32, warps=8, stages=3)


def merged_tiles(vocab: int, tile: Tile, top_k: int) -> int:
    """How many tiles share their groups: fewer groups are fewer numbers to write, read and search.

    But a larger group holds two of the top k more often, and then all its members are multiplied again: of G groups
    one does in k * k / 2G rows. 8 k * k groups keep that to one row in sixteen.
    """
    return next((merged for merged in (4, 2) if vocab // (tile.members * merged) >= 8 * top_k * top_k), 1)


def row_band(d_model: int, itemsize: int, tile: Tile) -> int:
    """Row blocks that run side by side: as many as leave half of a 50 MB L2 cache to the vocabulary."""
    return max(1, 24 * 2**20 // (tile.block_rows * d_model * itemsize))


@functools.lru_cache(maxsize=1024)
def vocabulary_splits(row_blocks: int, tiles: int, programs: int, band: int) -> int:
    """Into how many slices the vocabulary is cut so that ``programs`` processors finish together.

    A program costs its tiles and about half a tile to start; the last wave is as long as a full one. No fewer slices
    than let a band of row blocks occupy all processors: more row blocks at once would not stay in L2.
    """

    def waves(splits: int) -> float:
        return -(-row_blocks * splits // programs) * (-(-tiles // splits) + 0.5)

    least = min(tiles, -(-programs // band))
    return min(range(max(1, least), max(least, min(tiles, 512)) + 1), key=waves)


@dataclass(frozen=True)
class Partition:
    """How a vocabulary pass shares rows and vocabulary among programs."""

    groups: int  #: of columns; token = member * groups + group
    tiles: int  #: that are whole
    tiles_per_split: int
    splits: int  #: slices of the whole tiles
    row_blocks: int
    band: int
    slots: int  #: for groups' maxima in a row: of whole tiles, left-over groups and left-over tokens, eight each
    place_mask: int  #: clears the bits of a logit in which a place is kept
    tail: tuple[bool, bool]  #: whether there are left-over groups, and left-over tokens

    @classmethod
    def of(cls, rows: int, head: Head, tile: Tile) -> Partition:
        groups = head.vocab // tile.members
        tiles = groups // 8
        row_blocks = triton.cdiv(rows, tile.block_rows)
        band = row_band(head.weight.shape[1], head.weight.element_size(), tile)
        splits = vocabulary_splits(row_blocks, tiles, processors(head.weight.device), band) if tiles else 1
        # A slot belongs to one program.
        per_split = triton.cdiv(triton.cdiv(tiles, splits), tile.merged) * tile.merged
        tail = groups % 8 > 0, head.vocab % tile.members > 0
        slots = 8 * (triton.cdiv(tiles, tile.merged) + sum(tail))
        mask = ~(tile.members * tile.merged - 1)
        return cls(groups, tiles, per_split, triton.cdiv(tiles, max(1, per_split)), row_blocks, band, slots, mask, tail)
