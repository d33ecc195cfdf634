"""The lenses beside those of tuned-lens 0.2.0, where it is right; fp32, within 1e-4."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import D_MODEL, LAYERS, tiny
from torch import nn

import tuned_lens_fast as fast
from tuned_lens_fast.models.resident import Resident
from tuned_lens_fast.nn import unembed as fast_unembed

reason = "the library to compare with is not installed: pip install --no-deps tuned-lens==0.2.0"
theirs = pytest.importorskip("tuned_lens.nn", reason=reason)
their_surgery = pytest.importorskip("tuned_lens.model_surgery", reason=reason)
tensor_hash = pytest.importorskip("tuned_lens.utils", reason=reason).tensor_hash

#: The types it knows.
KNOWN = ["gpt2", "gptj", "gpt_neox", "opt", "bloom", "llama"]


def randomise(lens):
    with torch.no_grad():
        for parameter in lens.layer_translators.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return lens


@pytest.mark.parametrize("model_type", KNOWN)
def test_logit_lens(model_type):
    model, h = tiny(model_type), torch.randn(2, 7, D_MODEL)
    ours, other = fast.LogitLens.from_model(model), theirs.LogitLens.from_model(model)
    torch.testing.assert_close(ours(h, 0), other(h, 0), atol=1e-4, rtol=0)
    assert torch.equal(ours.transform_hidden(h, 0), other.transform_hidden(h, 0))


@pytest.mark.parametrize("model_type", KNOWN)
@pytest.mark.parametrize("theirs_first", [True, False])
def test_tuned_lens_saved_by_one_and_loaded_by_the_other(tmp_path, model_type, theirs_first):
    model, h = tiny(model_type), torch.randn(2, 7, D_MODEL)
    model.config.name_or_path = "some/model"
    one, two = (theirs, fast) if theirs_first else (fast, theirs)
    saved = randomise(one.TunedLens.from_model(model, model_revision="v1"))
    saved.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = two.TunedLens.from_model_and_pretrained(model, lens_resource_id=str(tmp_path))
    assert loaded.config.to_dict() == saved.config.to_dict()
    for idx in range(LAYERS):
        torch.testing.assert_close(loaded.transform_hidden(h, idx), saved.transform_hidden(h, idx), atol=1e-4, rtol=0)
        torch.testing.assert_close(loaded(h, idx), saved(h, idx), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_folders_go_both_ways(tmp_path, dtype):
    model = tiny("llama").to(dtype)
    for one, two in ((theirs, fast), (fast, theirs)):
        saved = randomise(one.TunedLens.from_model(model))
        saved.save(tmp_path)
        loaded = two.TunedLens.from_model_and_pretrained(model, lens_resource_id=str(tmp_path))
        for mine, wanted in zip(loaded, saved, strict=True):
            assert torch.equal(mine.weight, wanted.weight)
            assert mine.weight.dtype == dtype


def test_its_whole_state_dict_loads():
    model, h = tiny("gpt2"), torch.randn(7, D_MODEL)
    other, ours = randomise(theirs.TunedLens.from_model(model)), fast.TunedLens.from_model(model)
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(h, 1), other(h, 1), atol=1e-4, rtol=0)


def test_gradients():
    model, h = tiny("gpt2"), torch.randn(7, D_MODEL)
    other, ours = randomise(theirs.TunedLens.from_model(model)), fast.TunedLens.from_model(model)
    ours.load_state_dict(other.state_dict())
    for lens in (ours, other):
        lens(h, 1).logsumexp(-1).sum().backward()
    torch.testing.assert_close(ours[1].weight.grad, other[1].weight.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[1].bias.grad, other[1].bias.grad, atol=1e-4, rtol=1e-4)


def test_invert_is_no_worse():
    model = tiny("gpt2")
    ours, other = fast.Unembed(model), theirs.Unembed(model)
    z = ours(torch.randn(4, D_MODEL))
    assert ours.invert(z, max_iter=200).kl <= max(other.invert(z, max_iter=200).kl, 1e-3)


@pytest.mark.parametrize("model_type", KNOWN)
def test_model_surgery(model_type):
    model = tiny(model_type)
    surgery = fast.model_surgery
    assert surgery.get_final_norm(model) is their_surgery.get_final_norm(model)
    assert surgery.get_unembedding_matrix(model) is their_surgery.get_unembedding_matrix(model)
    assert surgery.get_transformer_layers(model) == their_surgery.get_transformer_layers(model)


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(1, 60),
    d_model=st.integers(1, 60),
    scale=st.sampled_from([1e-6, 0.02, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_unembedding_hash(vocab, d_model, scale, dtype):
    weight = (scale * torch.randn(vocab, d_model)).to(dtype)
    unembed = fast_unembed.Unembed.__new__(fast_unembed.Unembed)
    nn.Module.__init__(unembed)
    linear = nn.Linear(d_model, vocab, bias=False)
    linear.weight = nn.Parameter(weight)
    unembed._model_end, unembed._moved = (Resident(nn.Identity()), Resident(linear)), None
    wanted = tensor_hash(weight.float().numpy())
    assert unembed.unembedding_hash() == wanted
    with np.printoptions(precision=8, threshold=5, edgeitems=1, linewidth=200):
        assert unembed.unembedding_hash() == wanted


def test_every_parameter_is_there_in_its_place():
    """Names, order and defaults, but for those that are meant to differ."""
    for ours, other in (
        (fast.Lens, theirs.Lens),
        (fast.LogitLens, theirs.LogitLens),
        (fast.LogitLens.from_model, theirs.LogitLens.from_model),
        (fast.TunedLens, theirs.TunedLens),
        (fast.TunedLens.from_model, theirs.TunedLens.from_model),
        (fast.TunedLens.from_model_and_pretrained, theirs.TunedLens.from_model_and_pretrained),
        (fast.TunedLens.from_unembed_and_pretrained, theirs.TunedLens.from_unembed_and_pretrained),
        (fast.TunedLens.save, theirs.TunedLens.save),
        (fast.TunedLens.forward, theirs.TunedLens.forward),
        (fast.TunedLens.transform_hidden, theirs.TunedLens.transform_hidden),
        (fast.TunedLensConfig, theirs.TunedLensConfig),
        (fast.TunedLensConfig.from_dict, theirs.TunedLensConfig.from_dict),
        (fast.Unembed, theirs.Unembed),
        (fast.Unembed.invert, theirs.Unembed.invert),
        (fast_unembed.InversionOutput, theirs.InversionOutput),
    ):
        # Ours can check a lens against its model, and lack layers.
        more = ("verify", "translated_layers")
        parameters = [p for p in inspect.signature(ours).parameters.values() if p.name not in more]
        wanted = inspect.signature(other).parameters.values()
        assert [(p.name, p.kind, p.default) for p in parameters] == [(p.name, p.kind, p.default) for p in wanted]
    assert list(inspect.signature(fast.TunedLens.generate).parameters) == [
        "self",
        "model",
        "layer",
        "input_ids",
        "do_sample",
        "temp",
        "max_new_tokens",
        "tokenizer",  # ours takes texts
    ]
