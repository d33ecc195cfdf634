"""PredictionTrajectory: what a lens predicts at every layer of one model run, as statistics and figures of them.

It holds hidden states and how they are read, not log-probabilities: a statistic is a decode.
"""

from __future__ import annotations

import builtins
import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.models.chunked_pass import ChunkedPass
from tuned_lens_fast.models.forward_pass import input_device
from tuned_lens_fast.nn.lenses import Lens
from tuned_lens_fast.plotting.lazy_array import LazyArray
from tuned_lens_fast.plotting.token_formatter import TokenFormatter
from tuned_lens_fast.plotting.trajectory_plotting import (
    ShapeError,
    TrajectoryLabels,
    TrajectoryStatistic,
    _stride_keep_last,
    check_stride,
)
from tuned_lens_fast.predictions import GivenLayers, Layers, Predictions, ReadLayers, masked, top_of
from tuned_lens_fast.reading import readout_of
from tuned_lens_fast.streaming import check_length, check_lens, rows_of
from tuned_lens_fast.validation import check_input_ids, check_model, layers_of

#: Anything with ``convert_ids_to_tokens``.
Tokenizer = Any
ResidualComponent = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
#: Tokens in a figure's table, unless the caller says otherwise.
_TOP = 10


@dataclass(eq=False)
class PredictionTrajectory:
    """Predictions of the next token at every layer, last those of the model itself.

    ``log_probs`` is an array, or, of a trajectory that a lens made, a
    :class:`~tuned_lens_fast.plotting.lazy_array.LazyArray`: what is indexed of it is made, a layer is
    ``trajectory.log_probs[..., layer, :, :]``. Statistics do without it. Those of an array are of its softmax, so that
    logits do as well. Over a batch they are means, of targets over those that there are.
    """

    log_probs: NDArray[np.float32] | LazyArray  #: (*batch, layers + 1, tokens, vocab)
    input_ids: NDArray[np.int64]  #: (*batch, tokens)
    targets: NDArray[np.int64] | None = None  #: (*batch, tokens), -100 for none
    anti_targets: NDArray[np.int64] | None = None  #: (*batch, tokens), -100 for none
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        shape = self.log_probs.shape
        if len(shape) < 3:
            raise ShapeError(f"log_probs: got shape {[*shape]}, wanted [*batch, layers, tokens, vocab]")
        lead = (*shape[:-3], shape[-2])
        for name in ("input_ids", "targets", "anti_targets"):
            value = getattr(self, name)
            if (value is not None or name == "input_ids") and np.shape(value) != lead:
                raise ShapeError(f"{name}: got shape {[*np.shape(value)]}, wanted {[*lead]} as log_probs are")

    @property
    def n_batch_axis(self) -> int:
        """Number of batch dimensions."""
        return len(self.batch_shape)

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The batch dimensions."""
        return tuple(range(self.n_batch_axis))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch dimensions."""
        return self.log_probs.shape[:-3]

    @property
    def num_layers(self) -> int:
        """Number of layers, the model's own output apart."""
        return self.log_probs.shape[-3] - 1

    @property
    def num_tokens(self) -> int:
        """Number of positions."""
        return self.log_probs.shape[-2]

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
        return self.log_probs.shape[-1]

    @property
    def model_log_probs(self) -> NDArray[np.float32]:
        """The model's own log-probabilities (*batch, tokens, vocab)."""
        return self.log_probs[..., -1, :, :]

    @property
    def probs(self) -> NDArray[np.float32] | LazyArray:
        """The probabilities, as ``log_probs`` are."""
        if isinstance(self.log_probs, LazyArray):
            return LazyArray(self.log_probs.predictions, exponential=True)
        return np.exp(self.log_probs)

    @classmethod
    def from_lens_and_cache(
        cls,
        lens: Lens,
        input_ids: Tensor,
        cache: Any,
        model_logits: Tensor,
        targets: Tensor | None = None,
        anti_targets: Tensor | None = None,
        residual_component: ResidualComponent = "resid_pre",
        mask_input: bool = False,
    ) -> PredictionTrajectory:
        """From what TransformerLens's ``run_with_cache`` returned. The cache's tensors are kept, not copied.

        Args:
            lens: of the same model.
            input_ids: integer (*batch, tokens), what the model was run on.
            cache: the ``ActivationCache``.
            model_logits: (*batch, tokens, vocab).
            targets, anti_targets: see :class:`PredictionTrajectory`.
            residual_component: the part of each layer that is read.
            mask_input: take the tokens of ``input_ids`` out of all predictions.

        Raises:
            ValueError: shapes that do not fit.
        """
        numbers = layers_of(lens, cache.model.cfg.n_layers)
        ids = _array("input_ids", input_ids)
        head = lens.unembed.head
        if mask_input:
            head = masked(head, torch.from_numpy(np.unique(ids)))
        readout = readout_of(lens, numbers)
        states = [cache[residual_component, layer] for layer in numbers]
        for state in states:
            if state.shape[:-1] != ids.shape:
                raise ValueError(f"input_ids: got shape {[*ids.shape]}, the cache has {[*state.shape[:-1]]}")
        if model_logits.shape != (*ids.shape, head.vocab):
            raise ValueError(f"model_logits: got {[*model_logits.shape]}, wanted {[*ids.shape, head.vocab]}")
        hidden = [rows.detach().reshape(*ids.shape, -1) for rows in rows_of(states, head, readout.width)]
        output = model_logits.detach()
        if mask_input:
            output = output.clone()
            output[..., torch.from_numpy(np.unique(ids)).to(output.device)] = -torch.inf
        own = GivenLayers(output.to(head.weight.device).unsqueeze(-3))
        return cls._of(
            [ReadLayers(hidden, lens, numbers, head), own], ids, targets, anti_targets, cache.model.tokenizer
        )

    @classmethod
    def from_lens_and_model(
        cls,
        lens: Lens,
        model: Any,
        input_ids: Sequence[int],
        tokenizer: Tokenizer | None = None,
        targets: Sequence[int] | None = None,
        anti_targets: Sequence[int] | None = None,
        mask_input: bool = False,
    ) -> PredictionTrajectory:
        """From one run of the model, of which the hidden states are kept.

        Args:
            lens: of that model.
            model: a transformers causal LM; it runs in evaluation mode and is left in the modes it was in.
            input_ids: integer [tokens] or [batch, tokens].
            tokenizer: gives figures their labels.
            targets, anti_targets: see :class:`PredictionTrajectory`.
            mask_input: take the tokens of ``input_ids`` out of all predictions.

        Raises:
            ValueError, IndexError, TypeError, NotImplementedError: as :func:`tuned_lens_fast.decode_model`.
        """
        model = check_model(model)
        ids = _array("input_ids", input_ids)
        tensor = torch.from_numpy(ids).to(input_device(model))
        check_input_ids(model, tensor, None)
        check_length(model, ids.shape[-1])
        blocks = len(get_transformer_layers(model)[1])
        check_lens(model, lens, blocks)
        numbers = layers_of(lens, blocks)
        head, readout = lens.unembed.head, readout_of(lens, numbers)
        entering, at_head = ChunkedPass(model, numbers, torch.atleast_2d(tensor), None, cached=False)(slice(None))
        hidden = [rows.reshape(*ids.shape, -1) for rows in rows_of(entering, head, readout.width)]
        (last,) = rows_of([at_head], head, head.weight.shape[1])
        if mask_input:
            head = masked(head, torch.from_numpy(np.unique(ids)))
        own = ReadLayers([last.reshape(*ids.shape, -1)], None, [blocks], head)
        return cls._of([ReadLayers(hidden, lens, numbers, head), own], ids, targets, anti_targets, tokenizer)

    @classmethod
    def _of(
        cls, parts: Sequence[Layers], ids: NDArray[np.int64], targets: Any, anti_targets: Any, tokenizer: Any
    ) -> PredictionTrajectory:
        return cls(
            log_probs=LazyArray(Predictions(parts)),
            input_ids=ids,
            targets=None if targets is None else _array("targets", targets),
            anti_targets=None if anti_targets is None else _array("anti_targets", anti_targets),
            tokenizer=tokenizer,
        )

    @property
    def _predictions(self) -> Predictions:
        if isinstance(self.log_probs, LazyArray):
            return self.log_probs.predictions
        values = np.asarray(self.log_probs)
        if not values.flags.writeable or min(values.strides, default=0) < 0:
            values = values.copy()  # which tensors want
        return Predictions([GivenLayers(torch.from_numpy(values))], keep=False)

    @property
    def _layer_labels(self) -> NDArray[np.str_] | None:
        """Names of the layers, of which a lens may lack some; None for 0, 1, 2 and so on."""
        first = self._predictions.parts[0]
        return np.array([*map(str, first.numbers), "output"]) if isinstance(first, ReadLayers) else None

    def slice_sequence(self, slice: slice | Sequence[int] | NDArray) -> PredictionTrajectory:
        """The trajectory of some positions: a slice, positions or a mask of them."""
        index = slice if isinstance(slice, builtins.slice) else np.asarray(slice)
        if isinstance(index, np.ndarray):
            if index.ndim != 1 or index.dtype.kind not in "iub":
                raise TypeError(f"slice: got {slice!r}, wanted a slice, or positions or a mask [tokens]")
            index = np.arange(self.num_tokens)[index]

        def cut(ids: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
            return None if ids is None else ids[..., index]

        lazy = isinstance(self.log_probs, LazyArray)
        log_probs = LazyArray(self._predictions.at(index)) if lazy else self.log_probs[..., index, :]
        parts: dict[str, Any] = {name: cut(getattr(self, name)) for name in ("input_ids", "targets", "anti_targets")}
        return replace(self, log_probs=log_probs, **parts)

    def cross_entropy(self, **kwargs: Any) -> TrajectoryStatistic:
        """Minus the log-probability of the targets; ``kwargs`` are those of :meth:`_largest_prob_labels`.

        Raises:
            ValueError: there are no targets.
        """
        there = self._check("targets", "the cross entropy")
        return self._statistic("Cross Entropy", -self._ask("log_prob", kwargs), kwargs, there=there)

    def rank(self, show_ranks: bool = False, **kwargs: Any) -> TrajectoryStatistic:
        """1 + the number of tokens that are likelier than the target; 0 where there is none.

        Args:
            show_ranks: write the rank into the cells, not the top token.
            kwargs: those of :meth:`_largest_prob_labels`.

        Raises:
            ValueError: there are no targets.
        """
        there = self._check("targets", "the rank")
        found = self._statistic("Rank", self._ask("rank", kwargs), kwargs, units="", there=there)
        if show_ranks and found.trajectory_labels is not None:
            found.trajectory_labels.label_strings = np.char.mod("%d", np.nan_to_num(found.stats))
        return replace(found, min=1, max=getattr(self.tokenizer, "vocab_size", None))

    def entropy(self, **kwargs: Any) -> TrajectoryStatistic:
        """Of every prediction; ``kwargs`` are those of :meth:`_largest_prob_labels`."""
        return self._statistic("Entropy", self._ask("entropy", kwargs), kwargs)

    def forward_kl(self, **kwargs: Any) -> TrajectoryStatistic:
        """KL(model's output || layer); ``kwargs`` are those of :meth:`_largest_prob_labels`."""
        return self._statistic("Forward KL", self._ask("kl", kwargs), kwargs)

    def log_prob_diff(self, delta: bool = False) -> TrajectoryStatistic:
        """The log-probability of the targets less that of the anti-targets.

        Args:
            delta: how much it grows from each layer to the next, which is one layer less.

        Raises:
            ValueError: there are no targets or no anti-targets.
        """
        there = self._check("targets", "the difference") & self._check("anti_targets", "the difference")
        assert self.targets is not None
        assert self.anti_targets is not None
        # Of one row, so that its normaliser cancels.
        predictions = self._predictions
        stats = predictions.token_logits(self.targets) - predictions.token_logits(self.anti_targets)
        if delta:
            stats = np.diff(stats, axis=-2)
        return TrajectoryStatistic(
            name="Δ Log Prob Difference" if delta else "Log Prob Difference",
            units="nats",
            includes_output=not delta,
            sequence_labels=self._get_sequence_labels(),
            stats=self._over_batch(stats, there),
            _layer_labels=None if delta else self._layer_labels,
        )

    def max_probability(self, **kwargs: Any) -> TrajectoryStatistic:
        """The probability of the likeliest token; ``kwargs`` are those of :meth:`_largest_prob_labels`."""
        return self._statistic("Max Probability", self._ask("max_prob", kwargs), kwargs, units="probs")

    def kl_divergence(self, other: PredictionTrajectory, **kwargs: Any) -> TrajectoryStatistic:
        """KL(self || other); ``kwargs`` are those of :meth:`_largest_delta_in_prob_labels`.

        Raises:
            ValueError: ``other`` has another shape.
        """
        return self._divergence("KL(Self | Other)", "kl", other, kwargs)

    def js_divergence(self, other: PredictionTrajectory, **kwargs: Any) -> TrajectoryStatistic:
        """Jensen-Shannon divergence, at most ln 2; ``kwargs`` are those of :meth:`_largest_delta_in_prob_labels`.

        Raises:
            ValueError: ``other`` has another shape.
        """
        return self._divergence("JS(Self | Other)", "js", other, kwargs)

    def total_variation(self, other: PredictionTrajectory, **kwargs: Any) -> TrajectoryStatistic:
        """Half the sum of the absolute differences of probabilities, at most 1; ``kwargs`` are those of
        :meth:`_largest_delta_in_prob_labels`.

        Raises:
            ValueError: ``other`` has another shape.
        """
        return replace(self._divergence("TV(Self | Other)", "tv", other, kwargs), units="probs", max=1)

    def _check(self, name: str, what: str) -> NDArray[np.bool_]:
        """Where there are such targets."""
        ids = getattr(self, name)
        if ids is None:
            raise ValueError(f"{name}: there are none, and {what} needs them")
        return np.asarray(ids) >= 0

    def _ask(self, name: str, labels: dict[str, Any]) -> NDArray:
        """A statistic (*batch, layers, tokens); with it what its labels will ask for, which the same pass finds."""
        top_k = 0 if self.tokenizer is None else labels.get("topk", _TOP)
        return self._predictions.ask([name], self.targets, top_k)[name]

    def _over_batch(self, stats: NDArray, there: NDArray[np.bool_] | None = None) -> NDArray:
        """The mean over the batch of what is there."""
        if not self.n_batch_axis:
            return stats
        where = np.True_ if there is None else np.broadcast_to(there[..., None, :], stats.shape)
        with warnings.catch_warnings(), np.errstate(invalid="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)  # of positions at which there is nothing
            return stats.mean(axis=self.batch_axes, where=where)

    def _statistic(
        self, name: str, stats: NDArray, labels: dict[str, Any], units: str = "nats", there: Any = None
    ) -> TrajectoryStatistic:
        return TrajectoryStatistic(
            name=name,
            units=units,
            trajectory_labels=self._largest_prob_labels(**labels),
            sequence_labels=self._get_sequence_labels(),
            stats=self._over_batch(stats, there),
            _layer_labels=self._layer_labels,
        )

    def _divergence(
        self, name: str, statistic: str, other: PredictionTrajectory, labels: dict[str, Any]
    ) -> TrajectoryStatistic:
        top_k = 0 if self.tokenizer is None else labels.get("topk", _TOP)
        found = self._predictions.compare(other._predictions, [statistic], top_k)
        return TrajectoryStatistic(
            name=name,
            units="nats",
            trajectory_labels=self._delta_labels(found, **labels),
            sequence_labels=self._get_sequence_labels(),
            stats=self._over_batch(found[statistic]),
            min=0,
            max=None,
            _layer_labels=self._layer_labels,
        )

    def _get_sequence_labels(self, token_formatter: TokenFormatter | None = None) -> NDArray[np.str_] | None:
        """The labels of the input [tokens], "*" where a batch differs; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        tokens = (token_formatter or TokenFormatter()).vectorized_format(_ids_to_tokens(self.input_ids, self.tokenizer))
        return _consolidate_labels_from_batch(tokens, self.n_batch_axis)

    def _get_topk_tokens_and_values(
        self, k: int, sort_by: NDArray[np.float32] | LazyArray, values: NDArray[np.float32] | LazyArray
    ) -> tuple[NDArray[np.str_], NDArray[np.float32]]:
        """The k tokens with the largest ``sort_by`` (*batch, layers, tokens, vocab) and their ``values``.

        Returns:
            Both (*batch, layers, tokens, k), the largest first, the lower id first on a tie.
        """
        if isinstance(sort_by, LazyArray):
            found = sort_by.predictions.ask([], None, k)
            ids, top = found["top_ids"], found["top_log_probs"]
            if isinstance(values, LazyArray) and values.predictions is sort_by.predictions:
                return _ids_to_tokens(ids, self.tokenizer), np.exp(top) if values.exponential else top
        else:
            ids = top_of(np.asarray(sort_by), k)
        return _ids_to_tokens(ids, self.tokenizer), np.take_along_axis(np.asarray(values), ids, axis=-1)

    def _hover_over_entries(
        self, topk_tokens: NDArray[np.str_], topk_values: NDArray[np.str_], max_entries_to_show: int = 3
    ) -> NDArray[np.str_]:
        """The tables of a figure: a row for each of the k, for each entry of the batch a column of tokens and one of
        values; at most ``max_entries_to_show`` entries. (layers, tokens, k, 2 * entries) from (*batch, layers, tokens,
        k)."""
        return _hover_over_entries(topk_tokens, topk_values, max_entries_to_show)

    def _largest_prob_labels(
        self,
        formatter: TokenFormatter | None = None,
        min_prob: float = 0,
        topk: int = _TOP,
        max_entries_to_show: int = 3,
    ) -> TrajectoryLabels | None:
        """The likeliest tokens as labels; None without a tokenizer.

        Args:
            formatter: makes labels of tokens.
            min_prob: cells whose top token is no likelier stay empty.
            topk: rows of the table that a cell shows when one points at it.
            max_entries_to_show: entries of the batch in it.
        """
        if self.tokenizer is None:
            return None
        found = self._predictions.ask([], self.targets, topk)
        ids, probs = found["top_ids"], np.exp(found["top_log_probs"])
        return self._labels(ids, probs, "%.2f%%", probs[..., 0] > min_prob, formatter, max_entries_to_show)

    def _largest_delta_in_prob_labels(
        self,
        other: PredictionTrajectory,
        formatter: TokenFormatter | None = None,
        min_prob_delta: float = 0,
        max_entries_to_show: int = 3,
        topk: int = _TOP,
    ) -> TrajectoryLabels | None:
        """The tokens whose probability differs most from that in ``other`` as labels; None without a tokenizer.

        Args:
            other: what is compared.
            formatter, max_entries_to_show, topk: see :meth:`_largest_prob_labels`.
            min_prob_delta: cells with no larger difference stay empty.
        """
        if self.tokenizer is None:
            return None
        found = self._predictions.compare(other._predictions, [], topk)
        return self._delta_labels(found, formatter, min_prob_delta, max_entries_to_show, topk)

    def _delta_labels(
        self,
        found: dict[str, NDArray],
        formatter: TokenFormatter | None = None,
        min_prob_delta: float = 0,
        max_entries_to_show: int = 3,
        topk: int = _TOP,
    ) -> TrajectoryLabels | None:
        if self.tokenizer is None:
            return None
        deltas = found["top_deltas"]
        shown = np.abs(deltas[..., 0]) > min_prob_delta
        return self._labels(found["top_ids"], deltas, "Δ%.2f%%", shown, formatter, max_entries_to_show)

    def _labels(
        self,
        ids: NDArray[np.int64],
        values: NDArray,
        template: str,
        shown: NDArray[np.bool_],
        formatter: TokenFormatter | None,
        entries: int,
    ) -> TrajectoryLabels:
        """Of tokens and values (*batch, layers, tokens, k), and which top ones are shown (*batch, layers, tokens)."""
        batch = (math.prod(ids.shape[: self.n_batch_axis]), *ids.shape[self.n_batch_axis :])
        return _TopLabels.of(
            ids.reshape(batch),
            values.reshape(batch),
            np.asarray(shown.all(axis=self.batch_axes)),
            template=template,
            formatter=formatter or TokenFormatter(),
            tokenizer=self.tokenizer,
            entries=entries,
        )


class _TopLabels(TrajectoryLabels):
    """Labels of the top tokens. Their strings, hundreds of bytes a cell, are made when somebody looks at them, and of
    the layers that are left by then."""

    _layers: tuple[NDArray, NDArray, NDArray] | None = None  #: ids and values [batch, layers, tokens, k], and shown
    _style: dict[str, Any]

    @classmethod
    def of(cls, ids: NDArray[np.int64], values: NDArray, shown: NDArray[np.bool_], **style: Any) -> _TopLabels:
        """Labels (layers, tokens) of ``ids`` and ``values`` (batch, layers, tokens, k), which are not copied."""
        made = cls.__new__(cls)
        made._layers, made._style = (ids, values, shown), style
        return made

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers, tokens)."""
        return super().shape if self._layers is None else self._layers[2].shape

    @functools.cached_property
    def label_strings(self) -> NDArray[np.str_]:  # type: ignore[override]
        """The top tokens."""
        ids, _, shown = self._made_of()
        return np.where(shown, _consolidate_labels_from_batch(self._tokens(ids[..., 0]), 1), "")

    @functools.cached_property
    def hover_over_entries(self) -> NDArray[np.str_] | None:  # type: ignore[override]
        """The tables of tokens and values."""
        ids, values, _ = self._made_of()
        entries = self._style["entries"]
        values = np.char.mod(self._style["template"], values[:entries] * 100)
        return _hover_over_entries(self._tokens(ids[:entries]), values, entries)

    def stride(self, stride: int) -> TrajectoryLabels:
        """Those of every ``stride``-th layer and of the last."""
        if self._layers is None:
            return super().stride(stride)
        check_stride(stride)
        ids, values, shown = self._layers
        ids, values = (_stride_keep_last(each.swapaxes(0, 1), stride).swapaxes(0, 1) for each in (ids, values))
        left = self.of(ids, values, _stride_keep_last(shown, stride), **self._style)
        for name in vars(self).keys() & {"label_strings", "hover_over_entries"}:  # made, or set by the caller
            value = getattr(self, name)
            setattr(left, name, None if value is None else _stride_keep_last(value, stride))
        return left

    def _made_of(self) -> tuple[NDArray, NDArray, NDArray]:
        assert self._layers is not None, "the strings are given"
        return self._layers

    def _tokens(self, ids: NDArray[np.int64]) -> NDArray[np.str_]:
        return self._style["formatter"].vectorized_format(_ids_to_tokens(ids, self._style["tokenizer"]))


def _hover_over_entries(tokens: NDArray[np.str_], values: NDArray[np.str_], most: int) -> NDArray[np.str_]:
    """See :meth:`PredictionTrajectory._hover_over_entries`."""
    columns = np.stack([tokens, values], -1).reshape(-1, *tokens.shape[-3:], 2)
    shown = np.moveaxis(columns[:most], 0, -2)
    return shown.reshape(*shown.shape[:-2], -1)


def _array(name: str, ids: Any) -> NDArray[np.int64]:
    """Token ids of any kind as int64."""
    found = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if found.size and found.dtype.kind not in "iu":
        raise TypeError(f"{name}: got {found.dtype}, wanted integers")
    return found.astype(np.int64)


def _select_values_along_seq_axis(values: NDArray, targets: NDArray[np.int64]) -> NDArray:
    """``values`` (*batch, layers, tokens, vocab) at one token of the vocabulary (*batch, tokens) each."""
    return np.take_along_axis(values, targets[..., None, :, None], axis=-1).squeeze(-1)


def _ids_to_tokens(ids: NDArray[np.int64], tokenizer: Tokenizer) -> NDArray:
    """Tokens as the tokenizer spells them; None for an id of -1."""
    different = np.unique(ids)
    known = [int(token) for token in different if token >= 0]
    spelt: dict[int, Any] = dict(zip(known, tokenizer.convert_ids_to_tokens(known), strict=True))
    return np.array([spelt.get(token) for token in ids.reshape(-1).tolist()]).reshape(ids.shape)


def _consolidate_labels_from_batch(
    tokens: NDArray[np.str_], n_batch_axes: int, het_token_repr: str = "*"
) -> NDArray[np.str_]:
    """Labels (*axes) of tokens (*batch, *axes), and ``het_token_repr`` where the batch has several."""
    first = tokens.reshape(-1, *tokens.shape[n_batch_axes:])[0]
    return np.where((tokens == first).all(axis=tuple(range(n_batch_axes))), first, het_token_repr)
