"""LensStats: what a decode returns, a few numbers for every layer and position; saved, sliced, tabulated.

This is the end of the way from hidden state to statistics; nothing here computes one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tuned_lens_fast.atomic_write import atomic_write
from tuned_lens_fast.checkpoint import open_safetensors
from tuned_lens_fast.messages import listed, quoted, shortened

if TYPE_CHECKING:
    import pandas

#: Written into every file, so that a later layout can be told from this one.
_FORMAT = "tuned_lens_fast.LensStats 1"
#: Fields with one number more dimension than layers x positions: k top tokens, or the watched ones.
_LISTS = ("top_ids", "top_log_probs", "watch_log_probs")
_INTEGERS = ("layers", "targets", "rank", "top_ids")
#: Layers shown at each end by ``repr``.
_SHOWN = 6


@dataclass(eq=False, repr=False)
class LensStats:
    """Statistics of what a lens reads at every layer and position, in nats; None where not asked for.

    With hidden states ``[L, ..., d_model]`` every statistic is ``[L, ...]``; fp32, ranks and ids int64. A row
    whose logits hold a NaN or +inf is NaN, its rank 0, its top ids -1.

    ``stats[layer, position]`` slices every field as it would a tensor, layers first.
    """

    lse: Tensor  #: log of the sum of exp(logits)
    layers: Tensor  #: int64 [L], the translator each entry was read with; L of the model is its own output
    targets: Tensor | None = None  #: int64 [...], -100 for none
    log_prob: Tensor | None = None  #: of the target; NaN where there is none
    rank: Tensor | None = None  #: 1 + number of tokens with a larger logit than the target; 0 where there is none
    entropy: Tensor | None = None
    max_prob: Tensor | None = None  #: probability of the likeliest token
    kl: Tensor | None = None  #: KL(reference || lens)
    reverse_kl: Tensor | None = None  #: KL(lens || reference)
    js: Tensor | None = None  #: Jensen-Shannon divergence, at most ln 2
    tv: Tensor | None = None  #: total variation, half the sum of |p - q|
    top_ids: Tensor | None = None  #: int64 [L, ..., k], likeliest first, ties to the lower id
    top_log_probs: Tensor | None = None  #: [L, ..., k]
    watch_log_probs: Tensor | None = None  #: [L, ..., n_watch], in the order asked for; of a group, of their sum
    watch: tuple[str, ...] | None = None  #: names of what was watched, where it was asked for by names

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every field that is there."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value

    def to(self, device: torch.device | str) -> LensStats:
        """The same statistics on ``device``."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.items()}
        return replace(self, **moved)

    def __getitem__(self, index: Any) -> LensStats:
        """Slice layers first, then positions: ints, slices, an Ellipsis, at most one list, mask or id tensor.

        An int takes its dimension away, layers' too: ``stats[3]`` is one layer, ``stats[3][5]`` one position
        of it.

        Raises:
            IndexError: too many indices, or one out of range.
            TypeError: an index of another kind, or several lists or tensors.
        """
        parts = _full_index(index, self.lse.ndim)
        by_layer = self.layers.ndim
        cut: dict[str, Tensor] = {}
        for name, value in self.items():
            if name == "layers":
                chosen = parts[:by_layer]
            elif name == "targets":
                chosen = parts[by_layer:]
            else:
                chosen = parts
            cut[name] = value[tuple(p.to(value.device) if isinstance(p, Tensor) else p for p in chosen)]
        return LensStats(**cut, watch=self.watch)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every field to ``path`` as safetensors, aside and renamed: nothing is ever half there."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.items()}
        with atomic_write(path) as aside:
            aside.touch()  # an OSError that says why, where safetensors has an error of its own
            names = {} if self.watch is None else {"watch": json.dumps(self.watch)}
            save_file(tensors, aside, metadata={"format": _FORMAT, **names})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LensStats:
        """Read what :meth:`save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is cut short or not one of ours, or its tensors are not those of one decode.
        """
        names = {field.name for field in fields(cls)} - {"watch"}
        try:
            with open_safetensors(path) as file:
                metadata, there = file.metadata() or {}, set(file.keys())
                found = metadata.get("format")
                # Of another file not a byte is read.
                ours = found == _FORMAT and {"lse", "layers"} <= there <= names
                tensors = {name: file.get_tensor(name) for name in there} if ours else {}
        except SafetensorError as error:
            raise ValueError(f"path: {path} is not a complete safetensors file ({shortened(error)})") from error
        if not ours:
            raise ValueError(f"path: {path} holds {quoted(found)} with {listed(sorted(there))}, wanted {_FORMAT!r}")
        stats = cls(**tensors, watch=_names(metadata.get("watch")))
        problem = stats._mismatch()
        if problem is not None:
            raise ValueError(f"path: {path} holds statistics that do not belong together: {problem}")
        return stats

    def _mismatch(self) -> str | None:
        """Which field is not of the dtype or shape that the others call for, if one is not."""
        lead = self.lse.shape
        by_layer = self.layers.ndim
        if by_layer > 1 or self.layers.shape != lead[:by_layer]:
            return f"layers has shape {[*self.layers.shape]}, lse {[*lead]}"
        k = None if self.top_ids is None else self.top_ids.shape[-1:]
        for name, value in self.items():
            dtype = torch.int64 if name in _INTEGERS else torch.float32
            if value.dtype != dtype:
                return f"{name} is {value.dtype}, wanted {dtype}"
            if name in _LISTS:
                length = k if k is not None and name == "top_log_probs" else value.shape[-1:]
                wanted: tuple[int, ...] = (*lead, *(length or (0,)))
            elif name != "layers":
                wanted = lead[by_layer:] if name == "targets" else lead
            else:
                continue
            if value.shape != wanted:
                return f"{name} has shape {[*value.shape]}, wanted {[*wanted]}"
        if self.watch is not None:
            columns = 0 if self.watch_log_probs is None else self.watch_log_probs.shape[-1]
            if len(self.watch) != columns:
                return f"{columns} tokens were watched, with names for {len(self.watch)}"
        return None

    def to_pandas(self, tokenizer: Any = None) -> pandas.DataFrame:
        """One row for every layer and position.

        Columns: ``layer``, ``position`` (``batch`` before it with two dimensions, ``dim_0`` … with more),
        ``target``, the statistics by name, ``top_id_0``, ``top_log_prob_0``, … ``watch_log_prob_0``, …
        (``watch_log_prob_yes`` where it was watched by that name).
        With a ``tokenizer`` (anything with ``convert_ids_to_tokens``) also ``target_token`` and
        ``top_token_0``, …; missing where there is no token.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("LensStats.to_pandas needs pandas: pip install pandas") from error
        host = self.to("cpu")
        shape = host.lse.shape
        columns: dict[str, Any] = {}
        for name, ids in zip(_dimensions(shape, host.layers.ndim), _grid(shape), strict=True):
            columns[name] = (host.layers[ids] if name == "layer" else ids).numpy()
        if host.layers.ndim == 0:
            columns = {"layer": host.layers.expand(host.lse.numel()).numpy(), **columns}

        def add_ids(name: str, ids: Tensor) -> None:
            columns[name] = ids.numpy()
            if tokenizer is not None:
                tokens = tokenizer.convert_ids_to_tokens(ids.clamp(min=0).tolist())
                columns[name.replace("target", "target_token").replace("id", "token")] = [
                    token if number >= 0 else None for token, number in zip(tokens, ids.tolist(), strict=True)
                ]

        if host.targets is not None:
            add_ids("target", host.targets.expand(shape).flatten())
        for name, value in host.items():
            if name in ("layers", "targets"):
                continue
            if name not in _LISTS:
                columns[name] = value.flatten().numpy()
                continue
            for i, column in enumerate(value.reshape(shape.numel(), value.shape[-1]).unbind(1)):
                if name == "top_ids":
                    add_ids(f"top_id_{i}", column)
                else:
                    of = self.watch[i] if name == "watch_log_probs" and self.watch is not None else i
                    columns[f"{name.removesuffix('s')}_{of}"] = column.numpy()
        return pandas.DataFrame(columns)

    def show(self, tokenizer: Any = None, input_ids: Tensor | None = None) -> Any:
        """The page of :func:`tuned_lens_fast.plotting.heatmap_page` in a notebook's output, sealed off from it.

        Args:
            tokenizer: None shows ids.
            input_ids: ``[positions]``, what was decoded; None shows the positions' numbers.

        Of a long text the first positions are shown, as many as 65,536 cells are.

        Raises:
            ValueError: not of one text (``stats[:, i].show()`` is one of a batch), or nothing that can be drawn.
        """
        # By its name: the plotting of LensStats imports this module.
        return import_module("tuned_lens_fast.plotting").NotebookPage(self, tokenizer, input_ids)

    def _repr_html_(self) -> str:
        """For notebooks: as ``repr``, and how to see more."""
        hint = "<code>.show(tokenizer, input_ids)</code> draws it" if self.lse.ndim == 2 else ""
        return f"<pre>{escape(repr(self))}</pre>{hint}"

    def __repr__(self) -> str:
        """Shape, fields, and a line a layer: means over positions, the median for ranks."""
        names = [name for name, _ in self.items() if name not in ("layers", "targets", *_LISTS)]
        title = f"LensStats of shape {list(self.lse.shape)} (layers first)"
        lists = [f"{name} {list(value.shape)}" for name, value in self.items() if name in _LISTS]
        if self.layers.ndim == 0 or not self.lse.numel():
            return f"{title}: {', '.join([*names, *lists])}"
        table = [["layer", *(f"{'median' if name == 'rank' else 'mean'} {name}" for name in names)]]
        rows = range(len(self.layers))
        shown = [*rows[:_SHOWN], *rows[-_SHOWN:]] if len(rows) > 2 * _SHOWN else [*rows]
        for i in shown:
            row = [str(int(self.layers[i]))]
            for name in names:
                value = getattr(self, name)[i].flatten()
                if name == "rank":
                    ranked = value[value > 0]
                    row.append(str(int(ranked.median())) if len(ranked) else "-")
                else:
                    row.append(f"{value.nanmean().item():.4g}")
            table.append(row)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in table]
        if len(shown) < len(rows):
            lines.insert(1 + _SHOWN, "…".rjust(widths[0]))
        return "\n".join([title, *lines, *lists])


def _names(written: str | None) -> tuple[str, ...] | None:
    """Names as :meth:`LensStats.save` writes them."""
    if written is None:
        return None
    try:
        names = json.loads(written)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"path: its names of watched tokens are {quoted(written)}, wanted a list of strings")
    return tuple(names)


def _full_index(index: Any, ndim: int) -> list[Any]:
    """``index`` with its Ellipsis written out and one entry for every dimension."""
    parts = list(index) if isinstance(index, tuple) else [index]
    for i, part in enumerate(parts):
        if isinstance(part, list):
            parts[i] = part = torch.tensor(part, dtype=torch.int64 if not part else None)
        if isinstance(part, Tensor) and part.ndim == 0 and not part.dtype.is_floating_point:
            parts[i] = part = int(part)
        if isinstance(part, Tensor):
            if part.ndim != 1 or part.dtype.is_floating_point:
                raise TypeError(f"index: got {part.dtype} {list(part.shape)}, wanted one dimension of ids or bools")
        elif part is not Ellipsis and not isinstance(part, slice) and type(part) is not int:
            raise TypeError(f"index: got {part!r}, wanted ints, slices, an Ellipsis, or a list or tensor")
    if sum(isinstance(part, Tensor) for part in parts) > 1:
        raise TypeError("index: got several lists or tensors, wanted at most one")
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1 or len(parts) - len(dots) > ndim:
        raise IndexError(f"index: got {len(parts)} indices for {ndim} dimensions")
    at = dots[0] if dots else len(parts)
    missing = ndim - (len(parts) - len(dots))
    return [*parts[:at], *[slice(None)] * missing, *parts[at + len(dots) :]]


def _dimensions(shape: torch.Size, by_layer: int) -> list[str]:
    """Column names of the dimensions of a statistic."""
    positions = len(shape) - by_layer
    names = {0: [], 1: ["position"], 2: ["batch", "position"]}.get(
        positions, [*(f"dim_{i}" for i in range(positions - 1)), "position"]
    )
    return ["layer"] * by_layer + names


def _grid(shape: torch.Size) -> list[Tensor]:
    """For every dimension the index of each element, flattened."""
    grids = torch.meshgrid([torch.arange(size) for size in shape], indexing="ij") if shape else ()
    return [grid.flatten() for grid in grids]
