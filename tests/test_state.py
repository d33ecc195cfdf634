"""The running state and its merge, against whole rows in float64."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuned_lens_fast.engines.state import GROUP, NO_KEY, State, key_ids, key_logits, tile_top_keys, top_keys

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
    states = []
    for a, b in pairwise(cuts):
        tile = z[:, a:b].clone()
        state = State.of_tile(
            tile, a, running=frozenset({"t", "r", "target"}), targets=targets, threshold=threshold, top_k=k
        )
        states.append(replace(state, u=tile @ weight[a:b]))  # the tile holds exp(z - m) now
    return states


def assert_is(state, want, u):
    assert torch.equal(state.m.double(), want["m"])
    torch.testing.assert_close(state.s.double(), want["s"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state.t.double(), want["t"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.u.double(), u, atol=1e-5, rtol=1e-5)
    assert torch.equal(state.r, want["r"])
    assert torch.equal(state.target.double(), want["target"])
    assert torch.equal(key_ids(state.top), want["ids"])


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
    ids = torch.arange(len(z)) + (1 << 31) - len(z)  # the largest there are
    keys = top_keys(z, ids)
    order = keys.argsort(descending=True)
    assert torch.equal(order, z.sort(descending=True, stable=True).indices)
    assert torch.equal(key_logits(keys), z)
    assert torch.equal(key_ids(keys), ids)


@pytest.mark.parametrize("width", [GROUP * 4, GROUP * 8 + 5, 7])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_candidates_hold_the_top_k_among_ties(width, k):
    torch.manual_seed(0)
    z = torch.randint(0, 3, (50, width)).float()
    got = key_ids(tile_top_keys(z, 100, k).topk(k).values)
    assert torch.equal(got, 100 + z.sort(dim=1, descending=True, stable=True).indices[:, :k])


def test_fewer_tokens_than_k_leave_empty_keys():
    state = State.of_tile(torch.tensor([[2.0, 1.0]]), 5, top_k=4)
    assert key_ids(state.top).tolist() == [[5, 6, -1, -1]]
    assert key_logits(state.top)[0, 2:].isnan().all()
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
    state = State.of_tile(z.clone(), 0, targets=torch.tensor([1]), running=frozenset({"r"}))
    assert state.r.item() == 1
    # A threshold that rounding put just below the target's own logit.
    below = torch.nextafter(torch.tensor([1.0]), torch.tensor([0.0]))
    state = State.of_tile(z[:, 1:3].clone(), 1, targets=torch.tensor([1]), running=frozenset({"r"}), threshold=below)
    assert state.r.item() == 1


def test_closing_marks_what_cannot_be_said():
    """Rows: ordinary, without a target, with a NaN, with nothing but -inf."""
    torch.manual_seed(0)
    z = torch.randn(4, 8)
    z[2, 3] = math.nan
    z[3] = -math.inf
    targets = torch.tensor([5, -100, 1, 2])
    wanted = frozenset({"t", "r", "target"})
    state = State.of_tile(z.clone(), 0, running=wanted, targets=targets, top_k=2).closed(targets)
    assert state.s.isnan().tolist() == state.log_s.isnan().tolist() == [False, False, True, True]
    torch.testing.assert_close((state.m + state.log_s)[:2], z[:2].logsumexp(1))
    assert state.target[0] == z[0, 5]
    assert state.target[1].isnan()
    assert state.r.tolist() == [int((z[0] > z[0, 5]).sum()), -1, -1, -1]
    assert (key_ids(state.top)[2:] == -1).all()
    assert (key_ids(state.top)[:2, 0] == z[:2].argmax(1)).all()
