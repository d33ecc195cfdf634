"""Runs a model without what one of its blocks adds to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from torch import nn

from tuned_lens_fast.causal.utils import derange
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.models.block_output import first_tensor, stream_of, with_stream

T = TypeVar("T")


@contextmanager
def ablate_layer(
    model: T,
    layer_index: int,
    method: Literal["resample", "mean", "zero"],
    *,
    mode: Literal["batch", "token"] = "batch",
) -> Iterator[T]:
    """The model with something else in the place of what a block adds to the residual stream, until the block is left.

    Args:
        model: a causal LM.
        layer_index: from 0.
        method: "zero" adds nothing, "mean" the mean of what it adds, "resample" what it adds to another.
        mode: the mean or the others are those of the batch, "batch", or of all of its positions, "token".

    Raises:
        IndexError: no such block.
        ValueError: another method or mode; or, when the model runs, a batch (of positions) of one with "mean" or
            "resample".
    """
    if method not in ("resample", "mean", "zero"):
        raise ValueError(f"method: got {method!r}, wanted 'resample', 'mean' or 'zero'")
    if mode not in ("batch", "token"):
        raise ValueError(f"mode: got {mode!r}, wanted 'batch' or 'token'")
    blocks = get_transformer_layers(model)[1]
    if not 0 <= layer_index < len(blocks):
        raise IndexError(f"layer_index: got {layer_index}, wanted 0 to {len(blocks) - 1}")

    def ablated(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        entering = first_tensor(args, kwargs)
        if method == "zero":
            return with_stream(output, entering)
        added = stream_of(output) - entering
        shape = added.shape
        rows = added.flatten(0, 1) if mode == "token" else added
        if len(rows) < 2:
            raise ValueError(f"method: {method!r} needs two or more to take from, and the {mode} has {len(rows)}")
        rows = derange(rows) if method == "resample" else rows.mean(0, keepdim=True).expand_as(rows)
        return with_stream(output, entering + rows.reshape(shape))

    hook = blocks[layer_index].register_forward_hook(ablated, with_kwargs=True)
    try:
        yield model
    finally:
        hook.remove()
