"""Runs a prompt through a model in chunks and decodes each before the next: every layer, in bounded budget.

From token ids to statistics: :func:`prepare` checks the question, plans the memory and finds out whether the model can
continue from its cache; then each chunk's hidden states are recorded, handed to an engine and dropped.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tuned_lens_fast import budget
from tuned_lens_fast.engines import choose
from tuned_lens_fast.engines.decoding import Engine
from tuned_lens_fast.engines.eager import EagerEngine
from tuned_lens_fast.engines.interface import NO_TARGET, DecodableLens, Head, Query, Readout
from tuned_lens_fast.engines.sharded import ShardedEngine
from tuned_lens_fast.engines.statistics import DIVERGENCES, divergences
from tuned_lens_fast.engines.tiling import empty_answer, slices
from tuned_lens_fast.inputs import Watch
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.models.blocks import linear_head
from tuned_lens_fast.models.chunked_pass import ChunkedPass, cannot_continue, reads_padding
from tuned_lens_fast.models.resident import Resident, fully_sharded
from tuned_lens_fast.ranks import Ranks, Split
from tuned_lens_fast.reading import read, readout_of
from tuned_lens_fast.stats import LensStats
from tuned_lens_fast.validation import (
    check_boundaries,
    check_budget,
    check_chunk,
    check_input_ids,
    check_layer_numbers,
    check_model,
    check_query,
    kind,
    layers_of,
)


@dataclass(frozen=True)
class Prepared:
    """A prompt, and the question what every layer reads in it: all checked and planned, nothing run."""

    plan: budget.MemoryPlan
    boundaries: tuple[int, ...]  #: where the chunks of positions end
    recomputes: str | None  #: why every chunk runs the whole prompt anew; None where it continues from a cache
    model: Any
    lens: DecodableLens
    input_ids: Tensor  #: [batch, positions]
    attention_mask: Tensor | None  #: [batch, positions]
    numbers: tuple[int, ...]  #: the layers of the lens
    targets: Tensor | None  #: int64 [batch, positions] on the lens's device
    query: Query  #: for the whole prompt; targets and reference are put in for each chunk
    watch: Watch | None  #: what the query's watched tokens are groups of
    engine: Engine
    head: Head  #: the lens's; with ``split="vocabulary"`` this rank's tokens of it
    ranks: Ranks | None = None  #: those that read the prompt together
    split: Split | None = None

    @property
    def together(self) -> tuple[Ranks, Split] | None:
        """As :func:`prepare` takes it."""
        return None if self.ranks is None or self.split is None else (self.ranks, self.split)

    def run(self, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[tuple[int, slice, LensStats]]:
        """Decode the chunks whose number is ``wanted``, counted from 0, in order.

        A chunk that is not wanted only runs through the model, for its cache. After the last wanted one it stops.
        Between two chunks the model is as it was, and hidden states are gone.

        Yields:
            The chunk's number, its positions, and its statistics ``[L + 1, batch, positions of the chunk]``; the last
            layer is the model's own output.
        """
        batch, passes, chunks = self._passes()
        wanted_numbers = [number for number in range(len(chunks)) if wanted(number)]
        for number, positions in enumerate(chunks[: wanted_numbers[-1] + 1] if wanted_numbers else ()):
            if number in wanted_numbers:
                yield number, positions, self._decode(batch, passes, positions)
            elif self.recomputes is None:
                for part in passes:
                    part.skip(positions)

    def states(self) -> Iterator[tuple[slice, slice, list[Tensor], Tensor]]:
        """What the statistics are of, for a caller that reads it in more than one way; each is gone with the next.

        Yields:
            Some rows of the batch, a chunk's positions, and of these, one row of the batch behind the other, the hidden
            states of each layer, ``[rows x positions, width]``, and what the model's head receives,
            ``[rows x positions, d_model]``.
        """
        batch, passes, chunks = self._passes()
        for positions in chunks:
            for rows, part in zip(batch, passes, strict=True):
                yield rows, positions, *self._states(part, positions)

    def _passes(self) -> tuple[list[slice], list[ChunkedPass], list[slice]]:
        """Groups of rows of the batch, a pass of the model for each, and the chunks of positions."""
        ends = self.boundaries
        chunks = [slice(start, end) for start, end in zip((0, *ends), ends, strict=False)]
        batch = [*slices(self.plan.batch, self.plan.rows)]
        passes = [
            ChunkedPass(
                self.model,
                self.numbers,
                self.input_ids[rows],
                None if self.attention_mask is None else self.attention_mask[rows],
                cached=len(chunks) > 1 and self.recomputes is None,
            )
            for rows in batch
        ]
        return batch, passes, chunks

    def _states(
        self, part: ChunkedPass, positions: slice, kept: slice | None = None, apart: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        head = self.head
        entering, at_head = part(positions, kept)
        hidden = rows_of(entering, head, self.lens.unembed.norm.hidden_width(head), apart)
        (last,) = rows_of([at_head], head, head.weight.shape[1])
        return hidden, last

    def collect(self) -> LensStats:
        """The statistics of the whole prompt, ``[L + 1, batch, positions]``."""
        if len(self.boundaries) == 1:
            return next(self.run())[2]
        found = self._room(self.plan.positions)
        for _, positions, part in self.run():
            for name, value in part.items():
                if name in found:
                    found[name][:, :, positions] = value
            del part, value  # before the next chunk's take their place
        return self._shaped(found, slice(None))

    @torch.no_grad()
    def _decode(self, batch: Sequence[slice], passes: Sequence[ChunkedPass], positions: slice) -> LensStats:
        """The statistics of one chunk: each group of rows through the model and the engine, then the next."""
        layers = len(self.numbers)
        head = self.head if self.split == "vocabulary" else None  #: in place of the lens's
        kept, shares, width = positions, None, positions.stop - positions.start
        if self.ranks is not None and self.split == "rows":
            shares = self.ranks.shares(width)
            own = shares[self.ranks.rank]
            kept, width = slice(positions.start + own.start, positions.start + own.stop), own.stop - own.start
        found = self._room(width)
        for rows, part in zip(batch, passes, strict=True):
            hidden, last = self._states(part, positions, None if kept == positions else kept, head is None)
            query = replace(
                self.query,
                targets=None if self.targets is None else self.targets[rows, kept].reshape(-1),
                reference=last if divergences(self.query) else None,
            )
            itself = replace(query, stats=query.stats.difference(DIVERGENCES), reference=None)
            layerwise = {}
            if layers:
                layerwise = read(self.engine, self.lens, self.numbers, hidden, query, self.plan.scratch, head)
            output = self.engine.decode([last], Readout.of_output(self.head), itself, self.plan.scratch)
            for layer, answer in ((slice(layers), layerwise), (slice(layers, None), output)):
                for name, value in (self.watch.gathered(answer) if self.watch else answer).items():
                    found[name][layer, rows] = value.unflatten(1, (rows.stop - rows.start, width))
            del hidden, last, query
        if shares is not None:
            found = self._gathered(found, [share.stop - share.start for share in shares])
        for name in divergences(self.query):
            found[name][-1] = found["lse"][-1] - found["lse"][-1]  # 0, or NaN where the model's own output is
        return self._shaped(found, positions)

    def _gathered(self, found: dict[str, Tensor], widths: Sequence[int]) -> dict[str, Tensor]:
        """The statistics of a chunk's positions, put together from those of every rank's share of them."""
        assert self.ranks is not None
        room = {name: value.new_zeros(*value.shape[:2], max(widths), *value.shape[3:]) for name, value in found.items()}
        for name, value in found.items():
            room[name][:, :, : value.shape[2]] = value
        parts = self.ranks.gather([*room.values()])
        return {
            name: torch.cat([values[:, :, :width] for values, width in zip(of, widths, strict=True)], 2)
            for name, of in zip(room, zip(*parts, strict=True), strict=True)
        }

    def _room(self, positions: int) -> dict[str, Tensor]:
        """For statistics of so many positions, uninitialised."""
        query = self.query
        if self.watch is not None and self.watch.sizes is not None and query.watch is not None:
            query = replace(query, watch=query.watch[: len(self.watch.sizes)])  # a column for each group
        found = empty_answer(len(self.numbers) + 1, self.plan.batch * positions, query, self.head.weight.device)
        return {name: value.unflatten(1, (self.plan.batch, positions)) for name, value in found.items()}

    def _shaped(self, found: dict[str, Tensor], positions: slice) -> LensStats:
        blocks = len(get_transformer_layers(self.model)[1])
        return LensStats(
            **found,
            layers=torch.tensor([*self.numbers, blocks], dtype=torch.int64),
            targets=None if self.targets is None else self.targets[:, positions],
            watch=None if self.watch is None else self.watch.names,
        )


def prepare(
    model: Any,
    lens: DecodableLens,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: Iterable[int] | None = None,
    targets: Tensor | Literal["next"] | None = "next",
    top_k: int = 0,
    watch: Watch | None = None,
    stats: Collection[str] | None = None,
    chunk: int | None = None,
    boundaries: Sequence[int] | None = None,
    engine: str = "auto",
    memory_budget: int | None = None,
    together: tuple[Ranks, Split] | None = None,
) -> Prepared:
    """Check a question about a prompt ``[positions]`` or ``[batch, positions]`` and plan how to answer it.

    The prompt is not run. Where it takes several chunks, the model runs a few of its tokens, whole and in chunks:
    one that has no cache, or cannot continue from it, will run the whole prompt for every chunk; a warning says so.

    Args:
        model, lens, layers, targets, top_k, watch, stats, engine: see
            :func:`~tuned_lens_fast.decode.decode_model`.
        chunk: positions of a chunk; as many as the budget allows if None.
        boundaries: where chunks end, in place of ``chunk``: increasing, the last at the prompt's end.
        memory_budget: bytes of hidden states, statistics of a chunk and scratch; if None 256 MiB, on a GPU a
            sixteenth of its memory.
        together: the ranks that read the prompt, all of which call this alike, and how they split it.

    Raises:
        ValueError, IndexError, TypeError: as :func:`~tuned_lens_fast.decode.decode_model`.
    """
    model = check_model(model)
    if not hasattr(lens, "unembed"):
        raise TypeError(f"lens: got {kind(lens)}, wanted a Lens, such as LogitLens or TunedLens")
    check_input_ids(model, input_ids, attention_mask)
    blocks = get_transformer_layers(model)[1]
    check_lens(model, lens, len(blocks))
    ranks, split = together or (None, None)
    shard = None
    if ranks is not None and split == "vocabulary":
        if not hasattr(lens.unembed, "shard"):
            raise TypeError(
                f"lens: its unembed is {kind(lens.unembed)}, wanted an Unembed, whose vocabulary can be split"
            )
        shard = lens.unembed.shard(ranks.rank, ranks.size)
    own_head, head = (lens.unembed.head,) * 2 if shard is None else (shard.head, shard.whole)
    numbers = layers_of(lens, len(blocks)) if layers is None else check_layer_numbers(lens, layers, len(blocks))
    if isinstance(targets, str):
        if targets != "next":
            raise ValueError(f"targets: got {targets!r}, wanted 'next', ids or None")
        targets = next_tokens(input_ids, attention_mask)
    chosen = choose(engine, head.weight.device, head.weight.dtype, of_a_part=shard is not None)
    if shard is not None and ranks is not None:
        chosen = ShardedEngine(cast(EagerEngine, chosen), shard, ranks)
    # What the lens will be compared with is not known yet.
    unknown = head.weight.new_empty(()).expand(*input_ids.shape, head.weight.shape[1])
    query = replace(
        check_query(head, input_ids.shape, targets, unknown, top_k, None if watch is None else watch.ids, stats),
        reference=None,
    )
    input_ids = torch.atleast_2d(input_ids)
    batch, positions = input_ids.shape
    if attention_mask is not None:
        attention_mask = None if bool(attention_mask.all()) else torch.atleast_2d(attention_mask)
    longest = positions if attention_mask is None else int(attention_mask.sum(1).max())
    if longest == 0:
        raise ValueError("attention_mask: it is 0 everywhere, so there are no tokens to run the model on")
    check_length(model, longest)
    if attention_mask is not None:
        misread = _decided(ranks, reads_padding(model, input_ids, attention_mask))
        if misread is not None:
            raise ValueError(f"attention_mask: {misread}; pad on the right, or decode prompts of one length together")
    if boundaries is not None:
        ends = check_boundaries(boundaries, positions)
        chunk = max(end - start for start, end in zip((0, *ends), ends, strict=False))
    elif chunk is not None:
        chunk = min(check_chunk(chunk), positions)
    planned = budget.plan(
        batch,
        positions,
        engine=chosen,
        hidden=hidden_dtype(model),
        readout=readout_of(lens, numbers, own_head),
        query=query,
        memory_budget=check_budget(memory_budget, head.weight.device),
        chunk=chunk,
    )
    planned = _decided(ranks, planned)
    if boundaries is None:
        ends = tuple(part.stop for part in slices(positions, planned.chunk))
    recomputes = None
    if len(ends) > 1:
        recomputes = _decided(ranks, cannot_continue(model, input_ids, attention_mask, ends))
        if recomputes is not None:
            warnings.warn(
                f"model: {recomputes}, so each of the {len(ends)} chunks runs the whole prompt anew; a larger "
                f"memory_budget or chunk makes fewer",
                stacklevel=3,
            )
    return Prepared(
        planned, ends, recomputes, model, lens, input_ids, attention_mask, tuple(numbers),
        None if query.targets is None else query.targets.reshape(batch, positions), query, watch, chosen,
        own_head, ranks, split,
    )  # fmt: skip


def _decided(ranks: Ranks | None, value: Any) -> Any:
    """What the first rank found where values decide, which could differ in their last bits."""
    return value if ranks is None else ranks.first(value)


def next_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Each position's following token; NO_TARGET at the last, at padding and before it."""
    following = input_ids[..., 1:].to(torch.int64)
    if attention_mask is not None:
        real = attention_mask.bool()
        following = following.masked_fill(~(real[..., 1:] & real[..., :-1]), NO_TARGET)
    return nn.functional.pad(following, (0, 1), value=NO_TARGET)


def check_lens(model: Any, lens: DecodableLens, blocks: int) -> None:
    """That the lens belongs to the model, as far as their shapes and heads tell."""
    linear = linear_head(model)
    reads = getattr(lens.unembed, "reads", None)
    itself = reads is not None and reads(linear)
    if not itself:
        head = lens.unembed.head
        plain = Resident(linear, fully_sharded(model, get_transformer_layers(model)[1]))()
        own_head = cast(nn.Linear, plain).weight
        cut = own_head[: head.vocab]  # some models cut their vocabulary after the head
        itself = cut.shape == head.weight.shape and (
            cut.data_ptr() == head.weight.data_ptr() or torch.equal(cut.to(head.weight), head.weight)
        )
        own_head = cut if itself else own_head
        for name, ours, its in zip(("vocabulary", "d_model"), head.weight.shape, own_head.shape, strict=True):
            if ours != its:
                raise ValueError(f"lens: its {name} is {ours}, the model's {its}; it belongs to another model")
    if not itself:
        warnings.warn(
            "lens: its unembedding is not the model's; the last layer, and what is compared with it, are read with "
            "the lens's",
            stacklevel=4,
        )
    if isinstance(lens, Sized) and len(lens) != blocks:
        raise ValueError(f"lens: it has {len(lens)} layers, the model {blocks}; it belongs to another model")


def check_length(model: Any, longest: int) -> None:
    """That a model which looks its positions up in a table has an entry for each of them."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None or longest <= most:
        return
    words = model.get_input_embeddings()
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    tables += [buffer for name, buffer in model.named_buffers() if name.endswith(("embed_positions", "pos_encoding"))]
    # Some tables hold an offset of a few entries more.
    if any(most <= table.shape[0] < longest + 2 for table in tables):
        raise ValueError(
            f"input_ids: got {longest} positions, and {type(model).__name__} has learned only {most}; cut the prompt "
            f"into documents of at most {most}"
        )


def hidden_dtype(model: Any) -> torch.dtype:
    """The dtype of the residual stream."""
    dtype = model.get_input_embeddings().weight.dtype
    in_fp32 = getattr(model.config.get_text_config(), "residual_in_fp32", False)
    return torch.promote_types(dtype, torch.float32) if in_fp32 else dtype


def rows_of(states: Sequence[Tensor], head: Head, wanted: int, apart: bool = False) -> list[Tensor]:
    """States ``[batch, positions, wanted]`` as rows on the lens's device, or with ``apart`` each on its own, in one
    dtype.

    A model's blocks may lie on several devices, and some widen their residual stream behind the embedding.
    """
    for state in states:
        if state.shape[-1] != wanted:
            raise NotImplementedError(
                f"model: no lens can read it, since its blocks or head receive states {list(state.shape)}, and the "
                f"lens reads those of width {wanted}"
            )
    dtype = functools.reduce(torch.promote_types, (state.dtype for state in states)) if states else None
    rows = [state.reshape(-1, state.shape[-1]) for state in states]
    return [state.to(state.device if apart else head.weight.device, dtype) for state in rows]
