"""Where the parts of a model lie."""

import pytest
import torch
from tiny_models import LAYERS, TYPES, tiny
from torch import nn

from tuned_lens_fast import model_surgery


@pytest.mark.parametrize("model_type", TYPES)
def test_parts(model_type):
    model = tiny(model_type)
    path, layers = model_surgery.get_transformer_layers(model)
    assert isinstance(layers, nn.ModuleList)
    assert len(layers) == LAYERS
    assert path.startswith("base_model.")
    assert model.get_submodule(path.replace("base_model", model.base_model_prefix, 1)) is layers
    head = model_surgery.get_unembedding_matrix(model)
    assert head is model.get_output_embeddings()

    received = {}
    norm = model_surgery.get_final_norm(model)
    norm.register_forward_hook(lambda _module, args, output: received.update(norm=(args[0], output)))
    head.register_forward_hook(lambda _module, args, _output: received.update(head=args[0]))
    layers[-1].register_forward_hook(
        lambda _module, _args, output: received.update(block=output[0] if isinstance(output, tuple) else output)
    )
    model(torch.tensor([[5, 6, 7]]), use_cache=False)
    assert torch.equal(received["block"], received["norm"][0])
    factor = model_surgery.get_logit_transform(model).factor
    torch.testing.assert_close(received["head"], received["norm"][1] * factor)


def test_transforms_come_from_the_type_not_the_name():
    wanted = {
        "gemma2": (1.0, 2.0),
        "cohere": (0.3, None),
        "granite": (1 / 3, None),
        "hyperclovax": (3.0, None),
        "llama": (1.0, None),
    }
    for model_type, (scale, softcap) in wanted.items():
        transform = model_surgery.get_logit_transform(tiny(model_type))
        assert (transform.scale, transform.softcap) == (pytest.approx(scale), softcap)
    llama = tiny("llama")
    llama.config.logit_scale = 9.0
    llama.config.final_logit_softcapping = 9.0
    assert model_surgery.get_logit_transform(llama) == model_surgery.LogitTransform()


def test_wrapped_decoders():
    """A multimodal wrapper keeps its decoder in `language_model`."""
    inner = tiny("llama")
    wrapper = nn.Module()
    wrapper.base_model = nn.Module()
    wrapper.base_model.language_model = inner.model
    assert model_surgery.get_final_norm(wrapper) is inner.model.norm
    assert model_surgery.get_transformer_layers(wrapper) == (
        "base_model.language_model.layers",
        inner.model.layers,
    )


def test_what_cannot_be_read_is_named():
    model = tiny("opt")
    model.base_model.decoder.final_layer_norm = None
    with pytest.raises(ValueError, match=r"OPTForCausalLM .*'opt'.*final_layer_norm is None"):
        model_surgery.get_final_norm(model)
    model = tiny("llama")
    del model.model.norm
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM .*'llama'"):
        model_surgery.get_final_norm(model)
    del model.model.layers
    with pytest.raises(NotImplementedError, match="no list of blocks"):
        model_surgery.get_transformer_layers(model)
    model.config.model_type = "reformer"
    with pytest.raises(NotImplementedError, match="two residual streams"):
        model_surgery.get_final_norm(model)
    with pytest.raises(ValueError, match="no `base_model`"):
        model_surgery.get_final_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no `base_model`"):
        model_surgery.get_transformer_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no head"):
        model_surgery.get_unembedding_matrix(nn.Linear(2, 2))
    model.set_output_embeddings(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="head is a Embedding"):
        model_surgery.get_unembedding_matrix(model)
