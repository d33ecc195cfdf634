"""The vocabulary passes that are Hopper GPUs' alone, which tests/kernels/ has run in software."""

import dataclasses

import pytest
import reference
import torch
from test_vocabulary_pass import ids, operands, statistics_of

from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.kernels import launch
from tuned_lens_fast.kernels.search import cooperative_candidates, overlapped_candidates
from tuned_lens_fast.kernels.target_logits import target_logits
from tuned_lens_fast.kernels.vocabulary_pass import vocabulary_pass


def tiles(d_model):
    return list(overlapped_candidates(d_model) if d_model <= 832 else cooperative_candidates(d_model))


@pytest.fixture(autouse=True)
def _hopper(device):
    if launch.architecture(device)[0] != 9:
        pytest.skip("warpgroup instructions are Hopper's; this GPU is another")


@pytest.mark.parametrize("merged", [1, 4])
@pytest.mark.parametrize(("rows", "d_model", "vocab"), [
    (1_000, 576, 49_152), (300, 640, 50_001), (77, 768, 9_000), (300, 1024, 50_001), (2_000, 4096, 9_000)
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_float64(rows, d_model, vocab, merged, dtype, device):
    for tile in tiles(d_model):
        x, w = operands(rows, d_model, vocab, dtype, device)
        targets = ids(rows, vocab, device)
        got = statistics_of(x, Head(w), targets, tile=dataclasses.replace(tile, merged=merged), top_k=True)
        reference.check(got, reference.logits(x[None], Head(w)), targets=targets)


@pytest.mark.parametrize("d_model", [64, 576, 640, 1024, 4096])
def test_gathered_logits_are_the_tiles(d_model, device):
    for tile in tiles(d_model):
        x = torch.randn(1_000, d_model, device=device).bfloat16()
        w = torch.randn(1, d_model, device=device).bfloat16().repeat(1_024, 1)
        targets = torch.randint(1_024, (1_000,), device=device)
        gathered = target_logits(x, Head(w), targets, tile)
        _, groups = vocabulary_pass(x, Head(w), tile, group_maxima=True)
        assert torch.equal(gathered, groups[:, 0].amax(1))


@pytest.mark.parametrize("d_model", [576, 2048])
def test_the_same_twice(d_model, device):
    tile = tiles(d_model)[0]
    x, w = operands(2_000, d_model, 49_152, torch.bfloat16, device)
    (a, maxima), (b, again) = (vocabulary_pass(x, Head(w), tile, running="t", group_maxima=True) for _ in range(2))
    assert torch.equal(maxima, again)
    for name in ("m", "s", "t", "log_s"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
