"""Where the parts of a model lie."""

import pytest
import torch
from tiny_models import LAYERS, TYPES, tiny
from torch import nn
from toy_model import ToyModel

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


def test_transforms_are_measured_not_read_by_name():
    wanted = {
        "gemma2": (1.0, 2.0),
        "cohere": (0.3, None),
        "granite": (1 / 3, None),
        "hyperclovax": (3.0, None),
        "llama": (1.0, None),
    }
    for model_type, (scale, softcap) in wanted.items():
        transform = model_surgery.get_logit_transform(tiny(model_type))
        assert transform.scale == pytest.approx(scale, rel=1e-7)
        assert transform.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-7))
    llama = tiny("llama")
    llama.config.logit_scale = 9.0
    llama.config.final_logit_softcapping = 9.0
    assert model_surgery.get_logit_transform(llama) == model_surgery.LogitTransform()


def test_a_model_without_final_norm():
    model = tiny("opt")
    model.base_model.decoder.final_layer_norm = None
    assert isinstance(model_surgery.get_final_norm(model), nn.Identity)


def test_the_blocks_are_found_without_running_or_weights():
    with torch.device("meta"):
        model = ToyModel(nn.LayerNorm(8), 8)
    model.forward = None
    assert model_surgery.get_transformer_layers(model) == ("stack", model.stack)


def test_towers_with_as_many_layers_are_passed_over():
    model = ToyModel(nn.LayerNorm(8), 8)
    model.tower = ToyModel(nn.LayerNorm(8), 8)  # with a config of its own
    model.stack, stack = None, model.stack
    model.text = nn.Module()
    model.text.stack = stack
    model.text.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
    assert model_surgery.get_transformer_layers(model) == ("text.stack", stack)


def test_what_cannot_be_read_is_named():
    model = tiny("llama")
    del model.model.norm
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM .*'llama'.* does not run"):
        model_surgery.get_final_norm(model)
    for function in (model_surgery.get_unembedding_matrix, model_surgery.get_final_norm):
        with pytest.raises(ValueError, match="no head"):
            function(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no config"):
        model_surgery.get_transformer_layers(nn.Linear(2, 2))
    model.set_output_embeddings(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match=r"head is a torch\.nn\.modules\.sparse\.Embedding"):
        model_surgery.get_unembedding_matrix(model)
