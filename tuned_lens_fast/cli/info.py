"""``tuned-lens-fast info``: what a model or a lens is made of, and the engines that work here."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tuned_lens_fast.artifacts import read_config
from tuned_lens_fast.cli.arguments import add_model_options
from tuned_lens_fast.cli.loading import check_folder, gguf_in, load_model
from tuned_lens_fast.cli.output import print_json
from tuned_lens_fast.engines import engines
from tuned_lens_fast.jacobian_lens import read_jacobian_config
from tuned_lens_fast.load_artifacts import ONE_FILE, is_model_config, jacobian_files, load_lens_artifacts
from tuned_lens_fast.messages import ranges, shortened
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.models.forward_pass import input_device
from tuned_lens_fast.nn import LogitLens


def add(command: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    command.set_defaults(run=run)
    command.add_argument(
        "model", metavar="MODEL_OR_LENS", help="a model's folder or hub id, or a lens's folder or file"
    )
    command.add_argument("--json", action="store_true", help="print JSON in place of the table")
    add_model_options(command)


def run(args: argparse.Namespace) -> None:
    facts = _lens_facts(args.model) if _is_lens(args.model) else _model_facts(args)
    if args.json:
        print_json({**facts, "engines": engines()})
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
    """Whether ``name`` is the folder of a saved lens, or the file of one."""
    config = Path(name) / "config.json"
    if os.path.isfile(config):
        return not is_model_config(config)
    return bool(jacobian_files(Path(name))) or (os.path.isfile(name) and name.endswith(ONE_FILE))


def _lens_facts(name: str) -> dict[str, Any]:
    path, checkpoint = load_lens_artifacts(name)
    jacobian = path == checkpoint
    config = read_jacobian_config(path) if jacobian else read_config(path)
    return {
        "kind": "Jacobian lens" if jacobian else "tuned lens",
        "model": config.base_model_name_or_path or None,
        "model revision": config.base_model_revision,
        # A Jacobian lens does not say how many its model has.
        **({} if jacobian else {"layers": config.num_hidden_layers}),
        "layers it has": "all" if config.translated_layers is None else ranges(config.translated_layers),
        "width": config.d_model,
        "bias": "yes" if config.bias else "no",
        "unembedding hash": config.unembed_hash,
        "checkpoint bytes": checkpoint.stat().st_size,
    }


def _model_facts(args: argparse.Namespace) -> dict[str, Any]:
    check_folder(args.model)
    args.gguf_file = args.gguf_file or gguf_in(args.model)
    model = load_model(args)
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
        "device": str(input_device(model)),
    }
