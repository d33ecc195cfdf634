"""The parts of a page: a header of JSON, texts of tokens, and statistics in blocks of positions, gzipped.

``heatmap.py`` writes them into one file and ``page/data.js`` reads them. Nothing here knows where a part is kept, and a
block needs no other, so that a server can make each as it is asked for.

Every array is of four bytes a number, float32 or int32, written byte by byte: first the highest byte of all its
numbers, then the next. The high ones are much alike, which is what gzip looks for. Floats keep ten bits of their
mantissa, three decimal digits, and the other bytes are zeros.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tuned_lens_fast.plotting.tokens import NO_TOKEN, layer_names, token_texts, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuned_lens_fast.stats import LensStats

#: Of the parts; a page of another one says that it cannot read them.
FORMAT = 1
#: Positions of a block: half a megabyte of statistics of 31 layers.
BLOCK = 512
#: Bits of a float's mantissa that are kept.
_BITS = 10
#: Values that the end of a scale is chosen by, at most.
_SAMPLE = 2**20
#: Cells that a page can jump to, for each question.
_PEAKS = 100


#: Of the colours of a watched token's log-probability.
WATCHED_SPAN = (-12.0, 0.0)


@dataclass(frozen=True)
class Drawn:
    """A statistic as the page offers it."""

    name: str  #: of the field in LensStats
    label: str  #: on its button
    title: str  #: on its scale
    span: tuple[float, float] | None = None  #: of the colours; None: from 0 to where 96% are
    log: bool = False  #: coloured by log10
    of_target: bool = False  #: nothing where there is no target


DRAWN = {
    drawn.name: drawn
    for drawn in (
        Drawn("log_prob", "log-prob", "log-probability of the next token, nats", (-12.0, 0.0), of_target=True),
        Drawn("rank", "rank", "rank of the next token", log=True, of_target=True),
        Drawn("entropy", "entropy", "entropy, nats"),
        Drawn("max_prob", "top prob", "probability of the likeliest token", (0.0, 1.0)),
        Drawn("kl", "KL", "KL(output || layer), nats"),
        Drawn("reverse_kl", "reverse KL", "KL(layer || output), nats"),
        Drawn("js", "JS", "Jensen-Shannon divergence from the output, nats", (0.0, 0.6931)),
        Drawn("tv", "TV", "total variation from the output", (0.0, 1.0)),
    )
}


@dataclass
class Tokens:
    """The tokens of a page, numbered as they are first met."""

    tokenizer: PreTrainedTokenizerBase | None
    numbers: dict[int, int] = field(default_factory=dict)  #: by id

    def number(self, ids: Tensor) -> Tensor:
        """int32: the number of each id; -1 where an id is below -1, which is none."""
        found, at = torch.unique(ids, return_inverse=True)
        numbers = [-1 if i < NO_TOKEN else self.numbers.setdefault(i, len(self.numbers)) for i in found.tolist()]
        return torch.tensor(numbers, dtype=torch.int32)[at]

    def part(self) -> bytes:
        """JSON: ids, and the text of each, made visible."""
        ids = [*self.numbers]
        if self.tokenizer is None:
            texts = {i: "NaN" if i == NO_TOKEN else f"#{i}" for i in ids}
        else:
            texts = token_texts(self.tokenizer, ids)
        return packed(json.dumps([ids, [texts[i] for i in ids]], ensure_ascii=False).encode())


def packed(raw: bytes) -> bytes:
    """``raw`` as gzip."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, 31, 9, zlib.Z_FILTERED)
    return deflate.compress(raw) + deflate.flush()


def planes(values: Tensor) -> bytes:
    """Numbers of four bytes, the highest byte of all of them first."""
    array = values.contiguous().flatten().numpy()
    if array.dtype == np.float32:
        drop = 23 - _BITS
        bits = array.view(np.uint32)
        # Half a unit added to infinity's bits leaves infinity, and a NaN of few bits must not become it.
        bits = np.where(np.isnan(array), np.uint32(0x7FC00000), (bits + np.uint32(1 << (drop - 1))) >> drop << drop)
        array = bits.astype(np.uint32)
    return array.astype(array.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, 4)[:, ::-1].T.tobytes()


def drawn_names(stats: LensStats) -> list[str]:
    """The statistics that a page of ``stats`` can colour by."""
    return [name for name in DRAWN if getattr(stats, name) is not None]


def header(title: str, runs: Sequence[dict[str, Any]], served: bool = False) -> dict[str, Any]:
    """What a page reads first; ``runs`` are of :func:`described`, ``served`` says where the other parts are."""
    return {"format": FORMAT, "block": BLOCK, "title": visible_line(title), "served": served, "runs": [*runs]}


def described(
    name: str,
    first: LensStats,
    positions: int,
    whole: Callable[[str], Tensor],
    tokens: Tokens,
    watch: Iterable[int] | Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A run's part of the header: what its blocks hold, in order, its colours, and the cells to jump to.

    ``first`` is any part of the run, ``whole(statistic)`` that statistic of all ``positions``. ``watch`` are the ids of
    what was watched, or groups by their names.
    """
    watched = 0 if first.watch_log_probs is None else first.watch_log_probs.shape[-1]
    names = [*watch] if isinstance(watch, Mapping) else [*(first.watch or ())]
    ids = [] if watch is None or isinstance(watch, Mapping) else [*watch][:watched]
    named = tokens.number(torch.tensor(ids, dtype=torch.int64)).tolist()
    statistics: list[dict[str, Any]] = []
    peaks: list[tuple[int, int]] = []
    for key in drawn_names(first):
        drawn, values = DRAWN[key], whole(key)
        low, high = drawn.span or usual_span(values, drawn.log)
        peaks = _largest(values) if key == "kl" else peaks
        statistics.append(
            {
                "name": key, "label": drawn.label, "title": drawn.title, "low": low, "high": high, "log": drawn.log,
                "ofTarget": drawn.of_target, "changes": _changes(values),
            }
        )  # fmt: skip
    return {
        "name": visible_line(name),
        "positions": positions,
        "layers": layer_names(first),
        "statistics": statistics,
        "k": 0 if first.top_ids is None else first.top_ids.shape[-1],
        "watched": [*named, *[-1] * (watched - len(named))],
        "watchedNames": [*map(visible_line, names)],
        "peaks": peaks,
    }


def text_part(stats: LensStats, input_ids: Tensor | None, tokens: Tokens) -> bytes:
    """What was read, and what was to come, at every position; -1 where it is not known."""
    none = torch.full((stats.lse.shape[1],), NO_TOKEN - 1)
    read = none if input_ids is None else input_ids
    target = none
    if stats.targets is not None:
        target = torch.where(stats.targets < 0, none, stats.targets)
    elif input_ids is not None:
        target = torch.cat([input_ids[1:], none[:1]])
    return packed(planes(tokens.number(read)) + planes(tokens.number(target)))


def block_part(stats: LensStats, tokens: Tokens) -> bytes:
    """Statistics of the positions of one block: ``[layers, positions]`` each, lists ``[k, layers, positions]``."""
    arrays = [getattr(stats, name) for name in drawn_names(stats)]
    if stats.watch_log_probs is not None:
        arrays.append(stats.watch_log_probs.movedim(-1, 0))
    if stats.top_ids is not None and stats.top_log_probs is not None:
        arrays += [stats.top_log_probs.movedim(-1, 0), tokens.number(stats.top_ids.movedim(-1, 0))]
    return packed(b"".join(planes(value.int() if value.dtype == torch.int64 else value) for value in arrays))


def parts(
    runs: Sequence[tuple[str, LensStats, Tensor | None]],
    tokenizer: PreTrainedTokenizerBase | None,
    title: str,
    watch: Iterable[int] | Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The header, and every other part by its name: ``text-0``, ``block-0-0``, …, ``tokens``."""
    tokens, found, descriptions = Tokens(tokenizer), {}, []
    watch = watch if watch is None or isinstance(watch, Mapping) else [*watch]
    for i, (name, stats, input_ids) in enumerate(runs):
        descriptions.append(described(name, stats, stats.lse.shape[1], partial(getattr, stats), tokens, watch))
        found[f"text-{i}"] = text_part(stats, input_ids, tokens)
        for j, start in enumerate(range(0, stats.lse.shape[1], BLOCK)):
            found[f"block-{i}-{j}"] = block_part(stats[:, start : start + BLOCK], tokens)
    found["tokens"] = tokens.part()
    return header(title, descriptions), found


def visible_line(text: str) -> str:
    """``text`` with all that is not printed escaped, as a title is shown."""
    return "".join(char if char.isprintable() else visible(char) for char in text)


def usual_span(values: Tensor, log: bool) -> tuple[float, float]:
    """Where colours begin and end: a few outliers, such as KL at the embedding, would leave one for all the rest."""
    finite = values[torch.isfinite(values) & (values > 0)]
    if not len(finite):
        return (0.0, 1.0)
    if log:
        return (0.0, max(float(finite.max().double().log10()), 1.0))
    finite = finite[:: 1 + len(finite) // _SAMPLE]
    return (0.0, max(float(finite.kthvalue(1 + int(0.96 * (len(finite) - 1))).values), 1e-3))


def _largest(values: Tensor) -> list[tuple[int, int]]:
    """[layer, position] of the largest finite values, largest first."""
    flat = torch.where(torch.isfinite(values), values, -torch.inf).flatten()
    top = flat.topk(min(_PEAKS, len(flat)))
    cells = top.indices[top.values > 0].tolist()
    return [divmod(cell, values.shape[1]) for cell in cells]


def _changes(values: Tensor) -> list[tuple[int, int]]:
    """[layer, position] of the largest changes from the layer before."""
    if values.dtype == torch.int64:  # of ranks, those of the order of magnitude
        values = values.double().log10()
    return [(layer + 1, position) for layer, position in _largest(values.diff(dim=0).abs())]
