"""The running state and its merge, against whole rows in float64."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuned_lens_fast.engines.state import GROUP, NO_KEY, State, split_keys, tile_top_keys, top_keys

D = 3
LOGITS = st.one_of(
    st.floats(-60, 60, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1000.0, -1000.0, -math.inf]),  # ties, cancellation, masked tokens
)


def whole(z, targets, k, first=0):
    """The state of one row's logits by definition, in float64."""
    z = z.double()
    m = z.amax(1)
    d = z - m.masked_fill(m.isinf(), 0.0)[:, None]
    e = d.exp()
    zt = z.gather(1, targets[:, None])
    order = z.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return {
        "m": m,
        "s": e.sum(1),
        "t": torch.where(e > 0, e * d, 0.0).sum(1),
        "r": (z > zt).sum(1),
        "target": zt[:, 0],
        "ids": first + order,
    }


def states_of(z, cuts, targets, weight, k):
    threshold = z.gather(1, targets[:, None]).squeeze(1)
    return [
        State.of_tile(
            z[:, a:b].clone(),
            a,
            entropy=True,
            targets=targets,
            rank=True,
            threshold=threshold,
            top_k=k,
            weight=weight[a:b],
        )
        for a, b in pairwise(cuts)
    ]


def assert_is(state, want, u):
    assert torch.equal(state.m.double(), want["m"])
    torch.testing.assert_close(state.s.double(), want["s"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state.t.double(), want["t"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.u.double(), u, atol=1e-5, rtol=1e-5)
    assert torch.equal(state.r, want["r"])
    assert torch.equal(state.target.double(), want["target"])
    assert torch.equal(split_keys(state.top)[1], want["ids"])


@st.composite
def rows_in_tiles(draw):
    vocab = draw(st.integers(3, 90))
    z = torch.tensor([draw(st.lists(LOGITS, min_size=vocab, max_size=vocab)) for _ in range(2)])
    cuts = sorted({0, vocab, draw(st.integers(1, vocab - 1)), draw(st.integers(1, vocab - 1))})
    targets = torch.tensor([draw(st.integers(0, vocab - 1)) for _ in range(2)])
    return z, cuts, targets, draw(st.integers(1, vocab))


@given(rows_in_tiles())
@settings(max_examples=150, deadline=None)
def test_tiles_merge_to_the_row_in_any_order(case):
    z, cuts, targets, k = case
    weight = torch.randn(z.shape[1], D, generator=torch.Generator().manual_seed(0))
    want = whole(z, targets, k)
    e = (z.double() - want["m"].masked_fill(want["m"].isinf(), 0.0)[:, None]).exp()
    u = e @ weight.double()
    parts = states_of(z, cuts, targets, weight, k)
    left = parts[0]
    for part in parts[1:]:
        left = State.merge(left, part)
    right = parts[-1]
    for part in reversed(parts[:-1]):
        right = State.merge(part, right)
    swapped = parts[-1]
    for part in parts[:-1]:
        swapped = State.merge(swapped, part)
    for state in (left, right, swapped):
        assert_is(state, want, u)


@given(st.lists(LOGITS, min_size=1, max_size=40))
def test_keys_are_the_order_and_come_back(values):
    z = torch.tensor(values)
    ids = torch.arange(len(z)) + (1 << 31)  # beyond int32
    keys = top_keys(z, ids)
    order = keys.argsort(descending=True)
    assert torch.equal(order, z.sort(descending=True, stable=True).indices)
    back, back_ids = split_keys(keys)
    assert torch.equal(back, z)
    assert torch.equal(back_ids, ids)


@pytest.mark.parametrize("width", [GROUP * 4, GROUP * 8 + 5, 7])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_candidates_hold_the_top_k_among_ties(width, k):
    torch.manual_seed(0)
    z = torch.randint(0, 3, (50, width)).float()
    got = split_keys(tile_top_keys(z, 100, k).topk(k).values)[1]
    assert torch.equal(got, 100 + z.sort(dim=1, descending=True, stable=True).indices[:, :k])


def test_fewer_tokens_than_k_leave_empty_keys():
    state = State.of_tile(torch.tensor([[2.0, 1.0]]), 5, top_k=4)
    assert split_keys(state.top[:, :2])[1].tolist() == [[5, 6]]
    assert state.top[0, 2:].tolist() == [NO_KEY, NO_KEY]


def test_masked_tiles_before_between_and_after():
    z = torch.full((1, 12), -math.inf)
    z[0, 4:8] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    targets = torch.tensor([6])
    weight = torch.randn(12, D)
    parts = states_of(z, [0, 4, 8, 12], targets, weight, 3)
    state = State.merge(State.merge(parts[0], parts[1]), parts[2])
    e = (z.double() - 4).exp()
    assert_is(state, whole(z, targets, 3), e @ weight.double())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 5])
def test_a_bad_logit_shows_in_s_and_harms_no_other_row(bad, where):
    torch.manual_seed(0)
    z = torch.randn(3, 8)
    targets = torch.tensor([0, 1, 2])
    weight = torch.randn(8, D)
    clean = State.merge(*states_of(z, [0, 4, 8], targets, weight, 2))
    z[1, where] = bad
    state = State.merge(*states_of(z, [0, 4, 8], targets, weight, 2))
    assert state.s[1].isnan()
    for name in ("m", "s", "t", "r", "target", "top", "u"):
        assert torch.equal(getattr(state, name)[[0, 2]], getattr(clean, name)[[0, 2]]), name


def test_a_target_outside_the_tile_is_not_found():
    state = State.of_tile(torch.zeros(3, 4), 10, targets=torch.tensor([9, 14, -100]))
    assert (state.target == -math.inf).all()


def test_equals_are_not_larger_and_the_target_not_behind_itself():
    z = torch.tensor([[1.0, 1.0, 2.0, 1.0]])
    state = State.of_tile(z.clone(), 0, targets=torch.tensor([1]), rank=True)
    assert state.r.item() == 1
    # A threshold that rounding put just below the target's own logit.
    below = torch.nextafter(torch.tensor([1.0]), torch.tensor([0.0]))
    state = State.of_tile(z[:, 1:3].clone(), 1, targets=torch.tensor([1]), rank=True, threshold=below)
    assert state.r.item() == 1
