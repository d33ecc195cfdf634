"""What the commands start from: a model, its tokenizer, a lens and texts, with errors that name what was asked for."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.data.jsonl import Document
from tuned_lens_fast.messages import quoted, shortened
from tuned_lens_fast.nn import Lens, LogitLens, TunedLens


def device_of(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {quoted(name, 150)}: {shortened(error)}") from error
    return device


def load_model(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = "float32" if args.gguf_file and args.dtype == "auto" else args.dtype
    device = device_of(args.device)
    # Transformers shows a bar of its own while it unpacks GGUF, which nothing switches off.
    hidden = redirect_stderr(io.StringIO()) if args.gguf_file and not args.debug else nullcontext()
    with model_errors(args.model), hidden:
        model: Any = AutoModelForCausalLM.from_pretrained(
            args.model,
            revision=args.revision,
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


def load_lens(model: Any, name: str | None) -> Lens:
    if name is None:
        return LogitLens.from_model(model)
    return TunedLens.from_model_and_pretrained(model, name).to(model.device)


def load_tokenizer(args: argparse.Namespace) -> Any:
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    with model_errors(args.model):
        if args.gguf_file is None:
            # A tokenizer makes do without a config whose code may not run, and then says something else.
            AutoConfig.from_pretrained(args.model, **options)
        return AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf_file, **options)


def check_folder(name: str) -> None:
    """Refuse what can only be meant as a folder and is none, rather than wait for the hub."""
    is_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path and not os.path.isdir(name):
        raise FileNotFoundError(f"model: there is no folder {quoted(name, 150)}")


@contextmanager
def model_errors(name: str) -> Iterator[None]:
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


def read_text(args: argparse.Namespace) -> str:
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


def tokenize(tokenizer: Any, documents: Sequence[Document], jsonl: Path | None) -> list[Tensor]:
    """Token ids ``[positions]`` of every text, with the special tokens that the model expects."""
    found = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
    for document, ids in zip(documents, found, strict=True):
        if not len(ids):
            raise ValueError(f"{place_of(jsonl, document)}: it has no tokens, so there is nothing to decode")
    return [torch.tensor(ids) for ids in found]


def place_of(jsonl: Path | None, document: Document) -> str:
    """Where a text comes from, as errors name it."""
    if jsonl is None:
        return "text" if document.id is None else f"text: {document.id}"
    return f"jsonl: {jsonl}, line {document.line}"
