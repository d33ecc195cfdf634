"""``tuned-lens-fast explore``: the page in a browser, of a run on disk or of prompts that a model reads as they come.

It serves what ``plotting.serve`` makes, on this machine alone unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from tuned_lens_fast.cli.arguments import add_model_options, positive
from tuned_lens_fast.cli.loading import (
    check_folder,
    gguf_in,
    lens_name,
    load_lens,
    load_model,
    load_tokenizer,
    tokenize,
)
from tuned_lens_fast.data.jsonl import Document
from tuned_lens_fast.data.parts import MANIFEST
from tuned_lens_fast.decode import decode_model
from tuned_lens_fast.load_artifacts import load_lens_artifacts
from tuned_lens_fast.messages import quoted, shortened
from tuned_lens_fast.plotting.serve import MemoryText, Run, Server, texts_of
from tuned_lens_fast.streaming import check_length

_LOCAL = ("127.0.0.1", "localhost")


def add(command: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    command.set_defaults(run=run, check=check)
    command.add_argument(
        "model", metavar="MODEL_OR_RUN", help="a folder that decode --out wrote, or a model as decode takes it"
    )
    command.add_argument("--lens", metavar="FOLDER_OR_ID", help="a tuned lens, for a model (default: the logit lens)")
    command.add_argument(
        "--compare",
        metavar="LENS_OR_RUN",
        help='beside the first and as a difference: for a model "logit" or a lens as in --lens, for a run another',
    )
    command.add_argument("--top-k", type=positive, default=5, metavar="K", help="likeliest tokens, for a model")
    command.add_argument(
        "--tokenizer", metavar="FOLDER_OR_ID", help="gives a run's tokens their text (default: of the run's model)"
    )
    command.add_argument("--port", type=int, default=0, help="(default: any that is free)")
    command.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine alone)")
    add_model_options(command)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Refuse what cannot be an address, and a comparison with itself."""
    if not 0 <= args.port < 2**16:
        parser.error(f"--port: got {args.port}, wanted 0 to 65535")
    if args.compare is not None and args.compare == (args.model if _is_run(args.model) else args.lens or "logit"):
        parser.error(f"--compare: got {quoted(args.compare)}, which is the first one too; wanted another")
    if args.compare is not None and _is_run(args.model) and not _is_run(args.compare):
        parser.error(f"--compare: got {quoted(args.compare)}, wanted a folder that decode --out wrote, as the first is")


def run(args: argparse.Namespace) -> int:
    show = Console(file=sys.stderr)

    def say(text: str) -> None:
        show.print(text, highlight=False, markup=False, soft_wrap=True)

    if _is_run(args.model):
        folders = [args.model] if args.compare is None else [args.model, args.compare]
        runs = [Run(Path(folder), _tokenizer_of_run(args, folder, say)) for folder in folders]
        server = _server(args, " | ".join(folders), texts_of(*runs), None)
    else:
        check_folder(args.model)
        args.gguf_file = args.gguf_file or gguf_in(args.model)
        names = [args.lens] if args.compare is None else [args.lens, args.compare]
        for name in {*names} - {None, "logit"}:
            load_lens_artifacts(name)
        tokenizer = load_tokenizer(args)
        model = load_model(args)
        lenses = [load_lens(model, None if name == "logit" else name) for name in names]
        title = ", ".join([args.model.rstrip("/").split("/")[-1], *map(lens_name, names)])

        def decode(text: str) -> MemoryText:
            if not text:
                raise ValueError("text: it is empty, so there is nothing to decode")
            (ids,) = tokenize(tokenizer, [Document(None, None, text)], None)
            check_length(model, len(ids))
            found = [
                (
                    lens_name(name),
                    decode_model(model, lens, ids[None].to(model.device), top_k=args.top_k).to("cpu")[:, 0],
                )
                for name, lens in zip(names, lenses, strict=True)
            ]
            return MemoryText(text[:80], title, found, ids, tokenizer)

        server = _server(args, title, [], decode)
    with server:
        if args.host not in _LOCAL:
            say(
                f"tuned-lens-fast: warning: whoever can reach {args.host} and learns this address reads along, "
                f"and can use the model; nothing is encrypted"
            )
        say(f"{server.url}  (Ctrl-C ends it)")
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            say("ended")
    return 0


def _is_run(folder: str) -> bool:
    return (Path(folder) / MANIFEST).exists()


def _server(args: argparse.Namespace, title: str, texts: Any, decode: Any) -> Server:
    try:
        return Server((args.host, args.port), title, texts, decode)
    except OSError as error:
        raise OSError(
            f"host, port: cannot listen at {quoted(args.host)}, port {args.port}: {error.strerror}"
        ) from error


def _tokenizer_of_run(args: argparse.Namespace, folder: str, say: Any) -> Any:
    """The tokenizer that was asked for, or the one of the model that the run names if it is on this machine."""
    from transformers import AutoTokenizer

    if args.tokenizer is not None:
        check_folder(args.tokenizer)
        return load_tokenizer(argparse.Namespace(**vars(args) | {"model": args.tokenizer}))
    name = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["names"]["model"]
    try:
        return AutoTokenizer.from_pretrained(name, gguf_file=args.gguf_file, local_files_only=True)
    except Exception as error:
        say(f"no tokenizer of {quoted(name, 150)} here, so tokens are ids ({shortened(error, 100)}); see --tokenizer")
        return None
