"""The exact top k: candidates from keys, their logits read again, and rows that are handed back.

A row is either exact or reported: both are asserted here, and what the engine makes of reported rows in
test_triton_engine.py.
"""

import math
from dataclasses import replace

import pytest
import reference
import torch

from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.engines.statistics import OF_TOKENS
from tuned_lens_fast.kernels import launch
from tuned_lens_fast.kernels.top_k import LARGEST_K, serves, top_k
from tuned_lens_fast.kernels.vocabulary_pass import vocabulary_pass

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def top_k_of(x, head, k, merged=1):
    """ids and log-probs [1, rows, k] as an engine returns them, and the rows reported."""
    tile = launch.vocabulary_tile(x.device, x.dtype, x.shape[1])
    tile = replace(tile, merged=merged)
    state, group_maxima = vocabulary_pass(x, head, tile, group_maxima=True)
    state = top_k(x, head, group_maxima, state, k, tile)
    return {s.name: s.formula(state)[None] for s in OF_TOKENS if s.needs == "top_k"}, state.unsure


def check(x, head, k, merged=1):
    got, overflow = top_k_of(x, head, k, merged)
    if overflow.all():
        return got["top_ids"][0], overflow
    exact = {name: value[:, ~overflow] for name, value in got.items()}
    reference.check(exact, reference.logits(x[None, ~overflow], head), top_k=k)
    return got["top_ids"][0], overflow


def operands(rows, d_model, vocab, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(vocab, d_model, generator=generator) / d_model**0.5
    x = torch.randn(rows, d_model, generator=generator) * 3
    x[1::3] = w[torch.randint(vocab, (len(x[1::3]),), generator=generator)] * 25
    return x.to(device, dtype), w.to(device, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab", "k"), [(2, 65, 1), (3, 331, 3), (2, 600, 10), (1, 1037, 5), (1, 64, 1)])
@pytest.mark.parametrize("merged", [1, 2, 4])
def test_shapes(rows, vocab, k, merged, dtype, device):
    x, w = operands(rows, 40, vocab, dtype, device)
    assert not check(x, Head(w), k, merged)[1].all()


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"softcap": 30.0}, {"scale": 2.0, "softcap": 10.0}], ids=str)
def test_bias_scale_softcap(options, device):
    x, w = operands(3, 40, 331, torch.bfloat16, device)
    bias = torch.linspace(-1, 1, 331).to(device, torch.bfloat16)
    bias[2::5] = -math.inf
    assert not check(x, Head(w, bias, **options), 3)[1].all()


@pytest.mark.slow
@pytest.mark.parametrize("k", [17, LARGEST_K])
def test_large_k(k, device):
    """The room for candidates grows with k."""
    vocab = 64 * k + 7 * 8 + 5
    x, w = operands(1, 16, vocab, torch.float32, device)
    tile = launch.vocabulary_tile(device, x.dtype, 16)
    assert serves(k, launch.Partition.of(1, Head(w), tile).slots)
    assert not check(x, Head(w), k)[1].any()


def test_what_is_served():
    assert serves(LARGEST_K, 8 * LARGEST_K)
    assert not serves(LARGEST_K + 1, 10**6)
    assert not serves(5, 39)


def test_neighbouring_ids_on_top(device):
    x, w = operands(2, 32, 600, torch.bfloat16, device)
    x[0] = w[300] * 20
    w[296:305] = w[300] + w[296:305] / 20
    ids, overflow = check(x, Head(w), 9)
    assert not overflow[0]
    assert set(ids[0].tolist()) == set(range(296, 305))


def test_ties_go_to_the_lower_id(device):
    """Equal rows of W in different groups, and in the tail of tokens that fill no group."""
    x, w = operands(2, 32, 605, torch.bfloat16, device)
    x[0] = w[17] * 20
    w[[604, 3, 410]] = w[17].clone()
    ids, overflow = check(x, Head(w), 4)
    assert not overflow[0]
    assert ids[0].tolist() == [3, 17, 410, 604]


def test_one_group_holds_them_all(device):
    """More of the top k in a group than its two keys: all its members are looked at."""
    vocab, k = 600, 5
    x, w = operands(2, 32, vocab, torch.bfloat16, device)
    members = launch.vocabulary_tile(device, x.dtype, 32).members
    group = torch.arange(members) * (vocab // members) + 9
    x[0] = w[9] * 20
    w[group] = w[9] + w[group] / 50
    ids, overflow = check(x, Head(w), k)
    assert not overflow[0]
    assert set(ids[0].tolist()) <= set(group.tolist())


def test_logits_of_zero_name_their_tokens(device):
    """Their keys are denormal numbers."""
    x = torch.ones(1, 16, device=device)
    w = -torch.rand(333, 16, device=device) - 0.01
    w[[7, 299, 332]] = 0.0
    ids, overflow = check(x, Head(w), 3)
    assert not overflow[0]
    assert ids[0].tolist() == [7, 299, 332]


def test_negative_and_equal_logits_are_reported_or_right(device):
    """All zero, all equal, and only three values: candidates do not fit."""
    x = torch.zeros(4, 16, device=device)
    x[1, 0], x[2, 0], x[3, 1] = 1.0, -1.0, 1.0
    w = torch.zeros(300, 16, device=device)
    w[:, 0] = 3.0
    w[:, 1] = torch.arange(300, device=device) % 3
    assert check(x, Head(w), 4)[1].all()


@pytest.mark.slow
@pytest.mark.parametrize("finite", [1, 2, 4, 5])
def test_fewer_finite_logits_than_k(finite, device):
    """Never an id that does not exist."""
    x, w = operands(2, 32, 300, torch.bfloat16, device)
    bias = torch.full((300,), -math.inf, dtype=torch.bfloat16, device=device)
    bias[torch.arange(finite) * 61 + 5] = 0.0
    got, overflow = top_k_of(x, Head(w, bias), 4)
    assert (overflow | (finite >= 4)).all()
    assert ((got["top_ids"][0][~overflow] >= 0) & (got["top_ids"][0][~overflow] < 300)).all()


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_harms_itself_only(bad, device):
    x, w = operands(4, 32, 331, torch.bfloat16, device)
    clean, before = top_k_of(x, Head(w), 3)
    x[2, 5] = bad
    harmed, overflow = top_k_of(x, Head(w), 3)
    others = torch.arange(4, device=device) != 2
    assert not overflow[2]
    assert torch.equal(overflow[others], before[others])
    assert (harmed["top_ids"][0, 2] == -1).all()
    assert harmed["top_log_probs"][0, 2].isnan().all()
    for name, value in harmed.items():
        assert torch.equal(value[0, others], clean[name][0, others])


def test_strides(device):
    x, w = operands(2, 40, 300, torch.bfloat16, device)
    wide = torch.full((300, 64), math.nan, dtype=w.dtype, device=device)
    wide[:, :40] = w
    spread = torch.full((2, 3, 48), math.nan, dtype=x.dtype, device=device)
    spread[:, 1, :40] = x
    check(spread[:, 1, :40], Head(wide[:, :40]), 3)
