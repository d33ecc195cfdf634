"""The memory plan: it keeps to its budget, names the smallest that works, and what runs keeps to the plan."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LAYERS, VOCAB, tiny

import tuned_lens_fast as tl
from tuned_lens_fast.budget import plan
from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.interface import BudgetError, Head, Norm, Query, Readout, Translator
from tuned_lens_fast.engines.statistics import STATISTICS
from tuned_lens_fast.memory import PeakMemory
from tuned_lens_fast.streaming import prepare

CPU = torch.device("cpu")


def planned(batch, positions, budget, *, layers=3, d_model=32, vocab=101, stats=frozenset(), top_k=0, **options):
    head = Head(torch.empty(vocab, d_model, device="meta"))
    translator = Translator(torch.empty(d_model, d_model, device="meta"))
    return plan(
        batch,
        positions,
        engine=ENGINES["eager"],
        hidden=torch.float32,
        readout=Readout((translator,) * layers, Norm("identity"), head),
        query=Query(stats, top_k=top_k),
        memory_budget=budget,
        **options,
    )


@given(
    st.integers(1, 40),
    st.integers(1, 100_000),
    st.integers(1, 2**30),
    st.integers(0, 40),
    st.sampled_from([16, 576, 4096]),
    st.sampled_from([30, 128_256]),
    st.sets(st.sampled_from([*STATISTICS])),
    st.sampled_from([0, 1, 10]),
    st.none() | st.integers(1, 100_000),
)
@settings(deadline=None)
def test_a_plan_keeps_to_its_budget(batch, positions, budget, layers, d_model, vocab, stats, top_k, chunk):
    """One that is refused names the smallest budget that works; that one works, and one byte less does not."""
    question = {"layers": layers, "d_model": d_model, "vocab": vocab, "stats": frozenset(stats), "top_k": top_k}
    question["chunk"] = None if chunk is None else min(chunk, positions)
    try:
        plan = planned(batch, positions, budget, **question)
    except BudgetError as refused:
        smallest = refused.smallest
        plan = planned(batch, positions, smallest, **question)
        with pytest.raises(BudgetError, match=f"the smallest that works here is {smallest}"):
            planned(batch, positions, smallest - 1, **question)
    assert plan.total <= plan.budget
    assert plan.tiling.scratch <= plan.scratch
    assert 1 <= plan.rows <= batch
    assert 1 <= plan.chunk <= positions
    assert chunk is None or plan.chunk == question["chunk"]
    assert plan.hidden == plan.rows * plan.chunk * (layers + 1) * d_model * 4


def test_more_memory_never_means_smaller_chunks():
    cuts = [planned(1, 65_536, 2**power, layers=30, d_model=576, vocab=49_152, top_k=10) for power in range(24, 34)]
    assert [cut.chunk for cut in cuts] == sorted(cut.chunk for cut in cuts)
    assert cuts[0].chunk < 1000
    assert cuts[-1].chunk == 65_536


def test_whole_prompts_before_all_rows():
    """A batch of prompts that fit one by one needs no cache."""
    a_row = 1000 * 4 * 32 * 4
    plan = planned(8, 1000, 4 * a_row + 2**21)
    assert (plan.rows, plan.chunk) == (4, 1000)
    plan = planned(8, 10_000, 4 * a_row + 2**21)
    assert plan.rows == 8
    assert 400 <= plan.chunk <= 700


def test_what_a_plan_says():
    plan = planned(2, 50_000, 2**24, layers=3, d_model=64, stats=frozenset({"kl"}), top_k=2)
    assert str(plan).startswith("memory budget 16.0 MiB: chunks of ")
    assert f"{plan.chunk:,} positions of 2 of 2 rows" in str(plan)
    assert f"tiles of {plan.tiling.tile:,}" in str(plan)
    assert "the whole prompt at a time" in str(planned(1, 10, 2**24))


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def test_the_smallest_budget_works(llama):
    lens, ids = tl.TunedLens.from_model(llama), torch.arange(3, 23).view(2, 10)
    asked = {"top_k": 3, "watch": [1, 2], "stats": STATISTICS}
    for chunk in (None, 4):
        with pytest.raises(ValueError, match="the smallest that works here is") as refused:
            tl.decode_model(llama, lens, ids, memory_budget=1, chunk=chunk, **asked)
        smallest = int(re.search(r"here is (\d+)", str(refused.value))[1])
        with pytest.raises(ValueError, match=str(smallest)):
            tl.decode_model(llama, lens, ids, memory_budget=smallest - 1, chunk=chunk, **asked)
        got = tl.decode_model(llama, lens, ids, memory_budget=smallest, chunk=chunk, **asked)
        whole = tl.decode_model(llama, lens, ids, **asked)
        torch.testing.assert_close(got.top_log_probs, whole.top_log_probs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.js, whole.js, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(PeakMemory(CPU).growth() is None, reason="only Linux tells the resident peak of a call")
def test_memory_does_not_grow_with_positions():
    """Of a model whose own cache is bounded: a window of 16. Unchunked, its states would take 48 MB."""
    model = tiny("mistral", hidden_size=128, head_dim=32, sliding_window=16, max_position_embeddings=2**20)
    ids = torch.randint(3, VOCAB, (1, 24_576), generator=torch.Generator().manual_seed(0))
    budget = 4 * 2**20
    chunks = prepare(model, tl.TunedLens.from_model(model), ids, top_k=2, memory_budget=budget)
    memory, peaks = PeakMemory(CPU), []
    for _, _, part in chunks.run():
        assert part.lse.shape[0] == LAYERS + 1
        peaks.append(memory.growth())
    assert len(peaks) > 10
    assert peaks[-1] < peaks[len(peaks) // 2] + budget
    assert peaks[-1] < 36 * 2**20


def test_a_chunks_states_are_gone_before_the_next(llama):
    """Of every block, one tensor at a time is alive."""
    import weakref

    alive, most = set(), []

    def watch(_, args):
        state = args[0]
        key = id(state)
        alive.add(key)
        weakref.finalize(state, alive.discard, key)
        most.append(len(alive))

    hooks = [block.register_forward_pre_hook(watch) for block in llama.model.layers]
    ids = torch.arange(3, 33).view(1, 30)
    for _ in prepare(llama, tl.LogitLens.from_model(llama), ids, boundaries=[5, 10, 15, 20, 25, 30]).run():
        pass
    for hook in hooks:
        hook.remove()
    assert max(most) == LAYERS
