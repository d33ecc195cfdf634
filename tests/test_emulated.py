"""csrc/ for AMX and for GPUs, run on any CPU: the products against float64, the passes against the engines' definition.

tests/test_cpu_engines.py decodes with the emulated AMX unit as well.
"""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import emulated
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuned_lens_fast.engines import ENGINES, eager, native
from tuned_lens_fast.engines.interface import Norm, Readout
from tuned_lens_fast.engines.matmul import AmxMatmul, Matmul, bf16_parts
from tuned_lens_fast.engines.native import MOST_IN_PASS
from tuned_lens_fast.engines.state import EXP_FLOOR, NO_KEY, State, key_ids, key_logits

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from cases import DIVERGENCES, ONE_PASS, problem

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="there is no GCC here")
#: How numbers of a dtype are split, and how far off their products may be: relative, and beside fp32's own sums.
SPLITS = [
    (torch.bfloat16, 1, 0, 2**-21),
    (torch.float16, 2, 2, 2**-21),
    (torch.float32, 2, 1, 2**-15),
    (torch.float32, 3, 2, 2**-21),
]
INF, NAN = float("inf"), float("nan")


def held(weight):
    """As the engine holds it: 16-bit numbers that are no bf16 in fp32."""
    return weight if weight.dtype == torch.bfloat16 else weight.float()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestAmx:
    @given(
        rows=st.integers(1, 70),
        width=st.integers(1, 100),
        d_model=st.integers(1, 100),
        split=st.sampled_from(SPLITS),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=100, deadline=None)
    def test_against_float64(self, rows, width, d_model, split, seed):
        dtype, parts, most, off = split
        x = normal(rows, d_model, seed=seed).to(dtype)
        weight = normal(width + 3, d_model + 5, seed=seed + 1).to(dtype)[1:-2, 2:-3]  # strided, off any boundary
        room = torch.full((rows + 2, width + 7), NAN)
        z = room[1:-1, 3:-4]
        emulated.amx_matmul(bf16_parts(x, parts), held(weight), most, z)
        allowed = off * (x.double().abs() @ weight.double().abs().T) + 1e-30
        assert ((z - x.double() @ weight.double().T).abs() <= allowed).all()
        z.fill_(NAN)
        assert room.isnan().all(), "it wrote beside z"

    @pytest.mark.parametrize(("dtype", "parts", "most", "_"), SPLITS)
    def test_a_token_and_a_row_give_the_same_bits_wherever_they_stand(self, dtype, parts, most, _):
        x, weight = normal(40, 50).to(dtype), normal(90, 50, seed=1).to(dtype)
        whole, part = torch.empty(40, 90), torch.empty(7, 33)
        emulated.amx_matmul(bf16_parts(x, parts), held(weight), most, whole)
        emulated.amx_matmul(bf16_parts(x[31:38], parts), held(weight[19:52]), most, part)
        assert torch.equal(part, whole[31:38, 19:52])

    @pytest.mark.parametrize(("dtype", "parts", "most", "_"), SPLITS)
    def test_what_is_no_number_stays_in_its_row_or_token(self, dtype, parts, most, _):
        x, weight = normal(40, 50).to(dtype), normal(90, 50, seed=1).to(dtype)
        clean, harmed = torch.empty(40, 90), torch.empty(40, 90)
        emulated.amx_matmul(bf16_parts(x, parts), held(weight), most, clean)
        x[5, 7] = NAN
        weight[11, 49] = INF
        weight[12, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN that rounds up to -0
        emulated.amx_matmul(bf16_parts(x, parts), held(weight), most, harmed)
        bad = torch.zeros(40, 90, dtype=torch.bool)
        bad[5], bad[:, 11:13] = True, True
        assert torch.equal(harmed[~bad], clean[~bad])
        assert not harmed[bad].isfinite().any()

    def test_the_plan_counts_what_the_product_needs(self, monkeypatch):
        asked = problem(torch.float32, 4096, 3000, "cpu", top_k=1)
        cut = []
        monkeypatch.setattr(native, "has_fma", lambda: False)
        for amx in (False, True):
            monkeypatch.setattr(native, "has_amx", lambda amx=amx: amx)
            sizes = (6, torch.float32, Readout([None, None], Norm("identity"), asked.head), asked.query, 2**28)
            cut.append(ENGINES["native"].plan(*sizes))
        plain, split = cut
        assert (plain.layers, plain.positions, plain.tile) == (split.layers, split.positions, split.tile)
        packed = min(torch.get_num_threads(), -(-split.tile // 32)) * 32 * 4096 * 3 * 2
        parts = 2 * 32 * 4096 * (4 + 3 * 2)
        assert split.scratch - plain.scratch >= packed + parts

    def test_parts_add_up(self):
        x = normal(33, 50) * 10.0 ** torch.arange(33).sub(16).unsqueeze(1)
        for count, off in ((1, 2**-8), (2, 2**-17), (3, 0)):
            parts = bf16_parts(x, count)
            assert parts.shape == (count, 64, 64)
            assert not parts[:, 33:].any()
            assert not parts[:, :, 50:].any()
            rest = parts.double().sum(0)[:33, :50] - x.double()
            assert (rest.abs() <= off * x.double().abs()).all()

    @pytest.mark.parametrize(
        ("dtype", "precision", "split"),
        [
            (torch.float32, "none", (3, 2)),
            (torch.float32, "ieee", None),
            (torch.float32, "tf32", (2, 1)),
            (torch.float32, "bf16", (2, 1)),
            (torch.float16, "ieee", (2, 2)),
            (torch.bfloat16, "ieee", (1, 0)),
            (torch.float64, "none", None),
        ],
    )
    def test_pytorch_s_setting_says_how_exact_fp32_is(self, dtype, precision, split, monkeypatch):
        monkeypatch.setattr(torch.backends.mkldnn, "matmul", SimpleNamespace(fp32_precision=precision))
        head = problem(torch.float32, 40, 100, "cpu").head
        head = dataclasses.replace(head, weight=head.weight.to(dtype))
        monkeypatch.setattr(native, "has_fma", lambda: False)
        monkeypatch.setattr(native, "has_amx", lambda: False)
        assert type(ENGINES["native"].matmul(head)) is Matmul
        monkeypatch.setattr(native, "has_amx", lambda: True)
        product = ENGINES["native"].matmul(head)
        assert isinstance(product, AmxMatmul) == (split is not None)
        assert split is None or (product.parts, product.most) == split


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
