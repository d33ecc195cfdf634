"""What attention and MLP add to the stream, against the modules' own outputs and the stream itself."""

import pytest
import tiny_text_model
import torch
from tiny_models import D_MODEL, LAYERS, TYPES, tiny

import tuned_lens_fast as tl

#: Their attention and MLP read the same stream.
PARALLEL = {"gptj", "codegen", "gpt_neox", "phi", "cohere"}
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", sorted(TYPES.keys() - {"lfm2"}))
def test_the_parts_add_up_to_the_stream(model_type):
    model = tiny(model_type)
    stream = torch.stack(tl.residual_stream(model, IDS))
    attention, mlp = tl.capture(model, IDS, "attn"), tl.capture(model, IDS, "mlp")
    assert attention.shape == mlp.shape == (LAYERS, *IDS.shape, D_MODEL)
    scale = stream.abs().max().item()
    torch.testing.assert_close(stream[0] + attention.sum(0) + mlp.sum(0), stream[-1], rtol=1e-5, atol=1e-5 * scale)
    # Attention alone reads other positions: of the first token it sees nothing else, and later tokens change it.
    other = IDS.clone()
    other[:, 0] += 1 - 2 * (other[:, 0] > 50).long()
    assert not torch.equal(tl.capture(model, other, "attn")[0, :, -1], attention[0, :, -1])
    if model_type in PARALLEL:
        torch.testing.assert_close(tl.capture(model, other, "mlp")[0, :, 1:], mlp[0, :, 1:])
        with pytest.raises(ValueError, match=f"at: got 'mid', and block 0 of .*'{model_type}'.* side by side"):
            tl.capture(model, IDS, "mid")
    else:
        middle = tl.capture(model, IDS, "mid")
        torch.testing.assert_close(middle, stream[:-1] + attention, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_they_are_what_the_modules_return(dtype, implementation):
    model = tiny("llama").to(dtype)
    model.set_attn_implementation(implementation)
    wanted = {"attn": [], "mlp": []}
    hooks = []
    for block in model.model.layers:
        hooks.append(block.self_attn.register_forward_hook(lambda *a: wanted["attn"].append(a[-1][0])))
        hooks.append(block.mlp.register_forward_hook(lambda *a: wanted["mlp"].append(a[-1])))
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    for at, parts in wanted.items():
        assert torch.equal(tl.capture(model, IDS, at), torch.stack(parts))


def test_scaled_parts_and_those_in_parallel_are_as_they_are_added():
    model = tiny("granite", residual_multiplier=0.25)
    wanted = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *a: wanted.append(0.25 * a[-1]))
    found = tl.capture(model, IDS, "mlp")[1]
    hook.remove()
    torch.testing.assert_close(found, wanted[0])
    model = tiny("gptj")
    hook = model.transformer.h[2].attn.register_forward_hook(lambda *a: wanted.append(a[-1][0]))
    found = tl.capture(model, IDS, "attn")[2]
    hook.remove()
    assert torch.equal(found, wanted[1])


def test_the_head_and_a_lens():
    model, tokenizer = tiny_text_model.make()
    lens = tl.LogitLens.from_model(model)
    texts = ["a tuned lens", "b"]
    asked = {"tokenizer": tokenizer}
    at_head = tl.capture(model, texts, "head", **asked)
    with torch.no_grad():
        wanted = model(torch.tensor([tokenizer(texts[0])["input_ids"]])).logits[0]
    torch.testing.assert_close(at_head[0] @ model.lm_head.weight.T, wanted, atol=1e-4, rtol=1e-4)
    assert tl.capture(model, texts[0], "head", **asked).shape == (len(texts[0]), tiny_text_model.D_MODEL)
    stats = lens.decode(tl.capture(model, texts, "mid", **asked), reference=at_head, watch=["a"], **asked)
    assert stats.kl.shape == (tiny_text_model.LAYERS, 2, len(texts[0]))
    assert stats.kl.isfinite().all()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("model_type", "at", "error", "message"),
    [
        ("llama", "attention", ValueError, "at: got 'attention', wanted one of 'attn', 'mlp', 'mid', 'head'"),
        ("lfm2", "attn", NotImplementedError, "block 0 of .*'lfm2'.*, a Lfm2DecoderLayer of Lfm2ShortConv, Lfm2MLP"),
    ],
)
def test_refuses(model_type, at, error, message):
    with pytest.raises(error, match=message):
        tl.capture(tiny(model_type), IDS, at)


def test_refuses_a_stream_that_is_more_than_a_sum():
    model = tiny("llama")
    model.model.layers[1].register_forward_hook(lambda *a: 2 * a[-1])
    with pytest.raises(NotImplementedError, match=r"block 1 of .* does more to the residual stream than to add to it"):
        tl.capture(model, IDS, "mlp")
