"""Measures a lens on text: how far each layer's reading is from the model's output, and how sure that is.

``evaluate`` runs the model over documents once, reads the hidden states of every layer with the lens and with the logit
lens, and keeps sums. No logits are ever written, and memory does not grow with the text. ``save`` writes what was
measured, ``table`` has it as rows, ``draw`` a picture of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuned_lens_fast import progress
from tuned_lens_fast.atomic_write import atomic_write
from tuned_lens_fast.data.dataset import pack, positions_at_once
from tuned_lens_fast.data.documents import read_documents
from tuned_lens_fast.decode import decode
from tuned_lens_fast.engines.interface import NO_TARGET, DecodableLens, Norm
from tuned_lens_fast.inputs import padded
from tuned_lens_fast.messages import json_text
from tuned_lens_fast.models.chunked_pass import frequencies_change_at
from tuned_lens_fast.models.forward_pass import input_device
from tuned_lens_fast.stats import LensStats
from tuned_lens_fast.streaming import Prepared, prepare
from tuned_lens_fast.validation import check_model

if TYPE_CHECKING:
    import pyarrow

#: What is measured of every layer: name -> meaning.
MEASURES = {
    "kl": "KL(model || layer), nats",
    "ce": "cross-entropy of the next token, nats",
    "entropy": "entropy of the layer's distribution, nats",
    "agreement": "share of positions whose likeliest token is the model's",
}
#: Of the intervals.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Means:
    """A mean over positions, and its confidence interval over documents, for each layer; NaN where there is none."""

    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Transfer:
    """Row i, column j: the translator of the i-th layer on the hidden states of the j-th; nats."""

    positions: int  #: that were read
    left_out: int  #: entries of all positions that were not finite
    kl: list[list[float]]  #: mean KL(model || translator i on layer j)

    @property
    def penalty(self) -> list[list[float]]:
        """What is lost against the layer's own translator, ``kl[i][j] - kl[j][j]`` (Belrose et al., arXiv:2303.08112,
        on transferability across layers; there of the cross-entropy).
        """
        return [[value - self.kl[j][j] for j, value in enumerate(row)] for row in self.kl]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured. ``lens["kl"].mean[i]`` is of layer ``layers[i]``; see :data:`MEASURES`."""

    documents: int
    positions: int
    layers: list[int]  #: those that the lens has
    lens: dict[str, Means]
    logit_lens: dict[str, Means]
    model: dict[str, Means]  #: of its own output, one entry a list; its KL is 0 and its agreement 1
    left_out: dict[str, list[int]]  #: "lens", "logit_lens", "model": positions that were not finite, by layer
    transfer: Transfer | None

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, with None for what is not finite."""
        values = asdict(self)
        if self.transfer is not None:
            values["transfer"]["penalty"] = self.transfer.penalty
        return {"confidence": CONFIDENCE, **_finite(values)}

    def save(self, path: Path) -> None:
        """Write :meth:`to_dict` as JSON, aside and renamed."""
        with atomic_write(path) as aside:
            aside.write_text(json_text(self.to_dict()) + "\n", encoding="utf-8")


def evaluate(
    model: Any,
    lens: DecodableLens,
    documents: Iterable[Tensor | Sequence[int]],
    *,
    transfer_tokens: int = 0,
    chunk: int | None = None,
    engine: str = "auto",
    memory_budget: int | None = None,
) -> Evaluation:
    """Measure ``lens``, beside the logit lens and the model itself, on documents that it was not trained on.

    Means are over positions. Documents, whole, are what is drawn at random, so the intervals are over documents: the
    ratio estimator's, r ± t s, with r = sum S_d / sum n_d of the documents' sums and positions, t the quantile of
    Student's t with D - 1 degrees of freedom, and s^2 = D / (D - 1) sum (S_d - r n_d)^2 / (sum n_d)^2 (Cochran,
    Sampling Techniques, 3rd edition, 1977, chapter 6). With one document there is no interval, and with a few that
    differ much in length it is rough.

    A position where a layer's or the model's logits hold a NaN, or a statistic is infinite, is left out of that layer's
    means and counted. The last position of a document has no next token and no part in the cross-entropy.

    Args:
        model, lens, engine: as for :func:`tuned_lens_fast.decode_model`.
        documents: token ids of each, one dimension, not empty.
        transfer_tokens: measure how translators do on other layers, on so many positions of the first documents; 0
            for not at all. It reads each position once for every two layers.
        chunk: positions that run at once, of one document or of several; as many as the budget allows if None.
        memory_budget: bytes of hidden states, statistics and scratch, the model's own activations apart; if None
            256 MiB, on a GPU a sixteenth of its memory.

    Warns:
        UserWarning: there is one document only, so no interval.

    Raises:
        ValueError, IndexError, TypeError: as :func:`tuned_lens_fast.decode_model`; also no documents.
    """
    model = check_model(model)
    held = read_documents(model, documents)
    if not isinstance(transfer_tokens, int) or isinstance(transfer_tokens, bool) or transfer_tokens < 0:
        raise ValueError(f"transfer_tokens: got {transfer_tokens!r}, wanted a number of positions, or 0")
    if len(held) == 1:
        warnings.warn("documents: there is one only, so that no confidence interval can be given", stacklevel=2)
    options: dict[str, Any] = {"chunk": chunk, "engine": engine, "memory_budget": memory_budget}
    work = _Work(model, lens, held, {"stats": ("kl", "log_prob", "entropy"), "top_k": 1, **options})
    layers = len(work.numbers)
    some = first(held, transfer_tokens)
    others = _Work(model, lens, some, {"stats": ("kl",), "targets": None, **options}) if some else None
    progress.expect((2 * layers + 1) * work.positions + (layers**2 * others.positions if others else 0))

    sums = {"lens": _Sums(layers), "logit_lens": _Sums(layers), "model": _Sums(1)}
    for batch, prepared in work:
        _read(prepared, batch, sums)
    found = {reading: sum_.means() for reading, sum_ in sums.items()}
    matrix = None if others is None else _transfer(others, sum(map(len, some)))
    left_out = {reading: sum_.left_out.tolist() for reading, sum_ in sums.items()}
    positions = sum(map(len, held))
    return Evaluation(len(held), positions, work.numbers, **found, left_out=left_out, transfer=matrix)


def table(evaluation: Evaluation) -> pyarrow.Table:
    """A row for each layer, lens and measure, and last those of the model's own output, whose layer is null.

    Columns: "layer", int64; "lens", one of "lens", "logit_lens" and "model"; "measure", see :data:`MEASURES`; "mean",
    "low" and "high", float64, null for what is not finite; "documents", all of them; "positions", those of the layer
    that were not left out.

    Raises:
        ImportError: pyarrow is not installed.
    """
    import pyarrow

    layers: list[int | None] = [*evaluation.layers]
    readings: tuple[tuple[str, list[int | None]], ...] = (("lens", layers), ("logit_lens", layers), ("model", [None]))
    rows = [
        {
            "layer": layer,
            "lens": reading,
            "measure": measure,
            **{name: values[row] for name, values in _finite(asdict(means)).items()},
            "documents": evaluation.documents,
            "positions": evaluation.positions - evaluation.left_out[reading][row],
        }
        for reading, numbers in readings
        for row, layer in enumerate(numbers)
        for measure, means in getattr(evaluation, reading).items()
    ]
    number, text = pyarrow.float64(), pyarrow.string()
    types = {"layer": pyarrow.int64(), "lens": text, "measure": text, "mean": number, "low": number, "high": number}
    schema = pyarrow.schema([*types.items(), ("documents", pyarrow.int64()), ("positions", pyarrow.int64())])
    return pyarrow.Table.from_pylist(rows, schema)


def draw(evaluation: Evaluation, path: Path) -> None:
    """Write a picture (PNG): KL by layer with its intervals, and the transfer matrix if there is one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = 1 if evaluation.transfer is None else 2
    figure = Figure(figsize=(6 * panels, 4.4), layout="constrained")
    left, *right = figure.subplots(1, panels, squeeze=False)[0]
    for label, reading in (("logit lens", evaluation.logit_lens), ("lens", evaluation.lens)):
        kl = reading["kl"]
        left.plot(evaluation.layers, kl.mean, marker=".", label=label)
        left.fill_between(evaluation.layers, [max(low, 0.0) for low in kl.low], kl.high, alpha=0.25)
    left.set(xlabel="layer", ylabel=MEASURES["kl"].replace("layer", "lens"))
    left.set_title(
        f"{evaluation.documents:,} documents, {evaluation.positions:,} positions, {CONFIDENCE:.0%} intervals"
    )
    left.set_ylim(bottom=0)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend()
    for axes in right:
        assert evaluation.transfer is not None
        image = axes.imshow(evaluation.transfer.penalty, origin="lower", cmap="viridis")
        ticks = range(0, len(evaluation.layers), math.ceil(len(evaluation.layers) / 12))
        names = [str(evaluation.layers[i]) for i in ticks]
        axes.set_xticks(ticks, names)
        axes.set_yticks(ticks, names)
        axes.set(xlabel="hidden states of layer", ylabel="translator of layer")
        axes.set_title(f"transfer penalty, {evaluation.transfer.positions:,} positions")
        figure.colorbar(image, ax=axes, label="KL beyond the layer's own translator, nats")
    with atomic_write(path) as aside:
        figure.savefig(aside, format="png", dpi=130)


class _Sums:
    """What the ratio estimator needs of one way of reading, for every measure and layer, however many documents there
    are: sums over documents of 1, n, S, n^2, n S and S^2, S being a document's sum and n its positions.
    """

    def __init__(self, layers: int) -> None:
        self._of = torch.zeros(6, len(MEASURES), layers, dtype=torch.float64)
        self.left_out = torch.zeros(layers, dtype=torch.int64)

    def add(self, total: Tensor, count: Tensor) -> None:
        """Documents' S and n, float64 ``[documents, measures, layers]``."""
        there = (count > 0).double()
        self._of += torch.stack([there, count, total, count**2, count * total, total**2]).sum(1)

    def means(self) -> dict[str, Means]:
        documents, count, total, counts, products, squares = self._of
        ratio = total / count
        # Rounding may put it below 0 where all documents are alike.
        spread = (squares - 2 * ratio * products + ratio**2 * counts).clamp(min=0)
        error = (spread * documents / (documents - 1)).sqrt() / count
        half = error * torch.tensor([[student_t(int(d) - 1) for d in row] for row in documents])
        rows = torch.stack([ratio, ratio - half, ratio + half], 1).tolist()
        return {name: Means(*of_measure) for name, of_measure in zip(MEASURES, rows, strict=True)}


def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t; NaN without degrees of freedom. Exact for 1 and 2 of them, else the
    expansion around the normal distribution's (Abramowitz and Stegun, 26.7.5), good to 4e-3 from 3 on.
    """
    if freedom < 1:
        return math.nan
    p = (1 + confidence) / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    x = NormalDist().inv_cdf(p)
    return (
        x
        + (x**3 + x) / (4 * freedom)
        + (5 * x**5 + 16 * x**3 + 3 * x) / (96 * freedom**2)
        + (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / (384 * freedom**3)
        + (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / (92160 * freedom**4)
    )


class _Work:
    """A question about documents, batch by batch: those of like length run together."""

    def __init__(self, model: Any, lens: DecodableLens, documents: Sequence[Tensor], question: dict[str, Any]) -> None:
        self._model, self._lens, self._documents, self._question = model, lens, documents, question
        lengths = [len(document) for document in documents]
        first = self._prepared([documents[max(range(len(documents)), key=lengths.__getitem__)]])
        most = question["chunk"] or positions_at_once(first, sum(lengths))
        self._batches = pack(lengths, most, apart=frequencies_change_at(model))
        self.positions = sum(len(batch) * lengths[batch[0]] for batch in self._batches)  #: padding included
        self.numbers = [*first.numbers]  #: the layers

    def _prepared(self, documents: Sequence[Tensor]) -> Prepared:
        return prepare(self._model, self._lens, *padded(documents, input_device(self._model)), **self._question)

    def __iter__(self) -> Iterator[tuple[list[Tensor], Prepared]]:
        for numbers in self._batches:
            batch = [self._documents[number] for number in numbers]
            yield batch, self._prepared(batch)


def first(documents: Sequence[Tensor], positions: int) -> list[Tensor]:
    """The first documents, the last of them cut, so that they have ``positions`` or all there are."""
    found = []
    for document in documents:
        if positions > 0:
            found.append(document[:positions])
            positions -= len(document)
    return found


def _read(prepared: Prepared, documents: Sequence[Tensor], sums: dict[str, _Sums]) -> None:
    """Add a batch to the sums of every reading."""
    head = prepared.lens.unembed.head
    lengths = torch.tensor([len(document) for document in documents], device=head.weight.device)
    lenses: dict[str, Any] = {"lens": prepared.lens, "logit_lens": _of_end(prepared.lens.unembed.norm, head)}
    shape = (len(documents), 2, len(MEASURES))
    totals = {r: torch.zeros(*shape, len(of.left_out), dtype=torch.float64) for r, of in sums.items()}
    for rows, positions, hidden, last in prepared.states():
        assert prepared.targets is not None
        targets = prepared.targets[rows, positions]
        at = torch.arange(positions.start, positions.stop, device=targets.device)
        real = at < lengths[rows, None]
        asked: dict[str, Any] = {
            "targets": targets.reshape(-1),
            "top_k": 1,
            "engine": prepared.engine.name,
            "memory_budget": prepared.plan.scratch,
        }
        own = decode(_of_end(Norm("identity"), head), [last], layers=[0], stats=("log_prob", "entropy"), **asked)
        own.kl = own.lse - own.lse  # 0, or NaN where the model's own output is
        asked |= {"reference": last, "stats": ("kl", "log_prob", "entropy"), "layers": prepared.numbers}
        for reading, of in sums.items():
            stats = own if reading == "model" else decode(lenses[reading], hidden, **asked)
            part, left_out = _measured(stats, own, targets != NO_TARGET, real)
            totals[reading][rows] += part
            of.left_out += left_out
        del hidden, last
    for reading, of in sums.items():
        of.add(*totals[reading].unbind(1))


def _measured(stats: LensStats, own: LensStats, has_target: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts of every document and measure, float64 ``[documents, 2, measures, layers]`` on the CPU, and the
    positions that are left out, ``[layers]``.

    Args:
        stats: ``[layers, rows]``.
        own: the model's, ``[1, rows]``.
        has_target, real: ``[documents, positions]``, documents x positions being the rows.
    """
    assert stats.kl is not None
    assert stats.entropy is not None
    assert stats.log_prob is not None
    assert stats.top_ids is not None
    assert own.top_ids is not None
    target, counted = has_target.reshape(-1), real.reshape(-1)
    good = stats.kl.isfinite() & stats.entropy.isfinite() & (stats.log_prob.isfinite() | ~target)
    used = good & counted
    agreement = (stats.top_ids == own.top_ids)[..., 0]
    of_measures = {
        "kl": (stats.kl, used),
        "ce": (-stats.log_prob, used & target),
        "entropy": (stats.entropy, used),
        "agreement": (agreement, used),
    }
    found = []
    for name in MEASURES:
        values, chosen = of_measures[name]
        kept = torch.where(chosen, values, 0).unflatten(1, real.shape).sum(-1, dtype=torch.float64)
        found.append(torch.stack([kept, chosen.unflatten(1, real.shape).sum(-1)]))
    # [measures, 2, layers, documents]
    return torch.stack(found).permute(3, 1, 0, 2).cpu(), (counted & ~good).sum(1).cpu()


def _transfer(work: _Work, positions: int) -> Transfer:
    """Every translator on every layer's hidden states."""
    layers = len(work.numbers)
    total = torch.zeros(layers, layers, dtype=torch.float64)
    count = torch.zeros(layers, layers, dtype=torch.int64)
    for _, prepared in work:
        for rows, at, hidden, last in prepared.states():
            mask = prepared.attention_mask
            real = slice(None) if mask is None else mask[rows, at].reshape(-1).to(last.device).bool()
            for row, number in enumerate(prepared.numbers):
                kl = decode(
                    prepared.lens,
                    hidden,
                    layers=[number] * layers,
                    reference=last,
                    stats=("kl",),
                    engine=prepared.engine.name,
                    memory_budget=prepared.plan.scratch,
                ).kl
                assert kl is not None
                kl = kl[:, real]
                total[row] += kl.nan_to_num(0, 0, 0).sum(1, dtype=torch.float64).cpu()
                count[row] += kl.isfinite().sum(1).cpu()
            del hidden, last
    return Transfer(positions, int(positions * layers**2 - count.sum()), (total / count).tolist())


def _of_end(norm: Norm, head: Any) -> Any:
    """A lens without translators, with this end of a model."""
    return SimpleNamespace(unembed=SimpleNamespace(norm=norm, head=head), translator=lambda idx: None)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
