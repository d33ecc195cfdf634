"""The target's logit: right, and bit for bit what the vocabulary pass sees."""

import math

import pytest
import reference
import torch

from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.kernels import launch
from tuned_lens_fast.kernels.logits import MASKED
from tuned_lens_fast.kernels.target_logits import target_logits
from tuned_lens_fast.kernels.vocabulary_pass import vocabulary_pass

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gathered(x, head, targets):
    tile = launch.vocabulary_tile(x.device, x.dtype, x.shape[1])
    return target_logits(x, head, targets, tile)


def operands(rows, d_model, vocab, dtype, device):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, d_model, generator=generator) * 3
    w = torch.randn(vocab, d_model, generator=generator) / d_model**0.5
    return (
        x.to(device, dtype),
        w.to(device, dtype),
        torch.randint(vocab, (rows,), generator=generator).to(device),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 5.0}], ids=["plain", "scale and softcap"])
@pytest.mark.parametrize(("rows", "d_model"), [(1, 64), (16, 33), (37, 100)])
def test_against_float64(rows, d_model, options, dtype, device):
    x, w, targets = operands(rows, d_model, 57, dtype, device)
    bias = torch.linspace(-1, 1, 57).to(device, dtype)
    for b in (None, bias):
        head = Head(w, b, **options)
        wanted = reference.logits(x, head).gather(1, targets[:, None]).squeeze(1)
        torch.testing.assert_close(gathered(x, head, targets).double(), wanted, atol=2e-5, rtol=2e-6)


def test_rows_without_a_target_and_masked_targets(device):
    x, w, targets = operands(20, 64, 57, torch.bfloat16, device)
    bias = torch.zeros(57, dtype=torch.bfloat16, device=device)
    plain = gathered(x, Head(w, bias), targets)
    bias[targets[3]] = -math.inf
    none = targets.clone()
    none[::5] = -100
    got = gathered(x, Head(w, bias), none)
    masked = targets == targets[3]
    kept = (none >= 0) & ~masked
    assert torch.equal(got[kept], plain[kept])
    assert (got[masked & (none >= 0)] == MASKED.value).all()
    assert got[none < 0].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [130, 50], ids=["whole tiles", "masked tiles"])
@pytest.mark.parametrize("d_model", [40, 96])
def test_bit_for_bit_the_tiles_logit(d_model, vocab, dtype, device):
    """All tokens share one row of W, so that the largest logit is every token's."""
    x, w, _ = operands(21, d_model, 1, dtype, device)
    w = w.repeat(vocab, 1)
    targets = torch.arange(21, device=device)
    tile = launch.vocabulary_tile(device, dtype, d_model)
    largest = vocabulary_pass(x, Head(w), tile, group_maxima=True)[1][:, 0].amax(1)
    assert torch.equal(gathered(x, Head(w), targets), largest)


def test_a_bad_row_harms_itself_only(device):
    x, w, targets = operands(20, 64, 57, torch.bfloat16, device)
    clean = gathered(x, Head(w), targets)
    x[7, 0] = math.nan
    harmed = gathered(x, Head(w), targets)
    others = torch.arange(20, device=device) != 7
    assert harmed[7].isnan()
    assert torch.equal(harmed[others], clean[others])
