"""One way to read hidden states with any lens: what lies between a question that is checked and an engine.

A lens whose layers are affine maps is handed to the engine as it is. Of any other only ``transform_hidden`` is known:
its states are transformed a layer at a time, and read with the unembedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from tuned_lens_fast.engines.decoding import Engine
from tuned_lens_fast.engines.interface import AffineLens, DecodableLens, Head, Query, Readout
from tuned_lens_fast.engines.tiling import flat_pieces
from tuned_lens_fast.models.comparison import close
from tuned_lens_fast.replicas import by_device, readout_on


def is_affine(lens: DecodableLens) -> TypeGuard[AffineLens]:
    """Whether ``lens.translator(idx)`` says all that the lens does to a hidden state before the unembedding."""
    return getattr(lens, "affine", hasattr(lens, "translator"))


def readout_of(lens: DecodableLens, layers: Iterable[int], head: Head | None = None) -> Readout:
    """The lens's ``layers`` as an engine takes them; without translators where :func:`read` transforms the states.

    ``head`` stands in for the lens's own.
    """
    if is_affine(lens):
        return Readout.of(lens, layers, head)
    return Readout((None,) * len(list(layers)), lens.unembed.norm, head or lens.unembed.head)


def read(
    engine: Engine,
    lens: Any,
    layers: Sequence[int],
    hidden: Sequence[Tensor],
    query: Query,
    memory_budget: int,
    head: Head | None = None,
) -> dict[str, Tensor]:
    """``engine.decode`` of what ``lens`` reads in ``hidden``, entries ``[..., d_model]`` of its ``layers``.

    Of a model on several devices entries are read where they are, on all devices at once, where what the lens reads
    with fits twice; each has the budget. A lens that was moved away from its model has them come to it. ``head``
    stands in for the lens's own. A lens that is not affine takes what its ``transform_hidden`` of one layer takes
    beyond the budget.

    Raises:
        ValueError: see :func:`transformed`.
    """
    readout = readout_of(lens, layers, head)
    home = readout.head.weight.device
    if any(entry.device != home for entry in hidden):
        if is_affine(lens) and head is None and home in getattr(lens.unembed, "devices", ()):
            return _read_apart(engine, lens, layers, hidden, readout, query, memory_budget)
        hidden = [entry.to(home) for entry in hidden]
    if is_affine(lens) or not len(hidden):
        return decode_views(engine, hidden, readout, query, memory_budget)
    one = Readout(readout.translators[:1], readout.norm, readout.head)
    parts = []
    for layer, entry in zip(layers, hidden, strict=True):
        states = transformed(lens, entry, layer)
        parts.append(decode_views(engine, [states], one, query, memory_budget))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _read_apart(
    engine: Engine,
    lens: Any,
    layers: Sequence[int],
    hidden: Sequence[Tensor],
    readout: Readout,
    query: Query,
    memory_budget: int,
) -> dict[str, Tensor]:
    """:func:`read` of entries on several devices, each of which makes of the reference what it needs itself."""
    home = readout.head.weight.device

    def of(numbers: Sequence[int]) -> Readout:
        return replace(readout, translators=tuple(readout.translators[number] for number in numbers))

    work: list[tuple[list[int], Readout]] = []
    at_home: list[int] = []
    for device, numbers in by_device(hidden).items():
        works = device != home and engine.unavailable(device, readout.head.weight.dtype) is None
        replica = readout_on(device, lens, [layers[number] for number in numbers], of(numbers)) if works else None
        if replica is None:
            at_home += numbers
        else:
            work.append((numbers, replica))
    if at_home:
        work.append((at_home, of(at_home)))

    @torch.no_grad()
    def part(numbers: Sequence[int], there: Readout) -> dict[str, Tensor]:
        device = there.head.weight.device
        entries = [hidden[number].to(device) for number in numbers]
        return decode_views(engine, entries, there, query.on(device), memory_budget)

    # A thread each: some engines wait for their GPU in between.
    with ThreadPoolExecutor(len(work)) as pool:
        started = [pool.submit(copy_context().run, part, numbers, there) for numbers, there in work]
        parts = [future.result() for future in started]
    found: dict[str, Tensor] = {}
    for (numbers, _), answers in zip(work, parts, strict=True):
        for name, value in answers.items():
            if name not in found:
                found[name] = torch.empty(len(hidden), *value.shape[1:], dtype=value.dtype, device=home)
            found[name][numbers] = value.to(home)
    return found


def transformed(lens: Any, hidden: Tensor, layer: int) -> Tensor:
    """``lens.transform_hidden``, once it is seen that the unembedding of it is what the lens's ``forward`` gives.

    Raises:
        ValueError: it is not, at the first position; or the shape is another one.
    """
    states = lens.transform_hidden(hidden, layer)
    if states.shape != hidden.shape:
        raise ValueError(f"lens: transform_hidden made {[*states.shape]} of {[*hidden.shape]}, wanted the same shape")
    first = hidden.reshape(-1, hidden.shape[-1])[:1]
    if len(first) and first.isfinite().all():
        with torch.no_grad():
            found, wanted = lens.unembed.forward(lens.transform_hidden(first, layer)), lens.forward(first, layer)
        if found.shape != wanted.shape or not close(found, wanted):
            raise ValueError(
                f"lens: the forward of {type(lens).__name__} is not its unembed of its transform_hidden at layer "
                f"{layer}, and decode reads the latter"
            )
    return states


def decode_views(
    engine: Engine, entries: Sequence[Tensor], readout: Readout, query: Query, budget: int
) -> dict[str, Tensor]:
    """``engine.decode`` of entries ``[..., d_model]`` that are never copied as a whole."""
    parts = [engine.decode(rows, readout, part, budget) for rows, part in flat_pieces(entries, query)]
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
