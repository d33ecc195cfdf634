"""Decodes at sizes of real models against float64 (some rows), the eager engine, and themselves."""

import dataclasses

import pytest
import torch
from cases import DIVERGENCES, ONE_PASS, assert_close, assert_same_bits, assert_void, problem

from tuned_lens_fast.engines.eager import EagerEngine
from tuned_lens_fast.engines.interface import Query
from tuned_lens_fast.engines.triton import TritonEngine

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WITH_KL = ONE_PASS | {"kl"}
POSITIONS = 301


def run(asked, sample):
    """Decode, decode again, compare with eager and with float64."""
    got = asked.decode(TritonEngine())
    assert_same_bits(got, asked.decode(TritonEngine()))
    asked.check(got, sample)
    assert_close(got, asked.decode(EagerEngine(), 2**31))
    return got


# d_model is a compile-time constant and every set of statistics a kernel of its own: few lines, each a model.
@pytest.mark.parametrize(
    ("dtype", "d_model", "vocab", "stats", "options"),
    [
        pytest.param(BF16, 576, 49_152, WITH_KL, {"top_k": 10, "watch": 5}, id="SmolLM2-135M"),
        pytest.param(BF16, 4096, 128_256, WITH_KL, {"top_k": 10}, id="Llama-3-8B"),
        pytest.param(BF16, 2048, 151_936, ONE_PASS, {"top_k": 64}, id="Qwen3-1.7B"),
        pytest.param(BF16, 640, 262_144, ONE_PASS, {"scale": 0.5, "softcap": 30.0}, id="Gemma-270M"),
        pytest.param(BF16, 8192, 128_256, ONE_PASS, {}, id="Llama-3-70B"),
        pytest.param(FP16, 768, 50_257, ONE_PASS, {"top_k": 5}, id="GPT-2"),
        pytest.param(FP16, 100, 50_257, ONE_PASS | DIVERGENCES, {"bias": True, "top_k": 5}, id="rows of 200 bytes"),
        pytest.param(FP32, 64, 50_257, WITH_KL, {"bias": True, "top_k": 5}, id="fp32"),
        pytest.param(
            BF16,
            64,
            1_037,
            ONE_PASS | DIVERGENCES,
            {"bias": True, "scale": 0.3, "softcap": 30.0, "top_k": 3},
            id="every option",
        ),
    ],
)
def test_models(dtype, d_model, vocab, stats, options, device):
    asked = problem(dtype, d_model, vocab, device, positions=POSITIONS, stats=stats, **options)
    sample = [*range(12), *range(POSITIONS - 12, POSITIONS)]
    if d_model > 4096:  # see test_long_sums
        sample = [position for position in sample if position % 6 != 1]
    got = run(asked, sample)

    harmed = [h.clone() for h in asked.hidden]
    harmed[1][7, d_model // 2] = float("nan")
    harmed = dataclasses.replace(asked, hidden=harmed).decode(TritonEngine())
    assert_void(harmed, 1, 7)
    others = torch.arange(POSITIONS, device=device) != 7
    assert_same_bits(harmed, got, others)


def test_long_sums(device):
    """Matrix units truncate as they add 16 products at a time: a sum of one sign loses up to d / 16 * 2^-24."""
    asked = problem(BF16, 8192, 4_096, device, positions=60, layers=1, stats=frozenset())
    exact = torch.logsumexp(asked.hidden[0].double() @ asked.head.weight.double().t(), -1)
    error = (asked.decode(TritonEngine())["lse"][0].double() - exact).abs()
    assert (error <= 1e-4 + 8192 / 16 * 2**-24 * exact.abs()).all()


@pytest.mark.parametrize("vocab", [2, 31, 255, 256, 257, 2_055, 4_096 + 7 * 32 + 31])
def test_ragged_vocabularies(vocab, device):
    """Around a tile of 8 groups of 32 tokens; more rows than one block and one row only."""
    for positions in (131, 1):
        asked = problem(BF16, 64, vocab, device, positions=positions, stats=ONE_PASS, top_k=2)
        run(asked, slice(None))


def test_large_k_is_answered_by_the_eager_engine(device):
    asked = problem(BF16, 64, 20_000, device, positions=40, stats=frozenset(), top_k=300)
    run(asked, slice(None))


def test_ties_and_neighbours(device):
    """Rows of zeros, equal rows of W, and ten neighbouring ids on top: ids in order, each once."""
    vocab, k = 20_011, 10
    asked = problem(BF16, 64, vocab, device, positions=6, layers=1, stats=frozenset(), top_k=k)
    weight, x = asked.head.weight, asked.hidden[0]
    weight[7_000:7_010] = weight[7_000].clone()
    weight[[3, 11_111, 20_010]] = weight[5].clone()
    x.zero_()
    x[1] = weight[7_000] * 20
    x[2] = weight[5] * 20
    x[3] = 1.0
    run(asked, slice(None))
    top = asked.decode(TritonEngine())["top_ids"][0].tolist()
    assert top[0] == list(range(k))
    assert top[1] == list(range(7_000, 7_010))
    assert top[2][:4] == [3, 5, 11_111, 20_010]
    assert top[4] == list(range(k))


def test_logits_of_zero_on_top(device):
    """A key of a logit of zero is a denormal number: flushed to zero, it would name another token."""
    vocab = 5_003
    asked = problem(BF16, 64, vocab, device, positions=5, layers=1, stats=frozenset(), top_k=3)
    weight, x = asked.head.weight, asked.hidden[0]
    x.fill_(1.0)
    weight.copy_(-weight.abs() - 0.01)
    weight[[4_711, 99, 5_002]] = 0.0
    got = run(asked, slice(None))
    assert (got["top_ids"] == torch.tensor([99, 4_711, 5_002], device=device)).all()


def test_tf32_only_when_asked_for(device):
    asked = problem(FP32, 64, 1_037, device, positions=70)
    assert torch.get_float32_matmul_precision() == "highest"
    exact = asked.decode(TritonEngine())
    asked.check(exact)
    torch.set_float32_matmul_precision("high")
    try:
        short = asked.decode(TritonEngine())
    finally:
        torch.set_float32_matmul_precision("highest")
    difference = (short["lse"] - exact["lse"]).abs()
    assert 0 < difference.max() < 5e-2


def test_nothing_to_decode(device):
    asked = problem(BF16, 64, 300, device)
    nothing = dataclasses.replace(
        asked, hidden=[h[:0] for h in asked.hidden], query=Query(frozenset({"entropy"}), top_k=2)
    )
    assert nothing.decode(TritonEngine())["top_ids"].shape == (2, 0, 2)
