"""``tuned-lens-fast train``: a tuned lens of a model, from texts.

It reads and tokenises the texts, loads the model, and calls ``train``; then it says what came of it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tuned_lens_fast.artifacts import read_config
from tuned_lens_fast.cli.arguments import ALSO, add_model_options, byte_count, layer_numbers, number, positive, whole
from tuned_lens_fast.cli.launched import add_tp, check_place, group_of, processes
from tuned_lens_fast.cli.loading import check_folder, gguf_in, load_model, load_tokenizer, model_errors
from tuned_lens_fast.cli.texts import add_dataset_options, read_dataset, tokenized
from tuned_lens_fast.data.folder import cannot_write
from tuned_lens_fast.data.jsonl import Document, read_jsonl
from tuned_lens_fast.data.text_files import read_texts
from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.load_artifacts import load_lens_artifacts
from tuned_lens_fast.messages import listed, quoted
from tuned_lens_fast.nn import TunedLens
from tuned_lens_fast.progress_bar import ProgressBar
from tuned_lens_fast.training import TrainingReport, train
from tuned_lens_fast.training import folder as training_folder
from tuned_lens_fast.training.optimizers import DEFAULT_OPTIMIZER, RECIPES, SCHEDULES
from tuned_lens_fast.training.report import mean, span, thirds
from tuned_lens_fast.training.start import (
    CHECKPOINT_EVERY,
    EVAL_EVERY,
    HELD_OUT,
    INIT_TOKENS,
    INITS,
    LOSSES,
    STEPS,
    TOKENS_PER_STEP,
)

#: Pieces that text files are cut into where there are fewer documents, so that some can be held out.
_PIECES = 20


def add(command: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    command.usage = "%(prog)s MODEL (--jsonl FILE | --text FILE ... | --dataset NAME) --out FOLDER [OPTION ...]"
    command.epilog = (
        "for example: tuned-lens-fast train gpt2 --text book.txt --out lens --steps 50 --tokens-per-step 8192"
    )
    command.description = (
        "Train a tuned lens of MODEL on texts and write it to a folder. Name the texts (--jsonl, --text or "
        "--dataset) and the folder (--out); how long it takes and how good it gets follows from --steps and "
        "--tokens-per-step. All else has defaults. The same command resumes a run that was stopped. "
        f"{ALSO}"
    )
    command.set_defaults(run=run, check=check, resumes=_resumes)
    command.add_argument("model", metavar="MODEL", help="a local folder, or a model's id on the hub")

    first = command.add_argument_group("what matters")
    first.add_argument("--jsonl", type=Path, metavar="FILE", help="the texts, an object a line")
    first.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=f"the texts, files of plain text; a form feed begins a new one, and where there are fewer than {_PIECES} "
        "they are cut at ends of lines",
    )
    first.add_argument("--dataset", metavar="NAME", help="the texts, a data set of the hub or a folder; needs datasets")
    first.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the lens is written")
    first.add_argument("--steps", type=positive, default=STEPS, metavar="N", help="of training (default: 250)")
    first.add_argument(
        "--tokens-per-step",
        type=positive,
        default=TOKENS_PER_STEP,
        metavar="N",
        help="that a step reads (default: 262,144); texts that are used up come again, in another order",
    )

    text = command.add_argument_group("the texts")
    text.add_argument("--text-column", metavar="NAME", help="of --jsonl or --dataset (default: text)")
    add_dataset_options(text)
    text.add_argument(
        "--held-out",
        metavar="SHARE_OR_FILE",
        default=HELD_OUT,
        help="what is only measured on: a share of the texts, or a file of the same kind (default: 0.05)",
    )
    text.add_argument(
        "--sequence-length",
        type=positive,
        metavar="N",
        help="positions that texts are cut into (default: 2,048, or what the model has learned)",
    )

    lens = command.add_argument_group("the lens")
    lens.add_argument("--lens", metavar="FOLDER_OR_ID", help="go on from this tuned lens")
    lens.add_argument(
        "--loss",
        choices=LOSSES,
        default="kl",
        help="kl: the divergence from the model's output; ce: the cross-entropy of the next token (default: kl)",
    )
    lens.add_argument(
        "--init", choices=INITS, help="where training starts (default: ridge regression; with --lens what it has)"
    )
    lens.add_argument(
        "--init-tokens",
        type=positive,
        default=INIT_TOKENS,
        metavar="N",
        help="that the ridge regression reads (default: 65,536)",
    )
    lens.add_argument(
        "--layers", type=layer_numbers, help='to train, such as "0,5,10-20"; the rest stays (default: all)'
    )
    lens.add_argument("--rank", type=positive, metavar="R", help="that each layer's matrix is held to (default: full)")
    lens.add_argument("--bias-only", action="store_true", help="train biases and no matrices")

    optimizer = command.add_argument_group("the optimiser")
    optimizer.add_argument(
        "--optimizer",
        choices=[*RECIPES],
        default=DEFAULT_OPTIMIZER,
        help="; ".join(f"{name}: {recipe.meaning}" for name, recipe in RECIPES.items())
        + f" (default: {DEFAULT_OPTIMIZER})",
    )
    rates = ", ".join(f"{name} {recipe.learning_rate:g}" for name, recipe in RECIPES.items())
    optimizer.add_argument("--learning-rate", type=number, metavar="X", help=f"(default: {rates})")
    optimizer.add_argument(
        "--schedule",
        choices=[*SCHEDULES],
        default="linear",
        help="of the learning rate behind the warmup (default: linear, to 0)",
    )
    optimizer.add_argument(
        "--warmup",
        type=whole,
        metavar="N",
        help="steps in which the learning rate rises (default: 0, for adam a fifth of all, at most 1,000)",
    )
    decays = ", ".join(f"{name} {recipe.weight_decay:g}" for name, recipe in RECIPES.items())
    optimizer.add_argument("--weight-decay", type=number, metavar="X", help=f"(default: {decays})")
    optimizer.add_argument(
        "--clip", type=number, default=1.0, metavar="X", help="norm that gradients are cut to, 0 for none (default: 1)"
    )

    work = command.add_argument_group("how it runs")
    work.add_argument(
        "--eval-every",
        type=positive,
        default=EVAL_EVERY,
        metavar="N",
        help="steps from one measurement on what is held out to the next (default: 50)",
    )
    work.add_argument(
        "--eval-tokens",
        type=positive,
        metavar="N",
        help="that are measured on, if as many are held out (default: as many as a step has, at most 16,384)",
    )
    work.add_argument(
        "--checkpoint-every",
        type=positive,
        default=CHECKPOINT_EVERY,
        metavar="N",
        help="steps that a stopped run loses at most (default: 25)",
    )
    work.add_argument("--no-resume", action="store_true", help="refuse a folder that has a run in it")
    work.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="of what is held out and of the order of the texts (default: 0)",
    )
    work.add_argument(
        "--engine", choices=["auto", *ENGINES], default="auto", help="what reads the layers (default: auto)"
    )
    work.add_argument(
        "--memory-budget",
        type=byte_count,
        metavar="SIZE",
        help="for hidden states and scratch (default: 256MiB, or what one sequence takes)",
    )
    work.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_model_options(command)
    add_tp(command)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Refuse arguments that do not go together."""
    if sum(source is not None for source in (args.jsonl, args.text, args.dataset)) != 1:
        parser.error("train: wanted one of --jsonl FILE, --text FILE or --dataset NAME")
    if args.dataset is None and (args.split or args.config):
        parser.error("--split and --config are for --dataset")
    if args.text is not None and args.text_column:
        parser.error("--text-column is for --jsonl and --dataset")
    if args.bias_only and args.rank is not None:
        parser.error("--rank is of matrices, and --bias-only trains none")
    if args.warmup is not None and args.warmup > args.steps:
        parser.error(f"--warmup: got {args.warmup} of {args.steps} steps")
    if args.init == "lens" and args.lens is None:
        parser.error("--init lens: wanted --lens with the lens to go on from")
    share = _share(args.held_out)
    if share is not None and not 0 < share < 1:
        parser.error(f"--held-out: got {args.held_out}, wanted a share between 0 and 1, or a file")
    if share is None and args.dataset is not None:
        parser.error("--held-out: wanted a share where the texts are a data set")
    check_place(parser, args)


def _resumes(args: argparse.Namespace) -> bool:
    """Whether the same command goes on where it was stopped."""
    return (args.out / training_folder.CHECKPOINT).exists() and not args.no_resume


def run(args: argparse.Namespace) -> None:
    if args.tp not in (None, processes()):
        raise ValueError(f"tp: got {args.tp} and {processes()} processes, wanted all of them")
    with group_of(processes(), args.device) as leads:
        args.quiet = args.quiet or not leads
        _run(args)


def _run(args: argparse.Namespace) -> None:
    show = Console(file=sys.stderr, quiet=args.quiet)
    check_folder(args.model)
    args.gguf_file = args.gguf_file or gguf_in(args.model)
    _check_out(args.out, resume=not args.no_resume)
    share = _share(args.held_out)
    meter = ProgressBar(show, disable=args.quiet)
    with meter.shown():
        meter.say("reading the texts")
        texts = _read(args)
        others = None if share is not None else _read_file(args, Path(args.held_out))
        if args.lens is not None:
            _check_lens(args)
        tokenizer = load_tokenizer(args)
        # As many documents as the steps have use for once.
        enough = args.steps * args.tokens_per_step / (1 - (share or 0)) + args.tokens_per_step
        ids = [*tokenized(tokenizer, texts, args.jsonl, enough)]
        held_out: Any = share if others is None else [*tokenized(tokenizer, others, args.jsonl, float("inf"))]
        meter.say("loading the model")
        model = load_model(args)
        if args.lens is None:
            lens = TunedLens.from_model(model, None if args.revision == "main" else args.revision)
        else:
            lens = TunedLens.from_model_and_pretrained(model, args.lens)
    report = train(
        model,
        lens,
        ids,
        out=args.out,
        held_out=held_out,
        separator=tokenizer.eos_token_id,
        sequence_length=args.sequence_length,
        loss=args.loss,
        steps=args.steps,
        tokens_per_step=args.tokens_per_step,
        layers=args.layers,
        init=args.init or ("ridge" if args.lens is None else "lens"),
        init_tokens=args.init_tokens,
        rank=args.rank,
        bias_only=args.bias_only,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        schedule=args.schedule,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        clip=args.clip or None,
        seed=args.seed,
        eval_every=args.eval_every,
        eval_tokens=args.eval_tokens,
        checkpoint_every=args.checkpoint_every,
        resume=not args.no_resume,
        engine=args.engine,
        memory_budget=args.memory_budget,
        quiet=args.quiet,
    )
    if not args.quiet:
        _print(report)
    done = f"{len(report.losses):,} steps of {report.tokens['step']:,} tokens in {report.seconds:,.1f} s"
    show.print(f"{done}, {report.tokens_per_second:,.0f} tokens/s", highlight=False, soft_wrap=True)
    if report.skipped:
        layers = sorted({layer for _, layer in report.skipped})
        show.print(
            f"{len(report.skipped):,} steps were skipped since they were not finite, at layers {listed(layers, 8)}; "
            f"see {training_folder.REPORT}",
            highlight=False,
            soft_wrap=True,
        )
    show.print(f"wrote {args.out}; read with it:", highlight=False, markup=False, soft_wrap=True)
    options = ["--gguf-file", args.gguf_file] if args.gguf_file else []
    options += ["--revision", args.revision] if args.revision != "main" else []
    line = shlex.join(["tuned-lens-fast", "decode", args.model, *options, "--lens", str(args.out)])
    show.print(f'{line} "..."', highlight=False, markup=False, soft_wrap=True)


def _print(report: TrainingReport) -> None:
    """Held-out KL of groups of layers: the logit lens, the start, the end."""
    table = Table(title=f"held-out KL(model || lens), nats, {report.tokens['evaluated']:,} tokens", box=None)
    begun = {"ridge": "ridge start", "lens": "as given"}.get(report.arguments["init"])
    for column in ("layers", "logit lens", *([begun] if begun else []), "trained"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for name, part in thirds(len(report.layers)).items():
        columns = [report.logit_lens, *([report.kl_before] if begun else []), report.kl_after]
        table.add_row(f"{name}: {span(report.layers[part])}", *(f"{mean(column[part]):.4f}" for column in columns))
    Console(highlight=False, markup=False).print(table)


def _check_out(out: Path, resume: bool) -> None:
    """Refuse, before any work, a folder that the lens could not be written to."""
    training_folder.check_folder(out, resume)
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise cannot_write(out, error) from error


def _check_lens(args: argparse.Namespace) -> None:
    """Refuse, before the model is loaded, a lens that is not there or is of another width."""
    config_path, _ = load_lens_artifacts(args.lens)
    width = read_config(Path(config_path)).d_model
    if args.gguf_file is not None:
        return  # its config is in the file of the weights
    from transformers import AutoConfig

    with model_errors(args.model):
        config = AutoConfig.from_pretrained(
            args.model, revision=args.revision, trust_remote_code=args.trust_remote_code
        )
    of_model = getattr(config.get_text_config(), "hidden_size", width)
    if width % of_model:  # a lens of several residual streams is as wide as all of them
        raise ValueError(
            f"lens: {quoted(args.lens, 150)} is of a model of width {width}, {quoted(args.model, 150)} has {of_model}"
        )


def _read(args: argparse.Namespace) -> Iterable[Document]:
    if args.dataset is not None:
        return read_dataset(args)
    if args.jsonl is not None:
        return read_jsonl(args.jsonl, args.text_column or "text", skip_empty=True)
    return _of_files(args.text)


def _read_file(args: argparse.Namespace, path: Path) -> Iterable[Document]:
    """What is held out, as the texts are read."""
    return _of_files([path]) if args.jsonl is None else read_jsonl(path, args.text_column or "text", skip_empty=True)


def _of_files(paths: list[Path]) -> list[Document]:
    texts = [text for document in read_texts(paths) for text in document.text.split("\f")]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"text: there is none in {listed([str(path) for path in paths])}")
    if len(texts) < _PIECES:
        size = -(-sum(map(len, texts)) // _PIECES)
        texts = [piece for text in texts for piece in _cut(text, size) if piece.strip()]
    return [Document(None, None, text) for text in texts]


def _cut(text: str, size: int) -> Iterator[str]:
    """Pieces of ``size`` characters and up to the end of a line, if there is one before as much again."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size - 1, start + 2 * size) + 1 or start + size
        yield text[start:end]
        start = end


def _share(text: str | float) -> float | None:
    """The number that ``--held-out`` is; None where it names a file."""
    try:
        return float(text)
    except ValueError:
        return None
