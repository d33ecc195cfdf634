"""Reads files of plain text, each a document, so that a bad one is named before a model is even loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tuned_lens_fast.data.jsonl import Document


def read_texts(paths: Iterable[Path]) -> list[Document]:
    """The text of every file, less the newline that ends it; its id is the path.

    Raises:
        ValueError: a file that is not UTF-8, or has no text.
        OSError: a file cannot be read.
    """
    documents = []
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise OSError(f"text: cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"text: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        text = text.removesuffix("\n").removesuffix("\r")
        if not text:
            raise ValueError(f"text: {path} is empty")
        documents.append(Document(None, str(path), text))
    return documents
