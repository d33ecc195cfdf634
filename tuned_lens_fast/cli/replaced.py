"""Command lines of the library that this one replaces, tuned-lens, said as our own.

``python -m tuned_lens train --model.name M --data.name D --output O`` runs with one word changed. What each of its
flags becomes is in :data:`FLAGS`; ``translated`` stands before our own parser and gives it words that it knows, so that
nothing behind it has to know of another command line.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuned_lens_fast.cli.arguments import Parser, number, positive, whole
from tuned_lens_fast.messages import quoted
from tuned_lens_fast.training.optimizers import RECIPES

_TRAIN, _EVAL, _BOTH = ("train",), ("eval",), ("train", "eval")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {quoted(text)}, wanted a whole number") from None


def _truth(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"got {quoted(text)}, wanted true or false")
    return words[text.lower()]


def _one_of(*choices: str, instead: str = "") -> Callable[[str], str]:
    def chosen(text: str) -> str:
        if text.lower() not in choices:
            raise argparse.ArgumentTypeError(f"got {quoted(text)}, wanted {' or '.join(choices)}{instead}")
        return text.lower()

    return chosen


@dataclass(frozen=True)
class Flag:
    """A flag of theirs: it becomes an option of ours or, for the reason ``why``, is left out or refused."""

    name: str  #: with its group, which may be left out unless two groups have the name
    commands: tuple[str, ...]
    read: Callable[[str], Any]  #: its value
    becomes: str = ""  #: our option; "" for none
    why: str = ""  #: there is none
    default: Any = None  #: the value that changes nothing and so is never refused or spoken of
    refused: bool = False  #: rather than left out
    aliases: tuple[str, ...] = ()
    many: bool = False  #: values

    @property
    def words(self) -> list[str]:
        """As it may be written, shortest first."""
        group, _, name = self.name.rpartition(".")
        short = group and name not in ("name", "revision")
        return [*([f"--{name}"] if short else []), f"--{self.name}", *self.aliases]


_OTHER_TOKENIZER = "a model is read with its own tokenizer; save the other one in the model's folder"

FLAGS = (
    Flag("model.name", _BOTH, str, "MODEL"),
    Flag(
        "model.precision", _BOTH,
        _one_of("auto", "bfloat16", "float16", "float32", instead="; no model is quantised while it is loaded"),
        "--dtype",
    ),
    Flag("model.revision", _BOTH, str, "--revision"),
    Flag("model.slow_tokenizer", _BOTH, _truth, why=_OTHER_TOKENIZER, default=False, refused=True),
    Flag("model.tokenizer", _BOTH, str, why=_OTHER_TOKENIZER, refused=True),
    Flag("model.tokenizer_type", _BOTH, str, why=_OTHER_TOKENIZER, refused=True),
    Flag("data.name", _BOTH, str, "--jsonl, or --dataset and --config", many=True),
    Flag("data.split", _BOTH, str, "--split"),
    Flag("data.text_column", _BOTH, str, "--text-column"),
    Flag(
        "data.revision", _BOTH, str, refused=True,
        why="a data set is read as it is now; save that one with save_to_disk and name its folder",
    ),
    Flag("data.max_seq_len", _BOTH, positive, "--sequence-length", aliases=("--data.max_length", "--max_length")),
    Flag(
        "data.dataset_shuffle", _BOTH, _truth, default=False,
        why="texts are read in their order, and training takes sequences in a random one of its own",
    ),
    Flag("data.dataset_shuffle_seed", _BOTH, _integer, why="texts are read in their order", default=42),
    Flag("opt.optimizer", _TRAIN, _one_of("sgd", "adam"), "--optimizer"),
    Flag("opt.lr_scale", _TRAIN, number, "--learning-rate, times the optimiser's own"),
    Flag("opt.weight_decay", _TRAIN, number, "--weight-decay"),
    Flag("opt.warmup_steps", _TRAIN, whole, "--warmup"),
    Flag("opt.momentum", _TRAIN, number, why="it is 0.9; leave it out", default=0.9, refused=True),
    Flag("opt.zero", _TRAIN, _truth, why="it is so wherever several processes train", default=False),
    Flag(
        "dist.fsdp", _BOTH, _truth, default=False, refused=True,
        why="a model is loaded on one device; leave it out where the model fits, perhaps with --precision bfloat16",
    ),
    Flag(
        "dist.cpu_offload", _BOTH, _truth, default=False, refused=True,
        why="a model is loaded on one device; leave it out where the model fits, or add --device cpu",
    ),
    Flag("dist.nccl_timeout", _BOTH, _integer, why="processes wait as long as PyTorch's own default", default=1200),
    Flag(
        "dist.per_gpu_batch_size", _BOTH, positive, default=1,
        why="how many sequences run at once follows from --memory-budget and changes no result",
    ),
    Flag(
        "dist.dataloader_shuffle", _TRAIN, _truth, default=True, refused=True,
        why="training takes sequences in a random order, which --seed decides; leave it out",
    ),
    Flag("dist.dataloader_shuffle", _EVAL, _truth, default=True, why="texts are always read in their order"),
    Flag("output", _BOTH, str, "--out", aliases=("-o",)),
    Flag("lens_name_or_path", _TRAIN, str, "--lens", aliases=("--lens_name", "-l")),
    Flag("lens_name", _EVAL, str, "--lens", aliases=("--lens_name_or_path", "-l")),
    Flag("seed", _TRAIN, whole, "--seed"),
    Flag("seed", _EVAL, whole, why="texts are read in their order, nothing is drawn", default=42),
    Flag("bias_only", _TRAIN, _truth, "--bias-only"),
    Flag("num_steps", _TRAIN, positive, "--steps"),
    Flag("tokens_per_step", _TRAIN, positive, "--tokens-per-step"),
    Flag("loss", _TRAIN, _one_of("kl", "ce"), "--loss"),
    Flag(
        "token_shift", _TRAIN, _integer, refused=True,
        why="kl is of the same position (0) and ce of the next token (1); leave it out",
    ),
    Flag("token_shift", _EVAL, _integer, why="ce is of the next token (1); leave it out", default=1, refused=True),
    Flag("checkpoint_freq", _TRAIN, positive, "--checkpoint-every"),
    Flag("checkpoint_dir", _TRAIN, str, why="checkpoints are in the folder of --output until the run is finished"),
    Flag(
        "wandb", _TRAIN, str,
        why="nothing is sent to Weights & Biases; every loss and measurement is in report.json in --output",
    ),
    Flag("tokens", _EVAL, positive, "--tokens", aliases=("--limit",)),
    Flag("logit", _EVAL, _truth, why="the logit lens is always measured", default=True),
    Flag(
        "lens_types", _EVAL, _one_of("logit", "tuned"), many=True,
        why="the logit lens is always measured, the lens of --lens_name where there is one",
    ),
    Flag("layer_transfer", _EVAL, _truth, "--transfer"),
    Flag(
        "record_logit_stats", _EVAL, _truth, default=False, refused=True,
        why="the mean distribution over the vocabulary is not kept; leave it out",
    ),
    Flag(
        "log_level", _BOTH, _one_of("debug", "info", "warning", "error"),
        "--debug for debug, --quiet for warning and error",
    ),
)  # fmt: skip


def translated(argv: Sequence[str]) -> list[str]:
    """The words of our command line that do what ``argv`` asks of the replaced library; what is left out is said on
    standard error, and what is refused ends the process, as argparse does.

    Options of ours that it has none for may stand in it too.
    """
    words = [*argv]
    command = next((word for word in words if word in _BOTH), None)
    if command is None:
        Parser(prog="tuned-lens-fast").error("--model.name: wanted train or eval before it")
    words.remove(command)
    parser = Parser(prog=f"tuned-lens-fast {command}", add_help=False, argument_default=argparse.SUPPRESS)
    flags = {flag.name: flag for flag in FLAGS if command in flag.commands}
    for flag in flags.values():
        _add(parser, flag)
    values, rest = parser.parse_known_args([_with(word, "-", "_") for word in words])
    given = vars(values)
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1" and command == "eval":
        parser.error(f"one process measures; torchrun started {processes}, run it as python -m tuned_lens_fast eval")
    for missing in ("data.name", "output"):
        if missing not in given:
            parser.error(f"--{missing}: wanted one")
    if given.get("token_shift") == (0 if command == "train" and given.get("loss", "kl") == "kl" else 1):
        del given["token_shift"]

    notes = []
    for name, value in given.items():
        flag = flags[name]
        if not flag.why or value == flag.default:
            continue
        if flag.refused:
            parser.error(f"{flag.words[0]}: {flag.why}")
        notes.append(f"{flag.words[0]} is left out: {flag.why}")
    ours = [command, *_words(parser, flags, given)]
    ours += _of_train(given) if command == "train" else _of_eval(given)
    ours += [_with(word, "_", "-") for word in rest]
    if given.get("log_level") not in ("warning", "error"):
        for line in (*notes, f"runs as: {shlex.join(['tuned-lens-fast', *ours])}"):
            print(f"tuned-lens-fast: {line}", file=sys.stderr)
    return ours


def _with(word: str, old: str, new: str) -> str:
    """A flag with ``new`` for ``old`` in its name: theirs have underscores, or dashes too; ours have dashes only."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace(old, new)}{equals}{value}" if name.startswith("--") else word


def _add(parser: Parser, flag: Flag) -> None:
    if flag.read is _truth:
        parser.add_argument(*flag.words, dest=flag.name, type=_truth, nargs="?", const=True)
        group, dot, name = flag.name.rpartition(".")
        opposite = {f"--no{name}", f"--{group}{dot}no{name}"}
        parser.add_argument(*sorted(opposite), dest=flag.name, action="store_const", const=False)
    else:
        parser.add_argument(*flag.words, dest=flag.name, type=flag.read, nargs="+" if flag.many else None)


def _words(parser: Parser, flags: dict[str, Flag], given: dict[str, Any]) -> list[str]:
    """What both commands have: the model, the texts, and every flag that is an option of ours by another name."""
    words: list[str] = [given["model.name"]]
    texts, *others = given["data.name"]
    if texts.endswith(".jsonl") and not others:
        words += ["--jsonl", texts]
    elif len(others) > 1:
        parser.error(f"--data.name: got {len(others) + 1} names, wanted a .jsonl file, or a data set and its config")
    else:
        split = given.get("data.split", "validation")
        words += ["--dataset", texts, *(["--config", *others] if others else []), "--split", split]
    for name, value in given.items():
        option = flags[name].becomes
        # Those that become more than an option are translated one by one.
        if not option.startswith("--") or " " in option or name == "data.split":
            continue
        if value is True:
            words.append(option)
        elif value is not False:
            words += [option, str(value)]
    level = given.get("log_level", "info")
    return [*words, *{"debug": ["--debug"], "info": []}.get(level, ["--quiet"])]


def _of_train(given: dict[str, Any]) -> list[str]:
    """Where its training is not ours: it starts at the logit lens, with SGD, and measures nothing on its way."""
    words = [] if "lens_name_or_path" in given else ["--init", "zero"]
    words += [] if "seed" in given else ["--seed", "42"]
    words += [] if "opt.optimizer" in given else ["--optimizer", "sgd"]
    if "opt.lr_scale" in given:
        recipe = RECIPES[given.get("opt.optimizer", "sgd")]
        words += ["--learning-rate", repr(given["opt.lr_scale"] * recipe.learning_rate)]
    return [*words, "--eval-every", str(given.get("num_steps", 250))]


def _of_eval(given: dict[str, Any]) -> list[str]:
    """Texts are joined and cut, as for training."""
    return [] if "data.max_seq_len" in given else ["--sequence-length", "auto"]
