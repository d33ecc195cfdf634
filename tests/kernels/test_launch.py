"""Launch parameters, and how a tile's columns and groups number the tokens."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.kernels.launch import Partition, Tile, built_in_tile, merged_tiles, vocabulary_splits
from tuned_lens_fast.kernels.logits import token_of

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


@given(st.integers(1, 5_000), st.integers(1, 2_000), st.integers(1, 200), st.integers(1, 500))
def test_splits(row_blocks, tiles, programs, band):
    splits = vocabulary_splits(row_blocks, tiles, programs, band)
    assert 1 <= splits <= min(tiles, 512)
    # No slice is empty once the tiles are dealt out evenly.
    per_split = -(-tiles // splits)
    assert (-(-tiles // per_split) - 1) * per_split < tiles


def test_splits_fill_the_processors():
    assert vocabulary_splits(1, 501, 132, 22) >= 126
    assert vocabulary_splits(132 * 20, 501, 132, 200) == 1
    assert vocabulary_splits(1, 1, 132, 22) == 1
    # A band of 22 row blocks needs 6 slices to occupy them all.
    assert vocabulary_splits(132 * 20, 501, 132, 22) >= 6


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


def test_groups_are_merged_where_they_are_many():
    tile = Tile(128, 256, 64, 8, 3)
    assert merged_tiles(128_256, tile, 10) == 4
    assert merged_tiles(49_152, tile, 10) == 1
    assert merged_tiles(128_256, tile, 64) == 1


def test_neighbouring_tokens_share_no_group():
    tile = Tile(128, 256, 64, 8, 3)
    groups = 128_256 // tile.members
    assert all(token % groups != (token + 1) % groups for token in range(20_000))
