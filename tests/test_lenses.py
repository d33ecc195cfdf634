"""The lenses: values in float64, what they are saved as, what they generate, and what they refuse."""

import json
import os
import pickle
import warnings
from unittest import mock

import pytest
import torch
from all_models import build
from tiny_models import D_MODEL, LAYERS, TYPES, VOCAB, tiny
from torch import nn

from tuned_lens_fast import (
    Lens,
    LogitLens,
    TunedLens,
    TunedLensConfig,
    Unembed,
    decode_model,
    load_artifacts,
    residual_stream,
)
from tuned_lens_fast.decode import decode as tl_decode
from tuned_lens_fast.engines.interface import Translator

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def trained(model, seed=3, **kwargs):
    lens = TunedLens.from_model(model, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lens


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2")


class StandIn:
    """What users' tests pass for an Unembed."""

    def __init__(self, d_model=D_MODEL):
        self.unembedding = nn.Linear(d_model, VOCAB)

    def forward(self, h):
        return self.unembedding(h)

    def unembedding_hash(self):
        return 42


def config(**values):
    return TunedLensConfig(**{"base_model_name_or_path": "m", "d_model": D_MODEL, "num_hidden_layers": 3, **values})


# --- values ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "cohere"])
def test_starts_as_the_logit_lens(model_type, bias):
    model = tiny(model_type)
    tuned, logit = TunedLens.from_model(model, bias=bias), LogitLens.from_model(model)
    h = torch.randn(2, 5, D_MODEL)
    for idx in range(LAYERS):
        assert torch.equal(tuned(h, idx), logit(h, idx))
        assert torch.equal(tuned.transform_hidden(h, idx), h)
        assert torch.equal(logit.transform_hidden(h, idx), h)
        assert (tuned[idx].bias is not None) == bias


@pytest.mark.parametrize("bias", [True, False])
def test_transform_hidden_in_float64(model, bias):
    lens = trained(model, bias=bias)
    h = torch.randn(2, 5, D_MODEL)
    for idx in range(LAYERS):
        wanted = h.double() + torch.einsum("oi,bsi->bso", lens[idx].weight.double(), h.double())
        if bias:
            wanted += lens[idx].bias.double()
        torch.testing.assert_close(lens.transform_hidden(h, idx).double(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lens(h, idx=idx), lens.unembed(wanted.float()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("h_dtype", DTYPES)
@pytest.mark.parametrize("lens_dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_mixed_dtypes(model, lens_dtype, h_dtype, bias):
    lens = trained(model, bias=bias).to(lens_dtype)
    h = torch.randn(4, D_MODEL).to(h_dtype)
    got = lens.transform_hidden(h, 1)
    assert got.dtype == torch.promote_types(lens_dtype, h_dtype)
    wanted = h.double() + h.double() @ lens[1].weight.double().T + (lens[1].bias.double() if bias else 0)
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(got.double(), wanted, atol=4 * eps, rtol=4 * eps)
    assert lens(h, 1).dtype == torch.float32


def test_translators_are_modules_to_read_assign_and_train(model):
    lens = trained(model)
    assert isinstance(lens.layer_translators, nn.ModuleList)
    assert len(lens) == LAYERS
    assert list(lens) == [lens[i] for i in range(LAYERS)]
    assert lens[-1] is lens.layer_translators[LAYERS - 1]
    assert all(isinstance(linear, nn.Linear) for linear in lens)
    assert {id(p) for p in lens.parameters()} == {id(p) for linear in lens for p in linear.parameters()}
    stacked = torch.randn(LAYERS, D_MODEL, D_MODEL)
    for linear, weight in zip(lens, stacked, strict=True):
        linear.weight.data = weight
    h = torch.randn(D_MODEL)
    torch.testing.assert_close(lens.transform_hidden(h, 2), h + stacked[2] @ h + lens[2].bias)
    translator = lens.translator(2)
    assert isinstance(translator, Translator)
    assert translator.weight.data_ptr() == stacked[2].data_ptr()


def test_is_differentiable():
    lens = trained(tiny("gemma2").double())
    h = torch.randn(2, D_MODEL, dtype=torch.float64, requires_grad=True)
    weight, bias = lens[1].weight.detach().requires_grad_(), lens[1].bias.detach().requires_grad_()

    def loss(h, weight, bias):
        z = torch.func.functional_call(
            lens, {"layer_translators.1.weight": weight, "layer_translators.1.bias": bias}, (h, 1)
        )
        return z.logsumexp(-1)

    assert torch.autograd.gradcheck(loss, (h, weight, bias))
    assert lens(h.detach(), 1).requires_grad
    assert not lens.requires_grad_(False)(h.detach(), 1).requires_grad


def test_training_lowers_the_loss(model):
    lens, logit = TunedLens.from_model(model), LogitLens.from_model(model)
    h, target = torch.randn(64, D_MODEL), torch.randn(64, D_MODEL)
    wanted = logit(target, 0).softmax(-1)
    optimizer = torch.optim.Adam(lens.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(lens(h, 1), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad is None for p in model.parameters())


# --- construction and errors ---


def test_lens_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Lens(StandIn())


class Turned(Lens):
    """Any function of the hidden state, which knows of no translator."""

    def transform_hidden(self, h, idx):
        return h.roll(idx, -1).abs()

    def forward(self, h, idx):
        return self.unembed.forward(self.transform_hidden(h, idx))


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()])
def test_decode_reads_any_lens_by_its_transform(model, lead):
    lens, h = Turned(Unembed(model)), torch.randn(LAYERS, *lead, D_MODEL)
    ids, last = torch.randint(0, VOCAB, lead), torch.randn(*lead, D_MODEL)
    found = lens.decode(h, targets=ids, reference=last, top_k=3)
    by_hand = torch.stack([lens.transform_hidden(entry, i) for i, entry in enumerate(h)])
    wanted = LogitLens(lens.unembed).decode(by_hand, targets=ids, reference=last, top_k=3)
    assert dict(found.items()).keys() == dict(wanted.items()).keys()
    for name, value in found.items():
        torch.testing.assert_close(value, getattr(wanted, name), msg=name)
    only = lens.decode(h[1:2], layers=[1])
    torch.testing.assert_close(only.entropy, found.entropy[1:2])


def test_decode_model_reads_any_lens(model):
    lens, ids = Turned(Unembed(model)), torch.arange(3, 20)
    found = decode_model(model, lens, ids, chunk=5)
    for i, h in enumerate(residual_stream(model, ids)[:-1]):
        torch.testing.assert_close(found.lse[i], lens(h, i).logsumexp(-1))
    assert found.kl[-1].eq(0).all()


def test_the_loss_of_any_lens(model):
    lens, h = Turned(Unembed(model)), torch.randn(LAYERS, 5, D_MODEL, requires_grad=True)
    ids = torch.randint(0, VOCAB, (5,))
    found = lens.loss(h, targets=ids)
    wanted = torch.stack([nn.functional.cross_entropy(lens(entry, i), ids) for i, entry in enumerate(h)])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), h)[0], torch.autograd.grad(wanted.sum(), h)[0], atol=1e-5, rtol=1e-4
    )


def test_what_a_subclass_changes_is_read(model):
    """A translator says what its own class does, and nothing of a subclass that changes it."""

    class Halved(LogitLens):
        def transform_hidden(self, h, idx):
            return h.sign()

    h = torch.randn(LAYERS, 4, D_MODEL)
    torch.testing.assert_close(
        Halved.from_model(model).decode(h).lse[1], LogitLens.from_model(model)(h[1].sign(), 1).logsumexp(-1)
    )

    class Tempered(LogitLens):
        def forward(self, h, idx):
            return super().forward(h, idx) / 2

    with pytest.raises(ValueError, match="the forward of Tempered is not its unembed of its transform_hidden"):
        Tempered.from_model(model).decode(h)

    class Cut(Turned):
        def transform_hidden(self, h, idx):
            return h[..., 1:]

    with pytest.raises(ValueError, match=r"made \[4, 31\] of \[4, 32\]"):
        Cut(Unembed(model)).decode(h)


def test_a_stand_in_for_unembed():
    unembed, h = StandIn(), torch.randn(2, D_MODEL)
    lens = TunedLens(unembed, config())
    assert lens.config.unembed_hash == 42
    assert torch.equal(lens(h, 0), unembed.unembedding(h))
    assert torch.equal(LogitLens(unembed)(h, 0), unembed.unembedding(h))


def test_the_callers_config_is_left_alone(model):
    mine = config(unembed_hash="mine")
    lens = TunedLens(Unembed(model), mine)
    assert mine.unembed_hash == "mine"
    assert lens.config.unembed_hash == Unembed(model).unembedding_hash()
    assert mine.num_hidden_layers == len(lens)


def test_from_model_fills_the_config():
    model = tiny("llama").to(torch.bfloat16)
    model.config.name_or_path = "some/model"
    lens = TunedLens.from_model(model, model_revision="v1", bias=False)
    assert lens.config.to_dict() == {
        "base_model_name_or_path": "some/model",
        "d_model": D_MODEL,
        "num_hidden_layers": LAYERS,
        "bias": False,
        "base_model_revision": "v1",
        "unembed_hash": lens.unembed.unembedding_hash(),
        "lens_type": "linear_tuned_lens",
    }
    assert {p.dtype for p in lens.parameters()} == {torch.bfloat16}


def test_config_from_dict():
    values = config().to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TunedLensConfig.from_dict(values) == config()
        assert TunedLensConfig.from_dict(
            {"base_model_name_or_path": "m", "d_model": 32, "num_hidden_layers": 3, "unemebd_hash": "x"}
        ) == config(unembed_hash="x")
    with pytest.warns(UserWarning, match="unknown keys are ignored: 'banana'"):
        assert TunedLensConfig.from_dict(values | {"banana": 1}) == config()
    assert "banana" not in values
    with pytest.raises(ValueError, match="num_hidden_layers missing"):
        TunedLensConfig.from_dict({"base_model_name_or_path": "m", "d_model": 3})


def test_out_of_range_and_misshapen(model):
    lens = trained(model)
    h = torch.randn(2, D_MODEL)
    for idx in (LAYERS, -LAYERS - 1):
        with pytest.raises(IndexError):
            lens(h, idx)
    for idx in (LAYERS, -1):
        with pytest.raises(IndexError, match=f"got layer {idx}, wanted 0 to 2"):
            lens.translator(idx)
    assert LogitLens.from_model(model).translator(0) is None
    with pytest.raises(ValueError, match=r"h: got shape \[2, 31\]"):
        lens(h[:, 1:], 0)
    with pytest.raises(TypeError, match=r"h: got torch\.int64"):
        lens.transform_hidden(h.long(), 0)
    with pytest.raises(ValueError, match="d_model 16 for a model of d_model 32"):
        TunedLens(Unembed(model), config(d_model=16))


def test_decode_is_a_method_of_every_lens(model):
    lens, h = trained(model), torch.randn(LAYERS, 2, D_MODEL)
    for asked in ({}, {"layers": [2], "targets": torch.tensor([5, 6]), "reference": h[0], "top_k": 3}):
        states = h[2:] if asked else h
        for name, value in tl_decode(lens, states, **asked).items():
            assert torch.equal(getattr(lens.decode(states, **asked), name), value)
    with pytest.raises(TypeError):
        lens.decode(h, [0])


# --- save and load ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, bias, dtype):
    model = tiny("gemma2").to(dtype)
    lens, h = trained(model, bias=bias), torch.randn(2, D_MODEL)
    folder = tmp_path / "a" / "b"
    lens.save(str(folder), ckpt="c.pt", config="c.json")
    assert sorted(os.listdir(folder)) == ["c.json", "c.pt"]
    state = torch.load(folder / "c.pt", weights_only=True)
    assert sorted(state) == sorted(f"{i}.{n}" for i in range(LAYERS) for n in ["bias"] * bias + ["weight"])
    assert json.loads((folder / "c.json").read_text()) == lens.config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = TunedLens.from_model_and_pretrained(model, folder, ckpt_file="c.pt", config_file="c.json")
    assert loaded.config == lens.config
    for idx in range(LAYERS):
        assert torch.equal(loaded(h, idx), lens(h, idx))


def test_the_lens_is_looked_for_under_the_models_name(tmp_path, model):
    lens = trained(model)
    lens.save(tmp_path)
    with mock.patch.object(model.config, "_name_or_path", str(tmp_path)):
        assert torch.equal(TunedLens.from_model_and_pretrained(model)[1].weight, lens[1].weight)


def test_stand_ins_save_and_load(tmp_path):
    unembed = StandIn()
    lens = TunedLens(unembed, config())
    nn.init.normal_(lens[1].weight)
    lens.save(tmp_path)
    loaded = TunedLens.from_unembed_and_pretrained(unembed=unembed, lens_resource_id=tmp_path)
    assert torch.equal(loaded[1].weight, lens[1].weight)


def test_whole_state_dicts_load(tmp_path, model):
    lens = trained(model)
    lens.save(tmp_path)
    state = {f"layer_translators.{k}": v for k, v in lens.layer_translators.state_dict().items()}
    assert state.keys() == lens.state_dict().keys()
    state |= {"unembed.unembedding.weight": torch.zeros(2), "unembed.final_norm.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "params.pt")
    h = torch.randn(2, D_MODEL)
    with pytest.warns(UserWarning, match="another unembedding and final_norm"):
        assert torch.equal(TunedLens.from_model_and_pretrained(model, tmp_path)(h, 2), lens(h, 2))
    fresh = TunedLens.from_model(model)
    assert fresh.load_state_dict(state).missing_keys == []
    assert torch.equal(fresh(h, 2), lens(h, 2))


def test_options_are_split_and_unknown_ones_refused(tmp_path, model):
    trained(model).save(tmp_path)
    paths = (tmp_path / "config.json", tmp_path / "params.pt")
    with mock.patch.object(load_artifacts, "load_lens_artifacts", return_value=paths) as find:
        for of_torch_load in ({"mmap": True}, {"map_location": None, "weights_only": False}, {"map_location": "cuda"}):
            TunedLens.from_unembed_and_pretrained(Unembed(model), "x", revision="foo", **of_torch_load)
            assert find.call_args.kwargs == {"resource_id": "x", "revision": "foo"}
        for unknown in ({"banana": 1}, {"resource_id": "y"}):
            with pytest.raises(TypeError, match=f"{next(iter(unknown))}: unknown option"):
                TunedLens.from_unembed_and_pretrained(Unembed(model), "x", **unknown)


def test_a_lens_of_another_model(tmp_path, model):
    trained(model).save(tmp_path)
    with pytest.warns(UserWarning, match="another unembedding"):
        other = TunedLens.from_model_and_pretrained(tiny("gpt2", seed=1), tmp_path)
    assert other.config.unembed_hash == Unembed(model).unembedding_hash()
    with pytest.raises(ValueError, match="a lens of d_model 32 for a model of d_model 16"):
        TunedLens.from_model_and_pretrained(tiny("gpt2", n_embd=16), tmp_path)
    with pytest.raises(ValueError, match="a lens of 3 layers for a model of 2"):
        TunedLens.from_model_and_pretrained(tiny("gpt2", n_layer=2), tmp_path)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def damage(name):
    """Ways to spoil a checkpoint: path -> None."""

    def edit(change):
        def run(path):
            state = torch.load(path)
            change(state)
            torch.save(state, path)

        return run

    def cut(n):
        return lambda path: path.write_bytes(path.read_bytes()[:n])

    return {
        "missing": lambda path: path.unlink(),
        "empty": cut(0),
        "truncated": cut(2000),
        "cut short": cut(-20),
        "noise": lambda path: path.write_bytes(b"not a checkpoint"),
        "pickle": lambda path: path.write_bytes(pickle.dumps(Hostile(), protocol=2)),
        "code": lambda path: torch.save({"0.weight": Hostile()}, path),
        "object": lambda path: torch.save({"0.weight": StandIn.__new__(StandIn)}, path),
        "list": lambda path: torch.save([torch.zeros(2)], path),
        "numbers": lambda path: torch.save({"0.weight": 1.0}, path),
        "shape": edit(lambda state: state.update({"1.weight": torch.zeros(D_MODEL, 2)})),
        "layer": edit(lambda state: state.pop("2.weight")),
        "extra": edit(lambda state: state.update({"3.weight": torch.zeros(D_MODEL, D_MODEL)})),
    }[name]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing", FileNotFoundError, r"lacks params\.pt"),
        ("empty", ValueError, "truncated"),
        ("truncated", ValueError, "truncated"),
        ("cut short", ValueError, "truncated"),
        ("noise", ValueError, "no checkpoint"),
        ("pickle", ValueError, "no checkpoint"),
        ("code", ValueError, "could run code"),
        ("object", ValueError, "could run code"),
        ("list", ValueError, "no state dict"),
        ("numbers", ValueError, "no state dict"),
        ("shape", ValueError, r"1\.weight has shape \[32, 2\], wanted \[32, 32\]"),
        ("layer", ValueError, r"lacks '2\.weight' and has unknown nothing"),
        ("extra", ValueError, r"lacks nothing and has unknown '3\.weight'"),
    ],
)
def test_bad_checkpoints(tmp_path, monkeypatch, model, name, error, message):
    monkeypatch.chdir(tmp_path)
    trained(model).save(tmp_path)
    damage(name)(tmp_path / "params.pt")
    with pytest.raises(error, match=message):
        TunedLens.from_model_and_pretrained(model, tmp_path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("\x00\xff", "is no JSON"),
        ("[]", "holds a list"),
        ('{"d_model": 32}', "base_model_name_or_path, num_hidden_layers missing"),
        (json.dumps(config(d_model="32").to_dict()), "d_model is '32'"),
        (json.dumps(config(num_hidden_layers=0).to_dict()), "num_hidden_layers is 0"),
        (json.dumps(config(lens_type="mlp").to_dict()), "lens_type is 'mlp'"),
        (json.dumps(config(bias=False).to_dict()), r"bias False\): it lacks nothing and has unknown '0\.bias'"),
    ],
)
def test_bad_configs(tmp_path, model, text, message):
    trained(model).save(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        TunedLens.from_model_and_pretrained(model, tmp_path)


def test_an_interrupted_save_changes_nothing(tmp_path, model):
    lens = trained(model)
    lens.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    opened = [path.open("rb") for path in sorted(tmp_path.iterdir())]
    trained(model, seed=5).save(tmp_path)
    for file in opened:
        assert file.read() == before[os.path.basename(file.name)], "overwritten in place"
        file.close()
    lens.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(_state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with mock.patch("torch.save", interrupted), pytest.raises(KeyboardInterrupt):
        trained(model, seed=4).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_unwritable_folder(tmp_path, model):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        trained(model).save(tmp_path / "file")


# --- generate ---


def without_cache(lens, model, layer, tokens, steps):
    """Greedy, every sequence alone and read again from its start at every step."""
    rows = []
    for row in tokens:
        for _ in range(steps):
            with torch.no_grad():
                states = residual_stream(model, row)
                row = torch.cat([row, lens(states[layer][-1], layer).argmax(-1, keepdim=True)])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bloom", "gemma2", "lfm2", "mamba", "rwkv", "hy_v4", "cpmant"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_against_no_cache(model_type, batch):
    model = tiny(model_type) if model_type in TYPES else build(model_type)
    model.generation_config.eos_token_id = None
    lens = trained(model)
    tokens = torch.randint(3, VOCAB, (batch, 6), generator=torch.Generator().manual_seed(0))
    for layer in (0, len(lens) - 1):
        got = lens.generate(model, layer, tokens, do_sample=False, max_new_tokens=12)
        assert torch.equal(got, without_cache(lens, model, layer, tokens, 12))


def test_generate_feeds_one_token_at_a_time(model):
    lens, fed, unembedded = trained(model), [], []
    model.generation_config.eos_token_id = None
    hook = model.transformer.wte.register_forward_hook(lambda _module, args, _output: fed.append(args[0].shape[1]))
    head_hook = model.lm_head.register_forward_hook(lambda _module, args, _output: unembedded.append(args[0].shape[1]))
    lens.generate(model, 1, torch.tensor([5, 6, 7]), max_new_tokens=4)
    hook.remove()
    head_hook.remove()
    assert fed == [4, 3, 1, 3, 1, 1, 1]  # a trial of the cache goes before
    assert set(unembedded) == {1}


def test_generate_without_a_cache(model):
    lens = trained(model)
    model.generation_config.eos_token_id = None
    tokens = torch.tensor([[5, 6, 7]])

    wanted, forward = without_cache(lens, model, 1, tokens, 5), model.forward

    def cacheless(input_ids, past_key_values=None, **options):
        return forward(input_ids, **{**options, "use_cache": False})

    with mock.patch.object(model, "forward", cacheless):
        assert torch.equal(lens.generate(model, 1, tokens, do_sample=False, max_new_tokens=5), wanted)


def test_generate_runs_a_wrapped_model_without_dropout():
    model = tiny("gpt2", resid_pdrop=0.5).train()
    model.generation_config.eos_token_id = None
    lens, tokens = trained(model), torch.tensor([[5, 6, 7]])
    wanted = without_cache(lens, model, 2, tokens, 4)
    for wrapped in (model, nn.DataParallel(model), torch.compile(model)):
        assert torch.equal(lens.generate(wrapped, 2, tokens, do_sample=False, max_new_tokens=4), wanted)
    assert all(module.training for module in model.modules())


def test_shapes_seeds_and_temperature():
    model = tiny("gpt2", n_positions=128)
    lens = trained(model)
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([5, 6, 7])

    def sample(**kwargs):
        torch.manual_seed(7)
        return lens.generate(model, 2, prompt, **kwargs)

    tokens = sample(max_new_tokens=30)
    assert tokens.shape == (1, 33)
    assert torch.equal(tokens[0, :3], prompt)
    assert prompt.tolist() == [5, 6, 7]
    assert torch.equal(sample(max_new_tokens=30), tokens)
    assert not torch.equal(lens.generate(model, 2, prompt, max_new_tokens=30), tokens)
    greedy = sample(do_sample=False, max_new_tokens=30)
    assert torch.equal(sample(temp=0, max_new_tokens=30), greedy)
    assert torch.equal(sample(temp=1e-4, max_new_tokens=30), greedy)
    assert not torch.equal(tokens, greedy)
    assert torch.equal(sample(max_new_tokens=0), prompt[None])
    assert lens.generate(model, 0, prompt).shape == (1, 103)
    assert lens.generate(model, 0, prompt.to(torch.int32), max_new_tokens=1).dtype == torch.int32
    assert LogitLens.from_model(model).generate(model, 0, prompt, max_new_tokens=2).shape == (1, 5)


def test_samples_follow_the_distribution(model):
    lens, prompt = trained(model), torch.tensor([[5, 6, 7]])
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        h = model(prompt, output_hidden_states=True).hidden_states[1][0, -1]
        wanted = (lens(h, 1).double() / 2.0).softmax(-1)
    torch.manual_seed(0)
    n = 20_000
    drawn = lens.generate(model, 1, prompt.expand(n, 3), temp=2.0, max_new_tokens=1)[:, -1]
    seen = torch.bincount(drawn, minlength=VOCAB) / n
    assert ((seen - wanted).abs() < 5 * (wanted / n).sqrt() + 1e-4).all()


def test_eos(model):
    lens = LogitLens.from_model(model)
    prompts = torch.tensor([[5, 6, 7], [50, 60, 70], [8, 9, 10]])
    model.generation_config.eos_token_id = None
    free = lens.generate(model, 0, prompts, do_sample=False, max_new_tokens=12)[:, 3:]
    first, second = free[0, 1].item(), free[1, 0].item()
    assert first not in free[1, :6]
    assert len(free[0, 1:].unique()) > 2
    for eos in (first, [first], [first, second]):
        model.generation_config.eos_token_id = eos
        ends = {eos} if isinstance(eos, int) else set(eos)
        wanted = []
        for row in free.tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
            wanted.append(row[: end + 1] + [row[end]] * (len(row) - end - 1))
        got = lens.generate(model, 0, prompts, do_sample=False, max_new_tokens=12)[:, 3:].tolist()
        longest = len(got[0])
        assert got == [row[:longest] for row in wanted]
        assert all(row[longest:] == [row[-1]] * (12 - longest) for row in wanted)
    model.generation_config.eos_token_id = first
    alone = lens.generate(model, 0, prompts[0], do_sample=False, max_new_tokens=12)
    assert alone.shape[1] == 3 + free[0].tolist().index(first) + 1


def test_generate_errors(model):
    lens, prompt = trained(model), torch.tensor([5, 6, 7])
    for layer in (-LAYERS - 1, LAYERS):
        with pytest.raises(IndexError, match=f"layer: got (layer )?{layer}"):
            lens.generate(model, layer, prompt)
    for bad in (prompt[None, None], prompt[:0], torch.tensor(5)):
        with pytest.raises(ValueError, match="input_ids: got shape"):
            lens.generate(model, 0, bad)
    for bad in (prompt.float(), prompt.bool()):
        with pytest.raises(TypeError, match="input_ids: got torch"):
            lens.generate(model, 0, bad)
    for bad in (-0.5, float("nan")):
        with pytest.raises(ValueError, match="temp"):
            lens.generate(model, 0, prompt, temp=bad)
    with pytest.raises(ValueError, match="GPT2Model has no head"):
        lens.generate(model.transformer, 0, prompt)
    with pytest.raises(ValueError, match="max_new_tokens"):
        lens.generate(model, 0, prompt, max_new_tokens=-1)
