"""Asks for statistics: checks what came, hands it to an engine, and shapes the answer into a LensStats.

``decode`` starts from hidden states, ``decode_model`` from token ids. Both are the middle of the way from
hidden state to statistics: ``nn`` says what a lens is, ``engines`` compute.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from tuned_lens_fast.engines import choose
from tuned_lens_fast.engines.interface import DecodableLens
from tuned_lens_fast.inputs import Prompt, Watched, read_prompt, read_watch
from tuned_lens_fast.models.forward_pass import input_device
from tuned_lens_fast.ranks import Split, agree, ranks_of
from tuned_lens_fast.reading import read
from tuned_lens_fast.stats import LensStats
from tuned_lens_fast.streaming import prepare
from tuned_lens_fast.validation import check_budget, check_hidden, check_layers, check_model, check_query

_log = logging.getLogger(__name__)


@torch.no_grad()
def decode(
    lens: DecodableLens,
    hidden_states: Tensor | Sequence[Tensor],
    *,
    layers: Iterable[int] | None = None,
    targets: Tensor | None = None,
    reference: Tensor | None = None,
    top_k: int = 0,
    watch: Watched | None = None,
    stats: Collection[str] | None = None,
    tokenizer: Any = None,
    engine: str = "auto",
    memory_budget: int | None = None,
) -> LensStats:
    """Statistics of what ``lens`` reads in ``hidden_states``, without ever holding the logits. Builds no
    graph.

    Args:
        lens: any :class:`~tuned_lens_fast.nn.Lens`.
        hidden_states: ``[L, ..., d_model]``, or a sequence of L tensors ``[..., d_model]``: entry i is the
            residual stream that enters block ``layers[i]``. Of a model on several devices each may be on its block's.
        layers: the translator each entry is read with. If None 0..L-1, less those that the lens lacks.
        targets: integer ids ``[...]`` to rate at every layer, -100 for none.
        reference: ``[..., d_model]``, what the head's linear layer receives at the model's own output (after
            the norm and any factor); the divergences compare with it.
        top_k: how many of the likeliest tokens to return.
        watch: tokens whose log-probabilities to return: ids, or with a ``tokenizer`` texts, each one token. A mapping
            such as ``{"yes": ["Yes", " yes"]}`` reads each group as one: the log of the sum of its probabilities.
        tokenizer: that of the model, for texts in ``watch``.
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
    devices = getattr(lens.unembed, "devices", ())
    hidden, lead = check_hidden(hidden_states, head, lens.unembed.norm.hidden_width(head), devices)
    hidden, numbers = check_layers(lens, layers, hidden)
    watching = read_watch(watch, tokenizer)
    ids = None if watching is None else watching.ids
    query = check_query(head, lead, targets, reference, top_k, ids, stats, devices)
    chosen = choose(engine, head.weight.device, head.weight.dtype)
    found = read(chosen, lens, numbers, hidden, query, check_budget(memory_budget))
    if watching is not None:
        found = watching.gathered(found)
    return LensStats(
        **_shaped(found, len(hidden), lead),
        layers=torch.tensor(numbers, dtype=torch.int64),
        targets=None if targets is None else targets.to(torch.int64),
        watch=None if watching is None else watching.names,
    )


@overload
def decode_model(
    model: Any, lens: DecodableLens, input_ids: Prompt, *,
    attention_mask: Tensor | None = ..., tokenizer: Any = ..., layers: Iterable[int] | None = ...,
    targets: Tensor | Literal["next"] | None = ..., top_k: int = ..., watch: Watched | None = ...,
    stats: Collection[str] | None = ..., chunk: int | None = ..., engine: str = ..., memory_budget: int | None = ...,
    split: Split | None = ..., out: None = ...,
) -> LensStats: ...  # fmt: skip


@overload
def decode_model(
    model: Any, lens: DecodableLens, input_ids: Prompt, *,
    attention_mask: Tensor | None = ..., tokenizer: Any = ..., layers: Iterable[int] | None = ...,
    targets: Tensor | Literal["next"] | None = ..., top_k: int = ..., watch: Watched | None = ...,
    stats: Collection[str] | None = ..., chunk: int | None = ..., engine: str = ..., memory_budget: int | None = ...,
    split: Split | None = ..., out: str | os.PathLike[str],
) -> Path: ...  # fmt: skip


def decode_model(
    model: Any,
    lens: DecodableLens,
    input_ids: Prompt,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    layers: Iterable[int] | None = None,
    targets: Tensor | Literal["next"] | None = "next",
    top_k: int = 0,
    watch: Watched | None = None,
    stats: Collection[str] | None = None,
    chunk: int | None = None,
    engine: str = "auto",
    memory_budget: int | None = None,
    split: Split | None = None,
    out: str | os.PathLike[str] | None = None,
) -> LensStats | Path:
    """Run ``model`` over a prompt and decode every layer; the last entry is the model's own output. Builds no graph.

    A long prompt runs in chunks that continue from the model's cache; a chunk's hidden states are decoded and
    dropped before the next. The model's logits are not computed but decoded like the lens's, from what its head
    receives.

    Args:
        model: a transformers causal LM; it runs in evaluation mode and is left in the modes it was in.
        lens: any :class:`~tuned_lens_fast.nn.Lens` of that model.
        input_ids: integer ids ``[positions]`` or ``[batch, positions]``, also as lists; a text or a list of texts, with
            ``tokenizer``; or what a tokenizer returns. Prompts of several lengths are padded on the right.
        attention_mask: of the same shape, 0 at padding on either side. Padding is no target and has none.
        tokenizer: that of the model, for texts in ``input_ids`` and ``watch``; special tokens are its own affair.
        layers: the layers of the lens to decode, all that it has if None; the model's own output is added to them.
        targets: "next" for the following token (the last position has none), ids of the shape of
            ``input_ids`` with -100 for none, or None.
        top_k, watch, stats, engine: see :func:`decode`; kl is among the default statistics.
        chunk: positions to run at once; as many as ``memory_budget`` allows if None. Where the whole prompt is one
            chunk, no cache is needed. A model that cannot continue from a cache runs the whole prompt for each
            chunk, and warns.
        memory_budget: bytes of hidden states and scratch beyond inputs and results, the model's own activations and
            cache apart; if None 256 MiB, on a GPU a sixteenth of its memory.
        split: how ranks that read the model together share the work; each has to make the same call, and gets the same
            answer, to the last bit. "rows": each has the whole unembedding and reads its share of the positions.
            "vocabulary": each walks its own part of the unembedding at all positions. None: for a model split by tensor
            parallelism "rows", or "vocabulary" where the unembedding would take over a quarter of a GPU's free memory;
            any other model is read by each process alone.
        out: a folder to write the statistics to, chunk by chunk, as a Parquet data set; see
            :func:`tuned_lens_fast.data.dataset.decode_to`. Nothing is kept in memory.

    Returns:
        A :class:`LensStats` with statistics ``[L + 1, *input_ids.shape]``, or ``[L + 1, positions]`` of one text;
        ``layers[-1]`` is the model's number of blocks, and its divergences are 0. With ``out`` the path of the folder.

    Raises:
        ValueError, IndexError, TypeError: as :func:`decode`; also a lens of a model with other sizes, no tokens,
            more positions than the model has learned, or a model that does not call its blocks and head as
            transformers' decoders do.
        NotImplementedError: a model that no lens can read.
        RuntimeError: another rank failed, with its message, or cannot be reached.
    """
    asked: dict[str, Any] = {
        "layers": layers, "targets": targets, "top_k": top_k, "watch": watch, "stats": stats, "chunk": chunk,
        "engine": engine, "memory_budget": memory_budget,
    }  # fmt: skip
    if out is not None:
        from tuned_lens_fast.data.dataset import decode_to

        return decode_to(
            out, model, lens, input_ids, attention_mask=attention_mask, tokenizer=tokenizer, split=split, **asked
        )
    model = check_model(model)
    together = ranks_of(model, split)
    with nullcontext() if together is None else together[0].together():
        ids, attention_mask = read_prompt(input_ids, attention_mask, tokenizer, input_device(model))
        asked["watch"] = read_watch(watch, tokenizer)
    if together is not None:
        asked["layers"] = [*layers] if isinstance(layers, Iterable) else layers
        agree(together, model, lens, {"input_ids": ids, "attention_mask": attention_mask, **asked})
    prepared = prepare(model, lens, ids, attention_mask, together=together, **asked)
    _log.info("%s", prepared.plan)
    found = prepared.collect()
    return found if ids.ndim == 2 else found[:, 0]


def _shaped(found: dict[str, Tensor], layers: int, lead: Sequence[int]) -> dict[str, Tensor]:
    """An engine's ``[layers, positions, ...]`` as ``[layers, *lead, ...]``."""
    return {name: value.reshape(layers, *lead, *value.shape[2:]) for name, value in found.items()}
