"""Reads hidden states that were stored elsewhere, such as by vLLM's ``extract_hidden_states``: no model is run.

Where the way from hidden state to statistics starts from files: a text's states are looked at a chunk of positions at a
time, read like those of a running model, and dropped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError
from torch import Tensor

from tuned_lens_fast import budget, progress
from tuned_lens_fast.checkpoint import open_safetensors
from tuned_lens_fast.conditions import machine, versions
from tuned_lens_fast.data import fingerprint
from tuned_lens_fast.engines import choose
from tuned_lens_fast.engines.interface import DecodableLens, Query, Readout
from tuned_lens_fast.engines.statistics import DIVERGENCES, divergences
from tuned_lens_fast.engines.tiling import slices
from tuned_lens_fast.inputs import Watched, read_watch
from tuned_lens_fast.messages import shortened
from tuned_lens_fast.reading import read, readout_of
from tuned_lens_fast.stats import LensStats
from tuned_lens_fast.streaming import next_tokens
from tuned_lens_fast.validation import check_budget, check_ids, check_layer_numbers, check_query, kind

_log = logging.getLogger(__name__)
#: A text's hidden states ``[positions, layers, d_model]`` and its token ids ``[positions]``, or both by these names.
Stored = tuple[Tensor, Tensor | None] | Mapping[str, Tensor]
#: A file, a folder of such, or the texts themselves.
Source = str | os.PathLike[str] | Iterable[Stored]
_NAMES = ("hidden_states", "token_ids")


@overload
def decode_states(
    lens: DecodableLens, source: str | os.PathLike[str], *, layers: Iterable[int] | None = ...,
    targets: Literal["next"] | None = ..., top_k: int = ..., watch: Watched | None = ...,
    stats: Collection[str] | None = ..., tokenizer: Any = ..., engine: str = ..., memory_budget: int | None = ...,
    out: None = ...,
) -> LensStats | Iterator[LensStats]: ...  # fmt: skip


@overload
def decode_states(
    lens: DecodableLens, source: Iterable[Stored], *, layers: Iterable[int] | None = ...,
    targets: Literal["next"] | None = ..., top_k: int = ..., watch: Watched | None = ...,
    stats: Collection[str] | None = ..., tokenizer: Any = ..., engine: str = ..., memory_budget: int | None = ...,
    out: None = ...,
) -> Iterator[LensStats]: ...  # fmt: skip


@overload
def decode_states(
    lens: DecodableLens, source: Source, *, layers: Iterable[int] | None = ...,
    targets: Literal["next"] | None = ..., top_k: int = ..., watch: Watched | None = ...,
    stats: Collection[str] | None = ..., tokenizer: Any = ..., engine: str = ..., memory_budget: int | None = ...,
    out: str | os.PathLike[str],
) -> Path: ...  # fmt: skip


def decode_states(
    lens: DecodableLens,
    source: Source,
    *,
    layers: Iterable[int] | None = None,
    targets: Literal["next"] | None = "next",
    top_k: int = 0,
    watch: Watched | None = None,
    stats: Collection[str] | None = None,
    tokenizer: Any = None,
    engine: str = "auto",
    memory_budget: int | None = None,
    out: str | os.PathLike[str] | None = None,
) -> LensStats | Iterator[LensStats] | Path:
    """Decode hidden states that are stored in files, or come one text after another; no model is needed.

    Args:
        lens: any :class:`~tuned_lens_fast.nn.Lens`, such as one of
            :meth:`LogitLens.from_checkpoint <tuned_lens_fast.nn.LogitLens.from_checkpoint>`.
        source: a file of safetensors with ``hidden_states`` ``[positions, layers, d_model]`` and ``token_ids``
            ``[positions]``, as vLLM's ``extract_hidden_states`` writes them; a folder of such files; or an iterable of
            pairs of the two, or of mappings with these names.
        layers: the layer of each entry of ``hidden_states``: i for what enters block i, and the model's number of
            blocks for what the last one puts out, before the norm. That one is the model's own output, with which
            divergences compare. If None 0, 1, 2 and so on, for all of the lens's layers, with or without the output.
        targets: "next" for the following token, or None.
        top_k, watch, stats, tokenizer, engine: see :func:`~tuned_lens_fast.decode.decode`; with the output kl is among
            the default statistics.
        memory_budget: bytes of a chunk's hidden states and scratch beyond inputs and results; by default as in
            :func:`~tuned_lens_fast.decode.decode_model`.
        out: a folder to write the statistics to, as a Parquet data set that can be resumed; see
            :func:`~tuned_lens_fast.data.dataset.decode_documents`. A document is called like its file, or by its
            number. ``source`` has to be files or a sequence.

    Returns:
        Of a file a :class:`LensStats` with statistics ``[layers, positions]``, the output last; else an iterator over
        such, a text each; with ``out`` the path of the folder.

    Raises:
        FileNotFoundError: no such file, or none in the folder.
        ValueError, IndexError, TypeError: as :func:`~tuned_lens_fast.decode.decode`; also a file that is damaged or
            holds other things. The message names the file, or the text by its number.
    """
    texts = _texts(source)
    if out is not None:
        from tuned_lens_fast.data.dataset import engine_of

        engine = engine_of(engine, out, lens, None)
    reader = _Reader(lens, layers, targets, top_k, read_watch(watch, tokenizer), stats, engine, memory_budget)
    if out is not None:
        if not isinstance(texts, Sequence):
            raise TypeError(f"source: got {kind(source)} with out=, wanted files or a sequence, which can be resumed")
        return _write(Path(out), reader, texts, tokenizer)
    if isinstance(texts, _Files) and texts.single:
        return reader.whole(texts[0])
    return map(reader.whole, texts)


def first_states(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor]:
    """The ``hidden_states`` and ``token_ids`` of a file, or of the first one in a folder.

    Raises:
        FileNotFoundError, ValueError: as :func:`decode_states`; also a file without token ids.
    """
    text = _Files(Path(path))[0]
    if text.token_ids is None:
        raise ValueError(f"source: {text.name} holds no {_NAMES[1]}")
    return text.hidden, text.token_ids


@dataclass(frozen=True)
class _Text:
    name: str  #: as errors call it
    hidden: Tensor  #: [positions, entries, width]
    token_ids: Tensor | None  #: [positions]


class _Files(Sequence[_Text]):
    """Files, each opened when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.single = not path.is_dir()
        self.paths = [path] if self.single else sorted(path.glob("*.safetensors"))
        if not self.paths:
            raise FileNotFoundError(f"source: {path} holds no .safetensors")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: Any) -> Any:
        path = self.paths[number]
        try:
            with open_safetensors(path) as file:
                there = set(file.keys())
                if _NAMES[0] not in there:
                    raise ValueError(f"source: {path} holds no {_NAMES[0]}")
                ids = file.get_tensor(_NAMES[1]) if _NAMES[1] in there else None
                return _Text(str(path), file.get_tensor(_NAMES[0]), ids)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"source: there is no file {path}") from error
        except SafetensorError as error:
            raise ValueError(f"source: cannot read {path}: {shortened(error, 200)}") from error


class _Given(Sequence[_Text]):
    """Texts of a sequence."""

    def __init__(self, texts: Sequence[Stored]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: Any) -> Any:
        return _text_of(number, self.texts[number])


def _texts(source: Any) -> Iterable[_Text]:
    if isinstance(source, (str, os.PathLike)):
        return _Files(Path(source))
    if isinstance(source, Tensor | Mapping) or not isinstance(source, Iterable):
        raise TypeError(f"source: got {kind(source)}, wanted a path, or an iterable of {' and '.join(_NAMES)}")
    if isinstance(source, Sequence):
        return _Given(source)
    return (_text_of(number, text) for number, text in enumerate(source))


def _text_of(number: int, text: Any) -> _Text:
    if isinstance(text, Mapping):
        text = tuple(text.get(name) for name in _NAMES)
    if not isinstance(text, (tuple, list)) or len(text) != 2:
        raise TypeError(f"source: text {number} is {kind(text)}, wanted {' and '.join(_NAMES)}")
    return _Text(f"text {number}", *text)


class _Reader:
    """A lens and a question, put to one text after another."""

    def __init__(
        self,
        lens: Any,
        layers: Iterable[int] | None,
        targets: Any,
        top_k: int,
        watch: Any,
        stats: Collection[str] | None,
        engine: str,
        memory_budget: int | None,
    ) -> None:
        if targets not in ("next", None):
            raise ValueError(f"targets: got {targets!r}, wanted 'next' or None")
        self.lens, self.targets, self.watch = lens, targets, watch
        self.asked = top_k, None if watch is None else watch.ids, stats
        self.head = lens.unembed.head
        self.engine = choose(engine, self.head.weight.device, self.head.weight.dtype)
        self.budget = check_budget(memory_budget, self.head.weight.device)
        self.count = len(lens) if hasattr(lens, "__len__") else getattr(lens.unembed, "num_hidden_layers", None)
        self.layers = None if layers is None else [*layers]
        if self.layers is not None:
            check_layer_numbers(lens, [layer for layer in self.layers if layer != self.count], self.count)
            if sum(layer == self.count for layer in self.layers) > 1:
                raise ValueError(f"layers: got {self.count}, the model's own output, more than once")

    def numbers(self, text: _Text) -> tuple[list[int], list[int], int | None]:
        """The lens's layers, their entries of the hidden states, and the output's entry."""
        entries = text.hidden.shape[1]
        layers = self.layers
        if layers is None:
            if self.count is None or entries not in (self.count, self.count + 1):
                has = "unknown layers" if self.count is None else f"{self.count} layers"
                raise ValueError(f"layers: {text.name} has {entries} entries for a lens of {has}; name them in layers=")
            has_layers = getattr(self.lens, "translated_layers", None)
            numbers = [*range(self.count)] if has_layers is None else [*has_layers]
            return numbers, numbers, self.count if entries > self.count else None
        if len(layers) != entries:
            raise ValueError(f"layers: got {len(layers)} for {entries} entries of hidden_states in {text.name}")
        output = layers.index(self.count) if self.count in layers else None
        kept = [entry for entry in range(entries) if entry != output]
        return [layers[entry] for entry in kept], kept, output

    def question(self, text: _Text) -> tuple[Query, budget.MemoryPlan]:
        """The question to a text, checked; targets are put in, and the reference is not known yet."""
        hidden, ids = text.hidden, text.token_ids
        width = self.lens.unembed.norm.hidden_width(self.head)
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            raise TypeError(f"source: hidden_states of {text.name} are {kind(hidden)}, wanted a floating tensor")
        if hidden.ndim != 3 or hidden.shape[2] != width or not hidden.numel():
            raise ValueError(
                f"source: hidden_states of {text.name} are {[*hidden.shape]}, wanted [positions, layers, {width}]"
            )
        targets = None
        if self.targets is not None and ids is None:
            raise ValueError(f"source: {text.name} has no token_ids, so that no token comes next; pass targets=None")
        if ids is not None:
            check_ids(f"source: token_ids of {text.name}", ids, self.head.vocab)
            if ids.shape != hidden.shape[:1]:
                raise ValueError(
                    f"source: token_ids of {text.name} are {[*ids.shape]}, wanted {[len(hidden)]} as hidden_states are"
                )
            targets = None if self.targets is None else next_tokens(ids, None)
        numbers, _, output = self.numbers(text)
        top_k, watch, stats = self.asked
        unknown = None
        if output is not None:
            unknown = self.head.weight.new_empty(()).expand(len(hidden), self.head.weight.shape[1])
        elif named := sorted({*(stats or ())} & {*DIVERGENCES}):
            raise ValueError(
                f"stats: {', '.join(named)} compare with the model's own output, which {text.name} does not have; "
                f"it is layer {self.count}"
            )
        query = check_query(self.head, hidden.shape[:1], targets, unknown, top_k, watch, stats)
        query = replace(query, reference=None)
        planned = budget.plan(
            1,
            len(hidden),
            engine=self.engine,
            hidden=hidden.dtype,
            readout=readout_of(self.lens, numbers),
            query=query,
            memory_budget=self.budget,
        )
        return query, planned

    def whole(self, text: _Text) -> LensStats:
        """``[layers, positions]``."""
        query, planned = self.question(text)
        _log.info("%s", planned)
        numbers, _, output = self.numbers(text)
        progress.expect((len(numbers) + (output is not None)) * len(text.hidden))
        parts = [self.read(text, query, planned, at) for at in slices(len(text.hidden), planned.chunk)]
        found = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
        return self.stats(text, found, query.targets)

    def stats(self, text: _Text, found: dict[str, Tensor], targets: Tensor | None) -> LensStats:
        """What was found, ``[layers, *targets.shape]``."""
        numbers, _, output = self.numbers(text)
        layers = numbers if output is None or self.count is None else [*numbers, self.count]
        names = None if self.watch is None else self.watch.names
        return LensStats(**found, layers=torch.tensor(layers, dtype=torch.int64), targets=targets, watch=names)

    @torch.no_grad()
    def read(self, text: _Text, query: Query, planned: budget.MemoryPlan, positions: slice) -> dict[str, Tensor]:
        """Every statistic at a chunk of positions, ``[layers, positions]``."""
        numbers, entries, output = self.numbers(text)
        states = text.hidden[positions].to(self.head.weight.device)
        query, tiling = query.at(positions), planned.tiling
        parts, last = [], None
        if output is not None:
            norm, rows = self.lens.unembed.norm, slices(len(states), tiling.layers * tiling.positions)
            received = [self.engine.head_input([states[at, output]], (None,), norm, self.head, tiling) for at in rows]
            last = torch.cat(received)
        if numbers:
            asked = replace(query, reference=last if divergences(query) else None)
            hidden = [states[:, entry] for entry in entries]
            parts.append(read(self.engine, self.lens, numbers, hidden, asked, planned.scratch))
        if last is not None:
            itself = replace(query, stats=query.stats.difference(DIVERGENCES))
            own = self.engine.decode([last], Readout.of_output(self.head), itself, planned.scratch)
            # 0, or NaN where the output is.
            parts.append(own | dict.fromkeys(divergences(query), own["lse"] - own["lse"]))
        if self.watch is not None:
            parts = [self.watch.gathered(part) for part in parts]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _write(out: Path, reader: _Reader, texts: Sequence[_Text], tokenizer: Any) -> Path:
    """A data set of all texts, in which each is a batch of its own."""
    import pyarrow as pa

    from tuned_lens_fast.data.dataset import shares_of
    from tuned_lens_fast.data.parts import Batch, run_folder
    from tuned_lens_fast.data.table import table_of

    if not len(texts):
        raise ValueError("source: got no texts")
    digests, lengths, layers, used = [], [], set(), set()
    for text in texts:
        query, planned = reader.question(text)
        if text.token_ids is None:
            raise ValueError(f"source: {text.name} has no token_ids, which a data set has a column for")
        # All values of states would take as long to read as to decode.
        sample = text.hidden.reshape(-1)[:: text.hidden.numel() // 4096 | 1]
        digests.append(fingerprint.of_tensors([text.token_ids, sample, torch.tensor(text.hidden.shape)]))
        lengths.append((len(text.hidden), planned.chunk))
        used.update(text.token_ids.unique().tolist())
        numbers, _, output = reader.numbers(text)
        layers.add((*numbers, *([] if output is None else [reader.count])))
    if len(layers) > 1:
        raise ValueError("source: some texts have the model's own output and others do not")
    (of_all,) = layers
    names = [path.stem for path in texts.paths] if isinstance(texts, _Files) else [*range(len(texts))]
    documents = pa.array(names, pa.string() if isinstance(texts, _Files) else pa.int64())
    lens = fingerprint.of_lens(reader.lens)
    identity = {
        "states": fingerprint.of_text(digests),
        "lens": lens,
        "ids": fingerprint.of_text(names),
        "targets": reader.targets,
        "layers": [*of_all],
        "stats": sorted(query.stats),
        "top_k": query.top_k,
        "watch": None if reader.watch is None else reader.watch.columns(),
        "engine": reader.engine.name,
        "tokenizer": None if tokenizer is None else fingerprint.of_text(tokenizer.convert_ids_to_tokens(sorted(used))),
    }
    called = {"lens": f"{type(reader.lens).__name__}, {lens[:12]}"}
    made_with = {
        **versions(),
        **machine(reader.head.weight.device),
        "memory_budget": reader.budget,
    }

    def plan() -> list[Any]:
        cut = [[*slices(length, chunk)] for length, chunk in lengths]
        planned = [
            (Batch([number], [at.stop for at in parts]), [at.stop - at.start for at in parts])
            for number, parts in enumerate(cut)
        ]
        return shares_of(planned, len(of_all), budget.statistics_bytes(query))

    with run_folder(out, identity, called, made_with, plan) as folder:
        for number, lacking in folder.claimed():
            folder.warn_of_changes(stacklevel=4)
            share, held = folder.shares[number], -1
            progress.expect(sum(share.rows[part] for part in lacking))
            chunks = [
                (batch.documents[0], slice(start, stop))
                for batch in share.batches
                for start, stop in zip((0, *batch.boundaries), batch.boundaries, strict=False)
            ]
            for part, (first, end) in enumerate(zip((0, *share.ends), share.ends, strict=False)):
                if part not in lacking:
                    continue
                opened = folder.begin(number, part)
                try:
                    for document, at in chunks[first:end]:
                        if document != held:
                            held, text = document, texts[document]
                            query, planned = reader.question(text)
                        found = {name: v[:, None] for name, v in reader.read(text, query, planned, at).items()}
                        targets = None if query.targets is None else query.targets[None, at]
                        stats = reader.stats(text, found, targets).to("cpu")
                        assert text.token_ids is not None
                        ids = text.token_ids[None, at].cpu()
                        columns = documents.take(pa.array([document])), torch.arange(at.start, at.stop)[None], ids
                        real = torch.ones_like(ids, dtype=torch.bool)
                        opened.add(table_of(stats, *columns, real, tokenizer), ids.numel())
                    opened.close()
                except BaseException:
                    opened.abandon()
                    raise
            folder.finish(number)
        return folder.path
