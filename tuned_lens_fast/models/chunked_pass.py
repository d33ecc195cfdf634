"""Runs a model over a prompt in chunks of positions, and finds out beforehand whether it can.

On the way from token ids to statistics this stands between the model and :mod:`~tuned_lens_fast.streaming`: it knows
how transformers' models take and return their caches, and trusts none of them untried.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.models.forward_pass import model_inputs
from tuned_lens_fast.models.residual_stream import recorded

#: What models call the cache they return, and take again; most renamed ``past_key_values`` in transformers 5.24.
_CACHES = ("cache", "past_key_values", "cache_params", "state")
#: Positions of a chunk on which it is tried whether a model continues from its cache.
_TRIAL = 5


class ChunkedPass:
    """One forward pass of a model over a prompt, made chunk by chunk, in order.

    With ``cached`` each chunk continues from the model's cache of those before. Without, the whole prompt runs for
    each chunk, and only the chunk's states are kept.
    """

    def __init__(
        self, model: Any, layers: Sequence[int], input_ids: Tensor, attention_mask: Tensor | None, cached: bool
    ) -> None:
        self._model = model
        self._layers = layers
        self._inputs = model_inputs(model, input_ids, attention_mask)
        self._cached = cached
        self._cache: dict[str, Any] = {}
        if cached:
            self._inputs["use_cache"] = True
            if "position_ids" in inspect.signature(model.forward).parameters:
                # Some models number the positions of a chunk from 0, unless they are told.
                counted = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
                self._inputs.setdefault("position_ids", counted)

    @torch.no_grad()
    def __call__(self, positions: slice, kept: slice | None = None) -> tuple[list[Tensor], Tensor]:
        """What enters each of the layers at ``positions`` and what the head receives, ``[batch, positions, width]``.

        Of these, only ``kept`` are recorded if they are given; both count from the prompt's start.
        """
        recording = None if self._cached and kept is None else kept or positions
        if self._cached and recording is not None:
            recording = slice(recording.start - positions.start, recording.stop - positions.start)
        with recorded(self._model, self._layers, recording) as recorder:
            self._run(positions)
            return recorder.take()

    @torch.no_grad()
    def skip(self, positions: slice) -> None:
        """Run the model for its cache only."""
        with recorded(self._model, ()):
            self._run(positions)

    def _run(self, positions: slice) -> None:
        if not self._cached:
            self._model(**self._inputs)
            return
        inputs = dict(self._inputs)
        for name in ("input_ids", "position_ids"):
            if name in inputs:
                inputs[name] = inputs[name][:, positions]
        if "attention_mask" in inputs:
            inputs["attention_mask"] = inputs["attention_mask"][:, : positions.stop]
        self._cache = cache_of(self._model, self._model(**inputs, **self._cache))


def cache_of(model: Any, output: Any) -> dict[str, Any]:
    """The cache that a forward pass returned, by the name under which the model takes it; empty if none."""
    taken = inspect.signature(model.forward).parameters
    for name in _CACHES:
        cache = getattr(output, name, None) if name in taken else None
        if cache is not None:
            return {name: cache}
    return {}


@torch.no_grad()
def cannot_continue(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, boundaries: Sequence[int]
) -> str | None:
    """Why ``model`` cannot run this prompt ``[batch, positions]`` in chunks that end at ``boundaries``; None if it can.

    A few of the prompt's tokens are run, whole and in chunks. They must reach the head alike, up to half the digits of
    its dtype: a cache that is not continued, or a mask that is misread, moves them far more than rounding does. What
    only shows further on is known from the model: rotary frequencies that depend on the length of the whole prompt.

    Raises:
        NotImplementedError: the head does not receive one state for each token.
    """
    name = type(model).__name__
    sizes = [end - start for start, end in zip((0, *boundaries), boundaries, strict=False)]
    # A chunk that follows a continued one, and every other size: single tokens take a way of their own in many models.
    trial = [min(_TRIAL, size) for size in sizes]
    trial = trial[:3] + sorted(set(trial[3:]) - set(trial[1:3]))
    ids, mask = _trial_prompt(input_ids, attention_mask, sum(trial))
    whole = ChunkedPass(model, (), ids, mask, cached=False)(slice(None))[1]
    if whole.shape[:-1] != ids.shape:
        raise NotImplementedError(
            f"model: no lens can read it, since the head of {name} receives states {list(whole.shape)} for tokens "
            f"{list(ids.shape)}"
        )
    if not any(taken in inspect.signature(model.forward).parameters for taken in _CACHES):
        return f"{name} has no cache"
    longest = int(input_ids.shape[1] if attention_mask is None else attention_mask.sum(1).max())
    if (limit := frequencies_change_at(model)) is not None and longest > limit:
        return f"the rotary frequencies of {name} depend on the length of a prompt of more than {limit} tokens"
    try:
        part = ChunkedPass(model, (), ids, mask, cached=True)
        chunks, start = [], 0
        for size in trial:
            chunks.append(part(slice(start, start + size))[1])
            start += size
            if not part._cache:
                return f"{name} returns no cache"
        off = torch.cat(chunks, 1) - whole
    except Exception as error:  # whatever a model raises when it is asked for what it was not made for
        return f"{name} cannot continue from its cache ({type(error).__name__}: {error})"
    real = slice(None) if mask is None else mask.to(off.device).bool()
    far = torch.linalg.vector_norm(off.float(), dim=-1) / torch.linalg.vector_norm(whole.float(), dim=-1)
    worst = far[real].max().item()
    if not worst <= torch.finfo(whole.dtype).eps ** 0.5:
        return f"{name} does not continue from its cache: a trial of {len(far[0])} tokens came out {worst:.1%} off"
    return None


@torch.no_grad()
def reads_padding(model: Any, input_ids: Tensor, attention_mask: Tensor) -> str | None:
    """Why padding on the left of this prompt ``[batch, positions]`` changes what ``model`` reads; None if it does not.

    A few of the prompt's tokens are run with padding before them and without. They must reach the head alike, as in
    :func:`cannot_continue`: some models with a recurrence ignore their mask, or only part of the model heeds it.
    """
    before = attention_mask.cumsum(1) == 0
    row = int((before.sum(1) * attention_mask.any(1)).argmax())
    padding = input_ids[row][before[row]][: _TRIAL + 1]
    if not len(padding) or not attention_mask[row].any():
        return None
    tokens = input_ids[row][attention_mask[row].bool()][: 2 * _TRIAL]
    mask = attention_mask.new_ones(1, len(padding) + len(tokens))
    mask[:, : len(padding)] = 0
    alone = ChunkedPass(model, (), tokens[None], None, cached=False)(slice(None))[1]
    try:
        padded = ChunkedPass(model, (), torch.cat([padding, tokens])[None], mask, cached=False)(slice(None))[1]
    except Exception as error:  # whatever a model raises when it is asked for what it was not made for
        return f"{type(model).__name__} cannot read padding on the left ({type(error).__name__}: {error})"
    off = (padded[:, -len(tokens) :] - alone[:, -len(tokens) :]).float()
    worst = (off.norm(dim=-1) / alone[:, -len(tokens) :].float().norm(dim=-1)).max().item()
    if worst <= torch.finfo(alone.dtype).eps ** 0.5:
        return None
    return f"{type(model).__name__} reads padding on the left: a trial of {len(tokens)} tokens came out {worst:.1%} off"


def _trial_prompt(input_ids: Tensor, attention_mask: Tensor | None, positions: int) -> tuple[Tensor, Tensor | None]:
    """Up to two rows of the prompt's tokens, padded where the prompt is: on the left by more than a chunk."""
    real = input_ids.flatten() if attention_mask is None else input_ids[attention_mask.bool()]
    rows = min(2, input_ids.shape[0])
    ids = real[: rows * positions]
    ids = ids.repeat(-(-rows * positions // len(ids)))[: rows * positions].view(rows, positions)
    if attention_mask is None:
        return ids, None
    mask = attention_mask.new_ones(ids.shape)
    if not attention_mask[:, 0].all():
        mask[0, : min(_TRIAL + 1, positions - 1)] = 0
    if not attention_mask[:, -1].all():
        mask[-1, -1] = 0
    return ids, mask


def frequencies_change_at(model: Any) -> int | None:
    """The length of a prompt beyond which rotary frequencies depend on that length; None if they never do."""
    limits = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", "")
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if "dynamic" in kind or kind == "longrope":
                limits.append(module.original_max_seq_len)
                limits += _original_lengths(module.config.rope_parameters)
    return min(limits, default=None)


def _original_lengths(parameters: dict[str, Any]) -> list[int]:
    """Every ``original_max_position_embeddings`` in a config's entries, which some models keep for each layer type."""
    nested = [length for entry in parameters.values() if isinstance(entry, dict) for length in _original_lengths(entry)]
    own = parameters.get("original_max_position_embeddings")
    return nested if own is None else [own, *nested]
