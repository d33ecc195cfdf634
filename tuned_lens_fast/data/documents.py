"""Token ids of many documents, read in any order: from an Arrow list that may lie on disk, or packed in memory.

Where a corpus starts on its way from token ids to statistics, and where training begins.
"""

from __future__ import annotations

import bisect
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuned_lens_fast.validation import check_ids, kind

#: Token ids that are looked at at once.
_SLAB = 2**24


class Documents(Sequence[Tensor]):
    """Documents by number, each int32 ``[positions]`` on the CPU, of which only those that are asked for are made."""

    def __init__(self, pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """
        Args:
            pieces: token ids ``[tokens]`` of some documents, one behind the other, and where they start and end,
                ``[documents + 1]``; any integers. Files that are mapped into memory stay there.
        """
        self._pieces = [piece for piece in pieces if len(piece[1]) > 1]
        self._firsts = np.cumsum([0, *(len(offsets) - 1 for _, offsets in self._pieces)]).tolist()

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        piece = bisect.bisect_right(self._firsts, number) - 1
        (tokens, offsets), at = self._pieces[piece], number - self._firsts[piece]
        return torch.from_numpy(tokens[offsets[at] : offsets[at + 1]].astype(np.int32))

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))

    def lengths(self) -> list[int]:
        """Positions of each."""
        return np.concatenate([np.diff(offsets) for _, offsets in self._pieces] or [np.empty(0, int)]).tolist()

    def used(self) -> list[int]:
        """The token ids that are there, each once, sorted."""
        seen = np.zeros(0, bool)
        for tokens, offsets in self._pieces:
            for start in range(int(offsets[0]), int(offsets[-1]), _SLAB):
                slab = tokens[start : min(start + _SLAB, int(offsets[-1]))]
                seen = np.pad(seen, (0, max(0, int(slab.max()) + 1 - len(seen))))
                seen[slab] = True
        return seen.nonzero()[0].tolist()

    def check(self, vocab: int) -> None:
        """That every document has tokens, all of them ids below ``vocab``.

        Raises:
            ValueError: one is empty, or there are none.
            IndexError: an id is out of range.
        """
        for first, (tokens, offsets) in zip(self._firsts, self._pieces, strict=False):
            empty = (np.diff(offsets) <= 0).nonzero()[0]
            if len(empty):
                raise ValueError(f"documents: document {first + empty[0]} has shape [0], wanted [positions], not empty")
            for start in range(int(offsets[0]), int(offsets[-1]), _SLAB):
                slab = tokens[start : min(start + _SLAB, int(offsets[-1]))]
                outside = ((slab < 0) | (slab >= vocab)).nonzero()[0]
                if len(outside):
                    number = first + int(np.searchsorted(offsets, start + outside[0], side="right")) - 1
                    raise IndexError(
                        f"documents: document {number}: got {slab[outside[0]]}, wanted ids from 0 to {vocab - 1}"
                    )
        if not len(self):
            raise ValueError("documents: got none")


def read_documents(model: Any, documents: Any) -> Documents:
    """The documents that a caller gives, once all of their token ids are checked.

    Args:
        model: a causal LM.
        documents: token ids of each, one dimension, not empty. An array of pyarrow's, a list for each document, stays
            where it is, so that a file that is mapped into memory is never read as a whole; anything else is gone
            through once, and held in four bytes a token.

    Raises:
        TypeError: no iterable, or something in it is not token ids.
        ValueError: one is empty or of another shape, or there are none.
        IndexError: an id is not in the model's vocabulary.
    """
    vocab = model.get_input_embeddings().weight.shape[0]
    arrow = sys.modules.get("pyarrow")  # whoever has an array of its has imported it
    if arrow is not None and isinstance(documents, (arrow.Array, arrow.ChunkedArray)):
        chunks = documents.chunks if isinstance(documents, arrow.ChunkedArray) else [documents]
        found = Documents([_of_arrow(arrow, chunk) for chunk in chunks])
        found.check(vocab)
        return found
    if not isinstance(documents, Iterable):
        raise TypeError(f"documents: got {kind(documents)}, wanted an iterable of token ids")
    held, offsets = array("i"), array("q", [0])
    for number, document in enumerate(documents):
        try:
            tokens = torch.as_tensor(document)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"documents: document {number} is {kind(document)}, wanted token ids ({error})") from error
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(
                f"documents: document {number} has shape {list(tokens.shape)}, wanted [positions], not empty"
            )
        check_ids(f"documents: document {number}", tokens, vocab)
        held.frombytes(tokens.to("cpu", torch.int32).contiguous().numpy().tobytes())
        offsets.append(len(held))
    if len(offsets) == 1:
        raise ValueError("documents: got none")
    return Documents([(np.frombuffer(held, np.int32), np.frombuffer(offsets, np.int64))])


def _of_arrow(arrow: Any, chunk: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of an array of lists, on its own memory."""
    types = arrow.types
    fixed = types.is_fixed_size_list(chunk.type)
    if not (fixed or types.is_list(chunk.type) or types.is_large_list(chunk.type)) or not types.is_integer(
        chunk.type.value_type
    ):
        raise TypeError(f"documents: got a pyarrow array of {chunk.type}, wanted one of lists of integers")
    if chunk.null_count or chunk.flatten().null_count:
        raise ValueError("documents: got a pyarrow array with nulls, wanted token ids of every document")
    if fixed:
        size = chunk.type.list_size
        offsets = np.arange(chunk.offset, chunk.offset + len(chunk) + 1, dtype=np.int64) * size
    else:
        offsets = chunk.offsets.to_numpy()
    return chunk.values.to_numpy(), offsets
