"""The vocabulary pass against float64 of the very same operands."""

import dataclasses
import json
import math
from fractions import Fraction

import pytest
import reference
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.interface import NO_TARGET, Head
from tuned_lens_fast.engines.statistics import LSE, STATISTICS
from tuned_lens_fast.kernels import launch
from tuned_lens_fast.kernels.logits import MASKED
from tuned_lens_fast.kernels.running_state import is_above, steepness
from tuned_lens_fast.kernels.target_logits import target_logits
from tuned_lens_fast.kernels.vocabulary_pass import vocabulary_pass

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def operands(rows, d_model, vocab, dtype, device, size=3.0, seed=0):
    """Rows x of every peakedness, W of unit rows."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(vocab, d_model, generator=generator) / d_model**0.5
    x = torch.randn(rows, d_model, generator=generator) * size
    x[1::3] = w[torch.randint(vocab, (len(x[1::3]),), generator=generator)] * 25
    x[2::3] /= 1000
    return x.to(device, dtype), w.to(device, dtype)


def ids(rows, vocab, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[::4] = NO_TARGET
    return targets.to(device)


def statistics_of(x, head, targets=None, tile=None, top_k=False):
    """Every statistic of rows x, as an engine would return it for one layer."""
    tile = tile or launch.vocabulary_tile(x.device, x.dtype, x.shape[1])
    logits = None if targets is None else target_logits(x, head, targets, tile)
    state, _ = vocabulary_pass(
        x, head, tile, target_logits=logits, running="t" if targets is None else "tr", group_maxima=top_k
    )
    of_one = [s for s in STATISTICS.values() if s.formula and (s.needs is None or targets is not None)]
    return {statistic.name: statistic.formula(state)[None] for statistic in (LSE, *of_one)}


def check(x, head, targets=None, **options):
    got = statistics_of(x, head, targets, **options)
    reference.check(got, reference.logits(x[None], head), targets=targets)
    return got


def check_a_decode_with_an_entry(problem, tile, path, monkeypatch):
    """A whole decode whose pass takes the ``tile`` of a file of measured ones, which is put at ``path``."""
    weight = problem.head.weight
    key = launch.entry_key(weight.device, weight.dtype, weight.shape[1], "ieee", problem.query.top_k > 0)
    path.write_text(json.dumps({key: dataclasses.asdict(tile)}))
    monkeypatch.setenv("TUNED_LENS_FAST_TILES", str(path))
    problem.check(problem.decode(ENGINES["triton"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "d_model", "vocab"),
    [(1, 64, 2), (5, 33, 31), (17, 16, 33), (3, 100, 64), (4, 64, 255), (5, 80, 600), (3, 64, 1037)],
)
def test_ragged_shapes(rows, d_model, vocab, dtype, device):
    x, w = operands(rows, d_model, vocab, dtype, device)
    check(x, Head(w), ids(rows, vocab, device))


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 20),
    d_model=st.sampled_from([16, 40, 70]),  # a kernel each where there is a GPU
    vocab=st.integers(2, 400),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_any_shape(rows, d_model, vocab, dtype, seed, device):
    x, w = operands(rows, d_model, vocab, dtype, device, seed=seed)
    check(x, Head(w), ids(rows, vocab, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"scale": 0.25},
        {"softcap": 30.0},
        {"softcap": 0.5},
        {"bias": True, "scale": 4.0, "softcap": 30.0},
    ],
    ids=str,
)
def test_bias_scale_softcap(options, dtype, device):
    x, w = operands(4, 48, 333, dtype, device)
    options = dict(options)
    if options.pop("bias", False):
        bias = torch.linspace(-2, 2, 333).to(device, dtype)
        bias[5::11] = -math.inf
        options["bias"] = bias
    targets = torch.tensor([5, NO_TARGET, 332, 17], device=device)
    got = check(x, Head(w, **options), targets)
    if "bias" in options and "softcap" not in options:
        assert got["log_prob"][0, 0] == -math.inf


def test_strides(device):
    x, w = operands(5, 40, 300, torch.bfloat16, device)
    wide_x = torch.full((5, 3, 117), math.nan, dtype=x.dtype, device=device)
    wide_w = torch.full((300, 77), math.nan, dtype=w.dtype, device=device)
    wide_x[:, 1, 5:45] = x
    wide_w[:, 3:43] = w
    tile = launch.vocabulary_tile(device, x.dtype, 40).without_tma()
    targets = ids(5, 300, device)
    check(wide_x[:, 1, 5:45], Head(wide_w[:, 3:43]), targets, tile=tile)


def test_logits_near_a_thousand(device):
    """Gemma's: m + log s keeps six digits, so entropy and log-probs must not go through it."""
    x, w = operands(6, 64, 300, torch.float32, device)
    w[:, 0] = 1.0
    x[:, 0] = 1000.0
    got = statistics_of(x, Head(w), ids(6, 300, device))
    # The logits themselves are only good to 6e-5 in fp32; a common error of theirs does not matter.
    want = reference.statistics(reference.logits(x[None], Head(w)), targets=ids(6, 300, device))
    for name in ("lse", "log_prob", "entropy"):
        torch.testing.assert_close(got[name].double(), want[name], atol=1e-3, rtol=1e-6, equal_nan=True)


def test_a_certain_token(device):
    """log_prob near -1e-7 keeps the digits that an lse in one part would lose, and entropy stays positive."""
    w = torch.zeros(300, 16, device=device)
    w[7, 0] = 1.0
    x = torch.zeros(3, 16, device=device)
    x[:, 0] = torch.tensor([20.0, 21.8, 200.0])
    targets = torch.full((3,), 7, device=device)
    got = check(x, Head(w), targets)
    want = reference.statistics(reference.logits(x[None], Head(w)), targets=targets)
    # Two roundings of 1 + a little, however large the logits are.
    assert ((got["log_prob"] - want["log_prob"]).abs() < 2.4e-7).all()
    assert (got["entropy"] >= 0).all()
    assert (got["rank"] == 1).all()


def exact(rows, d_model, vocab, dtype, device, seed=0):
    """Small integers: every order of summing them gives the same logits, so that ranks are exact."""
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randint(-3, 4, (n, d_model), generator=generator).to(device, dtype) for n in (rows, vocab))
    return x, w


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [31, 128, 331])
def test_ranks_are_exact(vocab, dtype, device):
    """With many ties: only larger logits count. The largest ranks first, a row of zeros has no other rank."""
    x, w = exact(9, 16, vocab, dtype, device)
    x[4] = 0
    w[9] = w[vocab - 2]
    z = reference.logits(x[None], Head(w))
    for targets in (ids(9, vocab, device), z[0].argmax(-1), z[0].argmin(-1)):
        want = reference.statistics(z, targets=targets)["rank"]
        assert torch.equal(statistics_of(x, Head(w), targets)["rank"], want)
    assert want[0, 4] == 1


@pytest.mark.parametrize("hidden", [range(64), range(64, 128), range(330), range(3, 331)], ids=str)
def test_masked_tokens(hidden, device):
    """A bias of -inf over whole tiles, the first tile, and all tokens but one."""
    x, w = operands(4, 32, 331, torch.bfloat16, device)
    bias = torch.zeros(331, device=device, dtype=torch.bfloat16)
    bias[list(hidden)] = -math.inf
    check(x, Head(w, bias), torch.tensor([330, 0, 2, NO_TARGET], device=device))


def test_nothing_but_minus_infinity(device):
    x, w = operands(3, 32, 100, torch.bfloat16, device)
    bias = torch.full((100,), -math.inf, dtype=torch.bfloat16, device=device)
    got = statistics_of(x, Head(w, bias), torch.tensor([1, 2, 99], device=device))
    for name, value in got.items():
        assert (value == 0).all() if name == "rank" else value.isnan().all(), name


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, "overflow"])
def test_a_bad_row_harms_itself_only(bad, top_k, device):
    x, w = operands(20, 32, 140, torch.float32, device)
    targets = torch.randint(140, (20,), device=device)
    w[:, 0] = 0.0
    w[100, 0] = 1e20
    x[:, 0] = 0.0
    clean = statistics_of(x, Head(w), targets, top_k=top_k)
    assert all(value.isfinite().all() for value in clean.values())
    x[5, 0] = 1e20 if bad == "overflow" else bad
    harmed = statistics_of(x, Head(w), targets, top_k=top_k)
    others = torch.arange(20, device=device) != 5
    for name, value in harmed.items():
        assert torch.equal(value[:, others], clean[name][:, others]), name
        assert value[0, 5] == 0 if name == "rank" else value[0, 5].isnan(), (name, value[0, 5])


@pytest.mark.parametrize(("size", "splits", "last_splits"), [(9, 0, 1), (9, 0, 10), (1, 2, 4), (2, 3, 1), (1, 10, 3)])
def test_parts_merge(size, splits, last_splits, monkeypatch, device):
    """However rows and vocabulary are cut, in the same way every time; the parts differ widely in size."""
    rows = 3 * launch.vocabulary_tile(device, torch.bfloat16, 32).block_rows + 5
    x, w = operands(rows, 32, 700, torch.bfloat16, device)
    w[:128] *= 20
    targets = ids(rows, 700, device)
    bands = launch.Bands(min(size, 4), splits, last_splits)
    monkeypatch.setattr(launch.Bands, "of", lambda *_: bands)
    got = check(x, Head(w), targets)
    again = statistics_of(x, Head(w), targets)
    for name, value in got.items():
        assert torch.equal(value.nan_to_num(7.0), again[name].nan_to_num(7.0)), name


@triton.jit
def _above(z, target, above, steep, BM: tl.constexpr, MEMBERS: tl.constexpr):
    row = tl.arange(0, BM)
    at = row[:, None] * (8 * MEMBERS) + tl.arange(0, 8 * MEMBERS)[None, :]
    own = tl.load(target + row)
    found = is_above(tl.load(z + at).reshape(BM, MEMBERS, 8), own, BM, MEMBERS)
    tl.store(above + at, found.reshape(BM, 8 * MEMBERS))
    tl.store(steep + row, steepness(own))


def test_logits_above_the_target(device):
    """By comparing, or by the instruction that a GPU has for it, which is computed here in fractions."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(16, generator=generator) * 10
    target[:6] = torch.tensor([0.0, 1e5, -3e8, 2.0**27, MASKED.value, 1e-20])
    z = target[:, None] + torch.randn(16, 64, generator=generator) * target[:, None].abs() * 1e-6
    z[:, 0], z[:, 1], z[:, 2] = target, torch.nextafter(target, torch.tensor(torch.inf)), -target
    z[:, 3], z[:, 4], z[:, 5] = torch.nextafter(target, torch.tensor(-torch.inf)), MASKED.value, 0.0
    z[0, [1, 3]] = torch.tensor([2.0**-100, -(2.0**-100)])
    above, steep = torch.empty_like(z, device=device), torch.empty_like(target, device=device)
    _above[(1,)](z.to(device), target.to(device), above, steep, BM=16, MEMBERS=8)
    assert torch.equal(above.cpu(), (z > target[:, None]).float())
    below = (target * -steep.cpu()).tolist()
    for row, own, c, power in zip(z.tolist(), target.tolist(), below, steep.tolist(), strict=True):
        for value in row:
            clamped = min(max(Fraction(value) * Fraction(power) + Fraction(c), 0), 1)
            assert clamped == (value > own)


def test_what_is_not_asked_for_is_not_there(device):
    x, w = operands(2, 32, 70, torch.bfloat16, device)
    state, group_maxima = vocabulary_pass(x, Head(w), launch.vocabulary_tile(device, x.dtype, 32))
    assert group_maxima is None
    assert all(part is None for part in (state.t, state.r, state.target, state.top, state.u))
    assert torch.allclose(state.m + state.log_s, (x.float() @ w.float().T).logsumexp(-1), atol=1e-4)


def test_the_two_best_of_every_group(device):
    """The largest as it is; in the lowest bits of the second, where the largest stands."""
    vocab = 331
    x, w = operands(3, 16, vocab, torch.float32, device)
    tile = launch.vocabulary_tile(device, x.dtype, 16)
    _, found = vocabulary_pass(x, Head(w), tile, group_maxima=True)
    partition = launch.Partition.of(3, Head(w), tile)
    assert found.shape == (3, 2, partition.slots)
    groups = partition.groups
    z = reference.logits(x, Head(w))[:, : groups * tile.members].view(3, tile.members, groups)
    best = z.topk(2, dim=1)
    torch.testing.assert_close(found[:, 0, :groups].double(), best.values[:, 0], atol=1e-5, rtol=1e-6)
    # Seven lowest bits at most are not those of the second: 2^-16 of its value.
    torch.testing.assert_close(found[:, 1, :groups].double(), best.values[:, 1], atol=1e-5, rtol=2**-16)
    clear = best.values[:, 0] - best.values[:, 1] > 2**-15 * best.values[:, 0].abs()
    place = found[:, 1, :groups].contiguous().view(torch.int32) & (tile.members - 1)
    assert torch.equal(place[clear].long(), best.indices[:, 0][clear])
