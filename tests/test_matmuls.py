"""The product that csrc/ has for AVX2, against float64; tests/test_cpu_engines.py decodes with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuned_lens_fast.engines import ENGINES, native
from tuned_lens_fast.engines.interface import Head, Norm, Query, Readout
from tuned_lens_fast.engines.matmul import FMA_DTYPES, FmaMatmul, Matmul, _rows_contiguous

pytestmark = pytest.mark.skipif(not native.has_fma(), reason="csrc/'s product is for AVX2 without AVX-512")
NAN, INF = float("nan"), float("inf")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(x, weight):
    """z = x W^T, with W as it lies in memory; that nothing beside z is written is checked."""
    room = torch.full((x.shape[0] + 2, weight.shape[0] + 7), NAN)
    z = room[1:-1, 3:-4]
    torch.ops.tuned_lens_fast.fma_matmul(FmaMatmul(Head(weight)).pack(x).values, _rows_contiguous(weight), z)
    found = z.clone()
    z.fill_(NAN)
    assert room.isnan().all()
    return found


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@given(
    rows=st.integers(1, 130),
    width=st.integers(1, 150),
    d_model=st.integers(1, 600),
    dtype=st.sampled_from(FMA_DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_against_float64(rows, width, d_model, dtype, seed):
    x = normal(rows, d_model, seed=seed).to(dtype)
    weight = normal(width + 3, d_model + 5, seed=seed + 1).to(dtype)[1:-2, 2:-3]  # strided, off any boundary
    exact = x.double() @ weight.double().T
    allowed = 2**-21 * (x.double().abs() @ weight.double().abs().T) + 1e-30
    assert ((product(x, weight) - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", FMA_DTYPES)
def test_long_sums_are_as_exact_as_pytorch_s(dtype):
    x, weight = normal(60, 4096).to(dtype), normal(200, 4096, seed=1).to(dtype)
    exact = x.double() @ weight.double().T
    ours = (product(x, weight) - exact).square().mean()
    assert ours <= 2 * (x.float() @ weight.float().T - exact).square().mean()


@pytest.mark.parametrize("dtype", FMA_DTYPES)
def test_a_token_and_a_row_give_the_same_bits_wherever_they_stand(dtype, threads):
    x, weight = normal(140, 700).to(dtype), normal(190, 700, seed=1).to(dtype)
    whole = product(x, weight)
    for count in (1, 2, 3, 7, 40):
        threads(count)
        assert torch.equal(product(x, weight), whole)
    assert torch.equal(product(x[31:138], weight[19:152]), whole[31:138, 19:152])


@pytest.mark.parametrize("dtype", FMA_DTYPES)
def test_what_is_no_number_stays_in_its_row_or_token(dtype):
    x, weight = normal(40, 50).to(dtype), normal(90, 50, seed=1).to(dtype)
    clean = product(x, weight)
    x[5, 7], weight[11, 49], weight[12, 3] = NAN, INF, NAN
    harmed = product(x, weight)
    bad = torch.zeros(40, 90, dtype=torch.bool)
    bad[5], bad[:, 11:13] = True, True
    assert torch.equal(harmed[~bad], clean[~bad])
    assert not harmed[bad].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_widened(dtype):
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1)
    found = product(torch.ones(1, 1, dtype=dtype), weight)
    torch.testing.assert_close(found[0], weight[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("weight", [normal(80, 24).t().contiguous().t(), normal(80, 48)[:, ::2]], ids=["t", "strided"])
def test_weights_whose_rows_are_not_contiguous(weight):
    matmul = FmaMatmul(Head(weight))
    found = matmul(matmul.pack(normal(9, 24)), slice(0, 80), 80)
    torch.testing.assert_close(found, normal(9, 24) @ weight.T)


def test_nothing_to_multiply():
    assert torch.equal(product(torch.zeros(13, 0), torch.zeros(5, 0)), torch.zeros(13, 5))
    assert product(torch.zeros(0, 8), normal(5, 8)).shape == (0, 5)
    assert product(normal(5, 8), torch.zeros(0, 8)).shape == (5, 0)


def test_opcheck():
    operands = (normal(2, 8, 6), normal(5, 8), torch.zeros(12, 5))
    torch.library.opcheck(torch.ops.tuned_lens_fast.fma_matmul.default, operands)


@pytest.mark.parametrize(
    ("x", "weight", "z"),
    [
        ((2, 8, 5), (5, 8), (12, 5)),
        ((2, 9, 6), (5, 8), (12, 5)),
        ((2, 8, 6), (5, 8), (13, 5)),
        ((2, 8, 6), (5, 8), (6, 5)),
        ((2, 8, 6), (5, 8), (12, 4)),
        ((8, 12), (5, 8), (12, 5)),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused(x, weight, z):
    with pytest.raises(RuntimeError, match="fma_matmul"):
        torch.ops.tuned_lens_fast.fma_matmul(torch.zeros(x), torch.zeros(weight), torch.zeros(z))


@pytest.mark.parametrize("which", ["x", "weight", "z"])
def test_operands_of_other_dtypes_are_refused(which):
    operands = {"x": torch.zeros(2, 8, 6), "weight": torch.zeros(5, 8), "z": torch.zeros(12, 5)}
    operands[which] = operands[which].double()
    with pytest.raises(RuntimeError):
        torch.ops.tuned_lens_fast.fma_matmul(*operands.values())


def test_which_heads_it_multiplies(monkeypatch):
    monkeypatch.setattr(native, "has_amx", lambda: False)
    for dtype in FMA_DTYPES:
        assert type(ENGINES["native"].matmul(Head(torch.zeros(4, 8, dtype=dtype)))) is FmaMatmul
    assert type(ENGINES["native"].matmul(Head(torch.zeros(4, 8, dtype=torch.float64)))) is Matmul


def test_the_plan_counts_what_the_product_needs(monkeypatch):
    head = Head(torch.zeros(3000, 4096))
    sizes = (6, torch.float32, Readout([None, None], Norm("identity"), head), Query(frozenset({"entropy"})), 2**28)
    own = ENGINES["native"].plan(*sizes)
    monkeypatch.setattr(native, "has_fma", lambda: False)
    plain = ENGINES["native"].plan(*sizes)
    assert (own.layers, own.positions, own.tile) == (plain.layers, plain.positions, plain.tile)
    packed = 4 * 12 * 4096 * 4  # of the rows and of the reference, padded and packed
    assert own.scratch - plain.scratch >= packed + torch.get_num_threads() * 64 * 256 * 4
