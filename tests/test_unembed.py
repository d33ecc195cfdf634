"""The end of a model: against the model's own logits, and float64 from plain formulas."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from all_models import build
from reference import head_inputs, logits
from tiny_models import D_MODEL, LAYERS, TYPES, VOCAB, tiny
from torch import nn
from toy_model import ToyModel
from transformers import AutoModelForCausalLM

from tuned_lens_fast import LogitLens, TunedLens, Unembed
from tuned_lens_fast.model_surgery import get_final_norm, get_transformer_layers

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def last_block_output(model, input_ids):
    """The residual stream after the last block, and the model's own logits."""
    seen = []
    _, blocks = get_transformer_layers(model)
    hook = blocks[-1].register_forward_hook(
        lambda _module, _args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        z = model(input_ids, use_cache=False).logits
    hook.remove()
    return seen[0], z


def prompt(batch=2, tokens=7):
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_are_the_models_own(model_type):
    model = tiny(model_type)
    h, wanted = last_block_output(model, prompt())
    torch.testing.assert_close(Unembed(model)(h), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_norm_and_head_describe_the_model(model_type):
    model = tiny(model_type).double()
    h, wanted = last_block_output(model, prompt())
    unembed = Unembed(model)
    _, kind, unit_offset = TYPES[model_type]
    assert (unembed.norm.kind, unembed.norm.unit_offset) == (kind, unit_offset)
    x = head_inputs([h.reshape(-1, D_MODEL)], [None], unembed.norm)
    # transformers computes some norms in fp32 whatever the model's dtype.
    torch.testing.assert_close(logits(x, unembed.head), wanted.double().reshape(1, -1, VOCAB), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eps", [1e-2, 1e-5, 1e-6])
@pytest.mark.parametrize(
    ("model_type", "name"),
    [("gpt2", "layer_norm_epsilon"), ("llama", "rms_norm_eps"), ("gemma", "rms_norm_eps")],
)
def test_eps_is_found(model_type, name, eps):
    assert Unembed(tiny(model_type, **{name: eps})).norm.eps == eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "nemotron", "olmo"])
def test_norm_is_recognised_in_every_dtype(model_type, dtype):
    model = tiny(model_type)
    wanted = Unembed(model).norm
    got = Unembed(model.to(dtype)).norm
    assert (got.kind, got.unit_offset, got.eps) == (wanted.kind, wanted.unit_offset, wanted.eps)


def test_a_kind_is_not_told_by_the_weights():
    """One of 300 hides a missing offset in bf16; zero, which training may change, hides all."""
    model = tiny("gemma2", hidden_size=256, final_logit_softcapping=30.0)
    with torch.no_grad():
        weight = model.model.norm.weight.normal_(2, 0.7)
        weight[5] = 300
    assert Unembed(model.bfloat16()).norm.unit_offset
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        unembed = Unembed(model)
        assert unembed.norm.kind == "layer"
        model.transformer.ln_f.weight.fill_(2)
    h = torch.randn(3, D_MODEL)
    torch.testing.assert_close(unembed(h), model.lm_head(model.transformer.ln_f(h)), atol=1e-5, rtol=1e-5)


class OnlyBFloat16(nn.RMSNorm):
    def forward(self, x):
        assert self.weight.dtype == torch.bfloat16
        return super().forward(x)


class Rewritten(nn.RMSNorm):
    """Keeps its weight elsewhere too."""

    def forward(self, x):
        self.__dict__.setdefault("kept", self.weight.detach().clone())
        return nn.functional.rms_norm(x, x.shape[-1:], self.kept.to(x.dtype), self.eps)


@pytest.mark.parametrize("norm", [OnlyBFloat16, Rewritten])
def test_norms_that_take_no_other_weights_run_as_modules(norm):
    model = ToyModel(norm(D_MODEL, eps=1e-5)).bfloat16()
    model(prompt())
    unembed, h = Unembed(model), torch.randn(3, D_MODEL).bfloat16()
    assert unembed.norm.kind == "module"
    torch.testing.assert_close(unembed(h), model.unembedding(model.last(h)))


class ConstantEps(nn.Module):
    """Keeps its eps to itself, and another number where an eps could be."""

    def __init__(self, eps):
        super().__init__()
        self.eps_of_forward = [eps]
        self.dropout = 0.1

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps_of_forward[0])


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_eps_is_measured(eps):
    norm = Unembed(ToyModel(ConstantEps(eps))).norm
    assert (norm.kind, norm.eps) == ("rms", eps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_model", [2, 8192])
@pytest.mark.parametrize(("cls", "kind"), [(nn.LayerNorm, "layer"), (nn.RMSNorm, "rms")])
def test_kinds_are_told_apart_at_any_width(cls, kind, d_model, dtype):
    model = ToyModel(cls(d_model, eps=1e-5), d_model, vocab=3).to(dtype)
    assert Unembed(model, verify=False).norm.kind == kind


class GatedNorm(nn.Module):
    """Fits neither formula."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D_MODEL))

    def forward(self, x):
        return x * torch.sigmoid(x) * self.weight


class TwoWeights(nn.RMSNorm):
    def __init__(self):
        super().__init__(D_MODEL)
        self.gain = nn.Parameter(torch.rand(D_MODEL))


@pytest.mark.parametrize("norm", [GatedNorm, TwoWeights])
def test_other_norms_run_as_modules(norm):
    model = tiny("llama")
    model.model.norm = norm()
    h, wanted = last_block_output(model, prompt())
    unembed = Unembed(model)
    assert unembed.norm.kind == "module"
    torch.testing.assert_close(unembed(h), wanted, atol=1e-5, rtol=1e-5)


def snapshot(model):
    return {
        name: (p.data_ptr(), p.dtype, p.device, p.requires_grad, p.grad is None, p.detach().clone())
        for name, p in model.named_parameters()
    }


def assert_untouched(model, before):
    after = snapshot(model)
    for name, values in before.items():
        assert after[name][:-1] == values[:-1], name
        assert torch.equal(after[name][-1], values[-1]), name


def test_shares_the_models_storage():
    model = tiny("gemma2")
    unembed = TunedLens.from_model(model).unembed
    norm, head = get_final_norm(model).weight, model.lm_head.weight
    for tensor in (unembed.final_norm.weight, unembed.norm.weight):
        assert tensor.data_ptr() == norm.data_ptr()
    for tensor in (unembed.unembedding.weight, unembed.head.weight):
        assert tensor.data_ptr() == head.data_ptr()
        assert not tensor.requires_grad


def train(lens):
    lens.train()
    optimizer = torch.optim.SGD(lens.parameters(), lr=0.1)
    lens(torch.randn(4, D_MODEL), 1).logsumexp(-1).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        lambda lens: lens.half(),
        lambda lens: lens.to(torch.float64),
        lambda lens: lens.to("meta"),
        lambda lens: lens.requires_grad_(False),
        lambda lens: lens.train(),
        lambda lens: lens.unembed.unembedding.half().requires_grad_(True),
        lambda lens: lens.unembed.final_norm.to("meta"),
        lambda lens: lens.apply(lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Linear) else None),
        train,
    ],
)
@pytest.mark.parametrize("module_norm", [False, True])
def test_the_model_stays_as_it_was(change, module_norm):
    model = tiny("gpt2")
    if module_norm:
        model.transformer.ln_f = GatedNorm()
    lens = TunedLens.from_model(model)
    before = snapshot(model)
    change(lens)
    assert_untouched(model, before)
    assert not any(module.training for module in model.modules() if not isinstance(module, GatedNorm))


def test_sees_the_model_change():
    model = tiny("llama")
    lens = LogitLens.from_model(model)
    h = torch.randn(5, D_MODEL)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.model.norm.weight = nn.Parameter(torch.rand(D_MODEL))
    torch.testing.assert_close(lens(h, 0), model.lm_head(model.model.norm(h)), atol=1e-5, rtol=1e-5)
    model.double()
    assert lens(h, 0).dtype == torch.float64
    torch.testing.assert_close(lens(h.double(), 0), model.lm_head(model.model.norm(h.double())), atol=1e-5, rtol=1e-5)


def test_a_lens_moved_away_keeps_a_copy_there():
    model = tiny("gpt2")
    lens = TunedLens.from_model(model).to("meta")
    assert lens.unembed.norm.weight.is_meta
    assert lens(torch.empty(2, D_MODEL, device="meta"), 0).shape == (2, VOCAB)
    model.to("meta")
    assert lens.unembed.unembedding.weight.is_meta
    lens = LogitLens.from_model(tiny("gpt2")).to("cpu")
    assert lens.unembed._moved is None


def test_deep_copy_reads_the_same_model():
    model = tiny("gpt2")
    lens = TunedLens.from_model(model)
    duplicate = copy.deepcopy(lens)
    assert duplicate.unembed.head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    with torch.no_grad():
        duplicate[0].weight.fill_(1)
    assert not lens[0].weight.any()


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "deepseek_v4", "gemma3n_text"])
def test_pickled_lens_works_alone(model_type):
    model = tiny(model_type) if model_type in TYPES else build(model_type)
    lens = LogitLens.from_model(model)
    h = torch.randn(5, lens.unembed.hidden_size)
    file = io.BytesIO()
    torch.save(lens, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    wanted = lens(h, 0)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert torch.equal(loaded(h, 0), wanted)


def test_the_users_hooks_are_not_run():
    model, calls = tiny("llama"), []
    model.model.norm.register_forward_hook(lambda *_: calls.append("norm"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    LogitLens.from_model(model)(torch.randn(3, D_MODEL), 0)
    model.model.norm = GatedNorm()
    model.model.norm.register_forward_hook(lambda *_: calls.append("module norm"))
    LogitLens.from_model(model)(torch.randn(3, D_MODEL), 0)
    assert calls == []


@pytest.mark.parametrize("h_dtype", DTYPES)
@pytest.mark.parametrize("model_dtype", DTYPES)
def test_dtypes(model_dtype, h_dtype):
    model = tiny("gemma2").to(model_dtype)
    unembed = Unembed(model)
    h = (3 * torch.randn(4, 5, D_MODEL)).to(h_dtype)
    z = unembed(h)
    assert z.dtype == model_dtype
    wanted = logits(head_inputs([h.reshape(-1, D_MODEL)], [None], unembed.norm), unembed.head).reshape(4, 5, VOCAB)
    worst = 8 * max(torch.finfo(model_dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(z.double(), wanted, atol=worst, rtol=worst)


def test_large_residuals_do_not_overflow_in_fp16():
    model = tiny("llama").half()
    h = torch.randn(3, D_MODEL) * 1e5
    assert Unembed(model)(h).isfinite().all()


def test_empty_strided_and_nan_rows():
    unembed = Unembed(tiny("gpt2"))
    assert unembed(torch.empty(0, 3, D_MODEL)).shape == (0, 3, VOCAB)
    h = torch.randn(D_MODEL, 6)
    clean = unembed(h.T.contiguous())
    torch.testing.assert_close(unembed(h.T), clean)
    h[3, 2] = torch.nan
    z = unembed(h.T)
    assert z[2].isnan().all()
    kept = [0, 1, 3, 4, 5]
    torch.testing.assert_close(z[kept], clean[kept])


def test_bad_hidden_states():
    unembed = Unembed(tiny("gpt2"))
    with pytest.raises(ValueError, match=r"h: got shape \[2, 33\], wanted \[..., 32\]"):
        unembed(torch.randn(2, 33))
    with pytest.raises(ValueError, match=r"h: got shape \[\]"):
        unembed(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"h: got torch\.int64"):
        unembed(torch.ones(2, D_MODEL, dtype=torch.long))


def test_gradient_with_respect_to_h():
    model = tiny("gemma2").double()
    unembed = Unembed(model)
    h = torch.randn(2, D_MODEL, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: unembed(h).logsumexp(-1), h)
    assert all(p.grad is None for p in model.parameters())


def test_models_without_weights_or_head():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny("llama").config)
    for verify in (True, False):
        with pytest.raises(ValueError, match=r"is not loaded \(meta device\)"):
            Unembed(model, verify=verify)
    model = tiny("llama")
    model.model.layers.to("meta")
    with pytest.raises(ValueError, match=r"model.layers.0.* is not loaded"):
        Unembed(model)
    h = torch.randn(2, D_MODEL)
    assert torch.equal(Unembed(model, verify=False)(h), Unembed(tiny("llama"))(h))
    with pytest.raises(ValueError, match="no head"):
        Unembed(tiny("gpt2").transformer)


def test_a_head_that_is_quantised_later_is_named():
    model = tiny("gpt2")
    unembed = Unembed(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, D_MODEL, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"its head has become torch\.int8.* make the lens anew"):
        unembed(torch.randn(1, D_MODEL))


class HookedUnembed(nn.Module):
    def __init__(self):
        super().__init__()
        self.W_U = nn.Parameter(torch.randn(D_MODEL, VOCAB))
        self.b_U = nn.Parameter(torch.randn(VOCAB))


class HookedLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1e-5
        self.w = nn.Parameter(torch.randn(D_MODEL))
        self.b = nn.Parameter(torch.randn(D_MODEL))

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.w + self.b


def test_a_transformer_lens_model():
    model = nn.Module()
    model.ln_final, model.unembed = HookedLayerNorm(), HookedUnembed()
    model.cfg = SimpleNamespace(d_model=D_MODEL, n_layers=LAYERS)
    unembed, h = Unembed(model, verify=False), torch.randn(4, D_MODEL)
    assert unembed.norm.kind == "layer"
    assert unembed.unembedding.weight.data_ptr() == model.unembed.W_U.data_ptr()
    wanted = model.ln_final(h) @ model.unembed.W_U + model.unembed.b_U
    torch.testing.assert_close(unembed(h), wanted, atol=1e-5, rtol=1e-5)
    model.double()
    assert unembed(h).dtype == torch.float64


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_invert_finds_a_preimage(model_type):
    unembed = Unembed(tiny(model_type))
    z = unembed(3 * torch.randn(3, 2, D_MODEL))
    found = unembed.invert(z, tol=1e-6)
    assert found.preimage.shape == (3, 2, D_MODEL)
    assert found.nfev >= 1
    p, q = z.double().log_softmax(-1), unembed(found.preimage).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert kl.max() < 1e-3
    torch.testing.assert_close(found.kl.double(), kl.mean(), atol=1e-5, rtol=1e-3)
    assert found.loss == found.kl


def test_invert_options():
    model = tiny("gpt2")
    unembed = Unembed(model)
    z = unembed(torch.randn(2, D_MODEL)).detach()
    masked = z.clone()
    masked[:, :5] = -torch.inf
    assert unembed.invert(masked, max_iter=20).loss.isfinite()
    h0 = torch.randn(2, D_MODEL)
    start = h0.clone()
    few = unembed.invert(z, h0=h0, optimizer="sgd", max_iter=3, tol=0.0)
    many = unembed.invert(z, h0=h0, optimizer="sgd", max_iter=100, tol=0.0)
    assert (few.nfev, many.nfev) == (3, 100)
    assert many.kl < few.kl
    assert torch.equal(h0, start)
    prior = torch.distributions.MultivariateNormal(torch.zeros(D_MODEL), torch.eye(D_MODEL))
    assert unembed.invert(z, prior=prior, prior_weight=0.1, max_iter=5).loss > 0
    nothing = unembed.invert(z, weight=torch.zeros(VOCAB))
    assert nothing.kl == 0
    with torch.no_grad():
        assert unembed.invert(z, max_iter=5).nfev >= 1
    assert all(p.grad is None for p in model.parameters())


def test_invert_errors():
    unembed = Unembed(tiny("gpt2"))
    with pytest.raises(ValueError, match=r"logits: got shape \[2, 7\]"):
        unembed.invert(torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"h0: got shape \[1, 32\], wanted \[2, 32\]"):
        unembed.invert(torch.randn(2, VOCAB), h0=torch.randn(1, D_MODEL))
    with pytest.raises(ValueError, match="'adam'"):
        unembed.invert(torch.randn(2, VOCAB), optimizer="adam")
    with pytest.raises(RuntimeError, match="the loss is nan"):
        unembed.invert(torch.full((2, VOCAB), torch.nan))
