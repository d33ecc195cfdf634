"""Offsets beyond 32 bits, and scratch that stays within its budget."""

import re

import pytest
import reference
import torch
from cases import ONE_PASS, problem

from tuned_lens_fast.engines.interface import Head, Norm, Query, Readout, Translator
from tuned_lens_fast.engines.triton import TritonEngine

GIB = 2**30


def test_rows_times_vocabulary_beyond_32_bits(device, needs_memory):
    """3.7e10 logits and 2.3e9 keys in one launch."""
    needs_memory(30)
    rows, vocab = 140_001, 262_144
    asked = problem(torch.bfloat16, 64, vocab, device, layers=1, positions=rows, stats=ONE_PASS, top_k=4)
    got = asked.decode(TritonEngine(), 24 * GIB)
    asked.check(got, [0, 1, 2, 3, 4, 5, 2**31 // vocab + 1, 2**32 // vocab + 1, *range(rows - 24, rows)])


def test_rows_times_d_model_beyond_32_bits(device, needs_memory):
    """From hidden states: translator, norm, and a small vocabulary for 33.6 million rows."""
    needs_memory(45)
    d_model, vocab = 64, 300
    rows = 2**31 // d_model + 1_001
    h = torch.empty(rows, d_model, dtype=torch.bfloat16, device=device).normal_()
    translator = Translator(torch.randn(d_model, d_model, device=device).bfloat16() / 8)
    norm = Norm("rms", eps=1e-6)
    head = Head((torch.randn(vocab, d_model, device=device) / 4).bfloat16())
    targets = torch.randint(vocab, (rows,), device=device)
    query = Query(ONE_PASS, targets=targets)
    got = TritonEngine().decode([h], Readout([translator], norm, head), query, 40 * GIB)
    # The rounding of x to bf16 is part of the definition, so x is what float64 starts from.
    at = [0, 1, rows // 2, *range(rows - 1_000, rows)]
    x = reference.head_inputs([h[at]], [translator], norm).to(torch.bfloat16)
    z = reference.logits(x, head)
    for name, value in reference.statistics(z, targets=targets[at]).items():
        if name in got and name != "rank":
            # fp32 and float64 may round an element of x to different sides, half a bf16 step away.
            torch.testing.assert_close(got[name][:, at].double(), value, atol=2e-2, rtol=1e-2)
    alone = TritonEngine().decode([h[at]], Readout([translator], norm, head), Query(ONE_PASS, targets=targets[at]), GIB)
    for name, value in alone.items():
        assert torch.equal(got[name][:, at], value), name


def peak_of(decode):
    """Growth of the allocated peak during the call, less what the answer holds."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answer = decode()
    torch.cuda.synchronize()
    held = sum(value.untyped_storage().nbytes() for value in answer.values())
    return torch.cuda.max_memory_allocated() - before - held


@pytest.mark.parametrize("top_k", [0, 10])
@pytest.mark.parametrize("mebibytes", [24, 64, 256, 1024])
def test_scratch_stays_within_its_budget(mebibytes, top_k, device):
    """The flags are those of a case in test_decode.py: only the norm and the translator are compiled."""
    asked = problem(
        torch.bfloat16,
        576,
        49_152,
        device,
        layers=6,
        positions=1_024,
        stats=ONE_PASS | {"kl"},
        top_k=top_k,
        watch=5,
    )
    translators = [Translator(torch.zeros(576, 576, dtype=torch.bfloat16, device=device)) for _ in asked.hidden]
    norm = Norm("rms", eps=1e-6)

    def decode():
        return TritonEngine().decode(
            asked.hidden, Readout(translators, norm, asked.head), asked.query, mebibytes * 2**20
        )

    decode()  # libraries take their workspaces on the first call
    assert peak_of(decode) <= mebibytes * 2**20


def test_rows_without_order_stay_within_the_budget_too(device):
    """Rows of zeros overflow the candidates, and all of them are decoded again."""
    asked = problem(
        torch.bfloat16, 64, 50_257, device, layers=4, positions=2_000, stats=frozenset({"max_prob"}), top_k=5
    )
    for h in asked.hidden:
        h.zero_()
    budget = 16 * 2**20
    got = asked.decode(TritonEngine(), budget)
    assert (got["top_ids"] == torch.arange(5, device=device)).all()
    assert peak_of(lambda: asked.decode(TritonEngine(), budget)) <= budget


def test_a_budget_too_small_names_the_smallest(device):
    asked = problem(torch.bfloat16, 64, 50_257, device, positions=9, stats=ONE_PASS | {"kl"}, top_k=5)
    with pytest.raises(ValueError, match="memory_budget: got 1 bytes") as refused:
        asked.decode(TritonEngine(), 1)
    smallest = int(re.search(r"smallest that works here is (\d+)", str(refused.value))[1])
    asked.check(asked.decode(TritonEngine(), smallest))
    assert peak_of(lambda: asked.decode(TritonEngine(), smallest)) <= smallest
    with pytest.raises(ValueError, match="memory_budget"):
        asked.decode(TritonEngine(), smallest - 1)
