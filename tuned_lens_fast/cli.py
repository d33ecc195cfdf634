"""The command line, ``tuned-lens-fast``: texts through every layer of a model, and what it is made of.

It walks the whole way: loads a model and a lens, calls ``decode_model`` and shows or writes the ``LensStats``, or
``decode_documents``, which writes a folder.

Exit codes: 0; 1 for an error in the work; 2 for one in how the command was used; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import logging
import math
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tuned_lens_fast
from tuned_lens_fast import progress
from tuned_lens_fast.artifacts import read_config
from tuned_lens_fast.atomic_write import atomic_write
from tuned_lens_fast.data.dataset import decode_documents
from tuned_lens_fast.data.jsonl import Document, read_jsonl
from tuned_lens_fast.data.parts import MANIFEST, check_run
from tuned_lens_fast.data.table import table_of
from tuned_lens_fast.data.table_file import write_table
from tuned_lens_fast.decode import decode_model
from tuned_lens_fast.engines import ENGINES, engines
from tuned_lens_fast.engines.statistics import STATISTICS
from tuned_lens_fast.load_artifacts import is_model_config, load_lens_artifacts
from tuned_lens_fast.memory import PeakMemory
from tuned_lens_fast.messages import json_text, listed, quoted, shortened
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.nn import Lens, LogitLens, TunedLens
from tuned_lens_fast.plotting import heatmap_page, print_table
from tuned_lens_fast.progress_bar import ProgressBar
from tuned_lens_fast.stats import LensStats
from tuned_lens_fast.streaming import check_length
from tuned_lens_fast.validation import DEFAULT_MEMORY_BUDGET

if TYPE_CHECKING:
    import pyarrow

#: What each kind of result file needs that the package itself does not.
_OUT_NEEDS = {".safetensors": (), ".csv": ("pyarrow",), ".parquet": ("pyarrow",)}
#: Ends of names that are meant for a file, of a kind that is not written.
_NO_FOLDER = {".json", ".jsonl", ".txt", ".tsv", ".xlsx", ".feather", ".arrow", ".npz", ".npy", ".pt", ".pkl", ".html"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``argv`` (by default the process's own) and return its exit code."""
    args = _parse(argv)
    try:
        with _quiet_libraries(args.debug):
            code: int | None = args.run(args)
    except KeyboardInterrupt:
        resumes = args.run is _decode and _is_folder(args.out) and (args.out / MANIFEST).exists()
        print(f"tuned-lens-fast: interrupted{'; the same command resumes' if resumes else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has gone. Keep the interpreter's last flush from complaining too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"tuned-lens-fast: error: {shortened(error, 1000) or type(error).__name__}", file=sys.stderr)
        return 1
    return code or 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tuned-lens-fast: error: {shortened(message)} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tuned-lens-fast", description="What a language model believes at every layer.")
    parser.add_argument("--version", action="version", version=f"tuned-lens-fast {tuned_lens_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    decode = commands.add_parser("decode", help="read texts at every layer of a model")
    decode.set_defaults(run=_decode)
    decode.add_argument("model", metavar="MODEL", help="a local folder, or a model's id on the hub")
    decode.add_argument("text", metavar="TEXT", nargs="?", help="the text; - for standard input")
    decode.add_argument("--file", type=Path, help="read the text from this file")
    decode.add_argument("--jsonl", type=Path, metavar="FILE", help="read many texts, an object a line; needs --out DIR")
    decode.add_argument("--text-column", metavar="NAME", help="where the texts of --jsonl are (default: text)")
    decode.add_argument("--id-column", metavar="NAME", help="what they are called (default: 0, 1, 2 and so on)")
    decode.add_argument("--lens", metavar="FOLDER_OR_ID", help="a tuned lens (default: the logit lens)")
    decode.add_argument("--top-k", type=_positive, default=5, metavar="K", help="likeliest tokens kept (default: 5)")
    decode.add_argument(
        "--stats",
        type=_stats,
        metavar="NAMES",
        help=f"out of {', '.join(STATISTICS)} (default: {','.join(s.name for s in STATISTICS.values() if s.default)})",
    )
    decode.add_argument(
        "--watch", action="append", metavar="TOKEN", help="its log-probability everywhere; may be given several times"
    )
    decode.add_argument("--layers", type=_layers, help='such as "0,5,10-20" (default: all; the output is always there)')
    decode.add_argument(
        "--chunk", type=_positive, metavar="N", help="positions that run at once (default: what the budget allows)"
    )
    decode.add_argument("--engine", choices=["auto", *ENGINES], default="auto", help="(default: auto)")
    decode.add_argument(
        "--memory-budget",
        type=_bytes,
        default=DEFAULT_MEMORY_BUDGET,
        metavar="SIZE",
        help="scratch that the lens may use, such as 256MiB (the default) or a number of bytes",
    )
    decode.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help=f"write all statistics: a file ({', '.join(_OUT_NEEDS)}), else a folder of Parquet that can be resumed; "
        "the columns are the same, in .csv an entry of a list is a column and text is written as JSON",
    )
    decode.add_argument("--html", type=Path, metavar="FILE", help="write a heatmap as one page that works offline")
    decode.add_argument("--json", action="store_true", help="print JSON in place of the table")
    decode.add_argument("--verbose", action="store_true", help="say how the memory budget is spent")
    decode.add_argument("--quiet", action="store_true", help="print nothing but errors (and JSON, if asked for)")

    info = commands.add_parser("info", help="describe a model or a tuned lens, and the engines that work here")
    info.set_defaults(run=_info)
    info.add_argument("model", metavar="MODEL_OR_LENS", help="a model's folder or hub id, or a lens's folder")
    info.add_argument("--json", action="store_true", help="print JSON in place of the table")

    for command in (decode, info):
        command.add_argument("--gguf-file", metavar="NAME", help="the file in MODEL that holds its weights as GGUF")
        command.add_argument(
            "--dtype",
            choices=["auto", "float32", "bfloat16", "float16"],
            default="auto",
            help="of the model's weights (default: as they are stored; float32 for GGUF)",
        )
        command.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="run the Python code that MODEL brings, which can do all that you can (default: refuse such a model)",
        )
        command.add_argument("--device", help="such as cpu or cuda:0 (default: cuda if there is one)")

    check = commands.add_parser("check", help="say whether a run, written by decode --out, is complete and undamaged")
    check.set_defaults(run=_check)
    check.add_argument("folder", type=Path, metavar="RUN", help="the folder")

    for command in (decode, info, check):
        command.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.run is _decode:
        # Up to Python 3.12, argparse finds an optional positional only right behind the one before it.
        if args.text is None and rest and (rest[0] == "-" or not rest[0].startswith("-")):
            args.text = rest.pop(0)
        if sum(source is not None for source in (args.text, args.file, args.jsonl)) != 1:
            parser.error("decode: wanted one of TEXT, -, --file FILE or --jsonl FILE")
        for name, text in (("TEXT", args.text), *(("--watch", token) for token in args.watch or ())):
            # Bytes that are no UTF-8 reach Python as halves of surrogate pairs, which no tokenizer takes.
            if text is not None and any("\ud800" <= char <= "\udfff" for char in text):
                parser.error(f"{name}: got {quoted(text)}, wanted UTF-8")
        if args.jsonl is not None and not _is_folder(args.out):
            parser.error(f"--jsonl: wanted --out with a folder, got {args.out or 'none'}")
        if args.jsonl is None and (args.text_column or args.id_column):
            parser.error("--text-column and --id-column are for --jsonl")
        if _is_folder(args.out) and (args.html or args.json):
            parser.error("--html and --json hold one text in memory, --out with a folder none; run them on their own")
        if args.out is not None and args.html is not None and args.out.resolve() == args.html.resolve():
            parser.error(f"--out and --html: both are {args.out}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _positive(text: str) -> int:
    # As many digits as 64 bits have.
    if not re.fullmatch(r"\d{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {quoted(text)}, wanted a whole number from 1")
    return int(text)


def _layers(text: str) -> list[int]:
    """ "0,5,10-20" as sorted numbers."""
    numbers: set[int] = set()
    for part in text.split(","):
        # No model has 10,000 layers, and a range may not be any number of them.
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise argparse.ArgumentTypeError(f'got {quoted(text)}, wanted layers such as "0,5,10-20"')
        numbers.update(range(low, high + 1))
    return sorted(numbers)


def _bytes(text: str) -> int:
    """ "256MiB" as a number of bytes."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if not match or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"got {quoted(text)}, wanted a size such as 256MiB or 1GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _stats(text: str) -> list[str]:
    """ "log_prob,kl" as names."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STATISTICS:
            raise argparse.ArgumentTypeError(f"got {quoted(name)}, wanted names out of {', '.join(STATISTICS)}")
    return names


def _check(args: argparse.Namespace) -> int:
    state = check_run(args.folder)
    print(state)
    return 0 if state.complete else 1


def _is_folder(out: Path | None) -> bool:
    """Whether ``--out`` names a folder, not a file."""
    return out is not None and out.suffix.lower() not in _OUT_NEEDS


def _decode(args: argparse.Namespace) -> None:
    show = Console(file=sys.stderr, quiet=args.quiet)
    if args.jsonl is None:
        documents = [Document(None, None, _read_text(args))]
    else:
        documents = read_jsonl(args.jsonl, args.text_column or "text", args.id_column)
    _check_outputs(args)
    _check_folder(args.model)
    if args.lens is not None:
        load_lens_artifacts(args.lens)
    meter = ProgressBar(show, disable=args.quiet)
    stats = None
    with meter.shown(), _plan_shown(show, args.verbose):
        meter.say("reading the text")
        tokenizer = _load_tokenizer(args)
        ids = _tokenize(tokenizer, documents, args.jsonl)
        watch = args.watch and [_token_id(tokenizer, text) for text in args.watch]
        meter.say("loading the model")
        model = _load_model(args)
        longest = max(range(len(ids)), key=lambda number: len(ids[number]))
        try:
            check_length(model, len(ids[longest]))
        except ValueError as error:
            place = _place(args.jsonl, documents[longest])
            raise ValueError(f"{place}: {str(error).removeprefix('input_ids: ')}") from error
        lens = _load_lens(model, args.lens)
        question: dict[str, Any] = {
            "layers": args.layers,
            "top_k": args.top_k,
            "stats": args.stats,
            "watch": watch,
            "chunk": args.chunk,
            "engine": args.engine,
            "memory_budget": args.memory_budget,
        }
        layers = 1 + (len(get_transformer_layers(model)[1]) if args.layers is None else len(args.layers))
        start, peak = time.perf_counter(), PeakMemory(model.device)
        with meter.counting(layers):
            if _is_folder(args.out):
                names: Any = [document.id for document in documents] if args.id_column else None
                decode_documents(model, lens, ids, out=args.out, ids=names, tokenizer=tokenizer, **question)
            else:
                progress.expect(layers * len(ids[0]))
                batch = cast(LensStats, decode_model(model, lens, ids[0][None].to(model.device), **question)).to("cpu")
                stats = batch[:, 0]
        seconds, extra = time.perf_counter() - start, peak.growth()

        meter.say("writing")
        if stats is not None and args.out is not None:
            if args.out.suffix.lower() == ".safetensors":
                stats.save(args.out)
            else:
                write_table(args.out, _table(batch, tokenizer, ids[0]))
        if stats is not None and args.html is not None:
            page = heatmap_page(stats, tokenizer, ids[0], title=_title(args))
            with atomic_write(args.html) as aside:
                aside.write_text(page, encoding="utf-8")

    if stats is not None and args.json:
        _print_json({**_as_json(args, stats, tokenizer, ids[0]), "seconds": seconds, "peak_extra_bytes": extra})
    elif stats is not None and not args.quiet:
        print_table(Console(), stats, tokenizer, ids[0])
    memory = "" if extra is None else f", at most {extra / 2**20:,.0f} MiB beyond the model"
    count = f"{layers} layers x {meter.positions:,.0f} positions in {seconds:.1f} s"
    show.print(f"{count}, {meter.positions / seconds:,.0f} positions/s{memory}", highlight=False, soft_wrap=True)
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


def _read_text(args: argparse.Namespace) -> str:
    """The text to decode, less the newline that ends a file."""
    if args.text not in (None, "-"):
        text = args.text
    else:
        source = "standard input" if args.file is None else str(args.file)
        try:
            raw = sys.stdin.buffer.read() if args.file is None else args.file.read_bytes()
            text = raw.decode("utf-8")
        except OSError as error:
            raise OSError(f"file: cannot read {source}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"file: {source} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError("text: it is empty, so there is nothing to decode")
    return text


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse, before any work, what could not be written after it."""
    needs = {args.out: ("out", _OUT_NEEDS.get(args.out.suffix.lower(), ("pyarrow",)))} if args.out else {}
    if args.html is not None:
        needs[args.html] = ("html", ("plotly",))
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


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {quoted(name, 150)}: {shortened(error)}") from error
    return device


def _load_model(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = "float32" if args.gguf_file and args.dtype == "auto" else args.dtype
    device = _device(args.device)
    # Transformers shows a bar of its own while it unpacks GGUF, which nothing switches off.
    hidden = redirect_stderr(io.StringIO()) if args.gguf_file and not args.debug else nullcontext()
    with _model_errors(args.model), hidden:
        model: Any = AutoModelForCausalLM.from_pretrained(
            args.model,
            gguf_file=args.gguf_file,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=args.trust_remote_code,
        )
    model.to(device)
    for parameter in model.parameters():
        # Weights are mapped from their file, and resident only once read: a page is 4 KiB. Read now, they
        # count as the model's memory, not as the decode's.
        parameter.detach().flatten()[:: 4096 // parameter.element_size()].sum()
    return model.eval()


def _load_lens(model: Any, name: str | None) -> Lens:
    if name is None:
        return LogitLens.from_model(model)
    return TunedLens.from_model_and_pretrained(model, name).to(model.device)


def _load_tokenizer(args: argparse.Namespace) -> Any:
    from transformers import AutoConfig, AutoTokenizer

    trust = args.trust_remote_code
    with _model_errors(args.model):
        if args.gguf_file is None:
            # A tokenizer makes do without a config whose code may not run, and then says something else.
            AutoConfig.from_pretrained(args.model, trust_remote_code=trust)
        return AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf_file, trust_remote_code=trust)


def _check_folder(name: str) -> None:
    """Refuse what can only be meant as a folder and is none, rather than wait for the hub."""
    is_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path and not os.path.isdir(name):
        raise FileNotFoundError(f"model: there is no folder {quoted(name, 150)}")


@contextmanager
def _model_errors(name: str) -> Iterator[None]:
    """Name the model in what goes wrong while it is loaded."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code=True" in str(error):
            raise ValueError(
                f"model: {quoted(name, 150)} brings Python code of its own, which can do all that you can and is not "
                f"run unasked; read it first, then pass --trust-remote-code"
            ) from error
        raise ValueError(f"model: cannot load {quoted(name, 150)}: {shortened(error)}") from error


def _tokenize(tokenizer: Any, documents: Sequence[Document], jsonl: Path | None) -> list[Tensor]:
    """Token ids ``[positions]`` of every text, with the special tokens that the model expects."""
    found = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
    for document, ids in zip(documents, found, strict=True):
        if not len(ids):
            raise ValueError(f"{_place(jsonl, document)}: it has no tokens, so there is nothing to decode")
    return [torch.tensor(ids) for ids in found]


def _place(jsonl: Path | None, document: Document) -> str:
    """Where a text comes from, as errors name it."""
    return "text" if jsonl is None else f"jsonl: {jsonl}, line {document.line}"


def _token_id(tokenizer: Any, text: str) -> int:
    """The token that ``text`` is, written as in a text or as in the vocabulary."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) == 1:
        return ids[0]
    known = tokenizer.get_vocab()
    if text in known:
        return known[text]
    parts = listed(tokenizer.convert_ids_to_tokens(ids))
    raise ValueError(f"watch: {quoted(text)} is {len(ids)} tokens ({parts}), wanted one")


def _table(batch: LensStats, tokenizer: Any, input_ids: Tensor) -> pyarrow.Table:
    """What the folder of one text holds."""
    import pyarrow

    ids = input_ids[None]
    positions = torch.arange(ids.shape[1])[None]
    return table_of(batch, pyarrow.array([0]), positions, ids, torch.ones_like(ids, dtype=torch.bool), tokenizer)


def _title(args: argparse.Namespace) -> str:
    """ "SmolLM2-135M-Instruct, logit lens": what a page is called."""
    name = Path(args.gguf_file).stem if args.gguf_file else args.model.rstrip("/").split("/")[-1]
    return f"{name}, {'tuned lens' if args.lens else 'logit lens'}"


def _as_json(args: argparse.Namespace, stats: LensStats, tokenizer: Any, input_ids: Tensor) -> dict[str, Any]:
    """Statistics by name, each ``[layers][positions]``; the top tokens ``[layers][positions][k]``."""
    return {
        "model": args.model,
        "lens": args.lens,
        "token_ids": input_ids.tolist(),
        "tokens": tokenizer.convert_ids_to_tokens(input_ids.tolist()),
        **{name: _plain(value.tolist()) for name, value in stats.items()},
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


def _print_json(value: Any) -> None:
    sys.stdout.write(json_text(value) + "\n")
    sys.stdout.flush()


def _info(args: argparse.Namespace) -> None:
    facts = _lens_facts(args.model) if _is_lens(args.model) else _model_facts(args)
    if args.json:
        _print_json({**facts, "engines": engines()})
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, "none" if value is None else f"{value:,}" if type(value) is int else shortened(value, 1000))
    for name, state in engines().items():
        table.add_row(f"engine {name}", state)
    Console(highlight=False, markup=False).print(table)


def _is_lens(name: str) -> bool:
    """Whether ``name`` is the folder of a saved lens."""
    config = Path(name) / "config.json"
    return os.path.isfile(config) and not is_model_config(config)


def _lens_facts(name: str) -> dict[str, Any]:
    config = read_config(Path(name) / "config.json")
    _, checkpoint = load_lens_artifacts(name)
    return {
        "kind": "tuned lens",
        "model": config.base_model_name_or_path,
        "model revision": config.base_model_revision,
        "layers": config.num_hidden_layers,
        "width": config.d_model,
        "bias": "yes" if config.bias else "no",
        "unembedding hash": config.unembed_hash,
        "checkpoint bytes": checkpoint.stat().st_size,
    }


def _model_facts(args: argparse.Namespace) -> dict[str, Any]:
    _check_folder(args.model)
    model = _load_model(args)
    unembed = LogitLens.from_model(model).unembed
    norm, head = unembed.norm, unembed.head
    kinds = {"layer": "LayerNorm", "rms": "RMSNorm", "module": type(norm.module).__name__, "identity": "none"}
    norm_parts = [
        f"{kinds[norm.kind]}, eps {norm.eps:g}" if norm.kind in ("layer", "rms") else kinds[norm.kind],
        *(["weight stored less 1"] if norm.unit_offset else []),
        *(["bias"] if norm.bias is not None else []),
        *([f"then times {norm.factor:g}"] if norm.factor != 1.0 else []),
    ]
    transform = [
        *([f"times {head.scale:g}"] if head.scale != 1.0 else []),
        *([f"softcap at {head.softcap:g}"] if head.softcap is not None else []),
    ]
    return {
        "kind": "model",
        "type": model.config.get_text_config().model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": len(get_transformer_layers(model)[1]),
        "width": head.weight.shape[1],
        "vocabulary": head.vocab,
        "final norm": ", ".join(norm_parts),
        "head": f"linear {'with' if head.bias is not None else 'without'} bias, {str(head.weight.dtype)[6:]}",
        "logit transform": ", ".join(transform) or None,
        "device": str(model.device),
    }


@contextmanager
def _quiet_libraries(debug: bool) -> Iterator[None]:
    """Keep what libraries say while they load a model off the screen, our own warnings to a line each."""
    if debug:
        yield
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        yield


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if Path(filename).is_relative_to(Path(__file__).parent):
        print(f"tuned-lens-fast: warning: {shortened(message, 1000)}", file=sys.stderr)
