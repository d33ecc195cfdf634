"""How a model's end is found out: models of no known kind, each thing a model can do there, and what is left behind."""

import pickle
import sys
import threading
import time
from dataclasses import replace

import accelerate
import pytest
import torch
import torch.nn.functional as F
from all_models import build, config_of
from coverage_table import replaced
from tiny_models import D_MODEL, VOCAB, tiny
from torch import nn
from toy_model import ToyModel
from transformers import AutoModelForCausalLM, LlamaConfig

from tuned_lens_fast import LogitLens, TunedLens, Unembed, decode_documents, decode_model, residual_stream
from tuned_lens_fast.memory import PeakMemory
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.models.comparison import close
from tuned_lens_fast.models.resident import Resident
from tuned_lens_fast.models.tracing import TracedModel

PROMPT = torch.tensor([[5, 6, 7, 8]])


def assert_logits(model, tolerance=1e-4):
    """The lens's logits of the last block's output are the model's."""
    with torch.no_grad():
        logits = model(PROMPT)
    logits = logits["logits"]
    ours = Unembed(model)(residual_stream(model, PROMPT)[-1])
    assert (ours - logits).abs().max() <= tolerance * logits.abs().max()


class Shift(nn.Module):
    def forward(self, x):
        return x.roll(1, -1)


@pytest.mark.parametrize("norm", [nn.LayerNorm(D_MODEL), nn.RMSNorm(D_MODEL, eps=1e-3), Shift(), nn.Identity()])
@pytest.mark.parametrize(
    ("around", "transform"),
    [
        ({}, (1.0, 1.0, None, None)),
        ({"before_head": lambda x: x / 9}, (1 / 9, 1.0, None, None)),
        ({"after_head": lambda z: z * 0.0625}, (1.0, 0.0625, None, None)),
        ({"after_head": lambda z: -z / 3}, (1.0, -1 / 3, None, None)),
        ({"after_head": lambda z: 1.5 * torch.tanh(z / 1.5)}, (1.0, 1.0, 1.5, None)),
        ({"after_head": lambda z: 30 * torch.tanh(0.25 * z / 30)}, (1.0, 0.25, 30.0, None)),
        ({"after_head": lambda z: z.float().div_(3)[..., :-5]}, (1.0, 1 / 3, None, VOCAB - 5)),
    ],
)
def test_what_is_around_the_head_is_measured(norm, around, transform):
    model = ToyModel(norm, **around)
    found = TracedModel(model).transform
    assert (found.factor, found.scale, found.softcap) == (
        pytest.approx(transform[0], rel=1e-6),
        pytest.approx(transform[1], rel=1e-6),
        transform[2] if transform[2] is None else pytest.approx(transform[2], rel=1e-6),
    )
    assert found.vocab == transform[3]
    assert_logits(model)


@pytest.mark.parametrize("factor", [1 / 9, 0.3])
def test_a_factor_is_exact_in_16_bits(factor):
    model = ToyModel(nn.LayerNorm(D_MODEL), before_head=lambda x: x * factor).bfloat16()
    assert Unembed(model).norm.factor == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize(
    "around",
    [
        {"before_norm": lambda h: 3 * h},
        {"before_norm": lambda h: h.tanh()},
        {"before_norm": lambda h: h.flip(-1), "after_head": lambda z: z * 2},
        {"before_head": lambda x: x.relu()},
        {"before_norm": lambda h: h[:, -4:]},
    ],
)
def test_functions_between_the_modules(around):
    """What no module does runs as a part of the model's own forward."""
    model = ToyModel(nn.LayerNorm(D_MODEL), **around)
    assert_logits(model)
    lens = TunedLens.from_model(model)
    assert lens.transform_hidden(torch.randn(2, D_MODEL), 0).shape == (2, D_MODEL)


@pytest.mark.parametrize(
    "after_head",
    [
        lambda z: z + 1,
        lambda z: z.relu(),
        lambda z: z * torch.linspace(1, 2, z.shape[-1]),
        lambda z: z[..., 5:],
        lambda z: 30 * torch.erf(z / 30),
        lambda z: z.log_softmax(-1),
        lambda z: z.masked_fill(torch.arange(z.shape[-1]) == 3, -torch.inf),
        lambda z: z.clamp(-50, 50),
        lambda z: z.repeat(1, 1, 2),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_other_transforms_are_refused(after_head, verify):
    model = ToyModel(nn.LayerNorm(D_MODEL), after_head=after_head)
    with pytest.raises(NotImplementedError, match="changes its logits after the head by more than"):
        Unembed(model, verify=verify)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_more_than_the_last_block_are_refused(dtype):
    model = ToyModel(nn.LayerNorm(D_MODEL), skip=True).to(dtype)
    for verify in (True, False):
        with pytest.raises(NotImplementedError, match="depend on more than its last block's output"):
            Unembed(model, verify=verify)


class ScaledHead(nn.Linear):
    """A logit for each token times a number of its own."""

    def forward(self, x):
        return super().forward(x) * torch.linspace(0.5, 2, VOCAB)


@pytest.mark.parametrize("verify", [True, False])
def test_a_head_that_is_more_than_linear_is_refused(verify):
    model = ToyModel(nn.LayerNorm(D_MODEL))
    model.unembedding = ScaledHead(D_MODEL, VOCAB)
    with pytest.raises(NotImplementedError, match="ScaledHead, gives other logits than its weight and bias"):
        Unembed(model, verify=verify)


#: Types with norms in and behind their blocks, or with rows of one size at the end of an untrained model.
FRESH = ["bloom", "exaone4", "gemma2", "gemma3_text", "inkling_text", "llama", "minimax", "modernbert-decoder", "olmo2"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gain", [None, 0.5, 20.0])
@pytest.mark.parametrize("model_type", FRESH)
def test_untrained_models(model_type, gain, dtype):
    """Rows of about one size come out of their last block, where a norm looks like a constant factor."""
    for seed in range(2):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(model_type), dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if gain is not None and parameter.ndim == 1 and name.endswith("weight"):
                    parameter.fill_(gain)
        assert_logits_of_rows(model.to(dtype))


def assert_logits_of_rows(model):
    """The lens's logits are the model's for random hidden states of widely differing sizes, in every row."""
    ids = torch.arange(5, 13)[None]
    sizes = torch.logspace(-2.5, 2, ids.shape[1])[:, None]
    with torch.no_grad():
        h, wanted = replaced(model, ids, sizes)
    found = Unembed(model)(h)
    assert found.shape == wanted.shape
    assert close(found, wanted)


class InStreams(ToyModel):
    """Two residual streams ``[streams, batch, positions, d]``, of which the second is read."""

    def forward(self, input_ids):
        h = self.words(input_ids)[None] * torch.tensor([1.0, 2.0])[:, None, None, None]
        for block in self.stack:
            h, _ = block(h)
        return {"logits": self.unembedding(self.last(h[1]))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "end",
    [
        {"norm": nn.RMSNorm(D_MODEL, elementwise_affine=False)},
        {"norm": nn.Identity(), "before_head": lambda x: x / x.norm(dim=-1, keepdim=True)},
        {"norm": nn.Identity(), "before_head": lambda x: x + 0.01 * x.roll(1, -1)},
        {"norm": nn.Identity(), "before_head": lambda x: 100 * torch.tanh(x / 100)},
        {"norm": nn.LayerNorm(D_MODEL), "before_norm": lambda h: h + 0.02 * h.flip(-1)},
    ],
)
def test_what_is_almost_a_factor(end, dtype):
    assert_logits_of_rows(ToyModel(**end).to(dtype))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "end",
    [
        {"norm": nn.LayerNorm(D_MODEL, eps=1e-2), "before_norm": lambda h: h.mul_(3)},
        {"norm": nn.LayerNorm(D_MODEL), "before_norm": lambda h: h.tanh_()},
        {"norm": nn.LayerNorm(D_MODEL), "before_head": lambda x: x.mul_(3)},
        {"norm": nn.LayerNorm(D_MODEL), "before_head": lambda x: x.relu_()},
        {"norm": nn.Sequential(nn.Linear(D_MODEL, D_MODEL), nn.ReLU(inplace=True))},
    ],
)
def test_what_is_done_in_place(end, verify):
    model = ToyModel(**end)
    h = torch.randn(5, D_MODEL)
    with torch.no_grad():
        wanted = model.unembedding(model.before_head(model.last(model.before_norm(h.clone()))))
    before = h.clone()
    assert close(Unembed(model, verify=verify)(h), wanted)
    assert torch.equal(h, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_head_that_gets_one_position(dtype):
    """One row is proportional to its norm."""
    norm = nn.RMSNorm(D_MODEL, elementwise_affine=False)
    model = ToyModel(norm, before_head=lambda x: x[:, -1:]).to(dtype)
    unembed = Unembed(model)
    h = torch.randn(3, D_MODEL) * torch.tensor([[0.01], [1.0], [100.0]])
    assert close(unembed(h.to(dtype)), model.unembedding(norm(h.to(dtype))))


def test_one_of_several_streams():
    model = InStreams(nn.LayerNorm(D_MODEL))
    unembed = Unembed(model)
    h = torch.randn(3, 2 * D_MODEL)
    assert close(unembed(h), model.unembedding(model.last(h[:, D_MODEL:])))


def mutated_transform(**changes):
    def mutate(unembed):
        unembed._transform = replace(unembed._transform, **changes)

    return mutate


def mutated_formula(**changes):
    def mutate(unembed):
        unembed._formula = replace(unembed._formula, **changes)

    return mutate


@pytest.mark.parametrize(
    ("model_type", "mutate", "part"),
    [
        ("gemma2", mutated_transform(softcap=None), "scale or softcap"),
        ("gemma2", mutated_transform(softcap=2.01), "scale or softcap"),
        ("llama", mutated_transform(softcap=30.0), "scale or softcap"),
        ("cohere", mutated_transform(scale=1.0), "scale or softcap"),
        ("granite", mutated_transform(scale=3.0), "scale or softcap"),
        ("hyperclovax", mutated_transform(scale=1 / 3), "scale or softcap"),
        ("minicpm3", mutated_transform(factor=1.0), "factor before its head, by 0.125"),
        ("llama", mutated_transform(factor=1.001), r"factor before its head, by 1.001"),
        ("inkling_text", mutated_transform(vocab=None), "logits of 97 tokens, the lens of 101"),
        ("llama", mutated_transform(vocab=VOCAB - 1), "logits of 101 tokens, the lens of 100"),
        ("llama", mutated_formula(eps=1e-5), "final norm"),
        ("llama", mutated_formula(weight=None), "final norm"),
        ("llama", mutated_formula(kind="layer"), "final norm"),
        ("llama", mutated_formula(unit_offset=True), "final norm"),
        ("gpt2", mutated_formula(bias=None), "final norm"),
        ("gemma", mutated_formula(unit_offset=False), "final norm"),
    ],
)
def test_verification_sees_every_mutation(model_type, mutate, part):
    model = build(model_type)
    unembed = Unembed(model)
    watched = TracedModel(model)
    watched.verify(unembed, lambda h: unembed.norm(h))
    mutate(unembed)
    with pytest.raises(NotImplementedError, match=part):
        watched.verify(unembed, lambda h: unembed.norm(h))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "mutate"),
    [
        ("gemma", mutated_formula(unit_offset=False)),
        ("gemma2", mutated_formula(unit_offset=False)),
        ("llama", mutated_formula(unit_offset=True)),
        ("llama", mutated_formula(eps=1e-4)),
        ("gpt2", mutated_transform(factor=1.1)),
        ("llama", mutated_transform(factor=1.1)),
        ("llama", mutated_transform(scale=1.1)),
    ],
)
def test_verification_in_16_bits(model_type, mutate, dtype):
    model = build(model_type).to(dtype)
    unembed = Unembed(model)
    mutate(unembed)
    with pytest.raises(NotImplementedError, match="what differs is"):
        TracedModel(model).verify(unembed, lambda h: unembed.norm(h.float()))


def test_a_large_row_hides_no_small_one():
    wanted = torch.tensor([[1.0, 2.0], [3e4, 1.0], [0.0, 0.0]])
    assert close(wanted * (1 + 1e-5), wanted)
    assert not close(wanted + torch.tensor([[0.1], [0.0], [0.0]]), wanted)
    assert not close(wanted + torch.tensor([[0.0], [0.0], [1e-6]]), wanted)


@pytest.mark.parametrize("model_type", ["phi", "gptj"])
def test_verification_sees_a_missing_bias_of_the_head(model_type):
    model = tiny(model_type)
    unembed = Unembed(model)
    head = nn.Linear(D_MODEL, VOCAB, bias=False)
    head.weight = model.lm_head.weight
    unembed._model_end = (unembed._model_end[0], Resident(head))
    with pytest.raises(NotImplementedError, match="what differs is its head"):
        TracedModel(model).verify(unembed, lambda h: unembed.norm(h))


def test_verification_sees_a_norm_that_was_guessed_wrong(monkeypatch):
    """What `verify=False` would let pass."""
    from tuned_lens_fast.nn import unembed as module

    recognise = module._recognise
    monkeypatch.setattr(module, "_recognise", lambda *args: replace(recognise(*args), eps=1.0))
    Unembed(tiny("llama"), verify=False)
    for build_lens in (LogitLens.from_model, TunedLens.from_model):
        with pytest.raises(NotImplementedError, match="what differs is its final norm"):
            build_lens(tiny("llama"))
        build_lens(tiny("llama"), verify=False)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "deepseek_v4", "gemma3n_text", "blt", "mamba", "mixtral"])
@pytest.mark.parametrize("verify", [True, False])
def test_nothing_is_left_behind(model_type, verify):
    model = build(model_type)
    model.train()
    calls = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: calls.append(module))
        module.register_forward_hook(lambda module, *_: calls.append(module))
    attributes = {module: {k: id(v) for k, v in vars(module).items()} for module in model.modules()}
    hooks = {module: [*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()}
    trained = [p.requires_grad for p in model.parameters()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    Unembed(model, verify=verify)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(p.grad is None for p in model.parameters())
    assert {module: {k: id(v) for k, v in vars(module).items()} for module in model.modules()} == attributes
    assert {module: [*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()} == hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])


#: Frequencies that these models change when they run.
ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0,
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("as_tail", [False, True])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("verify", [True, False])
def test_buffers_are_left_alone(rope, verify, as_tail):
    model = tiny("llama", max_position_embeddings=16, rope_parameters=ROPES[rope])
    if as_tail:  # what no module does runs as a part of the model's own forward
        norm = model.model.norm
        del model.model.norm
        model.model.norm = lambda h: norm(h.tanh())
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        logits = model(ids).logits
    tensors = {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()}
    assert any("inv_freq" in name for name in tensors)
    unembed = Unembed(model, verify=verify)
    assert unembed.norm.kind == ("module" if as_tail else "rms")
    unembed(torch.randn(2, D_MODEL))
    for name, buffer in model.named_buffers():
        assert id(buffer) == tensors[name][0], name
        assert torch.equal(buffer, tensors[name][1]), name
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_under_any_global_state():
    model = tiny("gemma2")
    wanted = Unembed(model)(torch.ones(1, D_MODEL))
    for context in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.device("meta"),
    ):
        with context:
            unembed = Unembed(model)
        assert torch.equal(unembed(torch.ones(1, D_MODEL)), wanted)
    torch.set_default_dtype(torch.float64)
    try:
        unembed = Unembed(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(unembed(torch.ones(1, D_MODEL)), wanted)


def test_dropout_and_draws_of_the_model():
    norm = nn.Sequential(nn.LayerNorm(D_MODEL), nn.Dropout(0.5))
    model = ToyModel(norm, before_head=lambda x: x + 0 * torch.rand_like(x)).train()
    state = torch.get_rng_state()
    unembed = Unembed(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert unembed.norm.kind == "layer"


def test_verification_is_no_looser_under_autocast():
    unembed = Unembed(tiny("llama"))
    mutated_transform(factor=1.001)(unembed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        watched = TracedModel(tiny("llama"))
        with pytest.raises(NotImplementedError, match=r"by 1\.001"):
            watched.verify(unembed, lambda h: unembed.norm(h))


@pytest.mark.parametrize("model_type", ["llama", "gemma3n_text"])
def test_threads(model_type):
    model = build(model_type)
    unembed = Unembed(model)
    h = torch.randn(8, unembed.hidden_size)
    wanted, found = unembed(h), {}

    def work(i):
        found[i] = Unembed(model)(h[i]), unembed(h[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(h))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in found.items():
        for result in results:
            torch.testing.assert_close(result, wanted[i], atol=1e-5, rtol=1e-5)
    assert len(found) == len(h)


@pytest.mark.parametrize("vocab", [2, 3, 1000])
@pytest.mark.parametrize("tied", [True, False])
def test_any_vocabulary(vocab, tied):
    model = tiny("llama", vocab_size=vocab, tie_word_embeddings=tied, pad_token_id=None)
    unembed = Unembed(model)
    assert unembed.head.vocab == vocab
    assert unembed.head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "granite", "minicpm3", "mamba", "gemma3n_text"])
def test_dtypes_are_verified_too(model_type, dtype):
    model = build(model_type).to(dtype)
    unembed = Unembed(model)
    unembed._transform = replace(unembed._transform, scale=unembed._transform.scale * 1.5)
    with pytest.raises(NotImplementedError, match="scale or softcap"):
        TracedModel(model).verify(unembed, lambda h: unembed.norm(h.float()))


def test_a_compiled_model():
    model = tiny("llama")
    compiled = torch.compile(model)
    h = torch.randn(3, D_MODEL)
    assert torch.equal(Unembed(compiled)(h), Unembed(model)(h))


@pytest.mark.parametrize("model_type", ["deepseek_v4", "gemma3n_text", "hy_v4", "qwen4_exp_text"])
def test_several_streams_through_lens_and_decode(model_type):
    model = build(model_type)
    ids = torch.tensor([[5, 6, 7, 8], [15, 16, 17, 18], [9, 8, 7, 6], [3, 4, 5, 6]])
    stream = residual_stream(model, ids)
    width = stream[0].shape[-1]
    assert width == 4 * D_MODEL
    lens = TunedLens.from_model(model)
    assert lens.config.d_model == width
    with torch.no_grad():
        for linear in lens:
            linear.weight.copy_(0.01 * torch.randn_like(linear.weight))
    found = decode_model(model, lens, ids, top_k=3)
    for layer in range(len(lens)):
        log_p = lens(stream[layer], layer).log_softmax(-1)
        torch.testing.assert_close(found.top_log_probs[layer], log_p.topk(3).values, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        own = model(ids).logits.log_softmax(-1)
    torch.testing.assert_close(found.top_log_probs[-1], own.topk(3).values, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=f"wanted .*{width}"):
        lens.unembed(torch.randn(2, D_MODEL))
    z = lens.unembed(stream[1][0])
    preimage = lens.unembed.invert(z.detach(), max_iter=20).preimage
    assert preimage.shape == stream[1][0].shape


@pytest.mark.parametrize("model_type", ["deepseek_v4", "gemma3n_text", "modernbert-decoder"])
def test_modules_of_the_end_are_the_models_own(model_type):
    """Weights changed later are seen, nothing is copied, no gradient reaches the model."""
    model = build(model_type)
    unembed = Unembed(model)
    ids = torch.tensor([[5, 6, 7]])
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in unembed.norm.module.parameters()} <= own
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        logits = model(ids).logits
    h = residual_stream(model, ids)[-1]
    torch.testing.assert_close(unembed(h), logits, atol=1e-4, rtol=1e-4)
    h.requires_grad_()
    unembed(h).logsumexp(-1).sum().backward()
    assert h.grad is not None
    assert all(p.grad is None for p in model.parameters())


def test_blocks_with_a_block_list_of_another_length():
    """The config says nothing: the list whose block runs last before the head."""
    model = ToyModel(nn.LayerNorm(D_MODEL))
    del model.config.num_hidden_layers
    path, blocks = get_transformer_layers(model)
    assert path == "stack"
    assert blocks is model.stack
    assert_logits(model)


class Lora(nn.Module):
    """As peft wraps a linear layer."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, linear.out_features, bias=False)})


def test_bad_models_are_named():
    for refused in (Unembed, TunedLens.from_model_and_pretrained):
        with pytest.raises(ValueError, match=r"Linear has no head.* Unembed.from_modules\(norm, head\)"):
            refused(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no head"):
        Unembed(tiny("gpt2").transformer)
    model = tiny("gpt2")
    model.get_output_embeddings = lambda: nn.Embedding(3, 4)
    with pytest.raises(ValueError, match=r"head is a torch\.nn\.modules\.sparse\.Embedding"):
        Unembed(model)
    model = tiny("gpt2")
    model.lm_head = Lora(model.lm_head)
    with pytest.raises(ValueError, match=r"its head has an adapter.*merge_and_unload"):
        Unembed(model)
    model = ToyModel(nn.LayerNorm(D_MODEL))
    model.stack = nn.ParameterList()
    with pytest.raises(NotImplementedError, match="no list of blocks"):
        Unembed(model)
    model = ToyModel(nn.LayerNorm(D_MODEL))
    model.config = None
    with pytest.raises(ValueError, match=r"no config.* Unembed.from_modules\(norm, head\)"):
        Unembed(model)
    model = ToyModel(nn.LayerNorm(D_MODEL), before_norm=lambda h: h @ torch.ones(3, 3))
    with pytest.raises(ValueError, match="does not run on 4 tokens"):
        Unembed(model)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "deepseek_v4", "gemma3n_text"])
@pytest.mark.parametrize("verify", [True, False])
def test_blocks_offloaded_by_accelerate(model_type, verify, tmp_path):
    model, whole = build(model_type), build(model_type)
    path, blocks = get_transformer_layers(model)
    path = path.replace("base_model", model.base_model_prefix, 1)
    device_map = {name: "cpu" for name, _ in model.named_children()}
    # Everything outside of the blocks stays; of these, some are on the disk.
    device_map = {}
    for name, module in model.named_modules():
        if name and not any(True for _ in module.children()) and not name.startswith(f"{path}."):
            device_map[name] = "cpu"
    device_map |= {name: "cpu" for name, _ in model.named_parameters() if not name.startswith(f"{path}.")}
    device_map |= {f"{path}.{i}": "disk" if i else "cpu" for i in range(len(blocks))}
    model = accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    before = {name: p.is_meta for name, p in model.named_parameters()}
    assert any(before.values())
    unembed = Unembed(model, verify=verify)
    h = torch.randn(5, unembed.hidden_size)
    assert torch.equal(unembed(h), Unembed(whole)(h))
    assert {name: p.is_meta for name, p in model.named_parameters()} == before
    ids = torch.tensor([[5, 6, 7]])
    for ours, wanted in zip(residual_stream(model, ids), residual_stream(whole, ids), strict=True):
        torch.testing.assert_close(ours, wanted)


class Quantised(nn.Linear):
    """int8 weights and their scales, as quantised blocks have them."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / self.scales).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scales, self.bias)


@pytest.mark.parametrize("verify", [True, False])
def test_quantised_blocks(verify):
    model, whole = tiny("llama"), tiny("llama")
    for block in model.model.layers:
        block.mlp.down_proj = Quantised(block.mlp.down_proj)
    h = torch.randn(3, D_MODEL)
    assert torch.equal(Unembed(model, verify=verify)(h), Unembed(whole)(h))


class Rounding(Quantised):
    """One that rounds what it is given, as products of two quantised matrices do."""

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / scale).round() * scale)


@pytest.mark.parametrize("model_type", ["llama", "phi"])  # the latter's head has a bias
def test_quantised_head(model_type):
    model = tiny(model_type)
    linear = model.lm_head
    model.lm_head = Quantised(linear)
    unembed, h = Unembed(model), torch.randn(3, D_MODEL)
    assert torch.equal(unembed.head.weight, model.lm_head.weight * model.lm_head.scales)
    assert torch.equal(unembed(h), Unembed(model, verify=False)(h))
    torch.testing.assert_close(unembed(h), model.lm_head(unembed.norm(h)))
    ids = torch.arange(5, 13)
    with torch.no_grad():
        wanted = -F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    torch.testing.assert_close(decode_model(model, LogitLens(unembed), ids).log_prob[-1, :-1], wanted)
    assert torch.equal(Unembed.from_modules(None, model.lm_head).head.weight, unembed.head.weight)
    assert torch.equal(pickle.loads(pickle.dumps(unembed))(h), unembed(h))
    model.lm_head = Rounding(linear)
    for verify in (True, False):
        with pytest.raises(NotImplementedError, match=r"quantised Rounding, gives other logits than any matrix"):
            Unembed(model, verify=verify)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_blocks_quantised_by_pytorch(tmp_path):
    """Modules that hold no weight of their own, read to the end: to statistics, and to disk."""
    model, ids = tiny("llama"), torch.arange(5, 13)
    wanted = decode_model(model, LogitLens.from_model(model), ids)
    quantise = torch.ao.quantization.quantize_dynamic
    quantise(model.model.layers, {nn.Linear}, dtype=torch.qint8, inplace=True)
    lens = LogitLens.from_model(model)
    got = decode_model(model, lens, ids)
    assert 0 < (got.entropy - wanted.entropy).abs().max() < 0.05
    decode_documents(model, lens, [ids], out=tmp_path / "run")
    quantise(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    with pytest.raises(ValueError, match=r"its head is a torch\.ao.*Linear, wanted an nn.Linear, and not a quant"):
        Unembed(model)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the growth of the resident peak")
def test_cost_at_the_size_of_smollm2():
    """SmolLM2-135M in fp32: verified in the time of a few forward passes, without a copy of its head's 113 MB."""
    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1)
    model.model.rotary_emb.inv_freq.fill_(1.0)
    model.tie_weights()
    LogitLens.from_model(model)  # what is imported or compiled once does not count
    ids = torch.arange(16)[None]
    growth, took, passes = [], [], []
    for _ in range(3):
        memory = PeakMemory(torch.device("cpu"))
        took.append(seconds(lambda: LogitLens.from_model(model)))
        growth.append(memory.growth())
        with torch.no_grad():
            passes.append(seconds(lambda: model(ids)))
    assert min(took) < 20 * min(passes)
    assert min(growth) < 48 * 2**20


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
