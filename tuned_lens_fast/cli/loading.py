"""What the commands start from: a model, its tokenizer, a lens and texts, with errors that name what was asked for."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.data.jsonl import Document
from tuned_lens_fast.messages import listed, quoted, shortened
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


def lens_name(name: str | None) -> str:
    """What ``--lens`` or ``--compare`` asks for, as a page calls it."""
    return "logit lens" if name in (None, "logit") else f"lens {name.rstrip('/').split('/')[-1]}"


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


def gguf_in(name: str) -> str | None:
    """The GGUF file of a folder that has one and no other weights.

    Raises:
        ValueError: it has several.
    """
    folder = Path(name)
    files = sorted(path.name for path in folder.iterdir() if path.is_file()) if os.path.isdir(name) else []
    found = [file for file in files if file.lower().endswith(".gguf")]
    if not found or any(file.endswith((".safetensors", ".bin", ".pt", ".pth")) for file in files):
        return None
    if len(found) > 1:
        raise ValueError(f"model: {quoted(name, 150)} has several GGUF files, choose with --gguf-file: {listed(found)}")
    return found[0]


def check_sizes(args: argparse.Namespace, lenses: Mapping[str, tuple[Path, Path]]) -> None:
    """Refuse layers and lenses that the model cannot have, as far as its config tells, before its weights load.

    Args:
        lenses: what ``load_lens_artifacts`` found for each.
    """
    from transformers import AutoConfig

    if args.gguf_file is not None:
        return
    with model_errors(args.model):
        config = AutoConfig.from_pretrained(
            args.model, revision=args.revision, trust_remote_code=args.trust_remote_code
        )
    text = config.get_text_config()
    # Of an encoder and a decoder, it is the number of one of them.
    layers = None if config.is_encoder_decoder else getattr(text, "num_hidden_layers", None)
    if layers is not None and args.layers and args.layers[-1] >= layers:
        raise IndexError(f"layers: got {args.layers[-1]}, wanted 0 to {layers - 1}")
    for name, (config_path, weights) in lenses.items():
        if config_path == weights:
            continue  # a Jacobian lens, which is read as a whole
        try:
            lens = json.loads(Path(config_path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # what is wrong with it is said where it is loaded
        # A lens of several residual streams is that many times as wide.
        width = getattr(text, "hidden_size", None)
        for key, wanted, of_several in (("d_model", width, True), ("num_hidden_layers", layers, False)):
            got = lens.get(key) if isinstance(lens, dict) else None
            if type(got) is not int or type(wanted) is not int or got == wanted:
                continue
            if not (of_several and got % wanted == 0):
                raise ValueError(f"lens: {quoted(name, 150)} is of a model with {key} {got}, this one has {wanted}")


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


def tokenize(tokenizer: Any, documents: Sequence[Document], jsonl: Path | None, chat: bool = False) -> list[Tensor]:
    """Token ids ``[positions]`` of every text, with the special tokens that the model expects.

    With ``chat`` a text is what a user says, up to where the model's answer begins.
    """
    texts = [document.text for document in documents]
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("chat: the model's tokenizer has no chat template; leave --chat out")
        talks = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(talks, add_generation_prompt=True, tokenize=False)
    # A template writes the special tokens itself.
    found = tokenizer(texts, verbose=False, **({"add_special_tokens": False} if chat else {}))["input_ids"]
    for document, ids in zip(documents, found, strict=True):
        if not len(ids):
            raise ValueError(f"{place_of(jsonl, document)}: it has no tokens, so there is nothing to decode")
    return [torch.tensor(ids) for ids in found]


def place_of(jsonl: Path | None, document: Document) -> str:
    """Where a text comes from, as errors name it."""
    if jsonl is None:
        return "text" if document.id is None else f"text: {document.id}"
    return f"jsonl: {jsonl}, line {document.line}"
