"""Lenses on what is no plain model of transformers: a user's own modules, nnsight's and TransformerLens's models.

Compared with the logits that the model itself computes from its own last residual stream.
"""

import importlib
import warnings

import pytest
import tiny_text_model
import torch
import torch.nn.functional as F
from tiny_models import D_MODEL, LAYERS, VOCAB, tiny
from torch import nn

from tuned_lens_fast import LogitLens, TunedLens, TunedLensConfig, Unembed, model_surgery, residual_stream
from tuned_lens_fast.engines.interface import Norm
from tuned_lens_fast.plotting import PredictionTrajectory

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])


def check(lens_logits, wanted):
    assert lens_logits.shape == wanted.shape
    assert (lens_logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# --- a user's own modules ---


class Centred(nn.Module):
    """A norm that no formula of ours gives."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, h):
        return self.gain * (h - h.median(-1, keepdim=True).values) / (h.abs().mean(-1, keepdim=True) + 1e-3)


def randomised(module, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(D_MODEL, eps=1e-4), "layer"),
    "LayerNorm without bias": (lambda: nn.LayerNorm(D_MODEL, bias=False), "layer"),
    "LayerNorm without weight": (lambda: nn.LayerNorm(D_MODEL, elementwise_affine=False), "layer"),
    "RMSNorm": (lambda: nn.RMSNorm(D_MODEL, eps=1e-6), "rms"),
    "a module around it": (lambda: nn.Sequential(nn.RMSNorm(D_MODEL, eps=3e-6)), "rms"),
    "two in a row": (lambda: nn.Sequential(nn.LayerNorm(D_MODEL), nn.RMSNorm(D_MODEL)), "module"),
    "the user's": (lambda: Centred(D_MODEL), "module"),
    "none": (lambda: None, "identity"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_modules(name, bias, dtype):
    norm, kind = NORMS[name][0](), NORMS[name][1]
    norm = norm if norm is None else randomised(norm).to(dtype)
    head = randomised(nn.Linear(D_MODEL, VOCAB, bias=bias)).to(dtype)
    unembed = Unembed.from_modules(norm, head, factor=0.5, scale=3.0, softcap=20.0)
    assert unembed.norm.kind == kind
    h = torch.randn(4, 3, D_MODEL, dtype=dtype)
    x = h if norm is None else norm(h)
    wanted = 20 * torch.tanh(3 * head(0.5 * x) / 20)
    check(unembed(h), wanted)
    check(Unembed.from_modules(norm, head)(h), head(x))
    stats = LogitLens(unembed).decode(h, stats=["entropy"])
    log_p = wanted.double().log_softmax(-1)
    torch.testing.assert_close(stats.entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-3, rtol=1e-5)
    assert unembed.head.weight.data_ptr() == head.weight.data_ptr()
    assert list(unembed.parameters()) == []
    lens = TunedLens(unembed, TunedLensConfig("mine", D_MODEL, 3))
    assert torch.equal(lens(h, 1), unembed(h))
    assert lens.config.unembed_hash == unembed.unembedding_hash()


def test_new_weights_in_the_modules_are_seen():
    norm, head = nn.LayerNorm(D_MODEL), nn.Linear(D_MODEL, VOCAB)
    unembed, h = Unembed.from_modules(norm, head), torch.randn(2, D_MODEL)
    randomised(head, 1), randomised(norm, 2)
    check(unembed(h), head(norm(h)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("norm", [nn.LayerNorm, Centred])
def test_modules_of_two_dtypes(norm, dtype):
    norm, head = randomised(norm(D_MODEL)).to(dtype), randomised(nn.Linear(D_MODEL, VOCAB))
    h = torch.randn(4, D_MODEL)
    wanted = head(norm(h.to(dtype)).float())
    found = Unembed.from_modules(norm, head)(h)
    assert (found - wanted).abs().max() <= 16 * torch.finfo(dtype).eps * wanted.abs().max() + 1e-4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"unembedding": nn.Embedding(VOCAB, D_MODEL)}, TypeError, "unembedding: got a Embedding, wanted an nn.Linear"),
        ({"unembedding": torch.randn(VOCAB, D_MODEL)}, TypeError, "unembedding: got a Tensor"),
        ({"final_norm": F.layer_norm}, TypeError, "final_norm: got a function"),
        ({"final_norm": nn.LayerNorm(16)}, ValueError, r"final_norm: it does not take hidden states \[2, 32\]"),
        (
            {"final_norm": nn.LayerNorm(16, elementwise_affine=False)},
            ValueError,
            r"final_norm: it does not take hidden",
        ),
        ({"final_norm": nn.Linear(32, 16)}, ValueError, r"final_norm: it gives \[2, 16\]"),
        ({"final_norm": nn.LayerNorm(32, device="meta")}, ValueError, "final_norm: its weights are not loaded"),
        ({"unembedding": nn.Linear(32, 5, device="meta")}, ValueError, "unembedding: its weights are not loaded"),
        ({"factor": "2"}, TypeError, "factor: got a str"),
        ({"scale": True}, TypeError, "scale: got a bool"),
        ({"scale": None}, TypeError, "scale: got a NoneType"),
        ({"scale": float("nan")}, ValueError, "scale: got nan"),
        ({"factor": 0}, ValueError, "factor: got 0"),
        ({"softcap": 0.0}, ValueError, r"softcap: got 0\.0, wanted a positive number"),
        ({"softcap": -3}, ValueError, "softcap: got -3"),
    ],
)
def test_modules_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Unembed.from_modules(**{"final_norm": nn.LayerNorm(32), "unembedding": nn.Linear(32, VOCAB), **arguments})


# --- PyTorch's wrappers ---


def test_data_parallel():
    model = tiny("llama")
    h = torch.randn(2, D_MODEL)
    for wrapped in (
        nn.DataParallel(model),
        torch.compile(nn.DataParallel(model)),
        nn.DataParallel(torch.compile(model)),
    ):
        assert torch.equal(Unembed(wrapped)(h), Unembed(model)(h))
        assert model_surgery.get_final_norm(wrapped) is model.model.norm
        assert len(TunedLens.from_model(wrapped)) == LAYERS
        assert torch.equal(residual_stream(wrapped, IDS)[-1], residual_stream(model, IDS)[-1])


# --- nnsight ---


@pytest.fixture(scope="module")
def nnsight():
    return pytest.importorskip("nnsight", reason="nnsight is not installed, whose models are read here")


@pytest.fixture(params=["NNsight", "LanguageModel"])
def envoy(nnsight, request):
    model, tokenizer = tiny_text_model.make()
    randomised(model.model.norm)
    model.config.name_or_path = "some/model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LanguageModel is deprecated
        return (
            nnsight.NNsight(model) if request.param == "NNsight" else nnsight.LanguageModel(model, tokenizer=tokenizer)
        )


def test_nnsight(envoy):
    with envoy.trace(IDS):
        h = envoy.model.layers[-1].output.save()
        wanted = envoy.lm_head.output.save()
    lens = TunedLens.from_model(envoy)
    assert lens.config.base_model_name_or_path == "some/model"
    assert len(lens) == envoy.config.num_hidden_layers
    for unembed in (Unembed(envoy), Unembed(envoy, verify=False), lens.unembed, LogitLens.from_model(envoy).unembed):
        check(unembed(h), wanted)
        assert unembed.norm.kind == "rms"
    assert unembed.head.weight.data_ptr() == envoy._module.lm_head.weight.data_ptr()
    assert model_surgery.get_final_norm(envoy) is envoy._module.model.norm
    assert model_surgery.get_transformer_layers(envoy)[1] is envoy._module.model.layers


def test_nnsight_still_traces_and_lenses_work_inside(envoy):
    lens = LogitLens.from_model(envoy)
    with envoy.trace(IDS):
        envoy.model.layers[0].output[:] = 0
        read = lens(envoy.model.layers[-1].output, 0).save()
        wanted = envoy.lm_head.output.save()
    check(read, wanted)


def test_a_model_that_nnsight_has_wrapped(envoy):
    """It stays wrapped when its envoy is gone."""
    model = envoy._module
    h = torch.randn(4, D_MODEL)
    check(Unembed(model)(h), model.lm_head(model.model.norm(h)))


def test_a_model_that_nnsight_has_not_loaded(nnsight, tmp_path):
    _, tokenizer = tiny_text_model.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        envoy, loaded = (
            nnsight.LanguageModel(str(tmp_path), tokenizer=tokenizer, dispatch=dispatch) for dispatch in (False, True)
        )
    with pytest.raises(ValueError, match="nnsight has not loaded its weights; wrap it with dispatch=True"):
        Unembed(envoy)
    assert len(TunedLens.from_model(loaded)) == tiny_text_model.LAYERS


# --- TransformerLens ---


@pytest.fixture(scope="module")
def transformer_lens():
    return pytest.importorskip(
        "transformer_lens", reason="transformer_lens is not installed, whose models are read here"
    )


#: type -> class in transformers
BRIDGED = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "cohere": "CohereForCausalLM",
    "granite": "GraniteForCausalLM",
}


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("model_type", BRIDGED)
def test_bridge(transformer_lens, model_type, folded):
    sources = importlib.import_module("transformer_lens.model_bridge.sources")
    model = tiny(model_type)
    model.config.name_or_path = "some/model"
    bridge = sources.build_bridge_from_module(model, BRIDGED[model_type], hf_config=model.config)
    if folded:
        bridge.enable_compatibility_mode(disable_warnings=True)
    with torch.no_grad():
        wanted, cache = bridge.run_with_cache(IDS)
    h = cache[f"blocks.{LAYERS - 1}.hook_out"]
    lens = TunedLens.from_model(bridge)
    assert lens.config.base_model_name_or_path == "some/model"
    assert len(lens) == LAYERS
    for unembed in (Unembed(bridge), Unembed(bridge, verify=False), lens.unembed, LogitLens.from_model(bridge).unembed):
        check(unembed(h), wanted)
        assert unembed.norm.kind in ("layer", "rms")
    assert unembed.head.weight.data_ptr() == bridge.W_U.data_ptr()
    assert len(model_surgery.get_transformer_layers(bridge)[1]) == LAYERS
    with torch.no_grad():
        assert torch.equal(bridge(IDS), wanted)


@pytest.fixture(scope="module")
def hooked(transformer_lens):
    """A function that makes a HookedTransformer, random in every parameter."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("this transformer_lens has no HookedTransformer, which ended with 3.9; the bridge took its place")

    def make(**config):
        values = {"n_layers": LAYERS, "d_model": D_MODEL, "n_ctx": 16, "d_head": 8, "d_vocab": VOCAB, "act_fn": "gelu"}
        values |= config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            return randomised(HookedTransformer(HookedTransformerConfig(**values)))

    return make


@pytest.mark.parametrize("softcap", [-1.0, 5.0])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("kind", ["LN", "LNPre", "RMS", "RMSPre", None])
def test_hooked_transformer(hooked, kind, fold, softcap):
    model = hooked(normalization_type=kind, output_logits_soft_cap=softcap)
    if fold:
        model.process_weights_(fold_ln=True, center_writing_weights=kind in ("LN", "LNPre"), center_unembed=softcap < 0)
    with torch.no_grad():
        wanted, cache = model.run_with_cache(IDS)
    assert model.b_U.abs().max() > 0
    h = cache["resid_post", LAYERS - 1]
    lens = TunedLens.from_model(model)
    assert len(lens) == LAYERS
    for unembed in (Unembed(model), Unembed(model, verify=False), lens.unembed, LogitLens.from_model(model).unembed):
        check(unembed(h), wanted)
    assert unembed.norm.kind == {"L": "layer", "R": "rms", "N": "identity"}[str(kind)[0]]
    assert unembed.head.softcap == (softcap if softcap > 0 else None)
    assert unembed.head.weight.data_ptr() == model.W_U.data_ptr()
    if kind is None:
        return  # a stream that nothing normalises grows to logits of 1e9, which no fp32 holds to a nat
    states = torch.stack([cache["resid_pre", i] for i in range(LAYERS)])
    reference = unembed.norm(h)
    stats = lens.decode(states, reference=reference)
    log_q, log_p = (z.double().log_softmax(-1) for z in (unembed(states), wanted))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(stats.kl.double(), kl, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("component", ["resid_pre", "resid_mid", "attn_out"])
def test_a_trajectory_of_a_hooked_transformers_cache(hooked, component):
    model = hooked(normalization_type="LN")
    model.tokenizer = None
    lens = randomised(TunedLens.from_model(model))
    with torch.no_grad():
        logits, cache = model.run_with_cache(IDS)
        make = PredictionTrajectory.from_lens_and_cache
        found = make(lens, IDS, cache, logits, targets=IDS, residual_component=component)
        z = torch.stack([*(lens(cache[component, i], i) for i in range(LAYERS)), logits], 1).double().log_softmax(-1)
    wanted = -(z.exp() * z).sum(-1)
    torch.testing.assert_close(torch.from_numpy(found.entropy().stats).double(), wanted[0], atol=1e-3, rtol=1e-3)
    kl = (z[:, -1:].exp() * (z[:, -1:] - z)).sum(-1)
    torch.testing.assert_close(torch.from_numpy(found.forward_kl().stats).double(), kl[0], atol=1e-2, rtol=1e-3)


def test_a_published_lens_fits_a_hooked_transformer(hooked, tmp_path):
    model = hooked(normalization_type="LN", model_name="gpt2")
    saved = TunedLens.from_model(model)
    randomised(saved).save(tmp_path)
    assert saved.config.base_model_name_or_path == "gpt2"
    loaded = TunedLens.from_unembed_and_pretrained(unembed=Unembed(model), lens_resource_id=str(tmp_path))
    h = torch.randn(2, D_MODEL)
    assert torch.equal(loaded(h, 1), saved(h, 1))
    assert torch.equal(TunedLens.from_model_and_pretrained(model, tmp_path)(h, 1), saved(h, 1))


def test_a_hooked_transformer_of_few_positions(hooked):
    model = hooked(normalization_type="LNPre", n_ctx=2, d_vocab_out=7)
    h = torch.randn(2, D_MODEL)
    check(Unembed(model)(h), model.unembed(model.ln_final(h[None]))[0])


def test_a_hooked_transformer_that_ends_otherwise_is_refused(hooked, monkeypatch):
    model = hooked(normalization_type="LN", output_logits_soft_cap=5.0)
    monkeypatch.setattr(model_surgery, "get_logit_transform", lambda _: model_surgery.LogitTransform())
    with pytest.raises(NotImplementedError, match="random hidden states differ from those of HookedTransformer by"):
        Unembed(model)
    Unembed(model, verify=False)


def test_the_users_hooks_are_left_alone(hooked):
    model = hooked(normalization_type="LN")
    seen = []
    model.add_hook("ln_final.hook_normalized", lambda value, hook: seen.append(hook.name))
    unembed = Unembed(model)
    unembed(torch.randn(2, D_MODEL))
    assert isinstance(unembed.norm, Norm)
    assert seen == []
    model(IDS)
    assert seen == ["ln_final.hook_normalized"]
