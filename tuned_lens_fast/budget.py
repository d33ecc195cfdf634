"""Plans how a memory budget is spent: the positions and batch rows that run at once, an engine's rows and tile.

All of it before a prompt runs, so that a budget that cannot work is refused before any work. What counts is what this
package holds: hidden states, statistics, an engine's scratch. The model's own activations and cache do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tuned_lens_fast.engines.decoding import Engine
from tuned_lens_fast.engines.interface import BudgetError, Query, Readout, Tiling
from tuned_lens_fast.engines.statistics import asked
from tuned_lens_fast.engines.tiling import even


@dataclass(frozen=True)
class MemoryPlan:
    """How a budget is spent on a batch of prompts. ``str(plan)`` says it in a short paragraph."""

    budget: int  #: bytes
    batch: int  #: rows of the batch
    positions: int  #: of the prompt
    layers: int  #: whose hidden states are read, beside what the head receives
    rows: int  #: rows of the batch that run through the model at once
    chunk: int  #: positions that run through the model at once
    hidden: int  #: bytes of the hidden states of a chunk, of all layers
    statistics: int  #: bytes of the statistics of a chunk, before they are handed over
    engine: str  #: its name
    tiling: Tiling  #: how it cuts a chunk; its scratch included

    @property
    def scratch(self) -> int:
        """Bytes that the engine may use."""
        return self.budget - self.hidden - self.statistics

    @property
    def total(self) -> int:
        """Bytes at most, never above the budget."""
        return self.hidden + self.statistics + self.tiling.scratch

    def __str__(self) -> str:
        whole = "the whole prompt" if self.chunk >= self.positions else f"chunks of {self.chunk:,} positions"
        rows = "" if self.batch == 1 else f" of {self.rows:,} of {self.batch:,} rows"
        return (
            f"memory budget {_size(self.budget)}: {whole}{rows} at a time, whose hidden states of {self.layers} layers "
            f"and the output take {_size(self.hidden)} and statistics {_size(self.statistics)}; the {self.engine} "
            f"engine takes {self.tiling.layers * self.tiling.positions:,} rows (layers x positions) with vocabulary "
            f"tiles of {self.tiling.tile:,} in {_size(self.tiling.scratch)} of scratch; {_size(self.total)} in all"
        )


def plan(
    batch: int,
    positions: int,
    *,
    engine: Engine,
    hidden: torch.dtype,
    readout: Readout,
    query: Query,
    memory_budget: int,
    chunk: int | None = None,
) -> MemoryPlan:
    """Whole prompts, as many rows of the batch as fit; else all rows, as many positions as fit; else fewer rows.

    An engine that finds little left over works in smaller pieces: it is granted what it can use, up to half.

    Args:
        batch, positions: the shape of the prompt.
        engine, readout, query: what will decode it, how, and the question.
        hidden: dtype of the hidden states.
        memory_budget: bytes of hidden states, statistics on their way and scratch.
        chunk: positions to run at once; as many as fit if None.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that works.
    """
    layers = len(readout.translators)
    # Bytes of a row's position.
    state = (layers * readout.width + readout.head.weight.shape[1]) * hidden.itemsize
    # Of a position in all rows: an engine's answer, where it is put, and a data set's tables.
    answer = batch * (layers + 1) * statistics_bytes(query) * 4

    def tiling(states: int, budget: int) -> Tiling:
        return engine.plan(states, hidden, readout, query, budget)

    def filled(rows: int, width: int) -> MemoryPlan:
        held = (rows * width * state, width * answer)
        try:
            rest = tiling(rows * width, memory_budget - sum(held))
        except BudgetError as error:
            raise BudgetError(memory_budget, sum(held) + error.smallest) from None
        return MemoryPlan(memory_budget, batch, positions, layers, rows, width, *held, engine.name, rest)

    try:
        granted = tiling(max(1, min(batch * positions, memory_budget // state)), memory_budget // 2).scratch
    except BudgetError as error:
        granted = error.smallest
    room = memory_budget - granted
    width = chunk or positions
    rows = min(batch, (room - width * answer) // (width * state))
    if rows < 1 and chunk is None:
        rows, width = batch, even(positions, max(1, room // (answer + batch * state)))
    rows = even(batch, max(1, rows))
    while True:
        try:
            return filled(rows, width)
        except BudgetError:
            if rows > 1:
                rows = (rows + 1) // 2
            elif width > 1 and chunk is None:
                width = (width + 1) // 2
            else:
                raise


def statistics_bytes(query: Query) -> int:
    """Of one layer at one position."""
    columns = ((statistic.columns(query), statistic.dtype.itemsize) for statistic in asked(query))
    return sum((1 if count is None else count) * itemsize for count, itemsize in columns)


def _size(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
