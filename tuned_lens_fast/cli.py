"""The command line, ``tuned-lens-fast``: a text through every layer of a model, and what it is made of.

It walks the whole way: loads a model and a lens, calls ``decode_model``, shows or writes the ``LensStats``.

Exit codes: 0; 1 for an error in the work; 2 for one in how the command was used; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
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
from typing import Any, NoReturn, TextIO

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from torch import Tensor

from tuned_lens_fast import progress
from tuned_lens_fast.decode import DEFAULT_MEMORY_BUDGET, decode_model
from tuned_lens_fast.engines import ENGINES, engines
from tuned_lens_fast.files import written_aside
from tuned_lens_fast.load_artifacts import load_lens_artifacts
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.nn import Lens, LogitLens, TunedLens, TunedLensConfig
from tuned_lens_fast.plotting import heatmap_page, print_table
from tuned_lens_fast.stats import LensStats

#: What each kind of result file needs that the package itself does not.
_OUT_NEEDS = {".safetensors": (), ".csv": ("pandas",), ".parquet": ("pandas", "pyarrow")}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``argv`` (by default the process's own) and return its exit code."""
    args = _parse(argv)
    try:
        with _quiet_libraries(args.debug):
            args.run(args)
    except KeyboardInterrupt:
        print("tuned-lens-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has gone. Keep the interpreter's last flush from complaining too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"tuned-lens-fast: error: {message}", file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tuned-lens-fast: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tuned-lens-fast", description="What a language model believes at every layer.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    decode = commands.add_parser("decode", help="read a text at every layer of a model")
    decode.set_defaults(run=_decode)
    decode.add_argument("model", metavar="MODEL", help="a local folder, or a model's id on the hub")
    decode.add_argument("text", metavar="TEXT", nargs="?", help="the text; - for standard input")
    decode.add_argument("--file", type=Path, help="read the text from this file")
    decode.add_argument("--lens", metavar="FOLDER_OR_ID", help="a tuned lens (default: the logit lens)")
    decode.add_argument("--top-k", type=_positive, default=5, metavar="K", help="likeliest tokens kept (default: 5)")
    decode.add_argument("--layers", type=_layers, help='such as "0,5,10-20" (default: all; the output is always there)')
    decode.add_argument("--engine", choices=["auto", *ENGINES], default="auto", help="(default: auto)")
    decode.add_argument(
        "--memory-budget",
        type=_bytes,
        default=DEFAULT_MEMORY_BUDGET,
        metavar="SIZE",
        help="scratch that the lens may use, such as 256MiB (the default) or a number of bytes",
    )
    decode.add_argument("--out", type=_out, metavar="FILE", help=f"write all statistics: {', '.join(_OUT_NEEDS)}")
    decode.add_argument("--html", type=Path, metavar="FILE", help="write a heatmap as one page that works offline")
    decode.add_argument("--json", action="store_true", help="print JSON in place of the table")
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
        command.add_argument("--device", help="such as cpu or cuda:0 (default: cuda if there is one)")
        command.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.run is _decode:
        # Up to Python 3.12, argparse finds an optional positional only right behind the one before it.
        if args.text is None and rest and (rest[0] == "-" or not rest[0].startswith("-")):
            args.text = rest.pop(0)
        if (args.text is None) == (args.file is None):
            parser.error("decode: wanted one of TEXT, - or --file FILE")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number from 1")
    return int(text)


def _layers(text: str) -> list[int]:
    """ "0,5,10-20" as sorted numbers."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise argparse.ArgumentTypeError(f'got {text!r}, wanted layers such as "0,5,10-20"')
        numbers.update(range(low, high + 1))
    return sorted(numbers)


def _bytes(text: str) -> int:
    """ "256MiB" as a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if not match or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a size such as 256MiB or 1GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _out(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _OUT_NEEDS:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a name that ends in {', '.join(_OUT_NEEDS)}")
    return path


def _decode(args: argparse.Namespace) -> None:
    show = Console(file=sys.stderr, quiet=args.quiet)
    text = _read_text(args)
    _check_outputs(args)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=show,
        transient=True,
        disable=args.quiet or not show.is_terminal,
    ) as bar:
        task = bar.add_task("loading the model", total=None)
        model = _load_model(args)
        tokenizer = _load_tokenizer(args)
        lens = _load_lens(model, args.lens)
        input_ids = _tokenize(tokenizer, text, model).to(model.device)

        layers = len(get_transformer_layers(model)[1]) if args.layers is None else len(args.layers)
        bar.update(task, description="running the model")

        def advance(rows: int) -> None:
            bar.update(task, description="decoding", total=(layers + 1) * len(input_ids), advance=rows)

        start, peak = time.perf_counter(), _PeakMemory(model.device)
        with progress.listen(advance):
            stats = decode_model(
                model,
                lens,
                input_ids,
                layers=args.layers,
                top_k=args.top_k,
                engine=args.engine,
                memory_budget=args.memory_budget,
            ).to("cpu")
        seconds, extra = time.perf_counter() - start, peak.growth()

        bar.update(task, description="writing", total=None)
        input_ids = input_ids.cpu()
        if args.out is not None:
            _write_out(args.out, stats, tokenizer, input_ids)
        if args.html is not None:
            page = heatmap_page(stats, tokenizer, input_ids, title=_title(args))
            with written_aside(args.html) as aside:
                aside.write_text(page, encoding="utf-8")

    if args.json:
        _print_json({**_as_json(args, stats, tokenizer, input_ids), "seconds": seconds, "peak_extra_bytes": extra})
    elif not args.quiet:
        print_table(Console(), stats, tokenizer, input_ids)
    memory = "" if extra is None else f", at most {extra / 2**20:,.0f} MiB beyond the model"
    show.print(f"{layers + 1} layers x {len(input_ids)} positions in {seconds:.1f} s{memory}", highlight=False)
    for path in (args.out, args.html):
        if path is not None:
            show.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


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
    needs = {args.out: ("out", "data", _OUT_NEEDS[args.out.suffix])} if args.out else {}
    if args.html is not None:
        needs[args.html] = ("html", "html", ("plotly",))
    for path, (option, extra, packages) in needs.items():
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"{option}: needs {package}: pip install 'tuned-lens-fast[{extra}]'")
        try:
            if path.is_dir():
                raise IsADirectoryError(None, "it is a folder")
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise OSError(f"{option}: cannot write {path}: {error.strerror}") from error


def _load_model(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    _check_folder(args.model)
    dtype = "float32" if args.gguf_file and args.dtype == "auto" else args.dtype
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # Transformers shows a bar of its own while it unpacks GGUF, which nothing switches off.
    hidden = redirect_stderr(io.StringIO()) if args.gguf_file and not args.debug else nullcontext()
    with _model_errors(args.model), hidden:
        model: Any = AutoModelForCausalLM.from_pretrained(
            args.model,
            gguf_file=args.gguf_file,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
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
    from transformers import AutoTokenizer

    with _model_errors(args.model):
        return AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf_file)


def _check_folder(name: str) -> None:
    """Refuse what can only be meant as a folder and is none, rather than wait for the hub."""
    is_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise FileNotFoundError(f"model: there is no folder {name!r}")


@contextmanager
def _model_errors(name: str) -> Iterator[None]:
    """Name the model in what goes wrong while it is loaded."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"model: cannot load {name!r}: {error}") from error


def _tokenize(tokenizer: Any, text: str, model: Any) -> Tensor:
    """Token ids ``[positions]`` of ``text``, with the special tokens that the model expects."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not len(ids):
        raise ValueError("text: it has no tokens, so there is nothing to decode")
    if most is not None and len(ids) > most:
        raise ValueError(f"text: it has {len(ids)} tokens, more than the {most} that the model can read")
    return ids


class _PeakMemory:
    """How much memory beyond that at the start was in use at most."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start: int | None = torch.cuda.memory_allocated(device)
            return
        try:
            # Sets the resident peak back to what is resident now (man 5 proc).
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._resident_peak()
        except OSError:
            self.start = None

    def growth(self) -> int | None:
        """Bytes: allocated on a GPU, else resident; None where the system does not tell."""
        if self.start is None:
            return None
        now = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self._resident_peak()
        return max(0, now - self.start)

    @staticmethod
    def _resident_peak() -> int:
        status = Path("/proc/self/status").read_text()
        match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        if match is None:
            raise OSError("/proc/self/status has no VmHWM")
        return int(match[1]) * 1024


def _write_out(path: Path, stats: LensStats, tokenizer: Any, input_ids: Tensor) -> None:
    if path.suffix == ".safetensors":
        stats.save(path)
        return
    frame = stats.to_pandas(tokenizer)
    read = input_ids[torch.from_numpy(frame["position"].to_numpy(copy=True))]
    frame.insert(2, "token_id", read.numpy())
    frame.insert(3, "token", tokenizer.convert_ids_to_tokens(read.tolist()))
    with written_aside(path) as aside:
        if path.suffix == ".csv":
            frame.to_csv(aside, index=False)
        else:
            frame.to_parquet(aside, index=False)


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
    json.dump(value, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")
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
        table.add_row(name, "none" if value is None else f"{value:,}" if type(value) is int else str(value))
    for name, state in engines().items():
        table.add_row(f"engine {name}", state)
    Console(highlight=False, markup=False).print(table)


def _is_lens(name: str) -> bool:
    """Whether ``name`` is the folder of a saved lens: a model's config names its type, a lens's does not."""
    config = Path(name) / "config.json"
    return config.is_file() and "model_type" not in json.loads(config.read_text(encoding="utf-8"))


def _lens_facts(name: str) -> dict[str, Any]:
    config_path, checkpoint = load_lens_artifacts(name)
    config = TunedLensConfig.from_dict(json.loads(config_path.read_text(encoding="utf-8")))
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
        print(f"tuned-lens-fast: warning: {message}", file=sys.stderr)
