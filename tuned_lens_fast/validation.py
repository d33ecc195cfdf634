"""What a decode is asked, checked: every argument, before anything runs.

``decode`` and ``decode_model`` take the same questions; they stand at the start of the way from hidden state to
statistics, and what passes here needs no check further on.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import NO_TARGET, DecodableLens, Head, Query
from tuned_lens_fast.engines.statistics import DIVERGENCES, STATISTICS
from tuned_lens_fast.messages import ranges
from tuned_lens_fast.models.wrappers import unwrapped

#: Bytes of scratch beyond inputs and results where the caller names none: 256 MiB.
DEFAULT_MEMORY_BUDGET = 256 * 2**20
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_hidden(
    hidden_states: Tensor | Sequence[Tensor], head: Head, d_model: int, devices: Sequence[torch.device] = ()
) -> tuple[list[Tensor], torch.Size]:
    """The entries ``[..., d_model]``, and the shape between layers and d_model. Beside the head's device they may be on
    ``devices``.
    """
    if not isinstance(hidden_states, (Tensor, Sequence)):
        raise TypeError(f"hidden_states: got {kind(hidden_states)}, wanted a tensor or a sequence of tensors")
    entries = list(hidden_states.unbind(0)) if isinstance(hidden_states, Tensor) else list(hidden_states)
    if isinstance(hidden_states, Tensor):
        if hidden_states.ndim < 2:
            raise ValueError(f"hidden_states: got shape {list(hidden_states.shape)}, wanted [L, ..., d_model]")
        shape, dtype = hidden_states.shape[1:], hidden_states.dtype
    elif not entries:
        raise ValueError("hidden_states: got an empty sequence, which has no shape; pass a tensor [0, ..., d_model]")
    else:
        for entry in entries:
            if not isinstance(entry, Tensor):
                raise TypeError(f"hidden_states: got a sequence with a {type(entry).__name__}, wanted tensors")
        shape, dtype = entries[0].shape, entries[0].dtype
    for i, entry in enumerate(entries):
        if entry.shape != shape:
            raise ValueError(f"hidden_states: entry {i} has shape {list(entry.shape)}, entry 0 {list(shape)}")
        if entry.dtype != dtype:
            raise TypeError(f"hidden_states: entry {i} is {entry.dtype}, entry 0 {dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"hidden_states: got {dtype}, wanted a floating dtype")
    if not shape or shape[-1] != d_model:
        raise ValueError(f"hidden_states: got {list(shape)} for a layer, wanted [..., d_model] with d_model {d_model}")
    for entry in entries:
        if entry.device not in (head.weight.device, *devices):
            raise ValueError(f"hidden_states: they are on {entry.device}, the lens on {head.weight.device}")
    return entries, shape[:-1]


def check_layers(
    lens: DecodableLens, layers: Iterable[int] | None, entries: list[Tensor]
) -> tuple[list[Tensor], list[int]]:
    """Those of the entries of hidden_states that are read, and the translator number of each: all with ``layers``, else
    those of the layers that the lens has.
    """
    count = len(lens) if isinstance(lens, Sized) else getattr(lens.unembed, "num_hidden_layers", None)
    if layers is None:
        if count is not None and len(entries) != count:
            hint = (
                "; transformers' hidden_states have one entry more, already normed: pass hidden_states[:-1]"
                if len(entries) == count + 1
                else "; name those given with layers="
            )
            raise ValueError(f"hidden_states: got {len(entries)} entries for the lens's {count} layers{hint}")
        numbers = layers_of(lens, len(entries))
        return [entries[number] for number in numbers], numbers
    numbers = check_layer_numbers(lens, layers, count)
    if len(numbers) != len(entries):
        raise ValueError(f"layers: got {len(numbers)} for {len(entries)} entries of hidden_states")
    return entries, numbers


def layers_of(lens: DecodableLens, count: int) -> list[int]:
    """Those of a model's ``count`` layers that the lens has."""
    has = getattr(lens, "translated_layers", None)
    return [*range(count)] if has is None else [*has]


def check_layer_numbers(lens: DecodableLens, layers: Iterable[int], count: int | None) -> list[int]:
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: got {kind(layers)}, wanted a sequence of ints")
    numbers = [_index("layers", number) for number in layers]
    has = getattr(lens, "translated_layers", None)
    for number in numbers:
        if number < 0 or (count is not None and number >= count):
            raise IndexError(f"layers: got {number}, wanted 0 to {'any' if count is None else count - 1}")
        if has is not None and number not in has:
            raise IndexError(f"layers: got {number}, and the lens has only {ranges(has)}")
    return numbers


def check_query(
    head: Head,
    lead: torch.Size,
    targets: Tensor | None,
    reference: Tensor | None,
    top_k: int,
    watch: Tensor | Sequence[int] | None,
    stats: Collection[str] | None,
    devices: Sequence[torch.device] = (),
) -> Query:
    """The question to an engine, positions flattened, on the head's device. A reference may come from ``devices``."""
    vocab, d_model = head.weight.shape
    device = head.weight.device
    if targets is not None:
        check_ids("targets", targets, vocab, NO_TARGET)
        if targets.shape != lead:
            raise ValueError(f"targets: got shape {list(targets.shape)}, wanted {list(lead)}")
        targets = targets.to(device, torch.int64).reshape(-1)
    if reference is not None:
        if not isinstance(reference, Tensor) or not reference.dtype.is_floating_point:
            raise TypeError(f"reference: got {kind(reference)}, wanted a tensor of a floating dtype")
        if reference.shape != (*lead, d_model):
            raise ValueError(f"reference: got shape {list(reference.shape)}, wanted {[*lead, d_model]}")
        if reference.device not in (device, *devices):
            raise ValueError(f"reference: it is on {reference.device}, the lens on {device}")
        reference = reference.to(device)
    if watch is not None:
        if not isinstance(watch, Tensor):
            if not isinstance(watch, Iterable):
                raise TypeError(f"watch: got {kind(watch)}, wanted token ids")
            ids = [_index("watch", token) for token in watch]
            for token in ids:
                if not 0 <= token < vocab:
                    raise IndexError(f"watch: got {token}, wanted ids from 0 to {vocab - 1}")
            watch = torch.tensor(ids, dtype=torch.int64, device=device)
        check_ids("watch", watch, vocab)
        if watch.ndim != 1:
            raise ValueError(f"watch: got shape {list(watch.shape)}, wanted one dimension")
        watch = watch.to(device, torch.int64)
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"top_k: got {top_k!r}, wanted an int")
    if not 0 <= top_k <= vocab:
        raise ValueError(f"top_k: got {top_k}, wanted 0 to the vocabulary's {vocab}")
    wanted = _check_stats(stats, targets is not None, reference is not None)
    if reference is not None:
        reference = reference.reshape(-1, d_model) if wanted.intersection(DIVERGENCES) else None
    return Query(wanted, targets, reference, watch, top_k)


def _check_stats(stats: Collection[str] | None, has_targets: bool, has_reference: bool) -> frozenset[str]:
    """The statistics to compute: those named, or what the inputs allow at the price of one pass."""
    given = {"targets": has_targets, "reference": has_reference}
    if stats is None:
        return frozenset(name for name, s in STATISTICS.items() if s.default and (s.needs is None or given[s.needs]))
    if isinstance(stats, str):
        raise TypeError(f"stats: got the string {stats!r}, wanted a collection of names, such as [{stats!r}]")
    try:
        wanted = frozenset(stats)
    except TypeError:
        raise TypeError(f"stats: got {stats!r}, wanted a collection of names") from None
    unknown = sorted(map(str, wanted - set(STATISTICS)))
    if unknown:
        raise ValueError(f"stats: got {', '.join(map(repr, unknown))}, wanted names out of {', '.join(STATISTICS)}")
    for needed, there in given.items():
        names = sorted(name for name in wanted if STATISTICS[name].needs == needed)
        if names and not there:
            raise ValueError(f"stats: {', '.join(names)} asked for without {needed}=")
    return wanted


def check_ids(name: str, ids: Any, vocab: int, none: int | None = None) -> None:
    """Token ids below ``vocab``, or ``none``."""
    if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS:
        raise TypeError(f"{name}: got {kind(ids)}, wanted a tensor of an integer dtype")
    # Values cannot be looked at while a graph is traced or captured.
    if torch.compiler.is_compiling() or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    outside = (ids < 0) | (ids >= vocab)
    if none is not None:
        outside &= ids != none
    if outside.any():
        also = "" if none is None else f" or {none}"
        raise IndexError(f"{name}: got {ids[outside][0].item()}, wanted ids from 0 to {vocab - 1}{also}")


def check_budget(memory_budget: int | None, device: torch.device | None = None) -> int:
    """Bytes; where None are named the default, for runs of a model on a GPU a sixteenth of the memory of ``device``."""
    if memory_budget is None:
        if device is None or device.type != "cuda":
            return DEFAULT_MEMORY_BUDGET
        return max(DEFAULT_MEMORY_BUDGET, torch.cuda.get_device_properties(device).total_memory // 16)
    if not isinstance(memory_budget, int) or isinstance(memory_budget, bool):
        raise TypeError(f"memory_budget: got {memory_budget!r}, wanted an int, bytes")
    if memory_budget <= 0:
        raise ValueError(f"memory_budget: got {memory_budget}, wanted a positive number of bytes")
    return memory_budget


def check_chunk(chunk: Any) -> int:
    if _index("chunk", chunk) < 1:
        raise ValueError(f"chunk: got {chunk}, wanted a positive number of positions")
    return _index("chunk", chunk)


def check_boundaries(boundaries: Sequence[int], positions: int) -> tuple[int, ...]:
    """Where chunks of a prompt end."""
    ends = tuple(_index("boundaries", end) for end in boundaries)
    if any(start >= end for start, end in itertools.pairwise((0, *ends))) or ends[-1:] != (positions,):
        raise ValueError(f"boundaries: got {list(ends)}, wanted ends of chunks that increase up to {positions}")
    return ends


def check_model(model: Any) -> Any:
    """The causal language model of transformers that ``model`` is, or wraps."""
    model = unwrapped(model)
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"model: got {kind(model)}, wanted a causal language model of transformers")
    return model


def check_input_ids(model: Any, input_ids: Any, attention_mask: Any) -> None:
    check_ids("input_ids", input_ids, model.get_input_embeddings().weight.shape[0])
    if input_ids.ndim not in (1, 2):
        raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, wanted [positions] or [batch, positions]")
    if not input_ids.numel():
        raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, no tokens to run the model on")
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise TypeError(f"attention_mask: got {kind(attention_mask)}, wanted a tensor")
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask: got shape {list(attention_mask.shape)}, wanted {list(input_ids.shape)}")


def _index(name: str, value: Any) -> int:
    """An int, or whatever stands for one: numpy's, a tensor of one element."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, wanted ints") from None


def kind(value: Any) -> str:
    return f"{value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
