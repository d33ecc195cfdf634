"""The final norm against its definition in float64, in every form that models have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import head_inputs

from tuned_lens_fast.engines.interface import Norm
from tuned_lens_fast.kernels.norm import normalize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
FORMS = {
    "identity": {"kind": "identity"},
    "LayerNorm": {"kind": "layer", "weight": True, "bias": True, "eps": 1e-5},
    "LayerNorm without bias": {"kind": "layer", "weight": True, "eps": 1e-5},
    "LayerNorm with 1 + w": {"kind": "layer", "weight": True, "bias": True, "unit_offset": True, "eps": 1e-5},
    "LayerNorm without parameters": {"kind": "layer", "eps": 1e-5},
    "RMSNorm": {"kind": "rms", "weight": True, "eps": 1e-6},
    "RMSNorm with 1 + w": {"kind": "rms", "weight": True, "unit_offset": True, "eps": 1e-6},
    "RMSNorm without parameters": {"kind": "rms", "eps": 1e-6},
    "RMSNorm and a factor": {"kind": "rms", "weight": True, "eps": 1e-6, "factor": 1 / 12},
}


def norm_of(form, d_model, dtype, device):
    fields = dict(FORMS[form])
    generator = torch.Generator().manual_seed(1)
    for name in ("weight", "bias"):
        if fields.get(name):
            fields[name] = (torch.randn(d_model, generator=generator) + 1).to(device, dtype)
    return Norm(**fields)


def residual(rows, d_model, dtype, device, mean=0.3):
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(rows, d_model, generator=generator) * 3 + mean).to(device, dtype)


def assert_normed(x, r, norm):
    """One rounding to the dtype of ``x`` from float64, and a few of fp32 at the size of weight and bias."""
    wanted = head_inputs([r], [None], norm)[0]
    size = 1 + sum(p.double().abs() for p in (norm.weight, norm.bias) if p is not None)
    assert x.shape == r.shape
    assert ((x - wanted).abs() <= ROUNDING[x.dtype] * wanted.abs() + 1e-6 * (wanted.abs() + size)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "d_model"), [(37, 64), (3, 577), (2, 2049)])
def test_every_form(rows, d_model, form, dtype, device):
    r = residual(rows, d_model, torch.float32, device)
    norm = norm_of(form, d_model, dtype, device)
    assert_normed(normalize(r, norm, torch.empty_like(r, dtype=dtype)), r, norm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_without_translator(dtype, device):
    r = residual(5, 100, dtype, device)
    for form in ("identity", "LayerNorm", "RMSNorm"):
        norm = norm_of(form, 100, torch.float32, device)
        assert_normed(normalize(r, norm, torch.empty_like(r)), r, norm)


def test_widest_row(device):
    r = residual(2, 16_384, torch.float32, device)
    norm = norm_of("LayerNorm", 16_384, torch.float32, device)
    assert_normed(normalize(r, norm, torch.empty_like(r)), r, norm)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 80),
    d_model=st.integers(1, 1100),
    form=st.sampled_from(sorted(FORMS)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(rows, d_model, form, dtype, device):
    r = residual(rows, d_model, torch.float32, device, mean=0.0)
    if d_model == 1 and FORMS[form]["kind"] == "layer":
        r.zero_()  # the variance of one number is that of its rounding
    norm = norm_of(form, d_model, torch.float32, device)
    x = normalize(r, norm, torch.empty_like(r, dtype=dtype))
    if FORMS[form]["kind"] == "layer" and d_model < 8:
        # A few nearly equal numbers: their rounding is large against their spread, so compare loosely.
        assert torch.allclose(x.double(), head_inputs([r], [None], norm)[0], rtol=2**-7, atol=1e-2)
    else:
        assert_normed(x, r, norm)


def test_a_large_mean_does_not_cancel(device):
    """Mean 1000, spread 3: the mean of squares minus the squared mean would be wrong in its second digit."""
    r = residual(4, 768, torch.float32, device, mean=1000.0)
    norm = norm_of("LayerNorm", 768, torch.float32, device)
    x = normalize(r, norm, torch.empty_like(r))
    assert (x - head_inputs([r], [None], norm)[0]).abs().max() < 3e-4


def test_a_residual_of_100_000(device):
    r = residual(4, 768, torch.float32, device) * 30_000
    norm = norm_of("RMSNorm with 1 + w", 768, torch.float32, device)
    x = normalize(r, norm, torch.empty_like(r, dtype=torch.float16))
    assert_normed(x, r, norm)


def test_strides_and_nothing_written_around_out(device):
    plain = residual(37, 100, torch.float32, device)
    norm = norm_of("LayerNorm", 100, torch.float32, device)
    spread = Norm("layer", *(torch.stack([p, p], 1)[:, 0] for p in (norm.weight, norm.bias)), eps=norm.eps)
    wide = torch.full((37, 3, 117), float("nan"), device=device)
    wide[:, 1, 5:105] = plain
    around = torch.full((40, 130), 7.0, dtype=torch.bfloat16, device=device)
    for r in (wide[:, 1, 5:105], plain.T.contiguous().T):
        out = around[1:38, 3:103]
        assert normalize(r, spread, out) is out
        assert_normed(out.clone(), plain, norm)
        out.fill_(7.0)
        assert (around == 7.0).all()


def test_no_rows(device):
    r = torch.empty(0, 64, device=device)
    assert normalize(r, Norm("rms", eps=1e-6), torch.empty_like(r)).shape == (0, 64)


@pytest.mark.parametrize("form", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_harms_itself_only_and_results_repeat(bad, form, device):
    """64 features: 32 rows share a program."""
    r = residual(70, 64, torch.float32, device)
    norm = norm_of(form, 64, torch.bfloat16, device)
    clean = normalize(r, norm, torch.empty_like(r, dtype=torch.bfloat16))
    r[33, 5] = bad
    harmed = normalize(r, norm, torch.empty_like(r, dtype=torch.bfloat16))
    assert harmed[33].isnan().any()
    others = torch.arange(70, device=device) != 33
    assert torch.equal(harmed[others], clean[others])


def test_a_row_of_zeros(device):
    r = torch.zeros(3, 64, device=device)
    norm = norm_of("LayerNorm", 64, torch.float32, device)
    assert torch.equal(normalize(r, norm, torch.empty_like(r)), norm.bias.expand(3, 64))


@pytest.mark.parametrize(
    ("norm", "out", "message"),
    [
        (Norm("module"), (3, 64), "norm: got kind 'module'"),
        (Norm("rms"), (3, 63), r"out: got shape \[3, 63\]"),
        (Norm("rms", weight=torch.ones(65)), (3, 64), r"norm.weight: got shape \[65\], wanted \[64\]"),
        (Norm("layer", bias=torch.ones(65)), (3, 64), r"norm.bias: got shape \[65\], wanted \[64\]"),
    ],
)
def test_errors(norm, out, message):
    with pytest.raises(ValueError, match=message):
        normalize(torch.zeros(3, 64), norm, torch.zeros(out))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    rows, d_model = 2**31 // 4096 + 130, 4096
    r = torch.zeros(rows, d_model, dtype=torch.bfloat16, device="cuda")
    r[-130:] = last = residual(130, d_model, torch.bfloat16, "cuda")
    norm = norm_of("RMSNorm", d_model, torch.bfloat16, "cuda")
    assert_normed(normalize(r, norm, torch.empty_like(r))[-130:], last, norm)
