"""Saved lenses of every version of tuned-lens: what they decode to, and what is refused of them."""

import json
import pickle
import warnings
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import D_MODEL, LAYERS, VOCAB, tiny

from tuned_lens_fast import TunedLens, TunedLensConfig, Unembed, artifacts
from tuned_lens_fast.artifacts import read_artifact, read_config

#: As the first versions wrote them, with everything off that a plain lens does not have.
FIRST = {
    "bias": True,
    "dropout": 0.1,
    "extra_layers": 0,
    "identity_init": True,
    "include_input": True,
    "include_final": False,
    "layer_norm": False,
    "mlp_hidden_sizes": [],
    "shared_mlp_hidden_sizes": [],
    "share_weights": False,
    "orthogonal": False,
    "pre_ln": False,
    "rank": None,
    "reuse_unembedding": True,
    "sublayers": False,
    "model_name": "some/model",
    "model_config": {"model_type": "gpt2"},
    "d_model": D_MODEL,
    "num_layers": LAYERS,
    "vocab_size": VOCAB,
}
SECOND = {
    "bias": True,
    "extra_layers": 0,
    "include_input": True,
    "reuse_unembedding": True,
    "model_config": {"model_type": "gpt2", "_name_or_path": "some/model"},
    "d_model": D_MODEL,
    "num_layers": LAYERS,
    "vocab_size": VOCAB,
}
NOW = {"base_model_name_or_path": "some/model", "d_model": D_MODEL, "num_hidden_layers": LAYERS, "bias": True}


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2")


@pytest.fixture(scope="module")
def lens(model):
    """What every artifact here is of."""
    lens = TunedLens.from_model(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lens.requires_grad_(False)


def layer(lens, i, name):
    return {f"{name}.weight": lens[i].weight.data, f"{name}.bias": lens[i].bias.data}


def model_end(model, norm="layer_norm", head="unembedding"):
    end = model.transformer.ln_f
    return {
        f"{norm}.weight": end.weight.data,
        f"{norm}.bias": end.bias.data,
        f"{head}.weight": model.lm_head.weight.data,
    }


def renamed(lens, model, kind):
    """A state dict of the versions before 0.1.0, which counted the layers after the input's from 0."""
    state = {**model_end(model), **layer(lens, 0, f"input_{kind}")}
    for i in range(1, LAYERS):
        state |= layer(lens, i, f"layer_{kind}s.{i - 1}")
    return state


def numbered(lens, prefix=""):
    return {k: v for i in range(LAYERS) for k, v in layer(lens, i, f"{prefix}{i}").items()}


def whole(lens, model, prefix=""):
    end = model_end(model, f"{prefix}unembed.final_norm", f"{prefix}unembed.unembedding")
    return {**end, **numbered(lens, f"{prefix}layer_translators.")}


def snapshot(lens, state):
    """With what training holds besides: mostly no tensors."""
    twin = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(twin.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    twin(torch.ones(2)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {
        "lens": state,
        "optim": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "dataloader": {"serialized_datapipe": b"\x80\x00abc", "randomness_state": None, "seeds": (1, 2)},
        "step": 7,
        "wandb_id": None,
    }


#: name -> (config, state dict)
ARTIFACTS = {
    "2022, probes": lambda lens, model: (FIRST, renamed(lens, model, "probe")),
    "2022, adapters": lambda lens, model: (FIRST, renamed(lens, model, "adapter")),
    "2022, few options": lambda lens, model: (
        {k: FIRST[k] for k in ("bias", "include_input", "rank", "sublayers", "d_model", "num_layers", "vocab_size")},
        renamed(lens, model, "probe"),
    ),
    "2022, one translator": lambda lens, model: (FIRST | {"share_weights": True}, renamed(lens, model, "probe")),
    "early 2023": lambda lens, model: (SECOND, renamed(lens, model, "adapter")),
    "0.0.3 to 0.0.5": lambda lens, model: (SECOND, renamed(lens, model, "translator")),
    "0.1.0": lambda lens, model: (
        NOW | {"unemebd_hash": lens.unembed.unembedding_hash(), "base_model_revision": None},
        numbered(lens),
    ),
    "0.1.1": lambda lens, model: (NOW | {"unembed_hash": lens.unembed.unembedding_hash()}, numbered(lens)),
    "no hash": lambda lens, model: (NOW, numbered(lens)),
    "0.0.5, config of today": lambda lens, model: (NOW, renamed(lens, model, "translator")),
    "state dict": lambda lens, model: (NOW, whole(lens, model)),
    "state dict, old config": lambda lens, model: (SECOND, whole(lens, model)),
    "snapshot": lambda lens, model: (NOW, snapshot(lens, whole(lens, model))),
    "snapshot of several GPUs": lambda lens, model: (NOW, snapshot(lens, whole(lens, model, "module."))),
}


def write(folder, config, state):
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "params.pt")
    return folder


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", ARTIFACTS)
@pytest.mark.usefixtures("quiet")
def test_every_version_decodes_alike(tmp_path, model, lens, name):
    write(tmp_path, *ARTIFACTS[name](lens, model))
    loaded = TunedLens.from_model_and_pretrained(model, tmp_path)
    h = torch.randn(LAYERS, 5, D_MODEL)
    for i in range(LAYERS):
        assert torch.equal(loaded(h[i], i), lens(h[i], i))
    assert torch.equal(loaded.decode(h).entropy, lens.decode(h).entropy)
    assert loaded.config.num_hidden_layers == LAYERS
    assert loaded.config.base_model_name_or_path == ("" if name == "2022, few options" else "some/model")
    assert loaded.config.unembed_hash == lens.unembed.unembedding_hash()


@pytest.mark.parametrize("name", ["2022, probes", "0.0.3 to 0.0.5", "0.1.1", "state dict"])
@pytest.mark.usefixtures("quiet")
def test_without_biases(tmp_path, model, lens, name):
    config, state = ARTIFACTS[name](lens, model)
    translators = ("layer_t", "layer_p", "input", "0", "1", "2")
    state = {k: v for k, v in state.items() if not (k.endswith(".bias") and k.startswith(translators))}
    loaded = TunedLens.from_model_and_pretrained(model, write(tmp_path, config | {"bias": False}, state))
    for i in range(LAYERS):
        assert loaded[i].bias is None
        assert torch.equal(loaded[i].weight, lens[i].weight)


@pytest.mark.usefixtures("quiet")
def test_safetensors(tmp_path, model, lens):
    mine = TunedLens.from_model(model).requires_grad_(False)
    for i in range(LAYERS):
        mine[i].weight.data, mine[i].bias = lens[i].weight.data.T.contiguous().T, lens[0].bias
    mine.save(tmp_path, ckpt="params.safetensors")
    assert not (tmp_path / "params.pt").exists()
    for options in ({}, {"ckpt_file": "params.safetensors"}, {"map_location": "cpu", "mmap": True}):
        loaded = TunedLens.from_model_and_pretrained(model, tmp_path, **options)
        for i in range(LAYERS):
            assert torch.equal(loaded[i].weight, lens[i].weight)
            assert torch.equal(loaded[i].bias, lens[0].bias)
    path = tmp_path / "params.safetensors"
    for n in (0, 7, 500, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:n])
        with pytest.raises(ValueError, match="is truncated, or no checkpoint"):
            TunedLens.from_model_and_pretrained(model, tmp_path)


# --- what is left out, or refused ---


@pytest.mark.parametrize("config", [FIRST | {"include_input": False}, SECOND | {"include_input": False}])
@pytest.mark.usefixtures("quiet")
def test_without_the_inputs_translator(tmp_path, model, lens, config):
    state = {k: v for k, v in renamed(lens, model, "translator").items() if not k.startswith("input")}
    write(tmp_path, config, state)
    loaded = TunedLens.from_model_and_pretrained(model, tmp_path)
    assert loaded.translated_layers == [*range(1, LAYERS)]
    h = torch.randn(5, D_MODEL)
    for i in range(1, LAYERS):
        assert torch.equal(loaded(h, i), lens(h, i))
    write(tmp_path, config | {"include_input": True}, state)
    with pytest.raises(ValueError, match=r"lacks '0\.weight', '0\.bias'"):
        TunedLens.from_model_and_pretrained(model, tmp_path)


@pytest.mark.parametrize("parts", [("u", "v"), ("u", "v", "scale"), ("u", "v", "bias"), ("u", "v", "scale", "bias")])
@pytest.mark.parametrize("kind", ["probe", "adapter"])
@pytest.mark.usefixtures("quiet")
def test_low_rank(tmp_path, model, kind, parts):
    """white_box.nn.LowRankLinear: linear(x @ v, u, bias) + x * scale."""
    torch.manual_seed(1)
    shapes = {"u": (D_MODEL, 5), "v": (D_MODEL, 5), "scale": (D_MODEL,), "bias": (D_MODEL,)}
    names = [f"input_{kind}", *(f"layer_{kind}s.{i}" for i in range(LAYERS - 1))]
    factors = [{part: torch.randn(shapes[part]) for part in parts} for _ in names]
    state = model_end(model)
    for name, of_layer in zip(names, factors, strict=True):
        state |= {f"{name}.{part}": tensor for part, tensor in of_layer.items()}
    loaded = TunedLens.from_model_and_pretrained(
        model, write(tmp_path, FIRST | {"rank": 5, "bias": "bias" in parts}, state)
    )
    h = torch.randn(7, D_MODEL).double()
    for i, of_layer in enumerate(factors):
        f = {part: tensor.double() for part, tensor in of_layer.items()}
        want = h + torch.nn.functional.linear(h @ f["v"], f["u"], f.get("bias")) + h * f.get("scale", 0)
        torch.testing.assert_close(loaded.transform_hidden(h, i), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": (D_MODEL, 4)}, r"layer 0 is of low rank with .*wanted u and v \[32, rank\]"),
        ({"u": (D_MODEL, D_MODEL + 1), "v": (D_MODEL, D_MODEL + 1)}, "layer 0 is of low rank"),
        ({"u": (D_MODEL,), "v": (D_MODEL,)}, "layer 0 is of low rank"),
        ({"u": (), "v": ()}, "layer 0 is of low rank"),
        ({"v": None}, "layer 0 is of low rank"),
        ({"u": None}, r"lacks '0\.weight'.*unknown '0\.v'"),
        ({"scale": (3,)}, "layer 0 is of low rank"),
        ({"weight": (D_MODEL, D_MODEL)}, r"two entries for '0\.weight'"),
    ],
)
def test_low_rank_that_is_none(tmp_path, model, lens, changes, message):
    shapes = {"u": (D_MODEL, 5), "v": (D_MODEL, 5), "bias": (D_MODEL,)} | changes
    state = {k: v for k, v in renamed(lens, model, "probe").items() if not k.startswith("input")}
    state |= {f"input_probe.{part}": torch.ones(shape) for part, shape in shapes.items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        TunedLens.from_model_and_pretrained(model, write(tmp_path, FIRST | {"rank": 5}, state))


# --- lenses that lack layers ---


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("ckpt", ["params.pt", "params.safetensors"])
def test_what_a_lens_lacks_is_saved_and_loaded(tmp_path, model, lens, ckpt):
    config = TunedLensConfig("some/model", D_MODEL, LAYERS, translated_layers=[0, 2])
    part = TunedLens(Unembed(model), config)
    for i in (0, 2):
        part[i].load_state_dict(lens[i].state_dict())
    part.save(tmp_path, ckpt=ckpt)
    assert json.loads((tmp_path / "config.json").read_text())["translated_layers"] == [0, 2]
    loaded = TunedLens.from_model_and_pretrained(model, tmp_path)
    assert loaded.config == part.config
    assert loaded.state_dict().keys() == part.state_dict().keys()
    h = torch.randn(5, D_MODEL)
    for i in (0, 2, -1):
        assert torch.equal(loaded(h, i), lens(h, i))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"translated_layers": [0, 1]}))
    with pytest.raises(ValueError, match=r"lacks '1\.weight', '1\.bias' and has unknown '2\.bias', '2\.weight'"):
        TunedLens.from_model_and_pretrained(model, tmp_path)


def test_a_whole_lens_says_nothing_of_layers(lens):
    assert "translated_layers" not in lens.config.to_dict()
    assert lens.translated_layers is None


@pytest.mark.parametrize("include_final", [{"include_final": True}, {}])
def test_the_models_own_output_has_no_translator(tmp_path, model, lens, include_final):
    state = renamed(lens, model, "probe") | layer(lens, 0, f"layer_probes.{LAYERS - 1}")
    config = {k: v for k, v in FIRST.items() if k != "include_final"}
    write(tmp_path, config | include_final, state)
    with pytest.warns(UserWarning, match="include_final: .* left out"):
        loaded = TunedLens.from_model_and_pretrained(model, tmp_path)
    for i in range(LAYERS):
        assert torch.equal(loaded[i].weight, lens[i].weight)
    write(tmp_path, FIRST, state)
    with pytest.raises(ValueError, match=r"unknown '3\.bias', '3\.weight'"):
        TunedLens.from_model_and_pretrained(model, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reuse_unembedding", False),
        ("reuse_unembedding", None),
        ("pre_ln", True),
        ("layer_norm", True),
        ("mlp_hidden_sizes", [64]),
        ("shared_mlp_hidden_sizes", [64, 64]),
        ("sublayers", True),
        ("orthogonal", True),
        ("extra_layers", 2),
    ],
)
def test_options_that_are_refused(tmp_path, model, lens, key, value):
    write(tmp_path, FIRST | {key: value}, renamed(lens, model, "probe"))
    with pytest.raises(ValueError, match=rf"{key} is .*, so .*h \+ \(W h \+ b\).*config\.json"):
        TunedLens.from_model_and_pretrained(model, tmp_path)


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ("attn_probes.0.weight", "sublayers"),
        ("attn_adapters.0.weight", "sublayers"),
        ("shared_mlp.0.weight", "shared_mlp_hidden_sizes"),
        ("extra_layers.0.ln_1.weight", "extra_layers"),
        ("layer_probes.0.parametrizations.weight.original", "orthogonal"),
        ("layer_probes.0.2.weight", "mlp_hidden_sizes"),
        ("input_probe.0.bias", "mlp_hidden_sizes"),
        ("layer_probes.0.down.weight", "unknown entry"),
        ("layer_probes.00.weight", "unknown entry"),
        ("optimizer", "unknown entry"),
        ("0.weight", "two entries for '0"),
    ],
)
def test_entries_that_are_refused(tmp_path, model, lens, entry, key):
    write(tmp_path, FIRST, renamed(lens, model, "probe") | {entry: torch.zeros(D_MODEL, D_MODEL)})
    with pytest.raises(ValueError, match=f"{entry}.*{key}|{key}.*{entry}"):
        TunedLens.from_model_and_pretrained(model, tmp_path)


# --- the model it was made for ---


def test_a_stored_end_of_another_model(tmp_path, model, lens):
    config, state = ARTIFACTS["2022, probes"](lens, model)
    for name, part in (("unembedding.weight", "unembedding"), ("layer_norm.bias", "final_norm")):
        other = {name: torch.randn_like(state[name])}
        with pytest.warns(UserWarning, match=rf"made for a model \('some/model'\) with another {part}; it may"):
            loaded = TunedLens.from_model_and_pretrained(model, write(tmp_path, config, state | other))
        assert torch.equal(loaded[1].weight, lens[1].weight)
        assert loaded.config.unembed_hash is None
    larger = {"unembedding.weight": torch.cat([state["unembedding.weight"], torch.zeros(3, D_MODEL)])}
    with pytest.warns(UserWarning, match="another unembedding"):
        TunedLens.from_model_and_pretrained(model, write(tmp_path, config, state | larger))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("quiet")
def test_a_stored_end_in_another_dtype(tmp_path, lens, model, dtype):
    write(tmp_path, *ARTIFACTS["2022, probes"](lens, model))
    loaded = TunedLens.from_model_and_pretrained(tiny("gpt2").to(dtype), tmp_path)
    assert torch.equal(loaded[1].weight, lens[1].weight.to(dtype))


def test_a_hash_of_another_kind_is_another_model(tmp_path, model, lens):
    write(tmp_path, NOW | {"unembed_hash": 5}, numbered(lens))
    with pytest.warns(UserWarning, match="another unembedding"):
        assert TunedLens.from_model_and_pretrained(model, tmp_path).config.unembed_hash == 5


# --- damage ---


def test_a_tensor_larger_than_its_file(tmp_path, model):
    huge = 10**9
    state = {"0.weight": torch.zeros(1).expand(huge, huge), "0.bias": torch.zeros(1).expand(huge)}
    write(tmp_path, NOW | {"num_hidden_layers": 1, "d_model": huge}, state)
    with pytest.raises(ValueError, match=r"d_model 1000000000 for a model of d_model 32"):
        TunedLens.from_model_and_pretrained(model, tmp_path)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": LAYERS + 1}, {"num_hidden_layers": 10**15}, {"d_model": 10**9}]
)
def test_nothing_is_allocated_for_what_a_config_claims(tmp_path, model, lens, changes):
    write(tmp_path, NOW | changes, numbered(lens))
    with (
        mock.patch.object(artifacts, "load_checkpoint", side_effect=AssertionError("opens the checkpoint")),
        pytest.raises(ValueError, match=r"a lens of (d_model )?\d+ (layers )?for a model of .*config\.json"),
    ):
        TunedLens.from_model_and_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match=r"does not fit its config|has shape \[32, 32\], wanted"):
        read_artifact(tmp_path / "config.json", tmp_path / "params.pt")
    changes = {{"num_hidden_layers": "num_layers"}.get(name, name): value for name, value in changes.items()}
    state = {k: v for k, v in renamed(lens, tiny("gpt2"), "probe").items() if not k.startswith("input")}
    write(tmp_path, FIRST | {"include_input": False} | changes, state)
    with pytest.raises(ValueError, match=r"does not fit its config|has shape \[32, 32\], wanted"):
        read_artifact(tmp_path / "config.json", tmp_path / "params.pt")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bias": "no"}, "bias is 'no', wanted true or false"),
        ({"bias": None}, "bias is None"),
        ({"bias": 1}, "bias is 1"),
        ({"d_model": True}, "d_model is True"),
        ({"d_model": 32.0}, r"d_model is 32\.0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": [3]}, r"num_hidden_layers is \[3\]"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None, wanted a string"),
        ({"base_model_revision": 3}, "base_model_revision is 3"),
        ({"unembed_hash": [1]}, r"unembed_hash is \[1\]"),
        ({"lens_type": None}, "lens_type is None"),
        *(
            ({"translated_layers": layers}, r"translated_layers is .*, wanted some of 0 to 2, in order")
            for layers in ([], [3], [-1], [1, 1], [2, 1], [True], [0.0], "01", {"0": 1}, 5)
        ),
    ],
)
def test_configs_with_wrong_types(tmp_path, values, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(NOW | values))
    with pytest.raises(ValueError, match=rf"lens config: {message}.*config\.json"):
        read_config(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "nul", '{"a": 1' + "0" * 5000 + "}"])
def test_configs_that_are_no_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is no JSON"):
        read_config(tmp_path / "config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*FIRST, *vars(TunedLensConfig("", 1, 1)), "unemebd_hash", "banana"])


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from([FIRST, SECOND, NOW, {}]), changes=st.dictionaries(KEYS, JSON, max_size=4))
@pytest.mark.filterwarnings("ignore:lens config. unknown key")
def test_any_config_is_read_or_refused(start, changes):
    values = start | changes
    before = json.dumps(values)
    try:
        config = TunedLensConfig.from_dict(values)
    except ValueError:
        return
    finally:
        assert json.dumps(values) == before
    assert type(config.bias) is bool
    assert type(config.d_model) is int
    assert config.d_model > 0
    assert config.num_hidden_layers == values.get("num_hidden_layers", values.get("num_layers"))
    assert config.bias == values.get("bias", True)
    assert TunedLensConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: torch.full_like(t, torch.nan), "holds NaN or infinity"),
        (lambda t: t.index_fill(0, torch.tensor([2]), torch.inf), "holds NaN or infinity"),
        (lambda t: torch.full_like(t, torch.nan).to(torch.float8_e4m3fn), "holds NaN or infinity"),
        (lambda t: t.long(), r"is torch\.int64"),
        (lambda t: t.to(torch.complex64), r"is torch\.complex64"),
        (lambda t: t.bool(), r"is torch\.bool"),
        (lambda t: t.to_sparse(), "other objects than dense tensors, .*sparse"),
        (lambda t: t.to("meta"), "other objects than dense tensors, .*meta"),
        (lambda t: torch.nested.as_nested_tensor([t], layout=torch.jagged), "other objects than dense tensors"),
        (lambda t: t[None], r"has shape \[1, "),
        (lambda t: t[1:], r"has shape \[31"),
        (lambda t: t[0], "has shape"),
    ],
)
@pytest.mark.parametrize("name", ["1.weight", "1.bias"])
def test_damaged_translators(tmp_path, model, lens, change, message, name):
    write(tmp_path, NOW, numbered(lens) | {name: change(lens.layer_translators.state_dict()[name])})
    with pytest.raises(ValueError, match=rf"params\.pt: {name} {message}|params\.pt: (it|a tensor) .*{message}"):
        TunedLens.from_model_and_pretrained(model, tmp_path)


class Runs:
    """Code in a pickle."""

    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("options", [{}, {"weights_only": False}, {"weights_only": None, "pickle_module": pickle}])
def test_no_code_is_run_whatever_is_asked(tmp_path, model, lens, options):
    for state in (numbered(lens) | {"1.weight": Runs()}, snapshot(lens, whole(lens, model)) | {"optim": Runs()}):
        write(tmp_path, NOW, state)
        with pytest.raises(ValueError, match="could run code"):
            TunedLens.from_model_and_pretrained(model, tmp_path, **options)
    write(tmp_path, NOW, numbered(lens))
    assert torch.equal(TunedLens.from_model_and_pretrained(model, tmp_path, **options)[1].weight, lens[1].weight)


def test_read_artifact_says_what_it_read(tmp_path, model, lens):
    write(tmp_path, *ARTIFACTS["early 2023"](lens, model))
    artifact = read_artifact(tmp_path / "config.json", tmp_path / "params.pt")
    assert artifact.config == TunedLensConfig("some/model", D_MODEL, LAYERS)
    assert sorted(artifact.translators) == sorted(numbered(lens))
    assert artifact.differing == []
    assert not any(tensor.requires_grad for tensor in artifact.translators.values())
    again = TunedLens(Unembed(model), artifact.config)
    again.layer_translators.load_state_dict(artifact.translators)
    again.save(tmp_path / "now")
    state = torch.load(tmp_path / "now" / "params.pt")
    for name, tensor in numbered(lens).items():
        assert torch.equal(state[name], tensor)
