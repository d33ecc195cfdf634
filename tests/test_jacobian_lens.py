"""Jacobian lenses in every format that they are published in: what they decode to is what their own code computes."""

import warnings

import huggingface_hub
import pytest
import tiny_text_model
import torch
from safetensors.torch import save_file
from tiny_models import D_MODEL, LAYERS, tiny

from tuned_lens_fast import LogitLens, TunedLens, cli, decode_model
from tuned_lens_fast.jacobian_lens import read_jacobian_config, read_jacobian_lens

IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def matrices():
    """J of the outputs of blocks 0 to LAYERS - 2, in the dtype that jlens saves."""
    generator = torch.Generator().manual_seed(5)
    return {
        block: (torch.eye(D_MODEL) + 0.2 * torch.randn(D_MODEL, D_MODEL, generator=generator)).half()
        for block in range(LAYERS - 1)
    }


def jlens(matrices, **more):
    """As JacobianLens.save writes it."""
    return {"J": matrices, "n_prompts": 100, "source_layers": [*matrices], "d_model": D_MODEL, **more}


def stopped(matrices):
    """The checkpoint of a fit, in fp32."""
    return {
        "jacobian_sum": {block: 4 * matrix.float() for block, matrix in matrices.items()},
        "n_done": 4,
        "next_idx": 5,
        "source_layers": sorted(matrices),
    }


#: name of the file -> what is in it
FORMATS = {
    "x_jacobian_lens.pt": jlens,
    "lens.pt": lambda matrices: jlens(matrices, metadata={"model": "some/model", "layers": [1, 2.5, None]}),
    "stopped_jacobian_lens.pt": stopped,
    "lens.safetensors": lambda matrices: {f"J.{block}": matrix for block, matrix in matrices.items()},
    "jacobians.safetensors": lambda matrices: {f"layer_{block}": matrix for block, matrix in matrices.items()},
    "other.safetensors": lambda matrices: {str(block): matrix.float() for block, matrix in matrices.items()},
}


def write(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def by_definition(model, matrices):
    """Logits in float64 of what jlens reads: the output of each block, transported and unembedded."""
    double = type(model)(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    outputs = {}
    for block in matrices:

        def keep(module, args, output, block=block):
            outputs[block] = output[0] if isinstance(output, tuple) else output

        double.model.layers[block].register_forward_hook(keep)
    with torch.no_grad():
        double(IDS)
        return [double.lm_head(double.model.norm(outputs[b] @ matrices[b].double().T)) for b in sorted(matrices)]


@pytest.mark.parametrize("name", FORMATS)
def test_it_reads_what_its_own_code_reads(tmp_path, model, matrices, name):
    path = write(tmp_path / name, FORMATS[name](matrices))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lens = TunedLens.from_model_and_pretrained(model, path)
    assert lens.translated_layers == [*range(1, LAYERS)]
    assert len(lens) == LAYERS
    for block, matrix in matrices.items():
        torch.testing.assert_close(lens[block + 1].weight, matrix.float() - torch.eye(D_MODEL))
    logits = by_definition(model, matrices)
    stats = decode_model(model, lens, IDS, top_k=3)
    assert stats.layers.tolist() == [*range(1, LAYERS + 1)]
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    for row, want in enumerate(logits):
        torch.testing.assert_close(lens(states[row + 1], row + 1).double(), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stats.lse[row].double(), want.logsumexp(-1), rtol=1e-5, atol=1e-4)
        assert torch.equal(stats.top_ids[row, ..., 0], want.argmax(-1))


def test_near_the_identity_nothing_is_lost(tmp_path, model):
    small = 1e-3 * torch.rand(D_MODEL, D_MODEL)
    path = write(tmp_path / "lens.pt", jlens({0: small.half()}))
    lens = TunedLens.from_model_and_pretrained(model, path)
    assert torch.equal(lens[1].weight, small.half().float() - torch.eye(D_MODEL))


@pytest.mark.parametrize(
    "name",
    ["lens.pt", "gpt2_jacobian_lens_n1000.pt", "jlens/Salesforce-wikitext/gpt2_jacobian_lens.pt", "lens.safetensors"],
)
def test_folders(tmp_path, model, matrices, name, capsys):
    """A folder of the hub's, or one of its files."""
    is_safe = name.endswith(".safetensors")
    path = write(tmp_path / "gpt2-small" / name, FORMATS["lens.safetensors"](matrices) if is_safe else jlens(matrices))
    (path.parent / "config.yaml").write_text("hf_model_name: gpt2\n")
    for place in (tmp_path / "gpt2-small", path):
        lens = TunedLens.from_model_and_pretrained(model, place)
        assert torch.equal(lens[1].weight, matrices[0].float() - torch.eye(D_MODEL))
        assert cli.main(["info", str(place)]) == 0
        assert "Jacobian lens" in (out := capsys.readouterr().out)
        assert f"1-{LAYERS - 1}" in out
    write(tmp_path / "gpt2-small" / "other_jacobian_lens.pt", jlens(matrices))
    with pytest.raises(FileNotFoundError, match=r"holds several lenses, pass one of .*other_jacobian_lens\.pt"):
        TunedLens.from_model_and_pretrained(model, tmp_path / "gpt2-small")


def test_the_hub(tmp_path, model, matrices, monkeypatch):
    path = write(tmp_path / "gpt2_jacobian_lens.pt", jlens(matrices))
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **kwargs: asked.append(kwargs) or str(path))
    inside = "gpt2-small/jlens/Salesforce-wikitext/gpt2_jacobian_lens.pt"
    lens = TunedLens.from_model_and_pretrained(model, f"neuronpedia/jacobian-lens/{inside}", revision="n1000")
    assert lens.translated_layers == [*range(1, LAYERS)]
    TunedLens.from_model_and_pretrained(model, inside, repo_id="neuronpedia/jacobian-lens", revision="n1000")
    assert asked[0] == asked[1]
    assert asked[0] == {
        "repo_id": "neuronpedia/jacobian-lens",
        "repo_type": "model",
        "filename": inside,
        "revision": "n1000",
        "cache_dir": None,
    }
    for name in ("lens.pt", "./owner/repository/lens.pt", "owner/lens.pt", "/a/b/c.safetensors"):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            TunedLens.from_model_and_pretrained(model, name)
    assert len(asked) == 2


def test_the_hubs_failures(model, monkeypatch):
    def download(**_kwargs):
        raise huggingface_hub.utils.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ConnectionError, match=r"'c/d\.pt' in the hub's model 'a/b'.*not in the cache.*HF_HUB_OFFLINE"):
        TunedLens.from_model_and_pretrained(model, "a/b/c/d.pt")


def test_the_last_blocks_matrix_is_left_out(tmp_path, model, matrices):
    path = write(tmp_path / "lens.pt", jlens(matrices | {LAYERS - 1: torch.eye(D_MODEL)}))
    with pytest.warns(UserWarning, match="the last block, the model's own output, is left out"):
        lens = TunedLens.from_model_and_pretrained(model, path)
    assert lens.translated_layers == [*range(1, LAYERS)]
    assert read_jacobian_config(path).translated_layers == [*range(1, LAYERS + 1)]


class Lens:
    pass


@pytest.mark.filterwarnings("ignore:J. the matrix of the last block")
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda m: jlens({0: m[0][:-1]}), r"J of block 0 has shape \[31, 32\], wanted \[32, 32\]"),
        (lambda m: jlens({0: m[0][:, :-1]}), "a lens of d_model 31 for a model of d_model 32"),
        (lambda m: jlens({0: m[0], 1: m[1][0]}), r"J of block 1 has shape \[32\]"),
        (lambda m: jlens({0: m[0] * torch.nan}), "J of block 0 holds NaN"),
        (lambda m: jlens({0: m[0].int()}), r"J of block 0 is torch\.int32"),
        (lambda m: jlens({0: m[0], LAYERS: m[1]}), "a lens of block 3 for a model of 3 layers"),
        (lambda m: jlens({LAYERS - 1: m[0]}), "the last block alone"),
        (lambda m: jlens({0: m[0], "0": m[1]}), "two matrices for block 0"),
        (lambda m: jlens({-1: m[0]}), "no Jacobian lens: it holds -1"),
        (lambda m: jlens({0: 1.0}), "no Jacobian lens"),
        (lambda m: jlens({0: torch.tensor(1.0)}), "no Jacobian lens"),
        (lambda m: jlens({}), "holds nothing, wanted a matrix"),
        (lambda m: jlens([m[0]]), "holds a list"),
        (lambda m: [m[0]], "holds a list, wanted a Jacobian lens"),
        (lambda m: {"0.weight": m[0]}, r"holds '0\.weight'.*A tuned lens is given by its folder"),
        (lambda m: stopped(m) | {"n_done": 0}, "n_done is 0"),
        (lambda m: stopped(m) | {"n_done": m[0]}, "n_done is"),
        (lambda m: Lens(), r"could run code .*Lens.*where it was made, save a dict of its tensors"),
        (lambda m: jlens({0: m[0]}, fit=Lens()), "could run code"),
    ],
)
def test_what_is_refused(tmp_path, model, matrices, state, message):
    path = write(tmp_path / "lens.pt", state(matrices))
    with pytest.raises(ValueError, match=message):
        TunedLens.from_model_and_pretrained(model, path)


def test_nothing_is_read_of_a_lens_of_another_model(tmp_path, model, matrices, monkeypatch):
    path = write(tmp_path / "lens.pt", jlens({0: torch.zeros(1).expand(10**6, 10**6)}))
    with pytest.raises(ValueError, match="d_model 1000000 for a model of d_model 32"):
        TunedLens.from_model_and_pretrained(model, path)
    artifact = read_jacobian_lens(write(tmp_path / "lens.pt", jlens(matrices)))
    assert artifact.config.num_hidden_layers == LAYERS
    assert sorted(artifact.translators) == [f"{i}.weight" for i in range(1, LAYERS)]


# --- layers that it has not ---


@pytest.fixture
def lens(tmp_path, model, matrices):
    return TunedLens.from_model_and_pretrained(model, write(tmp_path / "lens.pt", jlens(matrices)))


def test_it_is_read_where_it_has_layers(model, lens):
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states[:-1]
    whole = lens.decode(states)
    assert whole.layers.tolist() == [1, 2]
    assert torch.equal(whole.lse, lens.decode(states[1:], layers=[1, 2]).lse)
    assert torch.equal(whole.lse, lens.decode(torch.stack(states)).lse)
    targets = IDS.roll(-1)
    losses = lens.loss(states, targets=targets)
    assert losses.shape == (2,)
    assert torch.equal(losses, lens.loss(states[1:], layers=[1, 2], targets=targets))
    assert torch.equal(decode_model(model, lens, IDS, layers=[2]).lse, decode_model(model, lens, IDS).lse[1:])
    with pytest.raises(ValueError, match="got 2 entries for the lens's 3 layers"):
        lens.decode(states[1:])
    assert len([*lens]) == 2
    assert len(lens[:2]) == 2


def test_a_layer_that_is_not_there_is_one_error(model, lens):
    h = torch.randn(2, D_MODEL)
    for ask in (
        *(lambda: lens[0], lambda: lens(h, 0), lambda: lens.transform_hidden(h, -LAYERS), lambda: lens.translator(0)),
        *(lambda: lens.decode([h], layers=[0]), lambda: decode_model(model, lens, IDS, layers=[0])),
        lambda: lens.generate(model, 0, IDS[0], max_new_tokens=2),
    ):
        with pytest.raises(IndexError, match="the lens has only 1-2"):
            ask()


def test_saved_it_stays_what_it_is(tmp_path, model, lens):
    lens.save(tmp_path / "saved")
    again = TunedLens.from_model_and_pretrained(model, tmp_path / "saved")
    assert again.config == lens.config
    assert torch.equal(decode_model(model, again, IDS).lse, decode_model(model, lens, IDS).lse)


def test_tuned_lens_refuses_what_lacks_layers(tmp_path, model):
    nn = pytest.importorskip("tuned_lens.nn.lenses")
    lens = TunedLens.from_model(tiny("gpt2"))
    lens.config.translated_layers = [1, 2]
    part = TunedLens(lens.unembed, lens.config)
    part.save(tmp_path)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0\.weight\", \"0\.bias\""):
        nn.TunedLens.from_model_and_pretrained(tiny("gpt2"), str(tmp_path))


def test_the_command_line(tmp_path, capsys):
    folder = tmp_path / "model"
    text_model, _ = tiny_text_model.save(folder)
    width = tiny_text_model.D_MODEL
    path = write(
        tmp_path / "x_jacobian_lens.pt", jlens({0: torch.eye(width), 1: torch.eye(width)}) | {"d_model": width}
    )
    assert cli.main(["decode", str(folder), "some text", "--lens", str(path), "--stats", "entropy"]) == 0
    out = capsys.readouterr()
    assert "3 layers x 9 positions" in out.err
    assert cli.main(["decode", str(folder), "some text", "--lens", str(path), "--layers", "0"]) == 1
    assert "layers: got 0, and the lens has only 1-2" in capsys.readouterr().err
    # J = I is the logit lens.
    ids = torch.tensor([[5, 6, 7]])
    lens = TunedLens.from_model_and_pretrained(text_model, path)
    torch.testing.assert_close(
        decode_model(text_model, lens, ids).entropy,
        decode_model(text_model, LogitLens.from_model(text_model), ids, layers=[1, 2]).entropy,
    )
