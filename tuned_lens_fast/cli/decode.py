"""``tuned-lens-fast decode``: texts through every layer of a model.

It loads a model and a lens, and calls ``decode_model`` and shows or writes the ``LensStats``, or ``decode_documents``,
which writes a folder. Of hidden states that are stored, ``--states``, a model's norm and head are enough.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from torch import Tensor

from tuned_lens_fast import progress
from tuned_lens_fast.atomic_write import atomic_write
from tuned_lens_fast.cli.arguments import add_engine_options, add_model_options, layer_numbers, positive
from tuned_lens_fast.cli.launched import add_tp, check_place, check_tp, group_of, processes
from tuned_lens_fast.cli.loading import (
    check_folder,
    check_sizes,
    device_of,
    gguf_in,
    lens_name,
    load_lens,
    load_model,
    load_tokenizer,
    place_of,
    read_text,
    tokenize,
)
from tuned_lens_fast.cli.output import print_json
from tuned_lens_fast.data.dataset import decode_documents
from tuned_lens_fast.data.jsonl import Document, read_jsonl
from tuned_lens_fast.data.parts import MANIFEST
from tuned_lens_fast.data.stored_states import decode_states, first_states
from tuned_lens_fast.data.table import table_of
from tuned_lens_fast.data.table_file import write_table
from tuned_lens_fast.decode import decode_model
from tuned_lens_fast.engines.statistics import STATISTICS
from tuned_lens_fast.inputs import Watch, read_watch
from tuned_lens_fast.load_artifacts import load_lens_artifacts
from tuned_lens_fast.memory import PeakMemory
from tuned_lens_fast.messages import quoted
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.models.forward_pass import input_device
from tuned_lens_fast.nn import Lens, LogitLens, TunedLens
from tuned_lens_fast.plotting import compare_page, print_table
from tuned_lens_fast.progress_bar import ProgressBar
from tuned_lens_fast.stats import LensStats
from tuned_lens_fast.streaming import check_length
from tuned_lens_fast.validation import layers_of

if TYPE_CHECKING:
    import pyarrow

#: What each kind of result file needs that the package itself does not.
_OUT_NEEDS = {".safetensors": (), ".csv": ("pyarrow",), ".parquet": ("pyarrow",)}
#: Ends of names that are meant for a file, of a kind that is not written.
_NO_FOLDER = {".json", ".jsonl", ".txt", ".tsv", ".xlsx", ".feather", ".arrow", ".npz", ".npy", ".pt", ".pkl", ".html"}


def add(command: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    command.set_defaults(run=run, check=check, resumes=_resumes)
    command.add_argument("model", metavar="MODEL", help="a local folder, or a model's id on the hub")
    command.add_argument("text", metavar="TEXT", nargs="?", help="the text; - for standard input")
    command.add_argument("--file", type=Path, help="read the text from this file")
    command.add_argument(
        "--jsonl", type=Path, metavar="FILE", help="read many texts, an object a line; needs --out DIR"
    )
    command.add_argument(
        "--states",
        type=Path,
        metavar="PATH",
        help="read hidden states in place of a text: a file as vLLM's extract_hidden_states writes it, or a folder of "
        "such, which needs --out DIR. Of MODEL, a folder, only norm and head are loaded",
    )
    command.add_argument("--text-column", metavar="NAME", help="where the texts of --jsonl are (default: text)")
    command.add_argument("--id-column", metavar="NAME", help="what they are called (default: 0, 1, 2 and so on)")
    command.add_argument("--chat", action="store_true", help="the text is a user's message: use the chat template")
    command.add_argument(
        "--generate", type=positive, metavar="N", help="read up to N tokens more, which the model goes on with (greedy)"
    )
    command.add_argument(
        "--lens", metavar="FOLDER_OR_ID", help="a tuned lens, or the file of a Jacobian lens (default: the logit lens)"
    )
    command.add_argument("--top-k", type=positive, default=5, metavar="K", help="likeliest tokens kept (default: 5)")
    command.add_argument(
        "--stats",
        type=_stats,
        metavar="NAMES",
        help=f"out of {', '.join(STATISTICS)} (default: {','.join(s.name for s in STATISTICS.values() if s.default)})",
    )
    command.add_argument(
        "--watch",
        action="append",
        metavar="TOKEN",
        help="its log-probability everywhere; may be given several times. A JSON object names groups of tokens "
        """that are read as one: '{"yes": ["Yes", " yes"]}'""",
    )
    command.add_argument(
        "--layers",
        type=layer_numbers,
        help='such as "0,5,10-20" (default: all; the output is always there). Of --states those that are stored, where '
        "the model's number of blocks is its output",
    )
    add_engine_options(command)
    command.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help=f"write all statistics: a file ({', '.join(_OUT_NEEDS)}), else a folder of Parquet that can be resumed; "
        "the columns are the same, in .csv an entry of a list is a column and text is written as JSON",
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page to explore that works offline")
    command.add_argument(
        "--compare",
        metavar="LENS",
        help='in --html, a second lens beside the first and as a difference: "logit", or a tuned lens as in --lens',
    )
    command.add_argument("--json", action="store_true", help="print JSON in place of the table")
    command.add_argument("--verbose", action="store_true", help="say how the memory budget is spent")
    command.add_argument("--quiet", action="store_true", help="print nothing but errors (and JSON, if asked for)")
    add_model_options(command)
    add_tp(command)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Refuse arguments that do not go together; ``rest`` loses what is found to be the text."""
    # Up to Python 3.12, argparse finds an optional positional only right behind the one before it.
    if args.text is None and rest and (rest[0] == "-" or not rest[0].startswith("-")):
        args.text = rest.pop(0)
    if sum(source is not None for source in (args.text, args.file, args.jsonl, args.states)) != 1:
        parser.error("decode: wanted one of TEXT, -, --file FILE, --jsonl FILE or --states PATH")
    if args.states is not None:
        for option in ("generate", "compare", "chunk", "gguf_file", "device_map", "tp"):
            if getattr(args, option) is not None:
                parser.error(f"--{option.replace('_', '-')} is for texts that a model runs on, not for --states")
        for option, default in (("chat", False), ("dtype", "auto"), ("revision", "main")):
            if getattr(args, option) != default:
                parser.error(f"--{option} is for texts that a model runs on, not for --states")
        if args.states.is_dir() and not _is_folder(args.out):
            parser.error(f"--states: of a folder, wanted --out with a folder, got {args.out or 'none'}")
    for name, text in (("TEXT", args.text), *(("--watch", token) for token in args.watch or ())):
        # Bytes that are no UTF-8 reach Python as halves of surrogate pairs, which no tokenizer takes.
        if text is not None and any("\ud800" <= char <= "\udfff" for char in text):
            parser.error(f"{name}: got {quoted(text)}, wanted UTF-8")
    check_tp(parser, args.tp)
    check_place(parser, args)
    if processes() > (args.tp or 1) and not _is_folder(args.out):
        parser.error(
            f"--out: {processes()} processes share the work on a folder, got {args.out or 'none'}; or name --tp"
        )
    if args.jsonl is not None and not _is_folder(args.out):
        parser.error(f"--jsonl: wanted --out with a folder, got {args.out or 'none'}")
    if args.jsonl is None and (args.text_column or args.id_column):
        parser.error("--text-column and --id-column are for --jsonl")
    if _is_folder(args.out) and (args.html or args.json):
        parser.error("--html and --json hold one text in memory, --out with a folder none; run them on their own")
    if args.generate is not None and args.jsonl is not None:
        parser.error("--generate is for one text, not for --jsonl")
    try:
        _watched(args.watch or [])
    except ValueError as error:
        parser.error(f"--{error}")
    if args.compare is not None and args.html is None:
        parser.error("--compare is for --html: the page shows both lenses")
    if args.compare is not None and (args.lens or "logit") == args.compare:
        parser.error(f"--compare: got {quoted(args.compare)}, which is the first lens too; wanted another")
    if args.out is not None and args.html is not None and args.out.resolve() == args.html.resolve():
        parser.error(f"--out and --html: both are {args.out}")


def _resumes(args: argparse.Namespace) -> bool:
    """Whether the same command goes on where it was stopped."""
    return _is_folder(args.out) and (args.out / MANIFEST).exists()


def _stats(text: str) -> list[str]:
    """ "log_prob,kl" as names."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STATISTICS:
            raise argparse.ArgumentTypeError(f"got {quoted(name)}, wanted names out of {', '.join(STATISTICS)}")
    return names


def _is_folder(out: Path | None) -> bool:
    """Whether ``--out`` names a folder, not a file."""
    return out is not None and out.suffix.lower() not in _OUT_NEEDS


def run(args: argparse.Namespace) -> None:
    with group_of(args.tp or 1, args.device) as leads:
        if not leads and not _is_folder(args.out):
            args.out = None
        if not leads:
            args.html, args.json = None, False
        args.quiet = args.quiet or os.environ.get("RANK", "0") != "0"
        _run(args)


def _run(args: argparse.Namespace) -> None:
    show = Console(file=sys.stderr, quiet=args.quiet)
    if args.states is not None:
        _run_on_states(args, show)
        return
    if args.jsonl is None:
        documents = [Document(None, None, read_text(args))]
    else:
        documents = read_jsonl(args.jsonl, args.text_column or "text", args.id_column)
    _check_outputs(args)
    check_folder(args.model)
    args.gguf_file = args.gguf_file or gguf_in(args.model)
    lens_files = {name: load_lens_artifacts(name) for name in {args.lens, args.compare} - {None, "logit"}}
    meter = ProgressBar(show, disable=args.quiet)
    with meter.shown(), _plan_shown(show, args.verbose):
        meter.say("reading the text")
        tokenizer = load_tokenizer(args)
        ids = tokenize(tokenizer, documents, args.jsonl, chat=args.chat)
        watch = read_watch(args.watch and _watched(args.watch), tokenizer)
        check_sizes(args, lens_files)
        meter.say("loading the model")
        model = load_model(args)
        longest = max(range(len(ids)), key=lambda number: len(ids[number]))
        try:
            check_length(model, len(ids[longest]) + (args.generate or 0))
        except ValueError as error:
            place = place_of(args.jsonl, documents[longest])
            raise ValueError(f"{place}: {str(error).removeprefix('input_ids: ')}") from error
        if args.generate is not None:
            meter.say("generating")
            ids = [_continued(model, ids[0], args.generate)]
        lens = load_lens(model, args.lens)
        other = None if args.compare is None else load_lens(model, None if args.compare == "logit" else args.compare)
        question: dict[str, Any] = {
            "layers": args.layers,
            "top_k": args.top_k,
            "stats": args.stats,
            "watch": watch,
            "chunk": args.chunk,
            "engine": args.engine,
            "memory_budget": args.memory_budget,
        }
        blocks = len(get_transformer_layers(model)[1])
        lenses = [lens] if other is None else [lens, other]
        count = sum(1 + len(layers_of(each, blocks) if args.layers is None else args.layers) for each in lenses)
        start, peak = time.perf_counter(), PeakMemory(input_device(model))

        def decoded(lens: Lens) -> LensStats:
            return cast(LensStats, decode_model(model, lens, ids[0][None].to(input_device(model)), **question)).to(
                "cpu"
            )

        runs: list[tuple[str, LensStats, Tensor]] = []
        batch: LensStats | None = None
        with meter.counting(count):
            if _is_folder(args.out):
                names: Any = [document.id for document in documents] if args.id_column else None
                decode_documents(model, lens, ids, out=args.out, ids=names, tokenizer=tokenizer, **question)
            else:
                progress.expect(count * len(ids[0]))
                batch = decoded(lens)
                runs = [(lens_name(args.lens), batch[:, 0], ids[0])]
                if other is not None:
                    runs.append((lens_name(args.compare), decoded(other)[:, 0], ids[0]))
        seconds, extra = time.perf_counter() - start, peak.growth()

        meter.say("writing")
        _write(args, batch, runs, tokenizer, watch)
    _say(args, show, meter, runs, tokenizer, count, seconds, extra)


def _run_on_states(args: argparse.Namespace, show: Console) -> None:
    """:func:`run` where the hidden states are there already."""
    _check_outputs(args)
    check_folder(args.model)
    meter = ProgressBar(show, disable=args.quiet)
    with meter.shown(), _plan_shown(show, args.verbose):
        meter.say("loading norm and head")
        lens: Lens = LogitLens.from_checkpoint(args.model, trust_remote_code=args.trust_remote_code)
        if args.lens is not None:
            lens = TunedLens.from_unembed_and_pretrained(lens.unembed, args.lens)
        lens = lens.to(device_of(args.device))
        tokenizer = load_tokenizer(args)
        watch = read_watch(args.watch and _watched(args.watch), tokenizer)
        hidden, ids = first_states(args.states)
        blocks = lens.unembed.num_hidden_layers or 0
        count = len(args.layers or layers_of(lens, blocks)) + (0 if args.layers else hidden.shape[1] - blocks)
        start, peak = time.perf_counter(), PeakMemory(lens.unembed.head.weight.device)
        question: dict[str, Any] = {
            "layers": args.layers,
            "top_k": args.top_k,
            "stats": args.stats,
            "watch": watch,
            "engine": args.engine,
            "memory_budget": args.memory_budget,
        }
        runs: list[tuple[str, LensStats, Tensor]] = []
        batch: LensStats | None = None
        with meter.counting(count):
            if _is_folder(args.out):
                decode_states(lens, args.states, out=args.out, tokenizer=tokenizer, **question)
            else:
                stats = cast(LensStats, decode_states(lens, args.states, **question)).to("cpu")
                runs = [(lens_name(args.lens), stats, ids)]
                columns = {name: value[:, None] for name, value in stats.items() if name not in ("layers", "targets")}
                targets = None if stats.targets is None else stats.targets[None]
                batch = LensStats(**columns, layers=stats.layers, targets=targets, watch=stats.watch)
        seconds, extra = time.perf_counter() - start, peak.growth()
        meter.say("writing")
        _write(args, batch, runs, tokenizer, watch)
    _say(args, show, meter, runs, tokenizer, count, seconds, extra)


def _write(
    args: argparse.Namespace,
    batch: LensStats | None,
    runs: list[tuple[str, LensStats, Tensor]],
    tokenizer: Any,
    watch: Watch | None,
) -> None:
    """What ``--out`` and ``--html`` ask for of one text, ``batch`` ``[layers, 1, positions]``."""
    if batch is not None and args.out is not None:
        if args.out.suffix.lower() == ".safetensors":
            runs[0][1].save(args.out)
        else:
            write_table(args.out, _table(batch, tokenizer, runs[0][2]))
    if runs and args.html is not None:
        page = compare_page(runs, tokenizer, title=_title(args), watch=None if watch is None else watch.columns())
        with atomic_write(args.html) as aside:
            aside.write_text(page, encoding="utf-8")


def _say(
    args: argparse.Namespace,
    show: Console,
    meter: ProgressBar,
    runs: list[tuple[str, LensStats, Tensor]],
    tokenizer: Any,
    count: int,
    seconds: float,
    extra: int | None,
) -> None:
    """The statistics of one text, where they are not in a folder, and what was done."""
    if runs and args.json:
        described = _as_json(args, runs[0][1], tokenizer, runs[0][2])
        print_json({**described, "seconds": seconds, "peak_extra_bytes": extra})
    elif runs and not args.quiet:
        print_table(Console(), runs[0][1], tokenizer, runs[0][2])
    if args.out is not None and not runs and not meter.positions:
        show.print(f"{args.out} is already complete", highlight=False, markup=False, soft_wrap=True)
        return
    memory = "" if extra is None else f", at most {extra / 2**20:,.0f} MiB beyond the model"
    done = f"{count} layers x {meter.positions:,.0f} positions in {seconds:.1f} s"
    show.print(f"{done}, {meter.positions / seconds:,.0f} positions/s{memory}", highlight=False, soft_wrap=True)
    for path in (args.out, args.html):
        if path is not None:
            show.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _plan_shown(show: Console, verbose: bool) -> Iterator[None]:
    """Within the block, say how the memory budget is spent."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show.print(record.getMessage(), highlight=False, markup=False, soft_wrap=True)

    log, handler = logging.getLogger("tuned_lens_fast"), Shown()
    before = log.level
    if verbose:
        log.setLevel(logging.INFO)
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse, before any work, what could not be written after it."""
    needs = {args.out: ("out", _OUT_NEEDS.get(args.out.suffix.lower(), ("pyarrow",)))} if args.out else {}
    if args.html is not None:
        needs[args.html] = ("html", ())
    for path, (option, packages) in needs.items():
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"{option}: needs {package}: pip install {package}")
        folder = option == "out" and _is_folder(path)
        if folder and path.suffix.lower() in _NO_FOLDER:
            raise ValueError(
                f"out: got {path}, wanted a name that ends in {', '.join(_OUT_NEEDS)}, or that of a folder, without "
                f"{path.suffix}"
            )
        try:
            if path.is_dir() and not folder:
                raise IsADirectoryError(None, "it is a folder")
            if path.exists() and not path.is_dir() and folder:
                raise NotADirectoryError(None, "it is a file, and no name of a folder or of a kind of file known here")
            with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent):
                pass
        except OSError as error:
            raise OSError(f"{option}: cannot write {path}: {error.strerror}") from error


def _continued(model: Any, ids: Tensor, most: int) -> Tensor:
    """``ids`` ``[positions]`` and up to ``most`` tokens that the model takes to be likeliest, one after the other."""
    prompt = ids[None].to(input_device(model))
    with torch.no_grad():
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, do_sample=False, num_beams=1
        )
    return found[0].to(ids)


def _watched(tokens: list[str]) -> dict[str, str | list[str]] | list[str]:
    """What ``--watch`` asks for: texts of tokens, or groups of such by name once one is a group."""
    groups = [_group(text) for text in tokens]
    if not any(groups):
        return tokens
    named: dict[str, str | list[str]] = {}
    for text, group in zip(tokens, groups, strict=True):
        for name, of in (group or {text: text}).items():
            if name in named:
                raise ValueError(f"watch: {quoted(name)} is there twice")
            named[name] = of
    return named


def _group(text: str) -> dict[str, str | list[str]] | None:
    """A JSON object with something in it; anything else is a token, and so is "{}"."""
    try:
        group = json.loads(text) if text.startswith("{") else None
    except (ValueError, RecursionError):
        return None
    if not group:
        return None
    for name, of in group.items():
        for token in of if isinstance(of, list) else [of]:
            if not isinstance(token, str):
                raise ValueError(f"watch: {quoted(name)} is {quoted(of)}, wanted a token's text or a list of such")
    return group


def _table(batch: LensStats, tokenizer: Any, input_ids: Tensor) -> pyarrow.Table:
    """What the folder of one text holds."""
    import pyarrow

    ids = input_ids[None]
    positions = torch.arange(ids.shape[1])[None]
    return table_of(batch, pyarrow.array([0]), positions, ids, torch.ones_like(ids, dtype=torch.bool), tokenizer)


def _title(args: argparse.Namespace) -> str:
    """ "SmolLM2-135M-Instruct, logit lens": what a page is called."""
    name = Path(args.gguf_file).stem if args.gguf_file else args.model.rstrip("/").split("/")[-1]
    return ", ".join([name, lens_name(args.lens), *([lens_name(args.compare)] if args.compare else [])])


def _as_json(args: argparse.Namespace, stats: LensStats, tokenizer: Any, input_ids: Tensor) -> dict[str, Any]:
    """Statistics by name, each ``[layers][positions]``; the top tokens ``[layers][positions][k]``."""
    return {
        "model": args.model,
        "lens": args.lens,
        "token_ids": input_ids.tolist(),
        "tokens": tokenizer.convert_ids_to_tokens(input_ids.tolist()),
        **{name: _plain(value.tolist()) for name, value in stats.items()},
        **({} if stats.watch is None else {"watch": [*stats.watch]}),
        "top_tokens": [
            [tokenizer.convert_ids_to_tokens([i for i in ids if i >= 0]) for ids in row]
            for row in ([] if stats.top_ids is None else stats.top_ids.tolist())
        ],
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
