"""Texts in bulk, as ``train`` and ``eval`` take them: the rows of a data set, and the token ids of however many."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.cli.loading import tokenize
from tuned_lens_fast.data.jsonl import Document
from tuned_lens_fast.messages import listed, quoted, shortened

#: Documents that are tokenised at once.
_AT_ONCE = 1000


def add_dataset_options(command: Any) -> None:
    """What ``--dataset`` needs beside its name; ``command`` is a parser or a group of one."""
    command.add_argument("--split", metavar="NAME", help="of --dataset (default: train)")
    command.add_argument("--config", metavar="NAME", help="of --dataset, where it has several")


def read_dataset(args: argparse.Namespace) -> Iterator[Document]:
    if importlib.util.find_spec("datasets") is None:
        raise ModuleNotFoundError("dataset: needs datasets: pip install datasets")
    import datasets

    name, split, column = args.dataset, args.split or "train", args.text_column or "text"
    if not args.debug:
        datasets.disable_progress_bars()
    try:
        # What `save_to_disk` wrote is read by another function than all else.
        if any((Path(name) / kept).is_file() for kept in ("state.json", "dataset_dict.json")):
            rows: Any = datasets.load_from_disk(name)
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[split]
        else:
            rows = datasets.load_dataset(name, args.config, split=split)
    except Exception as error:  # whatever it makes of a name
        raise ValueError(
            f"dataset: cannot load {quoted(name, 150)}, split {quoted(split)}: {shortened(error)}"
        ) from error
    if column not in rows.column_names:
        raise ValueError(
            f"dataset: {quoted(name, 150)} has no column {quoted(column)}, there are {listed(rows.column_names)}"
        )
    return _column(rows, column, name)


def _column(rows: Any, column: str, name: str) -> Iterator[Document]:
    for number, row in enumerate(rows.select_columns([column])):
        if not isinstance(row[column], str):
            raise ValueError(
                f"dataset: {quoted(column)} of row {number} of {quoted(name, 150)} is {type(row[column]).__name__}, "
                f"wanted text"
            )
        if row[column].strip():
            yield Document(None, None, row[column])


def tokenized(tokenizer: Any, texts: Iterable[Document], jsonl: Path | None, enough: float) -> Iterator[Tensor]:
    """Token ids of as many texts as have ``enough`` tokens, int32."""
    waiting: list[Document] = []
    tokens = 0

    def several() -> Iterator[list[Document]]:
        for document in texts:
            waiting.append(document)
            if len(waiting) == _AT_ONCE:
                yield waiting
                waiting.clear()
        if waiting:
            yield waiting

    for batch in several():
        for ids in tokenize(tokenizer, batch, jsonl):
            tokens += len(ids)
            yield ids.to(torch.int32)
        if tokens >= enough:
            return
    if not tokens:
        raise ValueError("dataset: there is no text in it")
