"""Asks for statistics: checks what came, hands it to an engine, and shapes the answer into a LensStats.

``decode`` starts from hidden states, ``decode_model`` from token ids. Both are the middle of the way from
hidden state to statistics: ``nn`` says what a lens is, ``engines`` compute.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import warnings
from collections.abc import Collection, Iterable, Sequence, Sized
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tuned_lens_fast.engines import choose
from tuned_lens_fast.engines.seam import DIVERGENCES, NO_TARGET, STATISTICS, Engine, Head, Norm, Query, Translator
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.stats import LensStats

if TYPE_CHECKING:
    from tuned_lens_fast.nn import Lens

#: Bytes of scratch beyond inputs and results where the caller names none: 256 MiB.
DEFAULT_MEMORY_BUDGET = 256 * 2**20
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@torch.no_grad()
def decode(
    lens: Lens,
    hidden_states: Tensor | Sequence[Tensor],
    *,
    layers: Iterable[int] | None = None,
    targets: Tensor | None = None,
    reference: Tensor | None = None,
    top_k: int = 0,
    watch: Tensor | Sequence[int] | None = None,
    stats: Collection[str] | None = None,
    engine: str = "auto",
    memory_budget: int | None = None,
) -> LensStats:
    """Statistics of what ``lens`` reads in ``hidden_states``, without ever holding the logits. Builds no
    graph.

    Args:
        lens: a LogitLens or TunedLens.
        hidden_states: ``[L, ..., d_model]``, or a sequence of L tensors ``[..., d_model]``: entry i is the
            residual stream that enters block ``layers[i]``.
        layers: the translator each entry is read with; 0..L-1 if None.
        targets: integer ids ``[...]`` to rate at every layer, -100 for none.
        reference: ``[..., d_model]``, what the head's linear layer receives at the model's own output (after
            the norm and any factor); the divergences compare with it.
        top_k: how many of the likeliest tokens to return.
        watch: token ids whose log-probabilities to return.
        stats: names out of log_prob, rank, entropy, max_prob, kl, reverse_kl, js, tv. None: entropy and
            max_prob; with targets log_prob and rank; with a reference kl. lse is always there.
        engine: "auto", or one of :func:`tuned_lens_fast.engines`.
        memory_budget: bytes of scratch beyond inputs and results; 256 MiB if None.

    Returns:
        A :class:`LensStats` with statistics ``[L, ...]`` in nats.

    Raises:
        ValueError: shapes that do not fit, a statistic that does not exist or lacks its input, top_k beyond
            the vocabulary, an engine that does not work here, a budget too small.
        IndexError: a layer or token id out of range.
        TypeError: something of another type or dtype.
    """
    head = lens.unembed.head
    hidden, lead = _check_hidden(hidden_states, head)
    numbers = _check_layers(lens, layers, len(hidden))
    query = _check_query(head, lead, targets, reference, top_k, watch, stats)
    chosen = choose(engine, head.weight.device, head.weight.dtype)
    translators = [lens.translator(number) for number in numbers]
    budget = _check_budget(memory_budget)
    found = _decode_views(chosen, hidden, translators, lens.unembed.norm, head, query, budget)
    return LensStats(
        **_shaped(found, len(hidden), lead),
        layers=torch.tensor(numbers, dtype=torch.int64),
        targets=None if targets is None else targets.to(torch.int64),
    )


@torch.no_grad()
def decode_model(
    model: Any,
    lens: Lens,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    layers: Iterable[int] | None = None,
    targets: Tensor | Literal["next"] | None = "next",
    top_k: int = 0,
    watch: Tensor | Sequence[int] | None = None,
    stats: Collection[str] | None = None,
    engine: str = "auto",
    memory_budget: int | None = None,
) -> LensStats:
    """Run ``model`` once and decode every layer; the last entry is the model's own output. Builds no graph.

    The model's logits are not computed but decoded like the lens's, from what its head receives.

    Args:
        model: a transformers causal LM; it runs in evaluation mode and is left in the modes it was in.
        lens: a LogitLens or TunedLens of that model.
        input_ids: integer ids ``[positions]`` or ``[batch, positions]``.
        attention_mask: of the same shape, 0 at padding on either side. Padding is no target and has none.
        layers: the layers of the lens to decode, all if None; the model's own output is added to them.
        targets: "next" for the following token (the last position has none), ids of the shape of
            ``input_ids`` with -100 for none, or None.
        top_k, watch, stats, engine, memory_budget: see :func:`decode`; kl is among the default statistics.

    Returns:
        A :class:`LensStats` with statistics ``[L + 1, *input_ids.shape]``; ``layers[-1]`` is the model's
        number of blocks, and its divergences are 0.

    Raises:
        ValueError, IndexError, TypeError: as :func:`decode`; also a lens of a model with other sizes, no
            tokens, or a model that does not call its blocks and head as transformers' decoders do.
    """
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"model: got {_kind(model)}, wanted a causal language model of transformers")
    if not hasattr(lens, "translator"):
        raise TypeError(f"lens: got {_kind(lens)}, wanted a LogitLens or TunedLens")
    _check_input_ids(model, input_ids, attention_mask)
    lead, head = input_ids.shape, lens.unembed.head
    blocks = get_transformer_layers(model)[1]
    own_head = model.get_output_embeddings().weight
    for name, ours, its in zip(("vocabulary", "d_model"), head.weight.shape, own_head.shape, strict=True):
        if ours != its:
            raise ValueError(f"lens: its {name} is {ours}, the model's {its}; it belongs to another model")
    if own_head.data_ptr() != head.weight.data_ptr() and not torch.equal(own_head.to(head.weight), head.weight):
        warnings.warn(
            "lens: its unembedding is not the model's; the last layer, and what is compared with it, are read with "
            "the lens's",
            stacklevel=2,
        )
    if isinstance(lens, Sized) and len(lens) != len(blocks):
        raise ValueError(f"lens: it has {len(lens)} layers, the model {len(blocks)}; it belongs to another model")
    numbers = [*range(len(blocks))] if layers is None else _check_layer_numbers(layers, len(blocks))
    if isinstance(targets, str):
        if targets != "next":
            raise ValueError(f"targets: got {targets!r}, wanted 'next', ids or None")
        targets = _next_tokens(input_ids, attention_mask)
    budget = _check_budget(memory_budget)
    chosen = choose(engine, head.weight.device, head.weight.dtype)

    # All of the question is checked before the model runs; what it will be compared with is not known yet.
    unknown = head.weight.new_empty(()).expand(*lead, head.weight.shape[1])
    query = _check_query(head, lead, targets, unknown, top_k, watch, stats)
    entering, reference = _run(model, [blocks[number] for number in numbers], input_ids, attention_mask)
    reference = reference.reshape(*lead, -1)
    if query.reference is not None:
        query = replace(query, reference=reference.reshape(-1, reference.shape[-1]))
    hidden, _ = _check_hidden([h.reshape(*lead, -1) for h in (*entering, reference)], head)
    *hidden, last = hidden
    del entering

    translators = [lens.translator(number) for number in numbers]
    found = _decode_views(chosen, hidden, translators, lens.unembed.norm, head, query, budget)
    read = _shaped(found, len(numbers), lead)
    itself = replace(query, stats=query.stats - DIVERGENCES, reference=None)
    own = _shaped(_decode_views(chosen, [last], [None], Norm("identity"), head, itself, budget), 1, lead)
    for name in query.divergences:
        own[name] = own["lse"] - own["lse"]  # 0, or NaN where the model's own output is
    return LensStats(
        **{name: torch.cat([read.pop(name), own[name]]) for name in list(read)},
        layers=torch.tensor([*numbers, len(blocks)], dtype=torch.int64),
        targets=None if query.targets is None else query.targets.reshape(lead),
    )


def _run(
    model: Any, blocks: Sequence[nn.Module], input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """The residual stream that enters each of ``blocks`` and what the head receives, ``[batch, positions,
    d_model]``.

    Both are taken where they pass. The last of transformers' ``hidden_states`` is normed in most models, and
    some have no entry for the embedding. The head is handed the last position only, so that no logits of a
    whole prompt are made.
    """
    seen: dict[nn.Module, Tensor] = {}
    at_head: list[Tensor] = []

    def keep_stream(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen[block] = args[0] if args else kwargs["hidden_states"]

    def keep_head_input(_: nn.Module, args: tuple) -> tuple:
        at_head.append(args[0])
        return (args[0][..., -1:, :],)

    head = model.get_output_embeddings()
    hooks = [block.register_forward_pre_hook(keep_stream, with_kwargs=True) for block in blocks]
    hooks.append(head.register_forward_pre_hook(keep_head_input))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model(**_model_inputs(model, input_ids, attention_mask))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if len(at_head) != 1 or len(seen) != len(set(blocks)):
        raise ValueError(
            f"model: {type(model).__name__} called its head {len(at_head)} times and {len(seen)} of "
            f"{len(blocks)} blocks, wanted the head once and every block, as transformers' decoders do"
        )
    return [seen[block] for block in blocks], at_head[0]


def _model_inputs(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
    """Keyword arguments of a plain forward pass on a batch."""
    inputs: dict[str, Any] = {"input_ids": input_ids.reshape(-1, input_ids.shape[-1])}
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known:
        inputs["use_cache"] = False
    if attention_mask is not None:
        mask = attention_mask.reshape(inputs["input_ids"].shape)
        inputs["attention_mask"] = mask
        if "position_ids" in known:
            # Without them, padding on the left would shift every position of models with absolute ones.
            inputs["position_ids"] = (mask.to(torch.int64).cumsum(-1) - 1).clamp(min=0)
    return inputs


def _next_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Each position's following token; NO_TARGET at the last, at padding and before it."""
    following = input_ids[..., 1:].to(torch.int64)
    if attention_mask is not None:
        real = attention_mask.bool()
        following = following.masked_fill(~(real[..., 1:] & real[..., :-1]), NO_TARGET)
    return torch.nn.functional.pad(following, (0, 1), value=NO_TARGET)


def _decode_views(
    engine: Engine,
    entries: Sequence[Tensor],
    translators: Sequence[Translator | None],
    norm: Norm,
    head: Head,
    query: Query,
    budget: int,
) -> dict[str, Tensor]:
    """``engine.decode`` of entries ``[..., d_model]`` that are never copied as a whole.

    Where positions do not lie evenly, as in a batch without its last position, the leading index goes one by one.
    """
    if all(_flattens(entry) for entry in entries):
        flat = [entry.reshape(-1, entry.shape[-1]) for entry in entries]
        return engine.decode(flat, translators, norm, head, query, budget)
    parts = []
    at_once = entries[0][0].numel() // entries[0].shape[-1]
    for i in range(entries[0].shape[0]):
        at = slice(i * at_once, (i + 1) * at_once)
        part = replace(
            query,
            targets=None if query.targets is None else query.targets[at],
            reference=None if query.reference is None else query.reference[at],
        )
        parts.append(_decode_views(engine, [entry[i] for entry in entries], translators, norm, head, part, budget))
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def _flattens(entry: Tensor) -> bool:
    """Whether ``[..., d_model]`` is a view ``[positions, d_model]``."""
    lead = [(size, stride) for size, stride in zip(entry.shape[:-1], entry.stride()[:-1], strict=True) if size != 1]
    return not entry.numel() or all(
        stride == inner_size * inner for (_, stride), (inner_size, inner) in itertools.pairwise(lead)
    )


def _shaped(found: dict[str, Tensor], layers: int, lead: Sequence[int]) -> dict[str, Tensor]:
    """An engine's ``[layers, positions, ...]`` as ``[layers, *lead, ...]``."""
    return {name: value.reshape(layers, *lead, *value.shape[2:]) for name, value in found.items()}


def _check_hidden(hidden_states: Tensor | Sequence[Tensor], head: Head) -> tuple[list[Tensor], torch.Size]:
    """The entries ``[..., d_model]``, and the shape between layers and d_model."""
    if not isinstance(hidden_states, (Tensor, Sequence)):
        raise TypeError(f"hidden_states: got {_kind(hidden_states)}, wanted a tensor or a sequence of tensors")
    entries = list(hidden_states.unbind(0)) if isinstance(hidden_states, Tensor) else list(hidden_states)
    if isinstance(hidden_states, Tensor):
        if hidden_states.ndim < 2:
            raise ValueError(f"hidden_states: got shape {list(hidden_states.shape)}, wanted [L, ..., d_model]")
        shape, dtype, device = hidden_states.shape[1:], hidden_states.dtype, hidden_states.device
    elif not entries:
        raise ValueError("hidden_states: got an empty sequence, which has no shape; pass a tensor [0, ..., d_model]")
    else:
        for entry in entries:
            if not isinstance(entry, Tensor):
                raise TypeError(f"hidden_states: got a sequence with a {type(entry).__name__}, wanted tensors")
        shape, dtype, device = entries[0].shape, entries[0].dtype, entries[0].device
    for i, entry in enumerate(entries):
        if entry.shape != shape:
            raise ValueError(f"hidden_states: entry {i} has shape {list(entry.shape)}, entry 0 {list(shape)}")
        if entry.dtype != dtype:
            raise TypeError(f"hidden_states: entry {i} is {entry.dtype}, entry 0 {dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"hidden_states: got {dtype}, wanted a floating dtype")
    d_model = head.weight.shape[1]
    if not shape or shape[-1] != d_model:
        raise ValueError(f"hidden_states: got {list(shape)} for a layer, wanted [..., d_model] with d_model {d_model}")
    if any(entry.device != head.weight.device for entry in entries):
        raise ValueError(f"hidden_states: they are on {device}, the lens on {head.weight.device}")
    return entries, shape[:-1]


def _check_layers(lens: Lens, layers: Iterable[int] | None, entries: int) -> list[int]:
    """The translator number of every entry of hidden_states."""
    count = len(lens) if isinstance(lens, Sized) else getattr(lens.unembed, "num_hidden_layers", None)
    if layers is None:
        if count is not None and entries != count:
            hint = (
                "; transformers' hidden_states have one entry more, already normed: pass hidden_states[:-1]"
                if entries == count + 1
                else "; name those given with layers="
            )
            raise ValueError(f"hidden_states: got {entries} entries for the lens's {count} layers{hint}")
        return list(range(entries))
    numbers = _check_layer_numbers(layers, count)
    if len(numbers) != entries:
        raise ValueError(f"layers: got {len(numbers)} for {entries} entries of hidden_states")
    return numbers


def _check_layer_numbers(layers: Iterable[int], count: int | None) -> list[int]:
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: got {_kind(layers)}, wanted a sequence of ints")
    numbers = [_index("layers", number) for number in layers]
    for number in numbers:
        if number < 0 or (count is not None and number >= count):
            raise IndexError(f"layers: got {number}, wanted 0 to {'any' if count is None else count - 1}")
    return numbers


def _check_query(
    head: Head,
    lead: torch.Size,
    targets: Tensor | None,
    reference: Tensor | None,
    top_k: int,
    watch: Tensor | Sequence[int] | None,
    stats: Collection[str] | None,
) -> Query:
    """The question to an engine, positions flattened."""
    vocab, d_model = head.weight.shape
    device = head.weight.device
    if targets is not None:
        _check_ids("targets", targets, vocab, NO_TARGET)
        if targets.shape != lead:
            raise ValueError(f"targets: got shape {list(targets.shape)}, wanted {list(lead)}")
        targets = targets.to(device, torch.int64).reshape(-1)
    if reference is not None:
        if not isinstance(reference, Tensor) or not reference.dtype.is_floating_point:
            raise TypeError(f"reference: got {_kind(reference)}, wanted a tensor of a floating dtype")
        if reference.shape != (*lead, d_model):
            raise ValueError(f"reference: got shape {list(reference.shape)}, wanted {[*lead, d_model]}")
        if reference.device != device:
            raise ValueError(f"reference: it is on {reference.device}, the lens on {device}")
    if watch is not None:
        if not isinstance(watch, Tensor):
            if not isinstance(watch, Iterable):
                raise TypeError(f"watch: got {_kind(watch)}, wanted token ids")
            ids = [_index("watch", token) for token in watch]
            for token in ids:
                if not 0 <= token < vocab:
                    raise IndexError(f"watch: got {token}, wanted ids from 0 to {vocab - 1}")
            watch = torch.tensor(ids, dtype=torch.int64, device=device)
        _check_ids("watch", watch, vocab)
        if watch.ndim != 1:
            raise ValueError(f"watch: got shape {list(watch.shape)}, wanted one dimension")
        watch = watch.to(device, torch.int64)
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"top_k: got {top_k!r}, wanted an int")
    if not 0 <= top_k <= vocab:
        raise ValueError(f"top_k: got {top_k}, wanted 0 to the vocabulary's {vocab}")
    wanted = _check_stats(stats, targets is not None, reference is not None)
    if reference is not None:
        reference = reference.reshape(-1, d_model) if wanted & DIVERGENCES else None
    return Query(wanted, targets, reference, watch, top_k)


def _check_stats(stats: Collection[str] | None, has_targets: bool, has_reference: bool) -> frozenset[str]:
    """The statistics to compute: those named, or what the inputs allow at the price of one pass."""
    if stats is None:
        return frozenset(["entropy", "max_prob"] + ["log_prob", "rank"] * has_targets + ["kl"] * has_reference)
    if isinstance(stats, str):
        raise TypeError(f"stats: got the string {stats!r}, wanted a collection of names, such as [{stats!r}]")
    try:
        wanted = frozenset(stats)
    except TypeError:
        raise TypeError(f"stats: got {stats!r}, wanted a collection of names") from None
    unknown = sorted(map(str, wanted - set(STATISTICS)))
    if unknown:
        raise ValueError(f"stats: got {', '.join(map(repr, unknown))}, wanted names out of {', '.join(STATISTICS)}")
    for names, there, missing in (
        ({"log_prob", "rank"}, has_targets, "targets"),
        (DIVERGENCES, has_reference, "reference"),
    ):
        if wanted & names and not there:
            raise ValueError(f"stats: {', '.join(sorted(wanted & names))} asked for without {missing}=")
    return wanted


def _check_ids(name: str, ids: Any, vocab: int, none: int | None = None) -> None:
    """Token ids below ``vocab``, or ``none``."""
    if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS:
        raise TypeError(f"{name}: got {_kind(ids)}, wanted a tensor of an integer dtype")
    # Values cannot be looked at while a graph is traced or captured.
    if torch.compiler.is_compiling() or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    outside = (ids < 0) | (ids >= vocab)
    if none is not None:
        outside &= ids != none
    if outside.any():
        also = "" if none is None else f" or {none}"
        raise IndexError(f"{name}: got {ids[outside][0].item()}, wanted ids from 0 to {vocab - 1}{also}")


def _check_budget(memory_budget: int | None) -> int:
    if memory_budget is None:
        return DEFAULT_MEMORY_BUDGET
    if not isinstance(memory_budget, int) or isinstance(memory_budget, bool):
        raise TypeError(f"memory_budget: got {memory_budget!r}, wanted an int, bytes")
    if memory_budget <= 0:
        raise ValueError(f"memory_budget: got {memory_budget}, wanted a positive number of bytes")
    return memory_budget


def _check_input_ids(model: Any, input_ids: Any, attention_mask: Any) -> None:
    _check_ids("input_ids", input_ids, model.get_input_embeddings().weight.shape[0])
    if input_ids.ndim not in (1, 2):
        raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, wanted [positions] or [batch, positions]")
    if not input_ids.numel():
        raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, no tokens to run the model on")
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise TypeError(f"attention_mask: got {_kind(attention_mask)}, wanted a tensor")
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


def _kind(value: Any) -> str:
    return f"{value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
