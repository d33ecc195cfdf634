"""The statistics of a chunk or a prompt as a table: the columns that every reader of results sees, whatever holds them.

It stands near the end of the way from hidden state to statistics, between ``LensStats`` and files.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import NO_TARGET
from tuned_lens_fast.stats import LensStats

if TYPE_CHECKING:
    import pyarrow as pa


def table_of(
    stats: LensStats,
    documents: pa.Array,
    positions: Tensor,
    token_ids: Tensor,
    real: Tensor,
    tokenizer: Any,
) -> pa.Table:
    """A row for every layer and real position of a chunk, sorted by layer, document, position.

    Args:
        stats: on the CPU, ``[layers, batch, positions]``.
        documents: ``[batch]``, int64 or string.
        positions: integer ``[batch, positions]``, of each token in its document.
        token_ids: integer ``[batch, positions]``.
        real: bool ``[batch, positions]``, False for padding, which gets no rows.
        tokenizer: has the text of tokens; None for no such column.
    """
    import pyarrow as pa

    layers = len(stats.layers)
    kept = real.flatten().nonzero()[:, 0]
    everything = len(kept) == real.numel()

    def of_position(values: Tensor) -> np.ndarray:
        return np.tile(values.flatten()[kept].to(torch.int32).numpy(), layers)

    def of_row(values: Tensor) -> np.ndarray:
        values = values.reshape(layers, real.numel(), *values.shape[3:])
        values = values if everything else values[:, kept]
        return values.to(torch.float32 if values.is_floating_point() else torch.int32).contiguous().numpy()

    ids = of_position(token_ids)
    in_batch = of_position(torch.arange(len(real))[:, None].expand(real.shape))
    columns: dict[str, Any] = {
        "document": documents.take(pa.array(in_batch))
        if pa.types.is_integer(documents.type)
        else pa.DictionaryArray.from_arrays(pa.array(in_batch), documents),
        "layer": np.repeat(stats.layers.to(torch.int32).numpy(), len(kept)),
        "position": of_position(positions),
        "token_id": ids,
    }
    if tokenizer is not None:
        unique, index = np.unique(ids, return_inverse=True)
        # An id that the tokenizer does not know has no text.
        text = ["" if token is None else token for token in tokenizer.convert_ids_to_tokens(unique.tolist())]
        columns["token"] = pa.DictionaryArray.from_arrays(pa.array(index, pa.int32()), pa.array(text, pa.string()))
    no_target = None
    if stats.targets is not None:
        targets = of_position(stats.targets)
        no_target = targets == NO_TARGET
        columns["target"] = pa.array(targets, mask=no_target)
    for name, values in stats.items():
        if name in ("layers", "targets"):
            continue
        rows = of_row(values)
        flat = pa.array(rows.reshape(-1), mask=no_target if name in ("log_prob", "rank") else None)
        if rows.ndim == 3:
            offsets = np.arange(layers * len(kept) + 1, dtype=np.int32) * rows.shape[-1]
            flat = pa.ListArray.from_arrays(pa.array(offsets), flat)
        columns[name] = flat
    return pa.table(columns)


def stats_of(table: pa.Table, layers: Tensor, start: int, stop: int) -> LensStats:
    """The statistics of the rows of one document that :func:`table_of` made, ``[layers, positions]``.

    Columns that are not there are left out; ``lse`` is then NaN.

    Args:
        table: rows of ``layers`` and of the positions from ``start`` to before ``stop``, in any order.
        layers: int64, as in the column ``layer``, sorted.
    """
    import pyarrow as pa

    shape = len(layers), stop - start
    rows = np.searchsorted(layers.numpy(), table["layer"].to_numpy())
    at = torch.from_numpy(rows * shape[1] + table["position"].to_numpy() - start)
    found: dict[str, Any] = {"lse": torch.full(shape, torch.nan), "layers": layers}
    for name in {field.name for field in fields(LensStats)} & {*table.column_names}:
        column = table[name].combine_chunks()
        if pa.types.is_integer(column.type):
            column = column.fill_null(0)
        width: tuple[int, ...] = ()
        if pa.types.is_list(column.type):
            column = column.flatten()
            width = (len(column) // max(1, len(at)),)
        values = torch.from_numpy(column.to_numpy(zero_copy_only=False).copy()).reshape(len(at), *width)
        whole = values.new_full((shape[0] * shape[1], *width), 0 if values.dtype == torch.int32 else torch.nan)
        whole[at] = values
        whole = whole.reshape(*shape, *width)
        found[name] = whole.long() if values.dtype == torch.int32 else whole
    return LensStats(**found)


def float_encodings(schema: pa.Schema) -> dict[str, str]:
    """Bytes of floats by significance: two thirds of the size, and of the time to write."""
    import pyarrow as pa

    encodings = {}
    for field in schema:
        of_list = pa.types.is_list(field.type)
        if pa.types.is_floating(field.type.value_type if of_list else field.type):
            encodings[f"{field.name}.list.element" if of_list else field.name] = "BYTE_STREAM_SPLIT"
    return encodings
