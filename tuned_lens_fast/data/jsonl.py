"""Reads the texts of a JSONL file and checks every line, so that a bad one is named before a model is even loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class Document(NamedTuple):
    line: int | None  #: of the file, from 1
    id: str | int | None  #: of the id column, if one was named
    text: str


def read_jsonl(path: Path, text_column: str, id_column: str | None = None) -> list[Document]:
    """Every document of ``path``, an object a line; blank lines are passed over.

    Raises:
        ValueError: the first line that is no JSON object in UTF-8, lacks a column, has a text that is no string or
            empty, or an id that is neither string nor int, not of the others' type, or there already; or no documents.
        OSError: the file cannot be read.
    """
    documents: list[Document] = []
    seen: dict[Any, int] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise OSError(f"jsonl: cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
            text = _column(row, text_column)
            if not isinstance(text, str):
                raise ValueError(f"{text_column!r} is {_kind(text)}, wanted a string")
            if not text:
                raise ValueError(f"{text_column!r} is empty, so there is nothing to decode")
            name = None if id_column is None else _column(row, id_column)
            if id_column is not None:
                if type(name) not in (str, int):
                    raise ValueError(f"{id_column!r} is {_kind(name)}, wanted a string or a whole number")
                if documents and type(name) is not type(documents[0].id):
                    raise ValueError(f"{id_column!r} is {_kind(name)}, {_kind(documents[0].id)} before")
                if name in seen:
                    raise ValueError(f"{id_column!r} is {name!r}, as in line {seen[name]}")
                seen[name] = number
        except UnicodeDecodeError as error:
            raise ValueError(f"jsonl: {path}, line {number}: not UTF-8 ({error.reason})") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"jsonl: {path}, line {number}: not JSON ({error.msg})") from error
        except ValueError as error:
            raise ValueError(f"jsonl: {path}, line {number}: {error}") from error
        documents.append(Document(number, name, text))
    if not documents:
        raise ValueError(f"jsonl: {path} has no documents")
    return documents


def _column(row: Any, name: str) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"{_kind(row)}, wanted an object")
    if name not in row:
        raise ValueError(f"no column {name!r}, there are {', '.join(map(repr, row)) or 'none'}")
    return row[name]


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a bool", type(None): "null"}
    return kinds.get(type(value), "a number")
