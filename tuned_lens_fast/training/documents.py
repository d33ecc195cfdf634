"""Text for training: documents of token ids become sequences of one length, and no document is on both sides.

It stands where training begins, before the model runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tuned_lens_fast.data import fingerprint
from tuned_lens_fast.data.documents import read_documents
from tuned_lens_fast.messages import quoted
from tuned_lens_fast.streaming import check_length

#: Positions of a sequence where the caller names none and the model has learned as many.
LONGEST = 2048


@dataclass(frozen=True)
class Text:
    """What a run trains and measures on."""

    training: Tensor  #: int32 [sequences, length]
    held_out: Tensor  #: int32 [sequences, length], shorter ones where there is less text
    separator: int | None  #: the token between documents
    share: float | None  #: that was to be held out; None where documents were given for it
    hashes: dict[str, str]  #: of the documents on either side


def prepare(
    model: Any,
    documents: Iterable[Tensor | Sequence[int]],
    held_out: float | Iterable[Tensor | Sequence[int]],
    separator: int | Literal["eos"] | None,
    length: int | None,
    tokens_per_step: int,
    seed: int,
) -> Text:
    """Check documents and cut them into sequences; arguments and errors are those of ``train``."""
    if length is None:
        length = min(usual_length(model), max(2, tokens_per_step))
    _check_length(model, length)
    if tokens_per_step < length:
        raise ValueError(f"tokens_per_step: got {tokens_per_step}, less than one sequence of {length}")
    own: Sequence[Tensor] = read_documents(model, documents)
    others: Sequence[Tensor]
    share = None
    if isinstance(held_out, (int, float)):
        if not 0 < held_out < 1:
            raise ValueError(f"held_out: got {quoted(held_out)}, wanted a share between 0 and 1, or documents")
        share = float(held_out)
        own, others = split(own, share, seed)
    else:
        try:
            others = read_documents(model, held_out)
        except (TypeError, ValueError, IndexError) as error:
            raise type(error)(f"held_out: {str(error).removeprefix('documents: ')}") from error
        own = without(own, others)
    between = special_token(model, "eos_token_id") if separator == "eos" else separator
    known = len(model.get_input_embeddings().weight)
    if between is not None and not (isinstance(between, int) and 0 <= between < known):
        raise ValueError(f"separator: got {quoted(separator)}, wanted a token id, 'eos' or None")
    start = start_token(model, [*own, *others])
    training = join(own, length, between, start)
    if len(training) < tokens_per_step // length:
        raise ValueError(
            f"documents: {sum(map(len, own)):,} tokens to train on, too few for a single step of "
            f"{tokens_per_step // length * length:,}; give more text, or a smaller tokens_per_step or sequence_length"
        )
    # What is held out may be shorter than a sequence: then it is one.
    measured = join(others, length, between, start)
    if not len(measured):
        measured = join(others, None, between, start)
    if measured.shape[1] < 2:
        raise ValueError("held_out: a single token, wanted at least two")
    hashes = {"documents": fingerprint.of_tensors(own), "held-out documents": fingerprint.of_tensors(others)}
    return Text(training, measured, between, share, hashes)


def usual_length(model: Any) -> int:
    """Positions of a sequence where the caller names none."""
    learned = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    return min(LONGEST, learned)


def sequences(model: Any, documents: Iterable[Tensor | Sequence[int]], length: int | None) -> Tensor:
    """Documents as ``train`` joins and cuts them when nothing else is asked for, int32 ``[sequences, length]``.

    Raises:
        ValueError, IndexError, TypeError: ``length`` or the documents are not what they should be, or the documents
            are shorter than one sequence.
    """
    if length is None:
        length = usual_length(model)
    _check_length(model, length)
    held = read_documents(model, documents)
    found = join(held, length, special_token(model, "eos_token_id"), start_token(model, held))
    if not len(found):
        raise ValueError(f"documents: {sum(map(len, held)):,} tokens, fewer than one sequence of {length:,}")
    return found


def _check_length(model: Any, length: int) -> None:
    """That a sequence has a next token, and the model an entry for every position."""
    if not isinstance(length, int) or length < 2:
        raise ValueError(f"sequence_length: got {quoted(length)}, wanted a whole number from 2")
    try:
        check_length(model, length)
    except ValueError as error:
        raise ValueError(f"sequence_length: {str(error).removeprefix('input_ids: ').partition(';')[0]}") from None


def special_token(model: Any, name: str) -> int | None:
    """The model's ``eos_token_id`` or ``bos_token_id``, the first of several; None where it has none."""
    token = getattr(model.config.get_text_config(), name, None)
    if isinstance(token, (list, tuple)):
        token = token[0] if token else None
    known = model.get_input_embeddings().weight.shape[0]
    return token if isinstance(token, int) and 0 <= token < known else None


def start_token(model: Any, documents: Sequence[Tensor]) -> int | None:
    """The token that every document begins with, if that is the model's bos token: then sequences do as well."""
    bos = special_token(model, "bos_token_id")
    return bos if bos is not None and all(int(document[0]) == bos for document in documents) else None


def split(documents: Sequence[Tensor], share: float, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The documents to train on, and those held out: about ``share`` of all tokens, drawn by ``seed``.

    Documents of the same tokens go to the same side.

    Raises:
        ValueError: there are no two different documents.
    """
    alike: dict[bytes, list[int]] = {}
    for number, document in enumerate(documents):
        alike.setdefault(_key(document), []).append(number)
    groups = [*alike.values()]
    if len(groups) < 2:
        raise ValueError(
            f"documents: got {len(documents)}, {'all the same' if len(documents) > 1 else 'one'}, of which none can be "
            f"held out; give more, or held_out= documents of their own"
        )
    sizes = [sum(len(documents[number]) for number in group) for group in groups]
    room, held = share * sum(sizes), set[int]()
    for drawn in torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist():
        if sizes[drawn] <= room and len(held) < len(groups) - 1:
            room -= sizes[drawn]
            held.add(drawn)
    held = held or {min(range(len(groups)), key=sizes.__getitem__)}
    out = {number for group in held for number in groups[group]}
    numbers = range(len(documents))
    return [documents[n] for n in numbers if n not in out], [documents[n] for n in numbers if n in out]


def without(documents: Sequence[Tensor], held_out: Sequence[Tensor]) -> list[Tensor]:
    """The documents that are not held out too.

    Raises:
        ValueError: none is left.

    Warns:
        UserWarning: some are left out.
    """
    there = {_key(document) for document in held_out}
    left = [document for document in documents if _key(document) not in there]
    if not left:
        raise ValueError("documents: every one of them is held out too, so that none is left to train on")
    if len(left) < len(documents):
        warnings.warn(
            f"documents: {len(documents) - len(left):,} of {len(documents):,} are held out too and are not trained on",
            stacklevel=3,
        )
    return left


def join(documents: Sequence[Tensor], length: int | None, separator: int | None, start: int | None) -> Tensor:
    """Sequences ``[sequences, length]``, int32: the documents one behind the other, cut; what is left over is dropped.

    Args:
        documents: int32 ``[positions]`` each.
        length: positions of a sequence; None for one sequence of all.
        separator: put before each document that does not begin with it or follow it; None for none.
        start: every document begins with it, and so will every sequence, instead of them; None for none.
    """
    pieces: list[Tensor] = []
    for document in documents:
        rest = document if start is None else document[1:]
        before = pieces[-1][-1:] if pieces else torch.empty(0, dtype=torch.int32)
        if (
            separator is not None
            and separator not in (*rest[:1].tolist(), *before.tolist())
            and (pieces or start is None)
        ):
            pieces.append(torch.tensor([separator], dtype=torch.int32))
        if len(rest):
            pieces.append(rest)
    stream = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
    own = len(stream) if length is None else length - (start is not None)
    cut = stream[: len(stream) // own * own].view(-1, own) if own else stream[None]
    return cut if start is None else torch.cat([cut.new_full((len(cut), 1), start), cut], 1)


def drawn(sequences: int, first: int, count: int, seed: int) -> Tensor:
    """Which of ``sequences`` stand at the places ``first`` to ``first + count`` of an endless order, int64 ``[count]``.

    All of them come once before any comes again, each time in another order. It follows from ``seed`` and the place
    alone, so that a run can go on anywhere.
    """
    found = []
    while count:
        again, place = divmod(first, sequences)
        order = torch.randperm(sequences, generator=torch.Generator().manual_seed((seed * 1_000_003 + again) % 2**63))
        found.append(order[place : place + count])
        first, count = first + len(found[-1]), count - len(found[-1])
    return torch.cat(found)


def _key(document: Tensor) -> bytes:
    return document.numpy().tobytes()
