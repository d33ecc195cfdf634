"""``tuned-lens-fast eval``: how good a lens is on texts that it was not trained on, layer by layer.

It loads a model and a lens, calls ``evaluate``, and shows, prints or writes what was measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tuned_lens_fast.cli.arguments import ALSO, add_engine_options, add_model_options, positive
from tuned_lens_fast.cli.loading import check_folder, gguf_in, load_lens, load_model, load_tokenizer, place_of
from tuned_lens_fast.cli.output import print_json
from tuned_lens_fast.cli.texts import add_dataset_options, read_dataset, tokenized
from tuned_lens_fast.data.jsonl import read_jsonl
from tuned_lens_fast.data.table_file import write_table
from tuned_lens_fast.data.text_files import read_texts
from tuned_lens_fast.load_artifacts import load_lens_artifacts
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.progress_bar import ProgressBar
from tuned_lens_fast.streaming import check_length
from tuned_lens_fast.training.documents import LONGEST, sequences
from tuned_lens_fast.training.evaluation import CONFIDENCE, Evaluation, draw, evaluate, first, table
from tuned_lens_fast.validation import layers_of

#: Positions that the transfer matrix is measured on: each is read once for every two layers.
TRANSFER_TOKENS = 4096


def add(command: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    command.usage = "%(prog)s MODEL --lens FOLDER_OR_ID (--text FILE ... | --jsonl FILE | --dataset NAME) [OPTION ...]"
    command.epilog = "for example: tuned-lens-fast eval gpt2 --lens lens --text a.txt b.txt --out results"
    command.description = (
        "Measure a lens of MODEL on texts that it was not trained on, layer by layer, beside the logit lens and the "
        "model's own output. Name the lens (--lens) and the texts (--text, --jsonl or --dataset). "
        f"{ALSO}"
    )
    command.set_defaults(run=run, check=check)
    command.add_argument("model", metavar="MODEL", help="a local folder, or a model's id on the hub")
    command.add_argument(
        "--lens", metavar="FOLDER_OR_ID", help="a tuned lens, or the file of a Jacobian lens (default: the logit lens)"
    )
    texts = command.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="files of plain text, each a document")
    texts.add_argument("--jsonl", type=Path, metavar="FILE", help="a document a line, which is a JSON object")
    texts.add_argument("--dataset", metavar="NAME", help="a data set of the hub or a folder; needs datasets")
    command.add_argument("--text-column", metavar="NAME", help="of --jsonl or --dataset (default: text)")
    add_dataset_options(command)
    command.add_argument(
        "--sequence-length",
        type=_length,
        metavar="N",
        help="join the texts and cut them into sequences of N positions, which then are the documents; auto for as "
        "many as train takes (default: read each text whole)",
    )
    command.add_argument(
        "--tokens", type=positive, metavar="N", help="of the texts that are read, the first ones (default: all)"
    )
    command.add_argument(
        "--transfer", action="store_true", help="also read every layer's hidden states with every layer's translator"
    )
    command.add_argument(
        "--transfer-tokens",
        type=positive,
        metavar="N",
        help=f"positions that --transfer reads, the first ones (default: {TRANSFER_TOKENS:,})",
    )
    add_engine_options(command)
    command.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write evaluation.json there, with pyarrow evaluation.parquet, with matplotlib evaluation.png",
    )
    command.add_argument("--json", action="store_true", help="print JSON in place of the table")
    command.add_argument("--quiet", action="store_true", help="print nothing but errors (and JSON, if asked for)")
    add_model_options(command)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Refuse arguments that do not go together."""
    if args.text is not None and args.text_column:
        parser.error("--text-column is for --jsonl and --dataset")
    if args.dataset is None and (args.split or args.config):
        parser.error("--split and --config are for --dataset")
    if args.transfer_tokens and not args.transfer:
        parser.error("--transfer-tokens is for --transfer")


def run(args: argparse.Namespace) -> None:
    show = Console(file=sys.stderr, quiet=args.quiet)
    documents = _read(args)
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=args.out):
                pass
        except OSError as error:
            raise OSError(f"out: cannot write {args.out}: {error.strerror}") from error
    check_folder(args.model)
    args.gguf_file = args.gguf_file or gguf_in(args.model)
    if args.lens is not None:
        load_lens_artifacts(args.lens)
    meter = ProgressBar(show, disable=args.quiet)
    with meter.shown():
        meter.say("reading the text")
        # Joined texts lose what they all begin with, and their end.
        enough = args.tokens or float("inf")
        if args.sequence_length is not None:
            enough = 2 * enough + max(LONGEST, args.sequence_length)
        ids = [*tokenized(load_tokenizer(args), documents, args.jsonl, enough)]
        meter.say("loading the model")
        model = load_model(args)
        if args.sequence_length is not None:
            ids = [*sequences(model, ids, args.sequence_length or None)]
        if args.tokens is not None:
            ids = first(ids, args.tokens)
        for number, tokens in enumerate(ids):
            try:
                check_length(model, len(tokens))
            except ValueError as error:
                # Sequences are checked already.
                place = f"dataset: text {number}" if args.dataset else place_of(args.jsonl, documents[number])
                what = str(error).removeprefix("input_ids: ")
                raise ValueError(f"{place}: {what}; --sequence-length auto cuts texts") from error
        lens = load_lens(model, args.lens)
        start = time.perf_counter()
        with meter.counting(2 * len(layers_of(lens, len(get_transformer_layers(model)[1]))) + 1):
            found = evaluate(
                model,
                lens,
                ids,
                transfer_tokens=(args.transfer_tokens or TRANSFER_TOKENS) if args.transfer else 0,
                chunk=args.chunk,
                engine=args.engine,
                memory_budget=args.memory_budget,
            )
        seconds = time.perf_counter() - start

    if args.json:
        print_json({"model": args.model, "lens": args.lens, **found.to_dict(), "seconds": seconds})
    elif not args.quiet:
        print_evaluation(Console(), found)
    documents_read = f"{found.documents:,} document{'s' if found.documents > 1 else ''}"
    done = f"{documents_read}, {found.positions:,} positions in {seconds:.1f} s"
    show.print(done, highlight=False, soft_wrap=True)
    if args.out is not None:
        try:
            written = _write(found, args.out)
        except OSError as error:
            raise OSError(f"out: cannot write {args.out}: {error.strerror or error}") from error
        show.print(f"wrote {args.out}: {', '.join(written)}", highlight=False, markup=False, soft_wrap=True)


def _read(args: argparse.Namespace) -> Any:
    """The texts: documents, a list but where they are of a data set."""
    if args.dataset is not None:
        return read_dataset(args)
    if args.jsonl is not None:
        return read_jsonl(args.jsonl, args.text_column or "text", skip_empty=True)
    return read_texts(args.text)


def _length(text: str) -> int:
    """A number of positions; 0 for "auto"."""
    try:
        return 0 if text == "auto" else positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or auto") from None


def _write(found: Evaluation, out: Path) -> list[str]:
    """Write what was measured, and say as what; what needs a package that is not there is left out."""
    found.save(out / "evaluation.json")
    written = ["evaluation.json"]
    if importlib.util.find_spec("pyarrow") is None:
        written.append("no table without pyarrow")
    else:
        write_table(out / "evaluation.parquet", table(found))
        written.append("evaluation.parquet")
    if importlib.util.find_spec("matplotlib") is None:
        written.append("no picture without matplotlib")
    else:
        draw(found, out / "evaluation.png")
        written.append("evaluation.png")
    return written


#: Columns of the table: heading -> whose reading, and what of it.
_COLUMNS = {
    "KL": ("lens", "kl"),
    "logit KL": ("logit_lens", "kl"),
    "CE": ("lens", "ce"),
    "logit CE": ("logit_lens", "ce"),
    "entropy": ("lens", "entropy"),
    "top 1": ("lens", "agreement"),
    "logit top 1": ("logit_lens", "agreement"),
}


def print_evaluation(console: Console, found: Evaluation) -> None:
    """A line for each layer, means with half the width of their intervals; then the transfer matrix's worst."""
    shown = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="dim")
    shown.add_column("layer", justify="right", style="dim", no_wrap=True)
    for heading in _COLUMNS:
        shown.add_column(heading, justify="right")
    for row, layer in enumerate(found.layers):
        shown.add_row(str(layer), *(_cell(getattr(found, of)[measure], row) for of, measure in _COLUMNS.values()))
    own = {"CE": "ce", "entropy": "entropy"}
    shown.add_row("output", *(_cell(found.model[own[name]], 0) if name in own else "" for name in _COLUMNS))
    console.print(shown)
    interval = f"± is half of the {CONFIDENCE:.0%} confidence interval over documents"
    notes = [
        f"nats; {interval if found.documents > 1 else 'one document has no confidence interval'}",
        "KL(model || lens), CE of the next token, top 1: share where the model's likeliest token is the lens's; logit: "
        "the logit lens",
    ]
    for reading, counts in found.left_out.items():
        if any(counts):
            notes.append(
                f"{reading.replace('_', ' ')}: up to {max(counts):,} positions of a layer are not finite and left out"
            )
    if found.transfer is not None:
        penalty = found.transfer.penalty
        worst = [(value, i, j) for i, row in enumerate(penalty) for j, value in enumerate(row) if value == value]
        if worst:
            value, i, j = max(worst)
            notes.append(
                f"transfer, {found.transfer.positions:,} positions: at worst {value:.4g} nats, the translator of layer "
                f"{found.layers[i]} on layer {found.layers[j]}"
            )
    for note in notes:
        console.print(note, style="dim", highlight=False, soft_wrap=True)


def _cell(means: Any, row: int) -> str:
    """A mean, to the digits that its interval leaves, three if there is none."""
    mean, half = means.mean[row], (means.high[row] - means.low[row]) / 2
    if not half > 0:
        return f"{mean:.3f}"
    digits = min(4, max(0, 1 - math.floor(math.log10(half))))
    return f"{mean:.{digits}f} ±{half:.{digits}f}"
