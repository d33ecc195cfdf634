"""The overlapped vocabulary pass in software (partitions.py), and its events in several orders."""

import dataclasses

import cases
import partitions
import pytest
import reference
import torch
import triton.language as tl
from test_vocabulary_pass import check_a_decode_with_an_entry, ids, operands, statistics_of
from triton.runtime.errors import InterpreterError

from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.kernels import launch, overlapped
from tuned_lens_fast.kernels.launch import Tile
from tuned_lens_fast.kernels.vocabulary_pass import vocabulary_pass

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs it on the GPU itself"),
]

SMALL = Tile(block_rows=16, block_vocab=64, block_depth=32, warps=8, stages=3, tma=True, overlapped=True)


@pytest.fixture
def software(monkeypatch, device):
    """The kernel's stand-in; its schedule is drawn from ``seed``, and ``splits`` programs share the vocabulary."""
    launcher = partitions.Launcher(overlapped._overlapped)
    monkeypatch.setattr(launch.Bands, "of", lambda row_blocks, *_: launch.Bands(row_blocks, 0, launcher.splits))
    monkeypatch.setattr(tl.block_type, "layout", None, raising=False)  # the kernel hands it on
    monkeypatch.setattr(overlapped, "_overlapped", launcher)
    return launcher


def both(x, w, tile):
    """By the overlapped kernel, and by the other in tiles of the same shape."""
    return [vocabulary_pass(x, Head(w), some, group_maxima=True) for some in (tile, tile.without_tma())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "d_model", "vocab", "merged", "stages"),
    [
        (5, 32, 64, 1, 3),  # one tile: the second group has none
        (17, 64, 640, 1, 2),
        (16, 72, 1100, 2, 3),  # features and tokens that fill neither step nor tile
        (18, 64, 1600, 4, 4),  # the last slots are not whole
        (3, 40, 2048, 4, 5),
    ],
)
def test_against_float64(rows, d_model, vocab, merged, stages, dtype, software):
    tile = dataclasses.replace(SMALL, merged=merged, stages=stages)
    x, w = operands(rows, d_model, vocab, dtype, "cpu")
    targets = ids(rows, vocab, "cpu")
    got = statistics_of(x, Head(w), targets, tile=tile, top_k=True)
    reference.check(got, reference.logits(x[None], Head(w)), targets=targets)
    assert software.launches == 1


@pytest.mark.parametrize(("bias", "scale", "softcap"), [(True, 1.0, None), (False, 0.5, 30.0), (True, 2.0, 20.0)])
def test_every_head(bias, scale, softcap, software):
    x, w = operands(6, 64, 700, torch.bfloat16, "cpu", size=3 / scale)
    offsets = torch.randn(700).to(w.dtype)
    offsets[5::9] = float("-inf")
    head = Head(w, offsets if bias else None, scale, softcap)
    targets = ids(6, 700, "cpu")
    got = statistics_of(x, head, targets, tile=dataclasses.replace(SMALL, merged=2), top_k=True)
    reference.check(got, reference.logits(x[None], head), targets=targets)


@pytest.mark.parametrize(
    ("tiles", "merged"), [(2, 1), (3, 1), (1, 2), (3, 2), (6, 2), (7, 2), (3, 4), (6, 4), (8, 4), (13, 4)]
)
def test_candidates_are_those_of_the_other_kernel(tiles, merged, software):
    """Every tile is some group's, once, and lands in its own slot."""
    x, w = operands(4, 48, 64 * tiles, torch.bfloat16, "cpu")
    (here, maxima), (there, wanted) = both(x, w, dataclasses.replace(SMALL, merged=merged))
    assert torch.equal(maxima, wanted)
    torch.testing.assert_close(here.m + here.log_s, there.m + there.log_s)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_events_gives_the_same(seed, software):
    software.splits = 2
    x, w = operands(8, 96, 576, torch.bfloat16, "cpu")
    first, maxima = vocabulary_pass(x, Head(w), SMALL, running="t", group_maxima=True)
    software.seed = seed + 1
    again, maxima_again = vocabulary_pass(x, Head(w), SMALL, running="t", group_maxima=True)
    assert torch.equal(maxima, maxima_again)
    for name in ("m", "s", "t", "log_s"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name


def test_a_whole_decode_takes_the_tile_of_an_entry(tmp_path, monkeypatch, software):
    problem = cases.problem(torch.bfloat16, 64, 900, "cpu", top_k=5, layers=3, positions=7)
    check_a_decode_with_an_entry(problem, SMALL, tmp_path / "tiles.json", monkeypatch)
    assert software.launches


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mbarrier.wait(filled.index(stage), phase)", "pass"),
        ("mbarrier.wait(x_here, 0)", "pass"),
        ("mbarrier.arrive(free.index(before), count=1)\n", "pass\n"),
        ("mbarrier.arrive(free.index(before), count=1, pred=k > 0)", "mbarrier.arrive(free.index(stage), count=1)"),
        ("mbarrier.wait(turn.index(WHO), (n & 1) ^ (1 - WHO))", "pass"),
        ("if pair < pairs or part <= in_turn:", "if True:"),
        ("gl.minimum(part + WHO, in_turn)", "part"),
        ("+ 2 * pair + WHO", "+ 2 * pair"),
    ],
)
def test_mistakes_are_found(old, new, monkeypatch, software):
    partitions.plant(monkeypatch, overlapped, "_take_turns", {old: new})
    tile = dataclasses.replace(SMALL, merged=4)
    x, w = operands(4, 64, 64 * 14, torch.bfloat16, "cpu")

    def agree():
        for software.seed in range(10):
            (_, here), (_, there) = both(x, w, tile)
            assert torch.equal(here, there), "other candidates"

    found = "changed under a product|more arrivals|wait for one another|other candidates"
    with pytest.raises((AssertionError, InterpreterError), match=found):
        agree()
