"""h + A h + c against float64 of the very same operands: what is left is fp32 rounding of the sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import head_inputs

from tuned_lens_fast.engines.interface import Norm, Translator
from tuned_lens_fast.kernels.translate import configuration, translate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def operands(rows, d_model, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, d_model, generator=generator)
    weight = torch.randn(d_model, d_model, generator=generator) / d_model**0.5
    bias = torch.randn(d_model, generator=generator)
    return [tensor.to(device, dtype) for tensor in (h, weight, bias)]


def assert_translated(r, h, weight, bias=None, relative=4e-6):
    """Within a few fp32 roundings of the sum of the terms' absolute values."""
    wanted = head_inputs([h], [Translator(weight, bias)], Norm("identity"))[0]
    size = h.double().abs() @ weight.double().abs().T + h.double().abs()
    if bias is not None:
        size += bias.double().abs()
    assert r.dtype == torch.float32
    assert r.shape == h.shape
    assert ((r - wanted).abs() <= relative * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d_model"), [(1, 64), (129, 144), (5, 100), (66, 577), (1100, 64)])
def test_ragged_shapes(rows, d_model, dtype, device):
    h, weight, bias = operands(rows, d_model, dtype, device)
    assert_translated(translate(h, weight, bias), h, weight, bias)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 200), d_model=st.integers(1, 200), dtype=st.sampled_from(DTYPES), bias=st.booleans())
def test_any_shape(rows, d_model, dtype, bias, device):
    h, weight, c = operands(rows, d_model, dtype, device)
    c = c if bias else None
    assert_translated(translate(h, weight, c), h, weight, c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, device):
    h, weight, bias = operands(9, 96, dtype, device)
    wide = torch.full((9, 3, 117), float("nan"), dtype=dtype, device=device)
    wide[:, 1, 5:101] = h
    columns = h.T.contiguous().T
    stack = torch.stack([torch.full_like(weight, float("nan")), weight.T]).transpose(1, 2)
    for view in (wide[:, 1, 5:101], columns):
        assert_translated(translate(view, stack[1], bias), h, weight, bias)
    spread = torch.stack([bias, bias], 1)[:, 0]
    assert_translated(translate(h, weight, spread), h, weight, bias)


def test_bias_may_have_its_own_dtype(device):
    h, weight, _ = operands(3, 64, torch.bfloat16, device)
    bias = torch.linspace(-1, 1, 64, device=device)
    assert_translated(translate(h, weight, bias), h, weight, bias)


def test_out_is_written_and_nothing_around_it(device):
    h, weight, bias = operands(70, 100, torch.float32, device)
    around = torch.full((74, 110), 7.0, device=device)
    out = around[2:72, 4:104]
    assert translate(h, weight, bias, out=out) is out
    assert_translated(out.clone(), h, weight, bias)
    out.fill_(7.0)
    assert (around == 7.0).all()


def test_no_rows(device):
    h, weight, bias = operands(0, 64, torch.bfloat16, device)
    assert translate(h, weight, bias).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_harms_itself_only_and_results_repeat(bad, dtype, device):
    h, weight, bias = operands(140, 80, dtype, device)
    clean = translate(h, weight, bias)
    h[77, 3] = bad
    harmed = translate(h, weight, bias)
    assert not harmed[77].isfinite().any()
    others = torch.arange(140, device=device) != 77
    assert torch.equal(harmed[others], clean[others])


def test_the_residual_stays_fp32(device):
    """Beyond fp16's range, and small changes of a large bf16 residual are kept."""
    h = torch.full((2, 64), 60_000.0, dtype=torch.float16, device=device)
    eye = torch.eye(64, dtype=torch.float16, device=device)
    assert (translate(h, eye) == 120_000).all()
    h, bias = h.bfloat16(), torch.full((64,), 0.25, device=device)
    assert (translate(h, torch.zeros_like(eye, dtype=torch.bfloat16), bias) == h.float() + 0.25).all()


def test_tf32_is_asked_for(device):
    h, weight, bias = operands(130, 192, torch.float32, device)
    assert_translated(translate(h, weight, bias, precision="tf32"), h, weight, bias, relative=2e-3)


def test_a_configuration_fits_an_operand_row_of_any_alignment():
    for dtype in DTYPES:
        for aligned in (True, False):
            config = configuration(dtype, aligned)
            stage = (config["BM"] + config["BN"]) * config["BK"] * dtype.itemsize
            assert config["num_stages"] * stage <= 99 * 1024  # the shared memory of sm_86, sm_89 and sm_120


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h": torch.float64}, TypeError, "h: got torch.float64"),
        (
            {"weight": torch.bfloat16},
            TypeError,
            "weight: got torch.bfloat16, wanted h's dtype, torch.float32",
        ),
        ({"weight": (64, 65)}, ValueError, r"weight: got shape \[64, 65\], wanted \[64, 64\]"),
        ({"bias": (63,)}, ValueError, r"bias: got shape \[63\], wanted \[64\]"),
        ({"out": torch.float16}, TypeError, "out: got torch.float16"),
        ({"out": (2, 64)}, ValueError, r"out: got shape \[2, 64\]"),
    ],
)
def test_errors(change, error, message):
    shapes = {"h": (3, 64), "weight": (64, 64), "bias": (64,), "out": (3, 64)}
    arguments = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, value in change.items():
        arguments[name] = torch.zeros(value) if isinstance(value, tuple) else arguments[name].to(value)
    with pytest.raises(error, match=message):
        translate(**arguments)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    rows, d_model = 2**31 // 2048 + 130, 2048
    h = torch.zeros(rows, d_model, dtype=torch.bfloat16, device="cuda")
    last, weight, bias = operands(130, d_model, torch.bfloat16, "cuda")
    h[-130:] = last
    assert_translated(translate(h, weight, bias)[-130:], last, weight, bias)
