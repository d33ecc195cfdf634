"""The opt-in search for tiles, on the interpreter: what it tries, what it keeps, and who reads it."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from tuned_lens_fast.engines import triton as engine
from tuned_lens_fast.engines.interface import Head, Query
from tuned_lens_fast.kernels import launch, search
from tuned_lens_fast.kernels.launch import built_in_tile, entry_key, vocabulary_tile
from tuned_lens_fast.kernels.overlapped import shared_bytes

CPU = torch.device("cpu")
TILE = built_in_tile((0, 0), torch.float32, 32)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.delenv("TUNED_LENS_FAST_TILES", raising=False)
    launch.entries.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_candidates_are_such_as_the_kernels_can_use(capability, dtype):
    built_in = built_in_tile(capability, dtype, 4096)
    tiles = list(search.candidates(built_in, dtype.itemsize))
    assert tiles[0] == built_in
    assert len(tiles) == len(set(tiles)) > 10
    for tile in tiles:
        assert tile.members >= 8
        assert tile.members & (tile.members - 1) == 0
        assert tile.tma == built_in.tma
        assert tile.tma or not tile.flat
        assert tile.stages * (tile.block_rows + tile.block_vocab) * tile.block_depth * dtype.itemsize <= 227 * 1024


@pytest.mark.parametrize(("d_model", "stages"), [(64, [8, 7]), (576, [5, 4]), (640, [4, 3]), (768, [2]), (840, [])])
def test_overlapped_tiles_fill_shared_memory(d_model, stages):
    tiles = list(search.overlapped_candidates(d_model))
    assert bool(tiles) == (d_model <= 832)
    assert [tile.stages for tile in tiles if tile.block_depth == 64] == stages
    assert len(set(tiles)) == len(tiles)
    for tile in tiles:
        assert shared_bytes(tile, d_model) <= search.SHARED_BYTES
        more = replace(tile, stages=tile.stages + 2)
        assert more.stages > 8 or shared_bytes(more, d_model) > search.SHARED_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("with_top_k", [False, True])
def test_tiles_that_fail_or_err_are_left_out(with_top_k, monkeypatch, capsys):
    x, head = torch.randn(20, 32), Head(torch.randn(300, 32))
    other, failing, wrong = replace(TILE, block_rows=32), replace(TILE, stages=2), replace(TILE, stages=3)
    apart, misplaced = replace(TILE, stages=4), replace(TILE, stages=5)
    run, gather = search.vocabulary_pass, search.target_logits

    def planted(x, head, tile, **asked):
        if tile.stages == 2:
            raise RuntimeError("out of resources")
        state, group_maxima = run(x, head, tile, **asked)
        if tile.stages == 3:
            state.m[0] += 1
        if tile.stages == 5 and with_top_k:
            group_maxima.copy_(group_maxima.roll(8, 2))
        return state, group_maxima

    def gathered(*args):
        return gather(*args) + (1e-6 if args[3].stages == 4 else 0)

    monkeypatch.setattr(search, "vocabulary_pass", planted)
    monkeypatch.setattr(search, "target_logits", gathered)
    found = search.search(x, head, [TILE, other, failing, wrong, apart, misplaced], with_top_k=with_top_k, rounds=3)
    assert set(found) == {TILE, other} | (set() if with_top_k else {misplaced})
    assert all(seconds > 0 for seconds in found.values())
    said = capsys.readouterr().err
    assert "RuntimeError" in said
    assert "wrong sums" in said
    assert ("wrong top ids" in said) == with_top_k
    assert "a gathered target's logit" in said
    with pytest.raises(RuntimeError, match=r"the built-in Tile.* does not work here"):
        search.search(x, head, [failing, TILE], with_top_k=with_top_k)


def test_an_entry_is_used_for_what_it_was_measured_for_alone(tmp_path, monkeypatch):
    path, mine = tmp_path / "tiles.json", replace(TILE, block_rows=32)
    search.add_entry(path, entry_key(CPU, torch.float32, 32, "ieee", True), mine)
    search.add_entry(path, entry_key(CPU, torch.float16, 48, "ieee", False), replace(TILE, block_depth=16))
    assert len(json.loads(path.read_text())) == 2
    assert vocabulary_tile(CPU, torch.float32, 32) == TILE
    monkeypatch.setenv("TUNED_LENS_FAST_TILES", str(path))
    assert vocabulary_tile(CPU, torch.float32, 32) == mine
    assert vocabulary_tile(CPU, torch.float32, 32, top_k=False) == TILE
    assert vocabulary_tile(CPU, torch.float32, 33) == TILE
    assert vocabulary_tile(CPU, torch.bfloat16, 32) == TILE
    assert vocabulary_tile(CPU, torch.float32, 32, "tf32") == replace(TILE, precision="tf32")
    assert entry_key(CPU, torch.float16, 32, "tf32", True) == entry_key(CPU, torch.float16, 32, "ieee", True)
    monkeypatch.setattr(launch.triton, "__version__", "2.0")
    assert vocabulary_tile(CPU, torch.float32, 32) == TILE


def test_a_decode_uses_it(tmp_path, monkeypatch):
    path, mine = tmp_path / "tiles.json", replace(TILE, block_rows=32)
    search.add_entry(path, entry_key(CPU, torch.float32, 32, "ieee", True), mine)
    monkeypatch.setenv("TUNED_LENS_FAST_TILES", str(path))
    head = Head(torch.randn(300, 32))
    assert engine._tile(head, Query(frozenset(), top_k=3)).block_rows == 32


@pytest.mark.parametrize(
    "text", [None, "no json", "[1]", json.dumps({"a": 1}), json.dumps({"a": asdict(TILE) | {"b": 1}})]
)
def test_a_file_that_holds_none_is_named(text, tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("TUNED_LENS_FAST_TILES", str(path))
    with pytest.raises(ValueError, match=r"TUNED_LENS_FAST_TILES: .*tiles\.json"):
        vocabulary_tile(CPU, torch.float32, 32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    assert search.main(["--d-model", "64", "--vocab", "100", "--out", str(tmp_path / "tiles.json")]) == 1
    assert "no NVIDIA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
