"""Decodes straight to disk: one prompt or many documents into a folder, a Parquet data set that can be resumed.

It stands at the end of the way from hidden state to statistics: ``streaming`` yields the statistics of one chunk of
positions after another, each is added to a part of the folder (``parts``) and dropped.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tuned_lens_fast import budget, progress
from tuned_lens_fast.conditions import machine, versions
from tuned_lens_fast.data import fingerprint
from tuned_lens_fast.data.documents import read_documents
from tuned_lens_fast.data.parts import Batch, Part, RunFolder, Share, recorded_engine, run_folder
from tuned_lens_fast.data.table import table_of
from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.interface import DecodableLens
from tuned_lens_fast.engines.tiling import even, slices
from tuned_lens_fast.inputs import Watched, padded, read_prompt, read_watch
from tuned_lens_fast.models.chunked_pass import frequencies_change_at
from tuned_lens_fast.models.forward_pass import input_device
from tuned_lens_fast.ranks import Ranks, Split, agree, check_not_sharded, ranks_of
from tuned_lens_fast.reading import readout_of
from tuned_lens_fast.streaming import Prepared, hidden_dtype, prepare
from tuned_lens_fast.validation import check_model

if TYPE_CHECKING:
    import pyarrow as pa

_log = logging.getLogger(__name__)
#: Of the documents with these numbers: ids ``[batch, positions]``, their mask, and targets.
_Inputs = Callable[[Sequence[int]], tuple[Tensor, Tensor | None, Tensor | Literal["next"] | None]]
#: A batch, and how many tokens there are in each of its chunks.
_Planned = tuple[Batch, list[int]]
#: Batches, and the numbers of those of their chunks that are to be decoded.
_Work = list[tuple[Batch, list[int]]]
#: Bytes of statistics in a part at least, of which its file takes about two thirds; and in how many parts a run that is
#: small for that is cut, so that several processes find work.
_PART_BYTES, _LEAST_PARTS = 96 * 2**20, 64


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
    split: Split | None = None,
) -> Path:
    """Decode many documents into the folder ``out``, a Parquet data set with a row for every layer and position.

    Documents of like length run together, padded on the right and never cut; one that does not fit the memory budget
    runs alone, in chunks. Each part of the folder is whole or not there, and the same call resumes what an interrupt, a
    full disk or a kill left: finished parts are compared with their checksums and kept, damaged ones are written anew,
    with a warning. The rows end up as those of an undisturbed run, bit for bit with the same machine, versions, number
    of threads and memory budget; a run that goes on with others warns.

    Args:
        model, lens, layers, top_k, watch, stats, engine, memory_budget, split: as for :func:`decode_model`. A resumed
            run keeps the batches and chunks that its first start planned, whatever the budget. Ranks that read a model
            together are one process to others, and the first of them writes.
        documents: token ids of each, one dimension, not empty. A list or an iterator, held in four bytes a token; or an
            array of pyarrow's, a list for each document, which may be mapped from a file and is not read as a whole.
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
        BlockingIOError: another process is writing to ``out``, on Windows.
        OSError: the folder cannot be written. What is there stays whole; the same call resumes.
        ImportError: pyarrow is not installed.
    """
    if targets not in ("next", None):
        raise ValueError(f"targets: got {targets!r}, wanted 'next' or None")
    model = check_model(model)
    together = _ranks_of(model, split)
    with _all_or_none(together and together[0]):
        held = read_documents(model, documents)
        names = _check_names(ids, len(held))
        asked: dict[str, Any] = {
            "layers": [*layers] if together and isinstance(layers, Iterable) else layers,
            "top_k": top_k,
            "watch": read_watch(watch, tokenizer),
            "stats": stats,
            "chunk": chunk,
        }
    asked["engine"] = engine_of(engine, out, lens, together)
    lengths = held.lengths()
    if together is not None:
        text = {"documents": fingerprint.of_tensors(held)[:12], "targets": targets, "memory_budget": memory_budget}
        agree(together, model, lens, {"out": str(out), **text, **asked})

    def inputs(numbers: Sequence[int]) -> tuple[Tensor, Tensor | None, Literal["next"] | None]:
        return *padded([held[i] for i in numbers], input_device(model)), targets

    longest, _, _ = inputs([max(range(len(held)), key=lengths.__getitem__)])
    prepared = prepare(
        model,
        lens,
        longest,
        targets=targets,
        memory_budget=memory_budget,
        together=together,
        **asked,
    )

    def plan() -> list[_Planned]:
        most = chunk or positions_at_once(prepared, sum(lengths))
        planned = []
        for batch in pack(lengths, most, apart=frequencies_change_at(prepared.model)):
            ends = [part.stop for part in slices(lengths[batch[0]], even(lengths[batch[0]], most))]
            reached = [sum(min(lengths[number], end) for number in batch) for end in ends]
            planned.append((Batch(batch, ends), _sizes(reached)))
        return planned

    text = {"text": fingerprint.of_tensors(held), "targets": targets, "tokenizer": None}
    if tokenizer is not None:
        text["tokenizer"] = fingerprint.of_text(tokenizer.convert_ids_to_tokens(held.used()))
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
    split: Split | None = None,
    **question: Any,
) -> Path:
    """:func:`decode_model` of a prompt ``[positions]`` or ``[batch, positions]`` into the folder ``out``.

    The rows of the batch are the documents 0, 1, …, and their positions are counted without padding; with a
    ``tokenizer`` there is the column ``token``. Folder, columns and errors: see :func:`decode_documents`; arguments:
    see :func:`decode_model`.
    """
    model = check_model(model)
    together = _ranks_of(model, split)
    with _all_or_none(together and together[0]):
        input_ids, attention_mask = read_prompt(input_ids, attention_mask, tokenizer, input_device(model))
        question["watch"] = read_watch(question.get("watch"), tokenizer)
        if together and isinstance(question.get("layers"), Iterable):
            question["layers"] = [*question["layers"]]  # an iterator is read by agree() too
    question["engine"] = engine_of(question.get("engine", "auto"), out, lens, together)
    if together is not None:
        asked = {"input_ids": input_ids, "attention_mask": attention_mask, "targets": targets, **question}
        agree(together, model, lens, {"out": str(out), **asked})
    prepared = prepare(model, lens, input_ids, attention_mask, targets=targets, together=together, **question)
    ids, mask, wanted = prepared.input_ids, prepared.attention_mask, prepared.targets
    wide = [None if values is None else values.to(torch.int64) for values in (ids, mask)]
    text = {"text": fingerprint.of_tensors(wide), "targets": fingerprint.of_tensors([wanted]), "tokenizer": None}
    if tokenizer is not None:
        used = ids.unique().tolist()
        text["tokenizer"] = fingerprint.of_text(tokenizer.convert_ids_to_tokens(used))
    counts = [int(part.sum()) for part in _real(ids, mask).split(_sizes(prepared.boundaries), 1)]
    return _decode(
        out,
        prepared,
        text,
        _check_names(None, len(ids)),
        lambda _: (ids, mask, wanted),
        lambda: [(Batch([*range(len(ids))], [*prepared.boundaries]), counts)],
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
    plan: Callable[[], list[_Planned]],
    tokenizer: Any,
) -> Path:
    """Plan a run or find the one that is there, and write the parts that it lacks, or others do not write."""
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
    made_with = {
        **versions(),
        **machine(input_device(model)),
        "memory_budget": prepared.plan.budget,
        "ranks": 1 if prepared.ranks is None else prepared.ranks.size,
    }

    ranks, answer = prepared.ranks, budget.statistics_bytes(query)
    # Of a group all ranks plan, since they tell each other how engines cut their work, and the first one writes.
    planned = None if ranks is None else shares_of(plan(), layers, answer)

    def shares() -> list[Share]:
        return shares_of(plan(), layers, answer) if planned is None else planned

    with ExitStack() as opened:
        with _all_or_none(ranks):
            folder = None
            if ranks is None or ranks.rank == 0:
                found = run_folder(out, identity, called, made_with, shares, 1 if ranks is None else ranks.size)
                folder = opened.enter_context(found)
        if folder is None:
            _follow(prepared, inputs)
            return Path(out)
        places = [(number, part) for number, share in enumerate(folder.shares) for part in range(len(share.rows))]
        chunks = [size for share in folder.shares for batch in share.batches for size in _sizes(batch.boundaries)]
        _log.info(
            "%d documents in %d batches and %d parts, in chunks of up to %d positions; %d parts there already",
            len(names), sum(len(share.batches) for share in folder.shares), len(places), max(chunks),
            sum(folder.has(*place) for place in places),
        )  # fmt: skip
        Writing(folder, prepared, names, inputs, tokenizer).run()
    return Path(out)


@dataclass
class Writing:
    """One process's work on a run."""

    folder: RunFolder
    prepared: Prepared
    names: pa.Array
    inputs: _Inputs
    tokenizer: Any
    _told: budget.MemoryPlan | None = None
    _open: Part | None = None  #: that chunks are being added to

    def run(self) -> None:
        """Write what is lacking, until all is there."""
        expected = {
            number: rows
            for number, share in enumerate(self.folder.shares)
            if (rows := self._rows(number, [n for n in range(len(share.rows)) if not self.folder.has(number, n)]))
        }
        progress.expect(sum(expected.values()))
        try:
            # Parts are written while the next chunk runs: on a GPU that takes as long.
            with ThreadPoolExecutor(1) as writer:
                pending: Future[None] | None = None
                claimed = self.folder.claimed()
                while True:
                    with self._telling_of_errors():
                        number, lacking = next(claimed, (-1, []))
                        if number < 0 and pending is not None:
                            pending.result()
                    work = self._work(number, lacking) if number >= 0 else None
                    self._tell(work)
                    if work is None:
                        break
                    self.folder.warn_of_changes(stacklevel=5)
                    by_others = [other for other in expected if other != number and self.folder.has_all(other)]
                    progress.expect(self._rows(number, lacking) - expected.pop(number, 0))
                    progress.expect(-sum(map(expected.pop, by_others)))
                    failed: Exception | None = None
                    for step in self._share(number, work):
                        try:
                            if pending is not None:
                                pending.result()
                            pending = None if failed else writer.submit(step)
                        except Exception as error:
                            if self.prepared.ranks is None:
                                raise
                            pending, failed = None, error  # the other ranks are in this share until its end
                        del step
                    if failed is not None:
                        with self._telling_of_errors():
                            raise failed
        finally:
            if self._open is not None:
                self._open.abandon()
        progress.expect(-sum(expected.values()))

    def _tell(self, work: _Work | str | None) -> None:
        if self.prepared.ranks is not None:
            self.prepared.ranks.first(work)

    @contextmanager
    def _telling_of_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tell(f"{type(error).__name__}: {error}")
            raise

    def _work(self, number: int, parts: Collection[int]) -> _Work:
        """The batches of a share, and the numbers of those of their chunks that some of its parts have."""
        part_of, first, work = _part_of(self.folder.shares[number]), 0, []
        for batch in self.folder.shares[number].batches:
            chunks = range(len(batch.boundaries))
            work.append((batch, [chunk for chunk in chunks if part_of[first + chunk] in parts]))
            first += len(chunks)
        return work

    def _rows(self, number: int, parts: Collection[int]) -> int:
        """Of layers and positions that are decoded for some parts of a share, padding included."""
        work = [(len(batch.documents), _sizes(batch.boundaries), of) for batch, of in self._work(number, parts)]
        return (len(self.prepared.numbers) + 1) * sum(n * sum(sizes[chunk] for chunk in of) for n, sizes, of in work)

    def _share(self, number: int, work: _Work) -> Iterator[Callable[[], None]]:
        """Decode what a share lacks, chunk by chunk, and yield what is to be done with each, in order."""
        share = self.folder.shares[number]
        part_of, first = _part_of(share), 0
        for batch, wanted in work:
            for chunk, add in self._batch(batch, wanted):
                part = part_of[first + chunk]
                if self._open is None:
                    self._open = self.folder.begin(number, part)
                yield functools.partial(add, self._open)
                if share.ends[part] == first + chunk + 1:
                    yield self._open.close
                    self._open = None
            first += len(batch.boundaries)
        yield functools.partial(self.folder.finish, number)

    def _batch(self, batch: Batch, wanted: Collection[int]) -> Iterator[tuple[int, Callable[[Part], None]]]:
        """Decode those chunks of a batch; each comes with what adds its rows to a part."""
        if not wanted:
            return
        ids, mask, targets = self.inputs(batch.documents)
        prepared = _anew(self.prepared, batch, ids, mask, targets)
        if self._told is None or self._told.chunk < prepared.plan.chunk:
            self._told = prepared.plan
            _log.info("%s", self._told)
        ids, real = ids.cpu(), _real(ids, mask)
        positions = real.cumsum(1) - 1
        documents = self.names.take(batch.documents)
        for chunk, at, stats in prepared.run(wanted.__contains__):
            columns = stats.to("cpu"), documents, positions[:, at], ids[:, at], real[:, at], self.tokenizer
            del stats
            yield chunk, functools.partial(_add, columns)
            del columns


def _follow(prepared: Prepared, inputs: _Inputs) -> None:
    """Decode with the first rank what it writes."""
    assert prepared.ranks is not None
    while (work := prepared.ranks.first(None)) is not None:
        if isinstance(work, str):
            raise RuntimeError(f"rank 0 failed: {work}")
        for batch, wanted in work:
            if wanted:
                for _ in _anew(prepared, batch, *inputs(batch.documents)).run(wanted.__contains__):
                    pass


def _anew(prepared: Prepared, batch: Batch, ids: Tensor, mask: Tensor | None, targets: Any) -> Prepared:
    """The same question about a batch."""
    query = prepared.query
    return prepare(
        prepared.model,
        prepared.lens,
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
        together=prepared.together,
    )


def _add(columns: tuple[Any, ...], part: Part) -> None:
    part.add(table_of(*columns), int(columns[4].sum()))


def _ranks_of(model: Any, split: Split | None) -> tuple[Ranks, Split] | None:
    """As :func:`ranks_of`, of a model whose ranks may run different documents at a time."""
    if dist.is_available() and dist.is_initialized():
        check_not_sharded(model, "documents")
    return ranks_of(model, split)


def _all_or_none(ranks: Ranks | None) -> AbstractContextManager[None]:
    """A block that all ranks get through, or none."""
    return nullcontext() if ranks is None else ranks.together()


def _part_of(share: Share) -> list[int]:
    """The part of each chunk."""
    return [part for part, size in enumerate(_sizes(share.ends)) for _ in range(size)]


def shares_of(planned: list[_Planned], layers: int, answer: int) -> list[Share]:
    """What processes take one at a time: whole batches, and at least a part's rows of them.

    Args:
        planned: batches, and the real positions of each of their chunks.
        layers: rows of a position.
        answer: bytes of a row's statistics.
    """
    total = sum(sum(counts) for _, counts in planned)
    least = min(_PART_BYTES // (layers * answer), total // _LEAST_PARTS)
    shares: list[Share] = []
    batches: list[Batch] = []
    ends: list[int] = []
    rows: list[int] = []
    chunks = real = 0
    for number, (batch, counts) in enumerate(planned):
        batches.append(batch)
        for count in counts:
            chunks, real = chunks + 1, real + count
            if real >= least:
                ends, rows, real = [*ends, chunks], [*rows, layers * real], 0
        if not ends and number + 1 < len(planned):
            continue
        if ends:  # what is left over is too little for a part
            ends[-1], rows[-1] = chunks, rows[-1] + layers * real
        else:
            ends, rows = [chunks], [layers * real]
        shares.append(Share(batches, ends, rows))
        batches, ends, rows, chunks, real = [], [], [], 0, 0
    return shares


def engine_of(
    asked: str, out: str | os.PathLike[str], lens: DecodableLens, together: tuple[Ranks, Split] | None
) -> str:
    """What ``asked`` means for the folder: a run that is there goes on with its own engine, if that works here."""
    recorded = recorded_engine(out) if asked == "auto" else None
    if together is not None:
        recorded = together[0].first(recorded)  # the folder may change between two looks
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
        readout=readout_of(lens, prepared.numbers, prepared.head),
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
