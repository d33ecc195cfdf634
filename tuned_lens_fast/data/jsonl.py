"""Reads the texts of a JSONL file and checks every line, so that a bad one is named before a model is even loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tuned_lens_fast.messages import listed, quoted, shortened


class Document(NamedTuple):
    line: int | None  #: of the file, from 1
    id: str | int | None  #: of the id column, if one was named
    text: str


def read_jsonl(
    path: Path, text_column: str, id_column: str | None = None, *, skip_empty: bool = False
) -> list[Document]:
    """Every document of ``path``, an object a line; blank lines are passed over, with ``skip_empty`` blank texts too.

    Raises:
        ValueError: the first line that is no JSON object in UTF-8, lacks a column, has a text that is no string or
            empty, or an id that is neither string nor int64, not of the others' type, or there already; or no
            documents.
        OSError: the file cannot be read.
    """
    documents: list[Document] = []
    seen: dict[Any, int] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    document = _document(number, line, text_column, id_column, skip_empty)
                    before = documents[0].id if documents else document.id
                    if type(document.id) is not type(before):
                        raise ValueError(f"{quoted(id_column)} is {_kind(document.id)}, {_kind(before)} before")
                    if id_column is not None and seen.setdefault(document.id, number) != number:
                        raise ValueError(
                            f"{quoted(id_column)} is {quoted(document.id)}, as in line {seen[document.id]}"
                        )
                except ValueError as error:
                    raise ValueError(f"jsonl: {path}, line {number}: {error}") from error
                if document.text.strip() or not skip_empty:
                    documents.append(document)
    except OSError as error:
        raise OSError(f"jsonl: cannot read {path}: {error.strerror}") from error
    if not documents:
        raise ValueError(f"jsonl: {path} has no documents{' but empty ones' if skip_empty else ''}")
    return documents


def _document(number: int, line: bytes, text_column: str, id_column: str | None, empty: bool) -> Document:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply to be read") from error
    except ValueError as error:
        # A number with more digits than Python reads.
        raise ValueError(f"not JSON that can be read ({shortened(error, 100)})") from error
    text = _column(row, text_column)
    if not isinstance(text, str):
        raise ValueError(f"{quoted(text_column)} is {_kind(text)}, wanted a string")
    if not text and not empty:
        raise ValueError(f"{quoted(text_column)} is empty, so there is nothing to decode")
    _check_unicode(text_column, text)
    if id_column is None:
        return Document(number, None, text)
    name = _column(row, id_column)
    if type(name) not in (str, int):
        raise ValueError(f"{quoted(id_column)} is {_kind(name)}, wanted a string or a whole number")
    if isinstance(name, int) and not -(2**63) <= name < 2**63:
        raise ValueError(f"{quoted(id_column)} is {quoted(name)}, wanted a string or a whole number of 64 bits")
    if isinstance(name, str):
        _check_unicode(id_column, name)
    return Document(number, name, text)


def _column(row: Any, name: str) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"{_kind(row)}, wanted an object")
    if name not in row:
        raise ValueError(f"no column {quoted(name)}, there are {listed(row) if row else 'none'}")
    return row[name]


def _check_unicode(column: str, text: str) -> None:
    """JSON can write halves of characters, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = quoted(text[error.start])
        raise ValueError(
            f"{quoted(column)} has {half} at {error.start}, half a surrogate pair, no character"
        ) from error


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a bool", type(None): "null"}
    return kinds.get(type(value), "a number")
