"""Token ids as text that can be shown: the table, the page and the figures label their cells with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from rich.cells import cell_len, set_cell_size
from torch import Tensor

from tuned_lens_fast.inputs import read_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuned_lens_fast.stats import LensStats

#: What stands for white space that would otherwise not be seen.
_MARKS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
#: The top id of a row that holds a NaN.
NO_TOKEN = -1


def visible(text: str) -> str:
    """``text`` with white space marked and everything unprintable (control characters, zero-width and
    direction-changing ones) escaped, so that it takes up exactly the room it seems to."""
    if text.strip(" ") == "":
        return "␣" * len(text)
    return "".join(
        _MARKS.get(char) or (char if char.isprintable() else char.encode("unicode_escape").decode()) for char in text
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str]:
    """Every different id of ``ids`` -> its text, made visible. ``NO_TOKEN`` -> "NaN"."""
    texts = {}
    for token in set(ids):
        if token == NO_TOKEN:
            texts[token] = "NaN"
            continue
        piece = tokenizer.convert_ids_to_tokens(token)
        # Decoding a single SentencePiece token drops its leading space; its spelling still has it.
        if not (isinstance(piece, str) and piece.startswith("▁")):
            piece = str(tokenizer.decode([token]))
        texts[token] = visible(piece.replace("▁", " ")) or "∅"
    return texts


def fit(text: str, cells: int) -> str:
    """``text`` in at most ``cells`` terminal cells (a CJK character takes two), cut with an ellipsis."""
    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1).rstrip() + "…"


def one_text(stats: LensStats, input_ids: Any, tokenizer: Any = None) -> tuple[LensStats, Tensor | None]:
    """Statistics ``[layers, positions]`` and ids ``[positions]`` of one text, which may come as a batch of one.

    Args:
        input_ids: as ``decode_model`` takes them, or None.

    Raises:
        ValueError: a batch of several, or another shape.
    """
    shape = [*stats.lse.shape]
    if len(shape) == 3 and shape[1] == 1:
        stats = stats[:, 0]
    elif len(shape) != 2:
        raise ValueError(f"stats: got shape {shape}, wanted [layers, positions]; of a batch, stats[:, i] is one text")
    if input_ids is None:
        return stats, None
    ids, _ = read_prompt(input_ids, None, tokenizer, torch.device("cpu"))
    return stats, ids[0] if ids.ndim == 2 and len(ids) == 1 else ids


def watched_names(stats: LensStats) -> list[str]:
    """What the columns of ``stats.watch_log_probs`` are called."""
    columns = 0 if stats.watch_log_probs is None else stats.watch_log_probs.shape[-1]
    return [*(stats.watch or (f"watched {i + 1}" for i in range(columns)))]


def layer_names(stats: LensStats) -> list[str]:
    """What the rows of a decoded model are called: the layer's number; the last is the model's own output."""
    return [str(layer) for layer in stats.layers[:-1].tolist()] + ["output"]
