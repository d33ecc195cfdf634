"""The native engine on a GPU: its kernels are compared with their definition on a CPU in tests/test_emulated.py."""

import dataclasses

import pytest
import torch
from cases import DIVERGENCES, ONE_PASS, assert_same_bits, assert_void, problem

from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.native import missing_on_cuda

NATIVE = ENGINES["native"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def built():
    if torch.cuda.is_available() and missing_on_cuda() is not None:
        pytest.skip(missing_on_cuda())


@pytest.mark.parametrize(
    ("dtype", "d_model", "vocab", "stats", "options"),
    [
        pytest.param(BF16, 576, 49_152, ONE_PASS | {"kl"}, {"top_k": 10, "watch": 5}, id="SmolLM2-135M"),
        pytest.param(BF16, 4096, 128_256, ONE_PASS | {"kl"}, {"top_k": 64}, id="Llama-3-8B"),
        pytest.param(FP16, 768, 50_257, ONE_PASS, {"top_k": 65}, id="more than the pass keeps"),
        pytest.param(FP32, 64, 50_257, ONE_PASS | {"kl"}, {"bias": True, "top_k": 5}, id="fp32"),
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
def test_decodes(dtype, d_model, vocab, stats, options, device):
    asked = problem(dtype, d_model, vocab, device, positions=61, stats=stats, **options)
    got = asked.decode(NATIVE)
    assert_same_bits(got, asked.decode(NATIVE))
    asked.check(got)
    harmed = [h.clone() for h in asked.hidden]
    harmed[1][7, d_model // 2] = float("nan")
    got = dataclasses.replace(asked, hidden=harmed).decode(NATIVE)
    assert_void(got, 1, 7)


def test_memory_stays_within_the_budget(device):
    budget = 2**28
    asked = problem(BF16, 1024, 128_256, device, layers=8, positions=1024, stats=ONE_PASS | {"kl"}, top_k=10)
    asked.decode(NATIVE, budget)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answer = asked.decode(NATIVE, budget)
    held = sum(value.nbytes for value in answer.values())
    assert torch.cuda.max_memory_allocated() - before <= budget + held


def test_another_stream(device):
    asked = problem(BF16, 256, 5_000, device, stats=ONE_PASS, top_k=3)
    wanted = asked.decode(NATIVE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = asked.decode(NATIVE)
    stream.synchronize()
    assert_same_bits(got, wanted)
