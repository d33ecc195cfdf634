"""What is predicted at every layer and position: hidden states and what reads them, or log-probabilities in an array.

Statistics are decodes, made when they are asked for and kept; log-probabilities themselves are made only of the layers
and positions that are asked for. Two predictions are compared a vocabulary tile at a time, so that here too nothing of
size layers x positions x vocabulary exists. ``plotting.PredictionTrajectory`` is built on this.
"""

from __future__ import annotations

import abc
import functools
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuned_lens_fast.engines import choose
from tuned_lens_fast.engines.decoding import Engine
from tuned_lens_fast.engines.eager import CPU_CHUNK, GPU_CHUNK, EagerEngine
from tuned_lens_fast.engines.interface import NO_TARGET, Head, Norm, Query, Readout, Tiling, Translator
from tuned_lens_fast.engines.matmul import Matmul, Packed
from tuned_lens_fast.engines.state import State, Wanted, key_ids, largest_keys, tile_top_keys, top_keys
from tuned_lens_fast.engines.statistics import LOG_FLOOR, STATISTICS, by_two_passes
from tuned_lens_fast.engines.tiling import slices
from tuned_lens_fast.reading import decode_views, is_affine, read, transformed
from tuned_lens_fast.validation import check_ids

#: Bytes of a decode's scratch. Hidden states are held beside it.
_BUDGET = 128 * 2**20


class Layers(abc.ABC):
    """The logits of some layers at positions ``[*batch, tokens]``, which are one dimension where rows are meant."""

    count: int
    lead: torch.Size  #: [*batch, tokens]
    head: Head  #: what products are made with; of an array, its size is the vocabulary's
    engine: Engine

    @abc.abstractmethod
    def decode(self, query: Query) -> dict[str, Tensor]:
        """What :meth:`.Engine.decode` answers, ``[count, positions]``."""

    @abc.abstractmethod
    def rows(self, layer: int, positions: slice | Tensor) -> Tensor:
        """``[positions, width]`` of one layer, which the engine's product makes logits of."""

    @abc.abstractmethod
    def at(self, tokens: Any) -> Layers:
        """The same at some tokens; a slice or an int64 tensor."""

    @functools.cached_property
    def products(self) -> EagerEngine:
        """The engine if it makes its logits a tile at a time, as another's kernels do not."""
        return self.engine if isinstance(self.engine, EagerEngine) else EagerEngine()

    @property
    def chunk(self) -> tuple[int, int]:
        """Rows and tokens whose logits exist at once."""
        rows, tokens = CPU_CHUNK if self.head.weight.device.type == "cpu" else GPU_CHUNK
        tokens = min(tokens, self.head.vocab)
        return min(rows, tokens), tokens

    def normalised(self, layer: int, positions: slice, width: int) -> _Rows:
        """Rows in tiles of ``width`` tokens, whose normaliser is known."""
        matmul = self.products.matmul(self.head)
        packed = matmul.pack(self.rows(layer, positions))
        state = self.products.tile_passes(matmul, packed, Wanted(), None, None, width)
        return _Rows(matmul, packed, state.closed(), width)

    def token_logits(self, ids: Tensor) -> Tensor:
        """fp32 ``[count, positions]``: the logit of one token at each position; NaN for NO_TARGET."""
        found = torch.empty(self.count, len(ids), device=ids.device)
        matmul, (at_once, width) = self.products.matmul(self.head), self.chunk
        for layer in range(self.count):
            for p in slices(len(ids), at_once):
                found[layer, p] = matmul.target_logits(matmul.pack(self.rows(layer, p)), ids[p], width)
        return found.masked_fill_(ids == NO_TARGET, torch.nan)

    def log_probs(self, layer: int, positions: Tensor) -> Tensor:
        """fp32 ``[positions, vocab]``."""
        matmul, width = self.products.matmul(self.head), self.chunk[1]
        rows = matmul.pack(self.rows(layer, positions))
        z = torch.empty(rows.rows, self.head.vocab, device=self.head.weight.device)
        for tokens in matmul.tiles(width):
            z[:, tokens] = matmul(rows, tokens, width)
        return torch.log_softmax(z, 1)


@dataclass
class _Rows:
    """Rows of logits, a vocabulary tile at a time."""

    matmul: Matmul
    packed: Packed
    state: State
    width: int

    def log_probs(self, tokens: slice) -> Tensor:
        """fp32 ``[rows, tokens]``; LOG_FLOOR for the logarithm of 0."""
        assert self.state.log_s is not None
        z = self.matmul(self.packed, tokens, self.width)
        return z.sub_(self.state.m.unsqueeze(1)).sub_(self.state.log_s.unsqueeze(1)).clamp_(min=LOG_FLOOR)


class ReadLayers(Layers):
    """Layers that are read: their hidden states, as the model made them."""

    def __init__(self, hidden: Sequence[Tensor], lens: Any, numbers: Sequence[int], head: Head) -> None:
        """
        Args:
            hidden: ``[*batch, tokens, width]``, of one dtype and on the head's device.
            lens: what reads them; None where they are what the head receives.
            numbers: the lens's layer of each.
            head: the lens's, or :func:`masked`.
        """
        self.hidden, self.lens, self.numbers, self.head = list(hidden), lens, list(numbers), head
        self.count, self.lead = len(self.hidden), self.hidden[0].shape[:-1]
        comes_back = head.bias is not None and (head.softcap is not None or head.scale < 0)
        is_masked = comes_back and bool(head.bias.isneginf().any())  # type: ignore[union-attr]
        self.engine = _MaskedEngine() if is_masked else choose("auto", head.weight.device, head.weight.dtype)

    def decode(self, query: Query) -> dict[str, Tensor]:
        if self.lens is None:
            return decode_views(self.engine, self.hidden, Readout.of_output(self.head), query, _BUDGET)
        return read(self.engine, self.lens, self.numbers, self.hidden, query, _BUDGET, self.head)

    def rows(self, layer: int, positions: slice | Tensor) -> Tensor:
        states, number = self.hidden[layer].reshape(self.lead.numel(), -1)[positions], self.numbers[layer]
        translator: Translator | None = None
        if self.lens is not None and is_affine(self.lens):
            translator = self.lens.translator(number)
        elif self.lens is not None:
            states = transformed(self.lens, states, number)
        norm = Norm("identity") if self.lens is None else self.lens.unembed.norm
        tiling = Tiling(1, len(states), self.chunk[1], 0)
        return self.products.head_input([states], [translator], norm, self.head, tiling)

    def at(self, tokens: Any) -> ReadLayers:
        return ReadLayers([h[..., tokens, :] for h in self.hidden], self.lens, self.numbers, self.head)


class GivenLayers(Layers):
    """Layers whose logits, or log-probabilities, somebody else has made."""

    def __init__(self, values: Tensor) -> None:
        """``values``: floating ``[*batch, count, tokens, vocab]``."""
        self.values = values
        self.count, self.lead = values.shape[-3], values.shape[:-3] + values.shape[-2:-1]
        vocab = values.shape[-1]
        self.head = Head(torch.zeros((), device=values.device).expand(vocab, vocab))
        self.engine = _GivenEngine()

    def decode(self, query: Query) -> dict[str, Tensor]:
        readout = Readout((None,) * self.count, Norm("identity"), self.head)
        return decode_views(self.engine, list(self.values.movedim(-3, 0)), readout, query, _BUDGET)

    @property
    def chunk(self) -> tuple[int, int]:
        rows, tokens = super().chunk
        return max(1, min(rows, 2**24 // self.head.vocab)), tokens

    def rows(self, layer: int, positions: slice | Tensor) -> Tensor:
        values = self.values.select(-3, layer)
        if isinstance(positions, slice) and len(self.lead) == 1:
            return values[positions]
        if isinstance(positions, slice):
            positions = torch.arange(self.lead.numel())[positions]
        # Not reshaped, which of a batch would be a copy of all of it.
        return values[torch.unravel_index(positions.to(values.device), self.lead)]

    def at(self, tokens: Any) -> GivenLayers:
        return GivenLayers(self.values[..., tokens, :])


class _GivenEngine(EagerEngine):
    """The eager engine on logits that are there."""

    def plan(
        self, positions: int, hidden: torch.dtype, readout: Readout, query: Query, memory_budget: int,
        gradient: bool = False,
    ) -> Tiling:  # fmt: skip
        rows, tokens = CPU_CHUNK
        return Tiling(1, min(positions, rows), min(tokens, readout.head.vocab), 0)

    def head_input(self, hidden: Sequence[Tensor], *_: Any) -> Tensor:
        return hidden[0]

    def matmul(self, head: Head) -> Matmul:
        return _GivenProducts(head)


class _GivenProducts(Matmul):
    """Takes logits where others make them."""

    shape_dependent = False

    def pack(self, x: Tensor) -> Packed:
        return Packed(x.shape[0], x)

    def __call__(self, x: Packed, tokens: slice | Tensor, width: int, out: Tensor | None = None) -> Tensor:
        return x.values[:, tokens].to(torch.float32, copy=True)

    def target_logits(self, x: Packed, targets: Tensor, width: int) -> Tensor:
        ids = targets.clamp(min=0).repeat(x.rows // len(targets))
        return x.values.gather(1, ids.unsqueeze(1)).squeeze(1).float()


class _MaskedEngine(EagerEngine):
    """The eager engine for a head whose softcap, or negative scale, would bring masked tokens back."""

    def matmul(self, head: Head) -> Matmul:
        return _MaskedProducts(head)


class _MaskedProducts(Matmul):
    def _transformed(self, z: Tensor, tokens: slice | Tensor) -> Tensor:
        assert self.head.bias is not None
        return super()._transformed(z, tokens).masked_fill_(self.head.bias[tokens].isneginf(), -torch.inf)


def masked(head: Head, ids: Tensor) -> Head:
    """The head without the tokens ``ids``, whose bias is -inf; see :class:`_MaskedEngine` for what else it takes."""
    bias = torch.zeros(head.vocab, dtype=head.weight.dtype, device=head.weight.device)
    if head.bias is not None:
        bias += head.bias
    bias[ids.to(bias.device)] = -torch.inf
    return replace(head, bias=bias)


class Predictions:
    """Layers and, last, the model's own output, at the same positions; their statistics as numpy arrays."""

    def __init__(self, parts: Iterable[Layers], keep: bool = True) -> None:
        """``keep``: decode all that a pass finds at once, and keep it; for what nobody can change."""
        self.parts, self.keep = tuple(parts), keep
        self.lead, self.vocab = self.parts[0].lead, self.parts[0].head.vocab
        self._each = [(part, layer) for part in self.parts for layer in range(part.count)]
        self._kept: dict[str, NDArray] = {}
        self._targets: bytes | None = None
        self._compared: tuple[weakref.ref[Predictions], int, dict[str, NDArray]] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(*batch, layers, tokens, vocab)."""
        return (*self.lead[:-1], len(self._each), self.lead[-1], self.vocab)

    def at(self, tokens: Any) -> Predictions:
        """The same at some tokens, a slice or int64 ``[tokens]``, with the statistics that are known of them."""
        index = tokens if isinstance(tokens, slice) else torch.as_tensor(tokens)
        if isinstance(index, slice) and (index.step or 1) < 0:  # which tensors do not take
            index = torch.arange(self.lead[-1]).numpy()[tokens].copy()
            index = torch.from_numpy(index)
        cut = Predictions([part.at(index) for part in self.parts], self.keep)
        axis = len(self.lead)
        along = (slice(None),) * axis + (tokens,)
        cut._kept = {name: value[along] for name, value in self._kept.items() if name not in ("log_prob", "rank")}
        return cut

    @torch.no_grad()
    def ask(self, names: Collection[str], targets: NDArray | None = None, top_k: int = 0) -> dict[str, NDArray]:
        """Statistics by name, out of STATISTICS or "top_ids" and "top_log_probs".

        Args:
            names: those that are wanted.
            targets: int64 ``[*batch, tokens]``, ids or -100.
            top_k: tokens of each of the last two.

        Returns:
            What is known: all of ``names``, ``[*batch, layers, tokens]`` and, of the top, ``[..., top_k]``.
        """
        found = self._kept if self.keep else {}
        seen = None if targets is None else targets.tobytes()
        if seen is not None and seen != self._targets:
            self._targets = seen
            for name in ("log_prob", "rank"):
                found.pop(name, None)
        top_k = min(top_k, self.vocab)
        top_missing = top_k > 0 and ("top_ids" not in found or found["top_ids"].shape[-1] < top_k)
        if top_missing or not found.keys() >= set(names):
            wanted = {name for name in names if name in STATISTICS}
            if self.keep:
                wanted |= {"entropy", "max_prob"} | ({"log_prob", "rank"} if targets is not None else set())
                wanted |= {"kl"} if self._kl_is_cheap() else set()
            wanted -= found.keys()
            if "kl" in wanted and not self._kl_is_cheap():
                wanted.remove("kl")
                found["kl"] = compare(self._each[-1:] * len(self._each), self._each, ["kl"])["kl"]
            if wanted or top_missing:
                found |= self._decode(frozenset(wanted), targets, top_k if top_missing else 0)
        return {name: value[..., :top_k] if name.startswith("top_") else value for name, value in found.items()}

    @torch.no_grad()
    def token_logits(self, ids: NDArray) -> NDArray:
        """fp32 ``[*batch, layers, tokens]``: the logit, or more exactly one up to a constant of the row, of one token
        ``[*batch, tokens]`` at each position."""
        return _shaped(torch.cat([part.token_logits(self._ids(ids, part)).cpu() for part in self.parts]), self.lead)

    def compare(self, other: Predictions, names: Collection[str], top_k: int = 0) -> dict[str, NDArray]:
        """The divergences of ``other`` from these, see :func:`compare`; all that they may be asked for is kept."""
        if self.shape != other.shape:
            raise ValueError(f"other: its predictions are {[*other.shape]}, these {[*self.shape]}")
        top_k = min(top_k, self.vocab)
        if not (self.keep and other.keep):
            return compare(self._each, other._each, names, top_k)
        if self._compared is None or self._compared[0]() is not other or self._compared[1] < top_k:
            self._compared = weakref.ref(other), top_k, compare(self._each, other._each, ["kl", "js", "tv"], top_k)
        return {
            name: value[..., :top_k] if name.startswith("top_") else value for name, value in self._compared[2].items()
        }

    @torch.no_grad()
    def block(self, layers: Iterable[int], positions: NDArray, tokens: NDArray, out: NDArray) -> None:
        """Write log-probabilities of some layers, positions and tokens of the vocabulary to ``[layers, positions,
        tokens]``; positions count ``[*batch, tokens]`` as one dimension."""
        at_once = max(1, 2**24 // self.vocab)
        for row, (part, layer) in zip(out, (self._each[number] for number in layers), strict=True):
            for p in slices(len(positions), at_once):
                found = part.log_probs(layer, torch.from_numpy(positions[p]).to(part.head.weight.device))
                row[p] = found.cpu().numpy()[:, tokens]

    def _kl_is_cheap(self) -> bool:
        """Whether KL from the model's output comes with a pass over the vocabulary, by an identity."""
        first, last = self.parts[0], self.parts[-1]
        if not (isinstance(first, ReadLayers) and isinstance(last, ReadLayers) and is_affine(first.lens)):
            return False
        return not by_two_passes(Query(frozenset({"kl"})), first.head)

    def _decode(self, names: frozenset[str], targets: NDArray | None, top_k: int) -> dict[str, NDArray]:
        answers = []
        for part in self.parts:
            query = Query(names - {"kl"}, None if targets is None else self._ids(targets, part), top_k=top_k)
            if "kl" in names and part is not self.parts[-1]:
                last = cast(ReadLayers, self.parts[-1]).hidden[0]
                query = replace(query, stats=names, reference=last.reshape(-1, last.shape[-1]))
            answers.append(part.decode(query))
        if "kl" in names:
            lse = answers[-1]["lse"]
            answers[-1]["kl"] = lse - lse  # of the model from itself: 0, or NaN where its logits are
        return {
            name: _shaped(torch.cat([answer[name].cpu() for answer in answers]), self.lead)
            for name in answers[0]
            if name != "unsure"
        }

    def _ids(self, ids: NDArray, part: Layers) -> Tensor:
        """``[positions]`` where the part is."""
        found = torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64))
        check_ids("targets", found, self.vocab, NO_TARGET)
        return found.reshape(-1).to(part.head.weight.device)


@torch.no_grad()
def compare(
    of: Sequence[tuple[Layers, int]], others: Sequence[tuple[Layers, int]], names: Collection[str], top_k: int = 0
) -> dict[str, NDArray]:
    """Divergences of layers from others, pair by pair, a vocabulary tile of both at a time.

    Args:
        of, others: as many (layers, number) of each, at the same positions of the same vocabulary.
        names: divergences out of STATISTICS; "kl" is KL(of || others).
        top_k: how many of the largest differences of probability to return.

    Returns:
        ``[*batch, layers, tokens]`` by name. With ``top_k`` also ``top_ids`` and ``top_deltas`` ``[..., top_k]``, the
        tokens whose probability differs most, the largest difference first, and probabilities of ``others`` less those
        of ``of``.
    """
    part = of[0][0]
    lead, device = part.lead, part.head.weight.device
    shape = (len(of), lead.numel())
    found = {name: torch.zeros(shape, device=device) for name in names}
    if top_k:
        found["top_ids"] = torch.zeros(*shape, top_k, dtype=torch.int64, device=device)
        found["top_deltas"] = torch.zeros(*shape, top_k, device=device)
    at_once, width = (min(sizes) for sizes in zip(*(layers[0].chunk for layers in (of[0], others[0])), strict=True))
    for p in slices(lead.numel(), at_once):
        last: list[tuple[tuple[Layers, int], _Rows] | None] = [None, None]
        for i, pair in enumerate(zip(of, others, strict=True)):
            for side, layer in enumerate(pair):  # the model's output is there once, compared with every layer
                before = last[side]
                if before is None or before[0] != layer:
                    last[side] = (layer, layer[0].normalised(layer[1], p, width))
            a, b = (side[1] for side in last if side is not None)
            top: tuple[Tensor, Tensor] | None = None
            for tokens in slices(part.head.vocab, width):
                log_p, log_q = a.log_probs(tokens), b.log_probs(tokens).to(device)
                probability, other = log_p.exp(), log_q.exp()
                for name in names:
                    term = STATISTICS[name].term
                    assert term is not None
                    found[name][i, p] += term(log_p, log_q, probability, other).sum(1)
                if top_k:
                    delta = other.sub_(probability)
                    top = _largest(delta, tokens.start, top_k, top)
            if top is not None:
                found["top_ids"][i, p], found["top_deltas"][i, p] = key_ids(top[0]), top[1]
    return {
        name: _shaped(value if name.startswith("top_") else value.clamp_(min=0), lead).copy()
        for name, value in found.items()
    }


def _largest(delta: Tensor, first: int, k: int, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values ``[rows, k]`` of the largest |delta| of a tile and all before it."""
    keys = largest_keys(tile_top_keys(delta.abs(), first, k), min(k, delta.shape[1]))
    values = delta.gather(1, key_ids(keys).sub_(first))
    if before is not None:
        keys, values = torch.cat([before[0], keys], 1), torch.cat([before[1], values], 1)
    keys, at = keys.topk(min(k, keys.shape[1]), 1)
    return keys, values.gather(1, at)


def top_of(values: NDArray, k: int) -> NDArray[np.int64]:
    """The ids of the k largest ``[..., k]`` of ``[..., vocab]``, the largest first and the lower id on a tie."""
    flat = torch.from_numpy(np.ascontiguousarray(values)).reshape(-1, values.shape[-1])
    ids = torch.arange(flat.shape[1])
    found = [key_ids(top_keys(rows.float(), ids).topk(min(k, len(ids)), 1).values) for rows in flat.split(256)]
    return torch.cat(found).numpy().reshape(*values.shape[:-1], -1)


def _shaped(value: Tensor, lead: torch.Size) -> NDArray:
    """``[layers, positions, ...]`` as ``[*batch, layers, tokens, ...]``."""
    batched = value.reshape(value.shape[0], *lead, *value.shape[2:])
    return batched.movedim(0, len(lead) - 1).cpu().numpy()
