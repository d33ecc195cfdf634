"""What a lens is trained on: the hidden states of all layers, and the model's own output, from one pass of the model.

On the way through training it stands between sequences of tokens and the loss, and bounds what is held at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.engines import choose
from tuned_lens_fast.engines.interface import BudgetError, Translator
from tuned_lens_fast.engines.losses import question
from tuned_lens_fast.engines.tiling import even, slices
from tuned_lens_fast.models.forward_pass import input_device, model_inputs
from tuned_lens_fast.models.residual_stream import last_output, recorded
from tuned_lens_fast.nn import TunedLens
from tuned_lens_fast.reading import readout_of
from tuned_lens_fast.streaming import hidden_dtype, next_tokens, rows_of
from tuned_lens_fast.validation import DEFAULT_MEMORY_BUDGET


@dataclass(frozen=True)
class States:
    """Of some sequences, one behind the other, on the lens's device."""

    hidden: list[Tensor]  #: [rows, width] for each layer
    reference: Tensor  #: [rows, d_model], what the head receives at the model's own output
    last: Tensor  #: [rows, width], what the last block puts out
    targets: Tensor  #: int64 [rows], each position's next token


class Reader:
    """Runs the model over sequences, as many at once as the memory budget allows."""

    def __init__(
        self,
        model: Any,
        lens: TunedLens,
        numbers: Sequence[int],
        length: int,
        most: int,
        engine: str,
        memory_budget: int | None,
    ) -> None:
        """
        Args:
            numbers: the layers whose hidden states are wanted.
            length: positions of a sequence.
            most: sequences that are wanted at once.
            engine: what will read the states.
            memory_budget: bytes of hidden states and of the engine's scratch, at most half of it for the former; None
                for 256 MiB, or for what one sequence takes where that is more.

        Raises:
            ValueError: not even one sequence fits.
        """
        self.model, self.numbers = model, [*numbers]
        self._head = lens.unembed.head
        self._width = lens.unembed.norm.hidden_width(self._head)
        # The reference, and what the last block puts out, beside what enters the layers.
        values = (len(self.numbers) + 1) * self._width + self._head.weight.shape[1]
        sequence = length * values * hidden_dtype(model).itemsize
        scratch = _least_scratch(lens, self.numbers, length, hidden_dtype(model), engine)
        smallest = sequence + max(sequence, scratch)
        if memory_budget is None:
            memory_budget = max(DEFAULT_MEMORY_BUDGET, smallest)
        if memory_budget < smallest:
            raise ValueError(
                f"memory_budget: got {memory_budget} bytes; the smallest that works here is {smallest}, {sequence} of "
                f"it for the hidden states of {len(self.numbers)} layers at the {length} positions of a sequence; a "
                f"smaller sequence_length needs less"
            )
        self.budget = memory_budget
        self.at_once = even(most, min(memory_budget // 2, memory_budget - scratch) // sequence)  #: sequences
        self.scratch = memory_budget - self.at_once * sequence  #: bytes that are left for the engine

    def read(self, sequences: Tensor) -> Iterator[tuple[float, States]]:
        """The states of ``sequences`` ``[n, length]``, part by part, each with the share of all that it is."""
        for part in slices(len(sequences), self.at_once):
            ids = sequences[part].to(input_device(self.model), torch.int64)
            yield len(ids) / len(sequences), self._states(ids)

    @torch.no_grad()
    def _states(self, ids: Tensor) -> States:
        # Not held around all passes: a caller that stops early would leave the hooks behind.
        with recorded(self.model, self.numbers) as recorder, last_output(self.model, recorder) as last:
            self.model(**model_inputs(self.model, ids))
            entering, at_head = recorder.take()
        *hidden, end = rows_of([*entering, *last], self._head, self._width)
        (reference,) = rows_of([at_head], self._head, self._head.weight.shape[1])
        return States(hidden, reference, end, next_tokens(ids, None).reshape(-1).to(reference.device))


def _least_scratch(lens: TunedLens, numbers: Sequence[int], length: int, dtype: torch.dtype, engine: str) -> int:
    """Bytes of scratch that an engine needs at least, for either loss and for the divergence that is measured."""
    head = lens.unembed.head
    # In training translators are fp32, whatever they are now.
    weight = torch.empty(lens.config.d_model, lens.config.d_model, device="meta")
    readout = replace(readout_of(lens, numbers), translators=(Translator(weight, weight[0]),) * len(numbers))
    one = torch.zeros(1, 1, dtype=head.weight.dtype, device=head.weight.device)
    reference = one.expand(length, head.weight.shape[1])
    targets = torch.zeros(1, dtype=torch.int64, device=head.weight.device).expand(length)
    chosen, least = choose(engine, head.weight.device, head.weight.dtype), 0
    for query, gradient in (
        (question(None, reference), True),
        (question(targets, None), True),
        (question(None, reference), False),
    ):
        try:
            chosen.plan(length, dtype, readout, query, 1, gradient)
        except BudgetError as error:
            least = max(least, error.smallest)
    return least
