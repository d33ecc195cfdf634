"""Command lines of the replaced library: none of its flags is unknown, and what runs is what they ask for."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest
import tiny_text_model
import torch

from tuned_lens_fast import cli
from tuned_lens_fast.cli import evaluate, train
from tuned_lens_fast.cli.arguments import is_replaced
from tuned_lens_fast.cli.replaced import FLAGS, translated

#: Its dataclasses, and the group that each one's fields are in.
GROUPS = {"Data": "data.", "Model": "model.", "Optimizer": "opt.", "Distributed": "dist.", "Train": "", "Eval": ""}
#: Fields that are on its main branch and not in 0.2.0, and the other way round.
MOVED = {"data.max_seq_len", "data.dataset_shuffle", "data.dataset_shuffle_seed", "dist.dataloader_shuffle", "logit"}
MOVED |= {"data.max_length", "lens_types", "log_level"}
NEEDED = ["--model.name", "m", "--data.name", "d.jsonl", "--output", "o"]


def declared():
    """Every flag of the installed tuned-lens, read from its source: importing it takes packages that are not there."""
    found = importlib.util.find_spec("tuned_lens")
    if found is None:
        pytest.skip("tuned-lens is not installed")
    for path in (Path(found.submodule_search_locations[0]) / "scripts").glob("*.py"):
        for kind in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(kind, ast.ClassDef) and kind.name in GROUPS:
                for field in kind.body:
                    if isinstance(field, ast.AnnAssign) and field.target.id not in ("model", "data", "opt", "dist"):
                        yield kind.name, GROUPS[kind.name] + field.target.id


def known(command):
    return {word.removeprefix("--") for flag in FLAGS if command in flag.commands for word in flag.words}


def test_every_flag_is_known():
    there = [*declared()]
    assert len(there) > 30
    for kind, name in there:
        for command in {"Train": ["train"], "Eval": ["eval"], "Optimizer": ["train"]}.get(kind, ["train", "eval"]):
            assert name in known(command), name
    assert known("train") | known("eval") >= MOVED


def test_every_flag_is_in_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "differences.md").read_text(encoding="utf-8")
    table = text.partition("## The replaced library's command line")[2]
    for flag in FLAGS:
        assert f"`{flag.words[0]}" in table or f"`--{flag.name}" in table, flag.name


def test_each_flag_becomes_something_or_says_why_not():
    for flag in FLAGS:
        assert bool(flag.becomes) != bool(flag.why), flag.name
    parser = cli._parser()
    options = {"train": vars(parser.parse_args(["train", "m", "--text", "t", "--out", "o"]))}
    options["eval"] = vars(parser.parse_args(["eval", "m", "--text", "t"]))
    for flag in FLAGS:
        for option in flag.becomes.replace(",", "").split():
            if option.startswith("--"):
                for command in flag.commands:
                    assert option[2:].replace("-", "_") in options[command], option


def asked(*argv):
    """Our own arguments for such a command line."""
    argv = [*map(str, argv)]
    assert is_replaced(argv)
    parser = cli._parser()
    args = parser.parse_args(translated(argv))
    {"train": train, "eval": evaluate}[argv[0]].check(parser, args, [])
    return args


def test_train_means_what_it_meant():
    args = asked("train", *NEEDED)
    assert (args.model, str(args.jsonl), str(args.out)) == ("m", "d.jsonl", "o")
    assert (args.init, args.optimizer, args.learning_rate, args.schedule) == ("zero", "sgd", None, "linear")
    assert (args.steps, args.tokens_per_step, args.eval_every, args.seed) == (250, 2**18, 250, 42)
    args = asked(
        "train", "--model.name=m", "--model.precision", "bfloat16", "--model.revision", "step3000",
        "--data.name", "wiki", "raw", "--data.text-column", "body", "--data.max_seq_len", 128, "--output=a_b",
        "--opt.optimizer", "ADAM", "--lr_scale", 0.5, "--opt.weight-decay", 0.01, "--warmup_steps", 3, "--num_steps", 7,
        "--tokens-per-step", 1024, "--loss", "CE", "--token_shift", 1, "--bias_only", "--seed", 5, "-l", "old",
        "--checkpoint_freq", 4, "--log_level", "WARNING", "--momentum", 0.9, "--device", "cpu", "--memory-budget=1GiB",
    )  # fmt: skip
    assert (args.dataset, args.config, args.split, args.text_column) == ("wiki", "raw", "validation", "body")
    assert (args.dtype, args.revision, args.sequence_length, str(args.out)) == ("bfloat16", "step3000", 128, "a_b")
    assert (args.optimizer, args.learning_rate, args.weight_decay, args.warmup) == ("adam", 5e-4, 0.01, 3)
    assert (args.steps, args.tokens_per_step, args.eval_every, args.seed) == (7, 1024, 7, 5)
    assert (args.loss, args.bias_only, args.lens, args.init) == ("ce", True, "old", None)
    assert (args.checkpoint_every, args.quiet, args.device, args.memory_budget) == (4, True, "cpu", 2**30)


def test_eval_means_what_it_meant(capsys):
    args = asked("eval", *NEEDED, "--data.split", "test")
    assert (args.lens, args.sequence_length, args.tokens, args.transfer) == (None, 0, None, False)
    capsys.readouterr()
    args = asked(
        "eval", *NEEDED, "--lens_name", "l", "--tokens", 99, "--layer_transfer", "--max_length", 64, "--nologit"
    )
    assert (args.lens, args.sequence_length, args.tokens, args.transfer) == ("l", 64, 99, True)
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "tuned-lens-fast: --logit is left out: the logit lens is always measured"
    assert printed[1].startswith("tuned-lens-fast: runs as: tuned-lens-fast eval m --jsonl d.jsonl")
    assert len(printed) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--fsdp"], "--fsdp: a model is loaded on one device"),
        (["train", "--cpu_offload"], "--cpu_offload: a model is loaded on one device"),
        (["train", "--momentum", "0.5"], "--momentum: it is 0.9"),
        (["train", "--token_shift", "1"], "--token_shift: kl is of the same position"),
        (["train", "--loss", "ce", "--token_shift", "-1"], "--token_shift: kl is of the same position"),
        (["eval", "--token_shift", "0"], "--token_shift: ce is of the next token"),
        (["train", "--model.precision", "int8"], "got 'int8', wanted auto or bfloat16"),
        (["train", "--tokenizer", "t"], "--tokenizer: a model is read with its own tokenizer"),
        (["train", "--data.revision", "r"], "--data.revision: a data set is read as it is now"),
        (["train", "--dataloader_shuffle", "False"], "--dataloader_shuffle: training takes sequences"),
        (["eval", "--record_logit_stats"], "--record_logit_stats: the mean distribution"),
        (["train", "--num_steps", "many"], "--num_steps: got 'many', wanted a whole number from 1"),
        (["train", "--data.name", "a", "b", "c"], "--data.name: got 3 names"),
        (["train", "--no_such_flag", "1"], "unrecognized arguments: --no-such-flag 1"),
        ([], "--model.name: wanted train or eval"),
    ],
)
def test_what_is_refused(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        cli.main([*argv[:1], *NEEDED, *argv[1:]])
    assert caught.value.code == 2
    printed = [line for line in capsys.readouterr().err.splitlines() if "runs as" not in line]
    assert len(printed) == 1
    assert message in printed[0]


@pytest.mark.parametrize("missing", ["--data.name", "--output"])
def test_what_is_missing_is_named(capsys, missing):
    at = NEEDED.index(missing)
    with pytest.raises(SystemExit):
        cli.main(["train", *NEEDED[:at], *NEEDED[at + 2 :]])
    assert f"error: {missing}: wanted" in capsys.readouterr().err


def test_several_processes_train_and_one_measures(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked("train", *NEEDED)
    with pytest.raises(SystemExit):
        cli.main(["eval", *NEEDED])
    assert "one process measures; torchrun started 2" in capsys.readouterr().err


def test_what_is_left_out_is_said(capsys):
    same = ["--zero", "false", "--nccl_timeout", 1200, "--per_gpu_batch_size", 1, "--dataset_shuffle", "false"]
    asked("train", *NEEDED, *same, "--token_shift", 0)
    assert len(capsys.readouterr().err.splitlines()) == 1
    left_out = ["--zero", "--nccl_timeout=9", "--per_gpu_batch_size", 8, "--data.dataset_shuffle", "--wandb", "run"]
    asked("train", *NEEDED, *left_out, "--checkpoint_dir", "c", "--dataset_shuffle_seed", 1)
    printed = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in printed[:-1]] == [
        "--zero", "--nccl_timeout", "--per_gpu_batch_size", "--dataset_shuffle", "--wandb", "--checkpoint_dir",
        "--dataset_shuffle_seed",
    ]  # fmt: skip


def test_they_run(tmp_path, capsys):
    model, tokenizer = tiny_text_model.save(tmp_path / "model")
    lines = [f"{i}: {'the quick brown fox jumps over the lazy dog ' * (1 + i % 3)}" for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    both = ["--model.name", str(tmp_path / "model"), "--data.name", str(tmp_path / "text.jsonl"), "--max_seq_len", "64"]
    out, lens = str(tmp_path / "found"), str(tmp_path / "lens")
    argv = ["train", *both, "--tokens_per_step", "256", "--num_steps", "2", "--per_gpu_batch_size=1", "--output", lens]
    assert cli.main(argv) == 0
    report = json.loads((tmp_path / "lens" / "report.json").read_text())
    assert [one["step"] for one in report["evaluations"]] == [0, 2]
    assert report["evaluations"][0]["kl"] == pytest.approx(report["logit_lens"], rel=1e-5)
    assert report["evaluations"][1]["kl"] < report["evaluations"][0]["kl"]
    assert cli.main(["eval", *both, "--lens_name", lens, "--tokens", "200", "-o", out]) == 0
    found = json.loads((tmp_path / "found" / "evaluation.json").read_text())
    assert (found["documents"], found["positions"]) == (4, 200)
    # By the model's own logits of the texts, the token that ends them before each.
    stream = [id for line in lines for id in (model.config.eos_token_id, *tokenizer(line)["input_ids"])]
    losses = []
    for start in (0, 64, 128, 192):
        part = torch.tensor([stream[start : min(start + 64, 200)]])
        logits = model(part).logits.double().log_softmax(-1)[:, :-1]
        losses += (-logits.gather(-1, part[:, 1:, None])).flatten().tolist()
    assert found["model"]["ce"]["mean"][0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
