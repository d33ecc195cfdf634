"""The cooperative vocabulary pass in software (partitions.py), and its events in several orders."""

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
from tuned_lens_fast.kernels import cooperative, search
from tuned_lens_fast.kernels.launch import Bands, Tile
from tuned_lens_fast.kernels.vocabulary_pass import vocabulary_pass

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs it on the GPU itself"),
]

SMALL = Tile(32, 64, 32, warps=8, stages=3, tma=True, cooperative=True, lag=2)


@pytest.fixture
def software(monkeypatch, device):
    """The kernel's stand-in, whose schedule is drawn from ``seed``; a program has several items."""
    launcher = partitions.Launcher(cooperative._cooperative)
    monkeypatch.setattr(tl.block_type, "layout", None, raising=False)  # the kernel hands it on
    monkeypatch.setattr(cooperative, "_cooperative", launcher)
    monkeypatch.setattr(cooperative, "processors", lambda _: 3)
    return launcher


def cut_in(monkeypatch, *bands):
    monkeypatch.setattr(Bands, "of", lambda *_: Bands(*bands))


@pytest.mark.parametrize(
    ("rows", "d_model", "vocab", "bands", "options"),
    [
        (5, 96, 64, (1, 0, 1), {}),  # one tile, and rows of the first group alone
        (40, 72, 330, (1, 2, 3), {"merged": 2, "lag": 1}),  # features and tokens that fill neither step nor tile
        (33, 64, 320, (2, 0, 1), {"merged": 4, "lag": 0, "stages": 2}),
    ],
)
def test_against_float64(rows, d_model, vocab, bands, options, monkeypatch, software):
    cut_in(monkeypatch, *bands)
    x, w = operands(rows, d_model, vocab, torch.bfloat16, "cpu")
    targets = ids(rows, vocab, "cpu")
    got = statistics_of(x, Head(w), targets, tile=dataclasses.replace(SMALL, **options), top_k=True)
    reference.check(got, reference.logits(x[None], Head(w)), targets=targets)
    assert software.launches == 1


def test_every_option_of_a_head(monkeypatch, software):
    cut_in(monkeypatch, 1, 0, 2)
    x, w = operands(6, 96, 140, torch.float16, "cpu", size=1.5)
    offsets = torch.randn(140).to(w.dtype)
    offsets[5::9] = float("-inf")
    head = Head(w, offsets, 2.0, 20.0)
    targets = ids(6, 140, "cpu")
    got = statistics_of(x, head, targets, tile=SMALL, top_k=True)
    reference.check(got, reference.logits(x[None], head), targets=targets)


def test_a_whole_decode_takes_the_tile_of_an_entry(tmp_path, monkeypatch, software):
    problem = cases.problem(torch.bfloat16, 96, 330, "cpu", top_k=5, layers=2, positions=5)
    check_a_decode_with_an_entry(problem, SMALL, tmp_path / "tiles.json", monkeypatch)
    assert software.launches


@pytest.mark.parametrize("d_model", [1024, 2048, 4096])
def test_candidates_fill_shared_memory(d_model):
    tiles = list(search.cooperative_candidates(d_model))
    found = [(tile.block_depth, tile.stages, tile.lag) for tile in tiles]
    assert found == [(64, 4, 3), (64, 4, 0), (32, 9, 8), (32, 9, 0)]
    for tile in tiles:
        assert cooperative.shared_bytes(tile) <= search.SHARED_BYTES
        assert cooperative.shared_bytes(dataclasses.replace(tile, stages=tile.stages + 1)) > search.SHARED_BYTES


@pytest.mark.parametrize(("lag", "stages", "steps"), [(3, 3, 5), (1, 4, 3), (4, 5, 3), (-1, 3, 5)])
def test_lags_that_would_never_end_are_refused(lag, stages, steps, software):
    x, w = operands(2, 32 * steps, 64, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=r"tile: got .* a lag that"):
        vocabulary_pass(x, Head(w), dataclasses.replace(SMALL, lag=lag, stages=stages))


def agree(monkeypatch, software, tile=SMALL, steps=3, seeds=3):
    """Whether the kernel answers as the other does in tiles of the same shape, whatever the order of events.

    The first of two programs has two items, and items have one tile or two.
    """
    cut_in(monkeypatch, 1, 1, 2)
    monkeypatch.setattr(cooperative, "processors", lambda _: 2)
    x, w = operands(20 + tile.block_rows, 32 * steps, 64 * 2, torch.bfloat16, "cpu")
    there, wanted = vocabulary_pass(x, Head(w), tile.without_tma(), running="t", group_maxima=True)
    for software.seed in range(seeds):
        here, maxima = vocabulary_pass(x, Head(w), tile, running="t", group_maxima=True)
        assert torch.equal(maxima, wanted), "other candidates"
        assert all(torch.equal(getattr(here, name), getattr(there, name)) for name in ("s", "t", "log_s")), "other sums"


FOUND = "changed under a product|more arrivals|wait for one another|other candidates|other sums|held back"


def test_any_order_of_events_gives_the_same(monkeypatch, software):
    agree(monkeypatch, software)


@pytest.mark.parametrize(("lag", "stages", "steps"), [(3, 3, 4), (1, 8, 2)])
def test_what_is_refused_would_fail(lag, stages, steps, monkeypatch, software):
    monkeypatch.setattr(cooperative, "serves", lambda *_: True)
    with pytest.raises((AssertionError, InterpreterError), match=FOUND):
        agree(monkeypatch, software, dataclasses.replace(SMALL, lag=lag, stages=stages), steps, seeds=20)


#: What tells how many tiles each group has issued, the second but for its last steps.
WATCHED = {
    "turn ^= 1": "turn ^= 1; issued[WHO] += 1",
    "mbarrier.wait(filled.index(stage), phase)": "mbarrier.wait(filled.index(stage), phase); "
    "assert WHO == 0 or k < STEPS - LAG or issued[0] > issued[1], 'not held back'",
}


@pytest.mark.parametrize("mistake", [None, ("turn = 0", "turn = 1"), ("k == STEPS - LAG", "k == STEPS - 1")])
def test_the_second_group_is_held_back(mistake, monkeypatch, software):
    changes = WATCHED if mistake is None else WATCHED | dict([mistake])
    monkeypatch.setattr(cooperative, "processors", lambda _: 1)
    cut_in(monkeypatch, 1, 0, 1)
    x, w = operands(4, 32 * 3, 64 * 4, torch.bfloat16, "cpu")

    def run():
        for software.seed in range(4):
            partitions.plant(monkeypatch, cooperative, "_half_of_the_rows", changes, issued=[0, 0])
            vocabulary_pass(x, Head(w), SMALL)
            monkeypatch.setattr(cooperative, "_half_of_the_rows", whole)

    whole = cooperative._half_of_the_rows
    if mistake is None:
        run()
    else:
        with pytest.raises((AssertionError, InterpreterError), match="held back"):
            run()


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("_half_of_the_rows", "mbarrier.wait(filled.index(stage), phase)", "pass"),
        ("_half_of_the_rows", "mbarrier.arrive(free.index(before), count=1)\n", "pass\n"),
        ("_half_of_the_rows", "arrive(free.index(before), count=1, pred=k > 0)", "arrive(free.index(stage), count=1)"),
        ("_half_of_the_rows", "mbarrier.arrive(lead.index(0), count=1)", "pass"),
        ("_half_of_the_rows", "slice(WHO * OWN, OWN, 0)", "slice(0, OWN, 0)"),
        ("_half_of_the_rows", "row = block * BM + WHO * OWN", "row = block * BM"),
        ("_half_of_the_rows", "phase ^= 1", "pass"),
        ("_copy", "mbarrier.wait(free.index(stage), phase)", "pass"),
        ("_copy", "tile * 8", "start * 8"),
        ("_copy", "phase = 1", "phase = 0"),
    ],
)
def test_mistakes_are_found(function, old, new, monkeypatch, software):
    partitions.plant(monkeypatch, cooperative, function, {old: new})
    with pytest.raises((AssertionError, InterpreterError), match=FOUND):
        agree(monkeypatch, software, seeds=20)
