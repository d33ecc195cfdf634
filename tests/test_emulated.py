"""csrc/ for GPUs, run on any CPU: the passes against the engines' definition.

What it has for CPUs that need not be here is in tests/test_matmuls.py.
"""

import sys
from pathlib import Path

import emulated
import pytest
import reference
import torch

from tuned_lens_fast.engines import ENGINES, eager, native
from tuned_lens_fast.engines.native import MOST_IN_PASS
from tuned_lens_fast.engines.state import EXP_FLOOR, NO_KEY, State, key_ids, key_logits

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from cases import DIVERGENCES, ONE_PASS, problem

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="there is no GCC here")
INF, NAN = float("inf"), float("nan")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


RUNNING = frozenset({"t", "r", "target"})


def running(rows, k):
    """The operands of a pass that are the state so far: of nothing yet."""
    return {
        "sums": torch.tensor([[-INF, 0.0, 0.0]]).repeat(rows, 1),
        "r": torch.zeros(rows, dtype=torch.int64),
        "target": torch.full((rows,), -INF),
        "top": torch.full((rows, k), NO_KEY) if k else None,
    }


@pytest.mark.slow
class TestCuda:
    """A thread of the system for each thread of a block: slow, so a few rows."""

    @pytest.mark.parametrize(
        ("widths", "k"),
        [((300, 4096, 5), 3), ((1,), 1), ((4097, 100), 64), ((9000,), 10), ((64, 64), 0)],
        ids=str,
    )
    def test_the_pass_is_a_merge_of_states(self, widths, k):
        rows = 6
        z = normal(rows, sum(widths)) * torch.tensor([[1e-3], [1.0], [30.0], [3.0], [1.0], [1.0]])
        z[3] = z[3].round()  # ties
        z[4, ::2] = -INF
        z[5, : widths[0]] = -INF
        ids = torch.arange(rows) * 1_000_003 % z.shape[1]
        threshold = z.gather(1, ids.unsqueeze(1)).squeeze(1)
        state, first, wanted = running(rows, k), 0, None
        for width in widths:
            tile = z[:, first : first + width]
            emulated.tile_pass(tile.clone(), first, ids, threshold, *state.values(), None)
            part = State.of_tile(tile.clone(), first, running=RUNNING, targets=ids, threshold=threshold, top_k=k)
            wanted = part if wanted is None else State.merge(wanted, part)
            first += width
        m, s, t = state["sums"].unbind(1)
        assert torch.equal(m, wanted.m)
        for name in ("r", "target"):
            assert torch.equal(state[name], getattr(wanted, name)), name
        if k:
            for part in (key_ids, key_logits):
                assert torch.equal(part(state["top"]), part(wanted.top))
        torch.testing.assert_close(s, wanted.s, atol=0, rtol=2e-6)
        torch.testing.assert_close(t, wanted.t, atol=1e-6, rtol=3e-6)

    def test_what_may_be_left_out(self):
        z, state = normal(3, 200), running(3, 0)
        emulated.tile_pass(z.clone(), 0, None, None, state["sums"], None, None, None, None)
        torch.testing.assert_close(state["sums"][:, 0] + state["sums"][:, 1].log(), z.logsumexp(1))

    def test_exponentials_stay_in_the_tile(self):
        first, second = normal(4, 300), normal(4, 300, seed=1) * 3
        state, before, rescale = running(4, 0), None, torch.zeros(4)
        for tile in (first, second):
            before = state["sums"][:, 0].clone()
            kept = tile.clone()
            emulated.tile_pass(kept, 0, None, None, state["sums"], None, None, None, rescale)
            torch.testing.assert_close(kept, (tile - state["sums"][:, :1]).exp())
            torch.testing.assert_close(rescale, (before - state["sums"][:, 0]).clamp(min=EXP_FLOOR).exp())

    def test_no_number_and_infinity(self):
        z = normal(4, 300)
        z[0, 70], z[1, 299], z[2] = NAN, INF, -INF
        alone, state = running(4, 3), running(4, 3)
        emulated.tile_pass(z.clone(), 0, torch.zeros(4, dtype=torch.int64), None, *state.values(), None)
        emulated.tile_pass(
            z[3:].clone(), 0, torch.zeros(1, dtype=torch.int64), None, *(v[3:] for v in alone.values()), None
        )
        assert state["sums"][:2, 1].isnan().all()
        assert state["sums"][2, 1] == 0
        for name, value in state.items():
            assert torch.equal(value[3], alone[name][3]), name

    def test_rows_apart_from_each_other(self):
        room = torch.full((4, 150), NAN)
        tile = room[1:3, 10:110]
        tile.copy_(normal(2, 100))
        state = running(2, 0)
        emulated.tile_pass(tile, 0, None, None, state["sums"], None, None, None, torch.zeros(2))
        assert tile.isfinite().all()
        tile.fill_(NAN)
        assert room.isnan().all()

    @pytest.mark.parametrize(
        "options", [{}, {"bias": True, "scale": 0.3, "softcap": 30.0, "watch": 3}], ids=["plain", "every option"]
    )
    def test_a_whole_decode(self, options, monkeypatch):
        for name in ("tile_pass", "tile_divergences"):
            monkeypatch.setattr(torch.ops.tuned_lens_fast, name, getattr(emulated, name))
        monkeypatch.setattr(eager, "CPU_CHUNK", (8, 256))
        asked = problem(torch.float32, 24, 700, "cpu", stats=ONE_PASS | DIVERGENCES, top_k=5, **options)
        asked.check(asked.decode(ENGINES["native"]))
        assert MOST_IN_PASS == 64  # as many keys as the kernel has room for


def test_divergences_of_certain_and_equal_distributions():
    z_p, z_q = torch.zeros(2, 200), torch.zeros(4, 200)
    z_p[0, 3], z_q[0, 3], z_q[2, 9] = 90, 90, 90
    z_q[3, 100:] = -INF
    normalisers = [torch.stack([z.amax(1), (z - z.amax(1, keepdim=True)).exp().sum(1).log()]) for z in (z_p, z_q)]
    outs = torch.zeros(4, 4)
    emulated.tile_divergences(z_p, z_q, *normalisers, True, outs)
    wanted = reference.statistics(z_q.view(2, 2, 200), reference=z_p)
    for found, name in zip(outs, native.DIVERGENCES, strict=True):
        expected = wanted[name].flatten()
        assert (found[expected.isinf()] > 1e28).all(), name
        torch.testing.assert_close(
            found[expected.isfinite()].double(), expected[expected.isfinite()], atol=1e-5, rtol=1e-5
        )
