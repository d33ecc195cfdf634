"""Launch parameters, and how a tile's columns and groups number the tokens."""

import heapq
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.kernels.launch import Bands, Partition, Tile, built_in_tile, merged_tiles, vocabulary_splits
from tuned_lens_fast.kernels.logits import token_of
from tuned_lens_fast.kernels.running_state import item_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_model", [64, 100, 576, 4096, 16_384])
@pytest.mark.parametrize("capability", [(0, 0), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_tiles_are_such_as_the_kernels_can_use(capability, d_model, dtype):
    for precision in ("ieee", "tf32"):
        tile = built_in_tile(capability, dtype, d_model, precision)
        assert tile == built_in_tile(capability, dtype, d_model, precision)
        # The top k's kernels take members eight at a time and find them in the low bits of a key.
        assert tile.members >= 8
        assert tile.members & (tile.members - 1) == 0
        for size in (tile.block_rows, tile.block_vocab, tile.block_depth):
            assert size >= 16
            assert size & (size - 1) == 0
        if tile.tma:
            assert capability >= (9, 0)
            assert d_model * dtype.itemsize % 16 == 0
        assert tile.tma or not tile.flat
        assert not tile.without_tma().tma
        stage = (tile.block_rows + tile.block_vocab) * tile.block_depth * dtype.itemsize
        shared = {(8, 0): 163, (8, 9): 99, (12, 0): 99}.get(capability, 227)
        assert tile.stages * stage <= shared * 1024


@given(st.integers(1, 5_000), st.integers(1, 2_000), st.integers(1, 200))
def test_splits(row_blocks, tiles, programs):
    splits = vocabulary_splits(row_blocks, tiles, programs)
    assert 1 <= splits <= min(tiles, 512)
    # No slice is empty once the tiles are dealt out evenly.
    per_split = -(-tiles // splits)
    assert (-(-tiles // per_split) - 1) * per_split < tiles


def test_splits_fill_the_processors():
    assert vocabulary_splits(1, 501, 132) >= 126
    assert vocabulary_splits(132 * 20, 501, 132) == 1
    assert vocabulary_splits(1, 1, 132) == 1


def items(row_blocks, tiles, merged, bands):
    """(row block, first tile, stop tile, slice), in the order in which programs take them."""
    found = []
    for first in range(0, row_blocks, bands.size):
        last = first + bands.size >= row_blocks
        start = 0
        for split, length in enumerate(bands.lengths(bands.last_splits if last else bands.splits, tiles, merged)):
            blocks = range(first, min(first + bands.size, row_blocks))
            found += [(block, start, start + length, split) for block in blocks]
            start += length
    return found


def over_ideal(some, row_blocks, tiles, programs, start=0.5):
    """Time of items over that of their tiles alone, each given to the processor that is free first."""
    free = [0.0] * programs
    for _, first, stop, _ in some:
        heapq.heapreplace(free, free[0] + stop - first + start)
    return max(free) * programs / (row_blocks * tiles)


@given(
    st.integers(1, 600), st.integers(1, 700), st.sampled_from([1, 2, 4]), st.integers(1, 150), st.integers(1, 400)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_bands(row_blocks, tiles, merged, programs, most):
    bands = Bands.of(row_blocks, tiles, merged, programs, most)
    assert 1 <= bands.size <= min(most, row_blocks)
    done = np.zeros((row_blocks, tiles), int)
    for block, start, stop, _ in items(row_blocks, tiles, merged, bands):
        assert start % merged == 0
        assert start < stop
        done[block, start:stop] += 1
    assert (done == 1).all()


@pytest.mark.parametrize(
    ("rows", "tiles", "merged", "d_model", "most"),
    [
        (7_168, 501, 2, 4096, 1.015),
        (7_168, 593, 2, 2048, 1.010),
        (9_216, 1024, 4, 640, 1.006),
        (15_360, 192, 2, 576, 1.018),
        (65_536, 501, 1, 4096, 1.010),
        (16, 501, 1, 4096, 1.19),  # four tiles a processor, and the start of each
    ],
)
def test_processors_are_done_together(rows, tiles, merged, d_model, most):
    """At the shapes of models, in chunks of the default budget, on 132 processors."""
    row_blocks = -(-rows // 128)
    side_by_side = 24 * 2**20 // (256 * d_model)
    bands = Bands.of(row_blocks, tiles, merged, 132, side_by_side)
    found = over_ideal(items(row_blocks, tiles, merged, bands), row_blocks, tiles, 132)
    assert found == pytest.approx(bands.over_ideal(row_blocks, tiles, merged, 132))
    assert found <= most


@triton.jit
def _items(out, tiles, row_blocks, band, splits, last_splits, MERGED: tl.constexpr):
    block, start, stop, split = item_of(tl.program_id(0), tiles, row_blocks, band, splits, last_splits, MERGED)
    at = out + 4 * tl.program_id(0)
    tl.store(at, block)
    tl.store(at + 1, start)
    tl.store(at + 2, stop)
    tl.store(at + 3, split)


@pytest.mark.parametrize("merged", [1, 4])
@pytest.mark.parametrize("bands", [Bands(5, 0, 3), Bands(2, 2, 5), Bands(1, 3, 1), Bands(4, 7, 2)], ids=str)
def test_a_program_finds_its_item(bands, merged, device):
    row_blocks, tiles = 5, 30
    wanted = items(row_blocks, tiles, merged, bands)
    out = torch.empty(len(wanted), 4, dtype=torch.int32, device=device)
    _items[(len(wanted),)](out, tiles, row_blocks, bands.size, bands.splits, bands.last_splits, MERGED=merged)
    assert out.tolist() == [list(item) for item in wanted]


@triton.jit
def _tokens(out, groups, MEMBERS: tl.constexpr, MERGED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    token = token_of(at // (MEMBERS * MERGED), at % (MEMBERS * MERGED), groups, MEMBERS, MERGED)
    tl.store(out + at, token)


@pytest.mark.parametrize("merged", [1, 2, 4])
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 63, 64, 65, 71, 72, 135, 600, 1037])
def test_every_token_has_one_place(vocab, merged, device):
    """Slot by slot, place by place: the groups of whole tiles, the left-over groups, the tokens that fill none."""
    tile = replace(built_in_tile((0, 0), torch.bfloat16, 64), merged=merged)
    places = Partition.of(1, Head(torch.empty(vocab, 64, device="meta")), tile).slots * tile.members * merged
    block = triton.next_power_of_2(places)
    out = torch.empty(block, dtype=torch.int32, device=device)
    _tokens[(1,)](out, vocab // tile.members, MEMBERS=tile.members, MERGED=merged, BLOCK=block)
    out = out[:places]
    assert out[(out >= 0) & (out < vocab)].sort().values.tolist() == list(range(vocab))


def test_groups_are_merged_where_that_moves_fewer_bytes():
    tile = Tile(128, 256, 64, 8, 3)
    assert merged_tiles(128_256, tile, 10, 2 * 4096) == 2
    assert merged_tiles(151_936, tile, 10, 2 * 2048) == 2
    assert merged_tiles(262_144, tile, 10, 2 * 640) == 4
    assert merged_tiles(49_152, tile, 10, 2 * 576) == 2
    assert merged_tiles(128_256, tile, 64, 2 * 576) == 1
    # One row in eight has a group with two of the top k, at most.
    for k in (1, 5, 10, 20, 40):
        merged = merged_tiles(262_144, tile, k, 16)
        assert merged == 1 or k * k / 2 <= 262_144 / (tile.members * merged) / 8
