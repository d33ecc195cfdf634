"""Decodes straight to disk: one prompt or many documents into a folder, a Parquet data set that can be resumed.

It stands at the end of the way from hidden state to statistics: ``streaming`` yields the statistics of one chunk of
positions after another, each becomes a part of the folder (``parts``) and is dropped.
"""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tuned_lens_fast import budget, progress
from tuned_lens_fast.data import fingerprint
from tuned_lens_fast.data.parts import Batch, recorded_engine, run_folder
from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.interface import DecodableLens
from tuned_lens_fast.engines.tiling import even, slices
from tuned_lens_fast.inputs import Watched, padded, read_prompt, read_watch
from tuned_lens_fast.models.chunked_pass import frequencies_change_at
from tuned_lens_fast.models.forward_pass import input_device
from tuned_lens_fast.reading import readout_of
from tuned_lens_fast.streaming import Prepared, hidden_dtype, prepare
from tuned_lens_fast.validation import check_documents, check_model

if TYPE_CHECKING:
    import pyarrow as pa

_log = logging.getLogger(__name__)
#: Of the documents with these numbers: ids ``[batch, positions]``, their mask, and targets.
_Inputs = Callable[[Sequence[int]], tuple[Tensor, Tensor | None, Tensor | Literal["next"] | None]]


def decode_documents(
    model: Any,
    lens: DecodableLens,
    documents: Iterable[Tensor | Sequence[int]],
    *,
    out: str | os.PathLike[str],
    ids: Sequence[str] | Sequence[int] | None = None,
    tokenizer: Any = None,
    layers: Iterable[int] | None = None,
    targets: Literal["next"] | None = "next",
    top_k: int = 0,
    watch: Watched | None = None,
    stats: Collection[str] | None = None,
    chunk: int | None = None,
    engine: str = "auto",
    memory_budget: int | None = None,
) -> Path:
    """Decode many documents into the folder ``out``, a Parquet data set with a row for every layer and position.

    Documents of like length run together, padded on the right and never cut; one that does not fit the memory budget
    runs alone, in chunks. Each part of the folder is whole or not there, and the same call resumes what an interrupt, a
    full disk or a kill left: finished parts are compared with their checksums and kept, damaged ones are written anew,
    with a warning. The rows end up as those of an undisturbed run, bit for bit with the same machine, versions, number
    of threads and memory budget; a run that goes on with others warns.

    Args:
        model, lens, layers, top_k, watch, stats, engine, memory_budget: as for :func:`decode_model`. A resumed run
            keeps the batches and chunks that its first start planned, whatever the budget.
        documents: token ids of each, one dimension, not empty.
        out: the folder, made if it is not there; else one of the same run, or an empty one.
        ids: a name for each document, all str or all int; 0, 1, 2, … if None.
        tokenizer: anything with ``convert_ids_to_tokens``, for the column ``token``; the model's own for texts in
            ``watch``.
        targets: "next" for the following token, or None.
        chunk: positions that run at once, of one document or of several; as many as the budget allows if None.

    Returns:
        The folder. Its columns: ``document``, ``layer`` (the last is the model's own output), ``position`` (in its
        document), ``token_id``, ``token``, ``target``, the statistics by name in nats, and lists ``top_ids``,
        ``top_log_probs``, ``watch_log_probs``. ``target``, ``log_prob`` and ``rank`` are null where there is no target.

    Raises:
        ValueError, IndexError, TypeError: as :func:`decode_model`; also a folder that holds another run (of another
            model, lens, text or question) or anything else, or whose manifest is damaged.
        BlockingIOError: another process is writing there.
        OSError: the folder cannot be written. What is there stays whole; the same call resumes.
        ImportError: pyarrow is not installed.
    """
    if targets not in ("next", None):
        raise ValueError(f"targets: got {targets!r}, wanted 'next' or None")
    model = check_model(model)
    held = check_documents(model, documents)
    names = _check_names(ids, len(held))
    lengths = [len(tokens) for tokens in held]

    def inputs(numbers: Sequence[int]) -> tuple[Tensor, Tensor | None, Literal["next"] | None]:
        return *padded([held[i] for i in numbers], input_device(model)), targets

    longest, _, _ = inputs([max(range(len(held)), key=lengths.__getitem__)])
    prepared = prepare(
        model,
        lens,
        longest,
        layers=layers,
        targets=targets,
        top_k=top_k,
        watch=read_watch(watch, tokenizer),
        stats=stats,
        chunk=chunk,
        engine=_engine(engine, out, lens),
        memory_budget=memory_budget,
    )

    def plan() -> list[tuple[list[int], list[int]]]:
        most = chunk or positions_at_once(prepared, sum(lengths))
        return [
            (batch, [part.stop for part in slices(lengths[batch[0]], even(lengths[batch[0]], most))])
            for batch in pack(lengths, most, apart=frequencies_change_at(prepared.model))
        ]

    text = {"text": fingerprint.of_tensors(held), "targets": targets, "tokenizer": None}
    if tokenizer is not None:
        used = torch.cat(held).unique().tolist()
        text["tokenizer"] = fingerprint.of_text(tokenizer.convert_ids_to_tokens(used))
    return _decode(out, prepared, text, names, inputs, plan, tokenizer)


def decode_to(
    out: str | os.PathLike[str],
    model: Any,
    lens: DecodableLens,
    input_ids: Any,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    targets: Tensor | Literal["next"] | None = "next",
    chunk: int | None = None,
    **question: Any,
) -> Path:
    """:func:`decode_model` of a prompt ``[positions]`` or ``[batch, positions]`` into the folder ``out``.

    The rows of the batch are the documents 0, 1, …, and their positions are counted without padding; with a
    ``tokenizer`` there is the column ``token``. Folder, columns and errors: see :func:`decode_documents`; arguments:
    see :func:`decode_model`.
    """
    model = check_model(model)
    input_ids, attention_mask = read_prompt(input_ids, attention_mask, tokenizer, input_device(model))
    question["engine"] = _engine(question.get("engine", "auto"), out, lens)
    question["watch"] = read_watch(question.get("watch"), tokenizer)
    prepared = prepare(model, lens, input_ids, attention_mask, targets=targets, chunk=chunk, **question)
    ids, mask, wanted = prepared.input_ids, prepared.attention_mask, prepared.targets
    wide = [None if values is None else values.to(torch.int64) for values in (ids, mask)]
    text = {"text": fingerprint.of_tensors(wide), "targets": fingerprint.of_tensors([wanted]), "tokenizer": None}
    if tokenizer is not None:
        used = ids.unique().tolist()
        text["tokenizer"] = fingerprint.of_text(tokenizer.convert_ids_to_tokens(used))
    return _decode(
        out,
        prepared,
        text,
        _check_names(None, len(ids)),
        lambda _: (ids, mask, wanted),
        lambda: [([*range(len(ids))], [*prepared.boundaries])],
        tokenizer,
    )


def pack(lengths: Sequence[int], most: int, apart: int | None = None) -> list[list[int]]:
    """Documents of ``lengths`` as batches, longest first: the numbers of those that run together.

    Padded to its longest, a batch has at most ``most`` positions, unless it is one document; and no document in it is
    shorter than three quarters of the longest, so that little of what runs is padding. Those longer than ``apart`` keep
    to themselves: some models read all of a batch otherwise once one row is as long.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batches:
            longest = lengths[batches[-1][0]]
            alike = apart is None or (lengths[number] > apart) == (longest > apart)
            if alike and (len(batches[-1]) + 1) * longest <= most and 4 * lengths[number] >= 3 * longest:
                batches[-1].append(number)
                continue
        batches.append([number])
    return batches


def _decode(
    out: str | os.PathLike[str],
    prepared: Prepared,
    text: dict[str, Any],
    names: pa.Array,
    inputs: _Inputs,
    plan: Callable[[], list[tuple[list[int], list[int]]]],
    tokenizer: Any,
) -> Path:
    """Plan a run or find the one that is there, and write the parts that it lacks."""
    model, lens, query = prepared.model, prepared.lens, prepared.query
    layers = len(prepared.numbers) + 1
    identity = {
        "model": fingerprint.of_model(model),
        "lens": fingerprint.of_lens(lens),
        **text,
        "ids": fingerprint.of_text(names.to_pylist()),
        "layers": [*prepared.numbers],
        "stats": sorted(query.stats),
        "top_k": query.top_k,
        "watch": None if prepared.watch is None else prepared.watch.columns(),
        "engine": prepared.engine.name,
    }
    of = getattr(getattr(lens, "config", None), "base_model_name_or_path", None)
    called = {
        "model": model.config.name_or_path or type(model).__name__,
        "lens": f"{type(lens).__name__}{f' of {of}' if of else ''}, {identity['lens'][:12]}",
    }
    device = input_device(model)
    made_with = {
        "tuned_lens_fast": version("tuned-lens-fast"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "memory_budget": prepared.plan.budget,
    }

    def batches() -> list[Batch]:
        found = []
        for numbers, ends in plan():
            parts = _real(*inputs(numbers)[:2]).split(_sizes(ends), 1)
            found.append(Batch(numbers, ends, [layers * int(part.sum()) for part in parts]))
        return found

    # Parts are written while the next chunk runs: on a GPU that takes as long.
    with run_folder(out, identity, called, made_with, batches) as folder, ThreadPoolExecutor(1) as writer:
        missing = folder.unfinished()
        changed = [
            f"{key} {folder.begun_with.get(key)} then, {value} now"
            for key, value in made_with.items()
            if folder.begun_with.get(key) != value
        ]
        if changed and any(missing):
            warnings.warn(
                f"out: the run began under other conditions ({'; '.join(changed)}), so that the last bits of what is "
                f"decoded now may differ from an undisturbed run's",
                stacklevel=3,
            )
        todo = list(zip(range(len(missing)), folder.batches, missing, strict=True))
        planned = [size for batch in folder.batches for size in _sizes(batch.boundaries)]
        _log.info(
            "%d documents in %d batches and %d parts of up to %d positions, %d parts there already",
            len(names), len(missing), len(planned), max(planned), len(planned) - sum(map(len, missing)),
        )  # fmt: skip
        told = None
        progress.expect(
            layers
            * sum(
                len(batch.documents) * _sizes(batch.boundaries)[chunk] for _, batch, chunks in todo for chunk in chunks
            )
        )
        written: Future[None] | None = None
        for number, batch, chunks in todo:
            if not chunks:
                continue
            ids, mask, targets = inputs(batch.documents)
            prepared = prepare(
                model,
                lens,
                ids,
                mask,
                layers=prepared.numbers,
                targets=targets,
                top_k=query.top_k,
                watch=prepared.watch,
                stats=query.stats,
                boundaries=batch.boundaries,
                engine=prepared.engine.name,
                memory_budget=prepared.plan.budget,
            )
            if told is None or told.chunk < prepared.plan.chunk:
                told = prepared.plan
                _log.info("%s", told)
            ids, real = ids.cpu(), _real(ids, mask)
            positions = real.cumsum(1) - 1
            documents = names.take(batch.documents)
            for chunk, at, stats in prepared.run(chunks.__contains__):
                if written is not None:
                    written.result()
                columns = stats.to("cpu"), documents, positions[:, at], ids[:, at], real[:, at], tokenizer
                written = writer.submit(folder.write, number, chunk, *columns)
                del stats, columns
        if written is not None:
            written.result()
    return folder.path


def _engine(asked: str, out: str | os.PathLike[str], lens: DecodableLens) -> str:
    """What ``asked`` means for the folder: a run that is there goes on with its own engine, if that works here."""
    recorded = recorded_engine(out) if asked == "auto" else None
    weight = lens.unembed.head.weight if hasattr(lens, "unembed") else None
    if recorded not in ENGINES or weight is None:
        return asked
    return asked if ENGINES[recorded].unavailable(weight.device, weight.dtype) else recorded


def positions_at_once(prepared: Prepared, positions: int) -> int:
    """How many of ``positions`` fit the memory budget, whether of one document or of several."""
    lens = prepared.lens
    return budget.plan(
        1,
        positions,
        engine=prepared.engine,
        hidden=hidden_dtype(prepared.model),
        readout=readout_of(lens, prepared.numbers),
        query=prepared.query,
        memory_budget=prepared.plan.budget,
    ).chunk


def _real(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """bool ``[batch, positions]`` on the CPU, False for padding."""
    if attention_mask is None:
        return torch.ones(input_ids.shape, dtype=torch.bool)
    return attention_mask.bool().cpu()


def _sizes(boundaries: Sequence[int]) -> list[int]:
    """Positions of each chunk."""
    return [end - start for start, end in zip((0, *boundaries), boundaries, strict=False)]


def _check_names(ids: Sequence[str] | Sequence[int] | None, documents: int) -> pa.Array:
    """What the documents are called, int64 or string."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError("out: a data set needs pyarrow: pip install pyarrow") from error
    if ids is None:
        return pa.array(range(documents), pa.int64())
    held = list(ids)
    kinds = {type(name) for name in held}
    if kinds not in ({str}, {int}):
        raise TypeError(f"ids: got {', '.join(sorted(k.__name__ for k in kinds)) or 'none'}, wanted all str or all int")
    if len(held) != documents:
        raise ValueError(f"ids: got {len(held)} for {documents} documents")
    if len(set(held)) != documents:
        raise ValueError("ids: some are there more than once, wanted one for each document")
    try:
        return pa.array(held, pa.string() if kinds == {str} else pa.int64())
    except (OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"ids: {error}; wanted text, or whole numbers of 64 bits") from error
