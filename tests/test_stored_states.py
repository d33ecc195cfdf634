"""Norm and head out of a checkpoint, and hidden states out of files: as if the model had been run."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import D_MODEL, LAYERS, TYPES, VOCAB, tiny

from tuned_lens_fast import LogitLens, TunedLens, Unembed, decode_model, decode_states, residual_stream
from tuned_lens_fast.data.parts import check_run, load_run

LENGTHS = [9, 4, 1, 6]
STATS = ["log_prob", "rank", "entropy", "max_prob", "kl", "js"]
QUESTION = {"stats": STATS, "top_k": 3, "watch": [5, 7]}


def text(number):
    return torch.arange(LENGTHS[number]) * 37 % 97 + 3 + number


@pytest.fixture(scope="module")
def model():
    return tiny("gemma2")


@pytest.fixture(scope="module")
def stored(model, tmp_path_factory):
    """A folder with the states of a few texts, as vLLM's extractor writes them: all layers and the output."""
    folder = tmp_path_factory.mktemp("states")
    for number in range(len(LENGTHS)):
        states = torch.stack(residual_stream(model, text(number)), 1)
        save_file({"hidden_states": states, "token_ids": text(number)}, folder / f"req-{number}.safetensors")
    return folder


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def assert_same(found, wanted):
    found = dict(found.items())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "opt", "cohere", "phi", "granite"])
def test_the_end_of_a_checkpoint(model_type, tmp_path):
    assert model_type in TYPES
    model = tiny(model_type)
    model.save_pretrained(tmp_path)
    lens, h = LogitLens.from_checkpoint(tmp_path), torch.randn(3, D_MODEL)
    assert torch.equal(lens(h, 0), LogitLens.from_model(model)(h, 0))
    assert lens.unembed.num_hidden_layers == LAYERS


def test_blocks_are_not_read(checkpoint, tmp_path, model):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {file for name, file in index.items() if ".layers." not in name}
    assert kept < set(index.values())
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors" or path.name in kept:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    h = torch.randn(3, D_MODEL)
    assert torch.equal(LogitLens.from_checkpoint(tmp_path)(h, 0), LogitLens.from_model(model)(h, 0))


def test_a_checkpoint_under_other_names(tmp_path):
    """That of the model without its head, tied to its embedding."""
    model = tiny("llama", tie_word_embeddings=True).bfloat16()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): t for name, t in load_file(path).items()}, path, {"format": "pt"})
    h = torch.randn(3, D_MODEL)
    assert torch.equal(Unembed.from_checkpoint(tmp_path)(h), Unembed(model)(h))


def test_checkpoints_that_are_none(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder: there is no folder .*nowhere"):
        LogitLens.from_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors"):
        LogitLens.from_checkpoint(tmp_path)
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = tmp_path / index["weight_map"]["model.norm.weight"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"folder: cannot read model.*safetensors"):
        LogitLens.from_checkpoint(tmp_path)
    save_file(
        {name: t[:-1] if name == "model.norm.weight" else t for name, t in load_file(checkpoint / file.name).items()},
        file,
    )
    with pytest.raises(ValueError, match=r"model.norm.weight of the checkpoint in .* is \[31\], wanted \[32\]"):
        LogitLens.from_checkpoint(tmp_path)
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"folder: the checkpoint in .* has no model.norm.weight"):
        LogitLens.from_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="folder: cannot read the checkpoint in"):
        LogitLens.from_checkpoint(tmp_path)


def test_a_file(model, stored, checkpoint):
    lens = LogitLens.from_checkpoint(checkpoint)
    for number in range(len(LENGTHS)):
        found = decode_states(lens, stored / f"req-{number}.safetensors", **QUESTION)
        wanted = decode_model(model, LogitLens.from_model(model), text(number), **QUESTION)
        assert_same(found, wanted)
        assert torch.equal(found.layers, wanted.layers)
        assert torch.equal(found.targets, wanted.targets)
    assert dict(decode_states(lens, stored / "req-0.safetensors").items()).keys() >= {"kl", "log_prob", "entropy"}


def test_a_folder_and_what_is_iterated_over(model, stored):
    lens = LogitLens.from_model(model)
    wanted = [decode_model(model, lens, text(number), **QUESTION) for number in range(len(LENGTHS))]
    files = [load_file(path) for path in sorted(stored.iterdir())]
    pairs = [(file["hidden_states"], file["token_ids"]) for file in files]
    for source in (stored, str(stored), files, pairs, iter(files), (pair for pair in pairs)):
        answers = [*decode_states(lens, source, **QUESTION)]
        assert len(answers) == len(wanted)
        for found, answer in zip(answers, wanted, strict=True):
            assert_same(found, answer)


def test_chosen_layers(model, stored):
    lens = TunedLens.from_model(model)
    whole = load_file(stored / "req-0.safetensors")
    states, ids = whole["hidden_states"], whole["token_ids"]
    wanted = decode_model(model, lens, ids, stats=["kl", "rank"])
    (found,) = decode_states(lens, [(states[:, [2, LAYERS, 0]], ids)], layers=[2, LAYERS, 0], stats=["kl", "rank"])
    assert found.layers.tolist() == [2, 0, LAYERS]
    for name in ("kl", "rank", "lse"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name)[[2, 0, LAYERS]], atol=1e-5, rtol=1e-5)
    (found,) = decode_states(lens, [(states[:, [1]], None)], layers=[1], targets=None)
    assert (found.layers.tolist(), found.kl, found.log_prob) == ([1], None, None)
    torch.testing.assert_close(found.entropy[0], decode_model(model, lens, ids).entropy[1])
    (found,) = decode_states(lens, [(states[:, [LAYERS]], ids)], layers=[LAYERS], stats=["log_prob", "kl"])
    torch.testing.assert_close(found.log_prob, decode_model(model, lens, ids).log_prob[[-1]], equal_nan=True)
    assert (found.kl == 0).all()


def test_chunks_and_16_bits(model, stored):
    lens = LogitLens.from_model(model)
    file = load_file(stored / "req-0.safetensors")
    states = file["hidden_states"].bfloat16()[torch.arange(300) % 9]
    ids = file["token_ids"][torch.arange(300) % 9]
    states[17, 1, 3] = torch.nan
    (whole,) = decode_states(lens, [(states, ids)], **QUESTION)
    (cut,) = decode_states(lens, [(states, ids)], memory_budget=200_000, **QUESTION)
    assert_same(cut, whole)
    assert whole.entropy[1].isnan().nonzero().flatten().tolist() == [17]
    wanted = lens.decode(states.movedim(1, 0)[:-1], targets=None)
    torch.testing.assert_close(whole.entropy[:-1], wanted.entropy, equal_nan=True)


def test_a_data_set(model, stored, tmp_path):
    lens = LogitLens.from_model(model)
    out = decode_states(lens, stored, out=tmp_path / "run", **QUESTION)
    assert out == tmp_path / "run"
    rows = load_run(out).to_table().to_pandas()
    for number in range(len(LENGTHS)):
        wanted = decode_model(model, lens, text(number), **QUESTION)
        own = rows[rows.document == f"req-{number}"].sort_values(["layer", "position"])
        assert len(own) == (LAYERS + 1) * LENGTHS[number]
        for name in ("entropy", "kl"):
            found = torch.tensor(own[name].to_numpy()).view(LAYERS + 1, -1)
            torch.testing.assert_close(found, getattr(wanted, name), atol=1e-5, rtol=1e-5)
        assert own.token_id.to_numpy()[: LENGTHS[number]].tolist() == text(number).tolist()
    parts = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    victim = sorted(parts)[0]
    (out / victim).unlink()
    decode_states(lens, stored, out=out, **QUESTION)
    assert {path.name: path.read_bytes() for path in out.glob("*.parquet")} == parts
    with pytest.raises(ValueError, match="out: "):
        decode_states(lens, stored, out=out, top_k=1)
    changed = [load_file(path) for path in sorted(stored.iterdir())]
    decode_states(lens, changed, out=tmp_path / "given", **QUESTION)
    changed[2]["hidden_states"] = changed[2]["hidden_states"] * 2
    with pytest.raises(ValueError, match="states"):
        decode_states(lens, changed, out=tmp_path / "given", **QUESTION)


def test_a_run_goes_on_as_it_began_or_says_so(model, stored, tmp_path):
    lens = LogitLens.from_model(model)
    out = decode_states(lens, stored, out=tmp_path / "run", engine="eager")
    next(out.glob("*.parquet")).unlink()
    with pytest.warns(UserWarning, match=r"other conditions \(memory_budget \d+ then, 134217728 now\)") as said:
        decode_states(lens, stored, out=out, memory_budget=2**27)
    assert [warning.filename for warning in said] == [__file__]
    assert check_run(out).complete


IDS, STATES = torch.arange(3, 7), torch.randn(4, LAYERS + 1, D_MODEL)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (5, {}, TypeError, "source: got a int, wanted a path"),
        (STATES, {}, TypeError, "source: got torch.float32"),
        ([STATES], {}, TypeError, "text 0 is torch.float32"),
        ([(STATES, IDS, IDS)], {}, TypeError, "text 0 is a tuple"),
        ([(STATES.long(), IDS)], {}, TypeError, "hidden_states of text 0 are torch.int64, wanted a floating tensor"),
        ([{"token_ids": IDS}], {}, TypeError, "hidden_states of text 0 are a NoneType"),
        ([(STATES[0], IDS)], {}, ValueError, r"text 0 are \[4, 32\], wanted \[positions, layers, 32\]"),
        ([(STATES[:0], IDS[:0])], {}, ValueError, r"text 0 are \[0, 4, 32\], wanted"),
        ([(STATES[..., :5], IDS)], {}, ValueError, r"text 0 are \[4, 4, 5\], wanted \[positions, layers, 32\]"),
        ([(STATES, IDS[:3])], {}, ValueError, r"token_ids of text 0 are \[3\], wanted \[4\]"),
        ([(STATES, IDS.float())], {}, TypeError, "token_ids of text 0: got torch.float32"),
        ([(STATES, IDS + VOCAB)], {}, IndexError, "token_ids of text 0: got 104, wanted ids from 0 to 100"),
        ([(STATES, None)], {}, ValueError, "text 0 has no token_ids"),
        ([(STATES[:, :2], IDS)], {}, ValueError, "text 0 has 2 entries for a lens of 3 layers; name them in layers="),
        ([(STATES, IDS)], {"layers": [0, 1]}, ValueError, "layers: got 2 for 4 entries"),
        (
            [(STATES, IDS)],
            {"layers": [0, 1, 3, 3]},
            ValueError,
            "layers: got 3, the model's own output, more than once",
        ),
        ([(STATES, IDS)], {"layers": [0, 1, 2, 4]}, IndexError, "layers: got 4, wanted 0 to 2"),
        (
            [(STATES[:, :3], IDS)],
            {"stats": ["kl"]},
            ValueError,
            "stats: kl compare with the model's own output.*layer 3",
        ),
        ([(STATES, IDS)], {"targets": IDS}, ValueError, "targets: got tensor"),
        ([(STATES, IDS)], {"engine": "warp"}, ValueError, "engine: got 'warp'"),
        ([(STATES, IDS)], {"memory_budget": 10}, ValueError, "memory_budget: got 10 bytes; the smallest"),
    ],
)
def test_what_is_refused(model, source, options, error, message):
    with pytest.raises(error, match=message):
        next(iter(decode_states(LogitLens.from_model(model, verify=False), source, **options)))


def test_files_that_are_refused(model, stored, tmp_path):
    lens = LogitLens.from_model(model, verify=False)
    with pytest.raises(FileNotFoundError, match=r"source: there is no file .*nowhere"):
        decode_states(lens, tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"source: .* holds no .safetensors"):
        decode_states(lens, tmp_path)
    path = tmp_path / "cut.safetensors"
    path.write_bytes((stored / "req-0.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"source: cannot read .*cut.safetensors"):
        decode_states(lens, path)
    save_file({"states": STATES}, path)
    with pytest.raises(ValueError, match=r"source: .*cut.safetensors holds no hidden_states"):
        decode_states(lens, path)
    with pytest.raises(TypeError, match="source: got a generator with out="):
        decode_states(lens, (text for text in ()), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
