"""Launch parameters: one deterministic function of the GPU, the dtype and the shape; nothing is searched at run time.

The entries for sm_90 were chosen from measurements on an H100 (see vocabulary_pass.py for what lost), those for other
GPUs from what compiles without spills. A file of one's own measurements, written by search.py and named by
TUNED_LENS_FAST_TILES, goes before them.
"""

from __future__ import annotations

import functools
import heapq
import itertools
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
    cooperative: bool = False  #: by cooperative.py: two groups of warps with half of the rows each
    lag: int = 0  #: of the second of these groups, in steps of block_depth
    precision: Precision = "ieee"

    @property
    def members(self) -> int:
        return self.block_vocab // 8

    def without_tma(self) -> Tile:
        return replace(self, tma=False, flat=False, overlapped=False, cooperative=False, lag=0)


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


def merged_tiles(vocab: int, tile: Tile, top_k: int, row_bytes: int) -> int:
    """How many tiles share their groups, ``row_bytes`` being those of a row of W.

    Larger groups are fewer numbers to write, read and search, 12 bytes each: two of every group are written, one is
    read. But of G groups one holds two of the top k in k * k / 2G rows, and then all its members are multiplied again.
    Whatever that costs, no more than one row in eight, or some would have more such groups than there is room for.
    """

    def bytes_a_row(merged: int) -> float:
        members = tile.members * merged
        groups = vocab / members
        return 12 * groups + top_k * top_k / (2 * groups) * members * row_bytes

    few = [merged for merged in (2, 4) if vocab // (tile.members * merged) >= 4 * top_k * top_k]
    return min((1, *few), key=bytes_a_row)


@functools.lru_cache(maxsize=1024)
def vocabulary_splits(row_blocks: int, tiles: int, programs: int) -> int:
    """Into how many slices of one length the vocabulary is cut so that ``programs`` processors finish together.

    A program costs its tiles and about half a tile to start; the last wave is as long as a full one.
    """

    def waves(splits: int) -> float:
        return -(-row_blocks * splits // programs) * (-(-tiles // splits) + START)

    least = min(tiles, -(-programs // row_blocks))
    return min(range(least, max(least, min(tiles, 512)) + 1), key=waves)


#: What a program costs before its first tile, in tiles.
START = 0.5
#: Slices of a band, at most: each costs 16 bytes of state a row.
MOST_SLICES = 512


@dataclass(frozen=True)
class Bands:
    """Row blocks in the order in which they are decoded: bands of so many, each with a few slices of the vocabulary.

    Programs that run together form a band, so that both operands stay in L2. The last band has what is left of the row
    blocks, from one up to as many as the others, and is cut anew.
    """

    size: int  #: row blocks of a band that is not the last
    splits: int  #: slices of the vocabulary in such a band
    last_splits: int

    def rest(self, row_blocks: int) -> int:
        """Row blocks of the last band."""
        return (row_blocks - 1) % self.size + 1

    def lengths(self, splits: int, tiles: int, merged: int) -> list[int]:
        """Tiles of every slice: multiples of ``merged``, as even as can be, the longer first."""
        units = -(-tiles // merged)
        found = [(units // splits + (i < units % splits)) * merged for i in range(splits)]
        found[-1] -= units * merged - tiles
        return found

    def over_ideal(self, row_blocks: int, tiles: int, merged: int, programs: int) -> float:
        """Time of so many programs side by side over that of their tiles alone, evenly shared."""
        busy, rest = [(0.0, programs)], self.rest(row_blocks)
        for _ in range((row_blocks - rest) // self.size):
            busy = _take_next(busy, self.size, self.lengths(self.splits, tiles, merged))
        busy = _take_next(busy, rest, self.lengths(self.last_splits, tiles, merged))
        return busy[-1][0] * programs / (row_blocks * tiles)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(row_blocks: int, tiles: int, merged: int, programs: int, most: int) -> Bands:
        """Those by which ``programs`` processors, each taking what is next, are done first.

        Slices are multiples of ``merged`` tiles, since a slot belongs to one program. No more than ``most`` row blocks
        side by side stay in L2, and far fewer would have W read again and again.
        """
        units = -(-tiles // merged)
        least = min(units, MOST_SLICES, -(-programs // most))
        some = range(least, min(least + 4, programs, units + 1))
        sizes = {min(programs // splits, most, row_blocks): splits for splits in some} | {min(most, row_blocks): least}
        best: tuple[float, int, Bands] | None = None
        for size, splits in sizes.items():
            bands = Bands(size, splits, 1)
            rest = bands.rest(row_blocks)
            busy = [(0.0, programs)]
            for _ in range((row_blocks - rest) // bands.size):
                busy = _take_next(busy, bands.size, bands.lengths(splits, tiles, merged))
            # Of all numbers of slices those whose longest is shorter, down to as many as are done four at a time.
            enough = min(MOST_SLICES, max(1, 4 * programs // rest))
            for last_splits in sorted({-(-units // length) for length in range(1, units + 1)}):
                if last_splits > enough:
                    break
                end = _take_next(busy, rest, bands.lengths(last_splits, tiles, merged))[-1][0]
                if best is None or (end, last_splits) < best[:2]:
                    best = end, last_splits, replace(bands, last_splits=last_splits)
        assert best is not None
        return best[2]


def _take_next(busy: list[tuple[float, int]], row_blocks: int, lengths: list[int]) -> list[tuple[float, int]]:
    """When how many processors are free, in ascending order, once a band's slices each went to the one free first."""
    heap = list(busy)
    for length, slices in itertools.groupby(lengths):
        left = row_blocks * len(list(slices))
        while left:
            time, count = heapq.heappop(heap)
            while heap and heap[0][0] == time:
                count += heapq.heappop(heap)[1]
            taken = min(count, left)
            left -= taken
            heapq.heappush(heap, (time + START + length, taken))
            if count > taken:
                heapq.heappush(heap, (time, count - taken))
    return sorted(heap)


@dataclass(frozen=True)
class Partition:
    """How a vocabulary pass shares rows and vocabulary among programs."""

    rows: int
    block_rows: int
    groups: int  #: of columns; token = member * groups + group
    tiles: int  #: that are whole
    bands: Bands
    parts: int  #: of a row's state that a slice leaves
    slots: int  #: for groups' maxima in a row: of whole tiles, left-over groups and left-over tokens, eight each
    place_mask: int  #: clears the bits of a logit in which a place is kept
    tail: tuple[bool, bool]  #: whether there are left-over groups, and left-over tokens

    @property
    def row_blocks(self) -> int:
        return triton.cdiv(self.rows, self.block_rows)

    @property
    def full_rows(self) -> int:
        """Rows of all bands but the last."""
        return (self.row_blocks - self.bands.rest(self.row_blocks)) * self.block_rows

    @property
    def items(self) -> int:
        """Pairs of a row block and a slice of the whole tiles."""
        full_blocks = self.full_rows // self.block_rows
        return full_blocks * self.bands.splits + (self.row_blocks - full_blocks) * self.bands.last_splits

    @property
    def states(self) -> int:
        """Pairs of a row and a part of its state, of the whole tiles."""
        last = (self.rows - self.full_rows) * self.bands.last_splits
        return self.parts * (self.full_rows * self.bands.splits + last)

    @property
    def state_bytes(self) -> int:
        """Of all parts of the rows' state."""
        return 16 * (self.states + self.rows * any(self.tail))

    def arguments(self) -> tuple[int, int, int, int, int]:
        """What running_state.py's ``item_of`` is told of it."""
        return self.tiles, self.row_blocks, self.bands.size, self.bands.splits, self.bands.last_splits

    @classmethod
    def of(cls, rows: int, head: Head, tile: Tile) -> Partition:
        groups = head.vocab // tile.members
        tiles = groups // 8
        row_blocks = triton.cdiv(rows, tile.block_rows)
        # As many row blocks side by side as leave half of a 50 MB L2 cache to the vocabulary.
        row_bytes = head.weight.shape[1] * head.weight.element_size()
        most = max(1, 24 * 2**20 // (tile.block_rows * row_bytes))
        bands = Bands(row_blocks, 0, 0)
        if tiles:
            bands = Bands.of(row_blocks, tiles, tile.merged, processors(head.weight.device), most)
        tail = groups % 8 > 0, head.vocab % tile.members > 0
        slots = 8 * (triton.cdiv(tiles, tile.merged) + sum(tail))
        place_mask = ~(tile.members * tile.merged - 1)
        return cls(rows, tile.block_rows, groups, tiles, bands, 1 + tile.overlapped, slots, place_mask, tail)
