"""Texts of a ``datasets.Dataset`` as chunks of tokens of one length, as tuned-lens's training wants them."""

from __future__ import annotations

import math
import os
from typing import Any


def chunk_and_tokenize(
    data: Any,
    tokenizer: Any,
    *,
    format: str = "torch",
    num_proc: int | None = None,
    text_key: str = "text",
    max_seq_len: int = 2048,
    return_final_batch: bool = False,
    load_from_cache_file: bool = True,
    max_length: int | None = None,
) -> tuple[Any, float]:
    """Texts put one after the other, each behind an end-of-text token, and cut into chunks of ``max_seq_len`` tokens.

    Args:
        data: a ``Dataset`` or a ``DatasetDict``.
        tokenizer: transformers'.
        format: of the result, as ``Dataset.with_format`` takes it.
        num_proc: processes that tokenize; half of the cores, at most 8, if None.
        text_key: the column of the texts.
        max_seq_len: tokens of a chunk, fewer where the tokenizer's ``model_max_length`` is less. ``max_length``, as
            tuned-lens 0.2.0 calls it, is the same.
        return_final_batch: keep the last, shorter chunk of each 2,048 texts.
        load_from_cache_file: take what ``datasets`` has in its cache of the same texts.

    Returns:
        The data with one column, ``input_ids``, and what turns nats a token into bits a byte (Gao et al., 2020,
        section 3.1): tokens / bytes / ln 2.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: not enough text for one chunk, or splits with different columns.
    """
    size = min(tokenizer.model_max_length, max_seq_len if max_length is None else max_length)
    separator = tokenizer.eos_token or "<|endoftext|>"

    def chunked(batch: dict[str, list]) -> dict[str, list]:
        text = "".join(separator + each for each in batch[text_key])
        found = tokenizer(
            text, max_length=size, truncation=True, return_overflowing_tokens=True, return_attention_mask=False
        )
        chunks = found["input_ids"]
        if chunks and isinstance(chunks[0], int):  # of tokenizers written in Python, which return what is over as one
            rest = found.get("overflowing_tokens") or []
            chunks = [chunks, *(rest[start : start + size] for start in range(0, len(rest), size))]
        tokens = sum(map(len, chunks))
        if not return_final_batch:
            chunks = chunks[:-1]
        if not chunks:
            raise ValueError(
                f"data: {len(batch[text_key])} texts are {tokens} tokens, which make no chunk of {size}; take more "
                f"text, a smaller max_seq_len, or return_final_batch=True"
            )
        counts = {"length": tokens, "bytes": len(text.encode())}
        # A table has a row for each chunk, so that sums are put into the first.
        return {"input_ids": chunks, **{name: [n] + [0] * (len(chunks) - 1) for name, n in counts.items()}}

    columns = get_columns_all_equal(data)
    found = data.map(
        chunked,
        batched=True,
        batch_size=2048,
        num_proc=num_proc or max(1, min((os.cpu_count() or 1) // 2, 8)),
        remove_columns=columns,
        load_from_cache_file=load_from_cache_file,
    )
    splits = list(found.values()) if isinstance(found, dict) else [found]
    tokens, size_in_bytes = (sum(sum(split[name]) for split in splits) for name in ("length", "bytes"))
    return found.with_format(format, columns=["input_ids"]), tokens / size_in_bytes / math.log(2)


def get_columns_all_equal(dataset: Any) -> list[str]:
    """The columns of a ``Dataset``, or of every split of a ``DatasetDict``.

    Raises:
        ValueError: the splits have different columns.
    """
    if not isinstance(dataset, dict):
        return list(dataset.column_names)
    columns = [list(split.column_names) for split in dataset.values()]
    if any(sorted(each) != sorted(columns[0]) for each in columns):
        raise ValueError(f"data: its splits have different columns, {', '.join(map(str, columns))}")
    return columns[0]
