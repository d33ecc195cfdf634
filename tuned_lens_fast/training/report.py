"""What a training run leaves beside the lens: every number that was measured, as JSON and as a picture.

At the end of training.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainingReport:
    """What was trained and how it went; losses and divergences in nats, NaN where something was not finite."""

    run: str  #: hash of all that the parameters depend on
    model: str  #: its name
    arguments: dict[str, Any]  #: of ``train``, with the defaults that were filled in
    versions: dict[str, str]  #: of this package, PyTorch, transformers and Python
    machine: dict[str, Any]  #: device and threads
    layers: list[int]  #: that were trained; lists by layer below go along these
    tokens: dict[str, int]  #: there for training, held out, evaluated on, of a step, and trained on
    init: list[dict[str, Any]]  #: by layer, the strength of the ridge regression that it began with
    losses: list[list[float]]  #: [steps][layers], the training loss before each step
    logit_lens: list[float]  #: by layer, held-out KL(model || logit lens)
    #: "step", the run's "seconds" so far, and by layer the lens's held-out "kl", and "ce" where that is trained.
    evaluations: list[dict[str, Any]]
    skipped: list[list[int]]  #: [step, layer] of each step that a layer did not take
    seconds: float  #: of all processes that worked on the run
    tokens_per_second: float  #: of the steps alone
    finished: bool

    @property
    def loss(self) -> list[float]:
        """The training loss before each step, a mean over layers."""
        return [mean(of_layers) for of_layers in self.losses]

    @property
    def kl_before(self) -> list[float]:
        """By layer, held-out KL where the first step began."""
        return self.evaluations[0]["kl"]

    @property
    def kl_after(self) -> list[float]:
        """By layer, held-out KL after the last step."""
        return self.evaluations[-1]["kl"]

    def to_json(self) -> str:
        """JSON, with null for what is not finite, and the mean loss of every step as "loss"."""
        values = {**asdict(self), "loss": self.loss}
        return json.dumps(_mapped(values, lambda x: x if math.isfinite(x) else None), indent=1)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainingReport:
        """Of what :meth:`to_json` wrote, read as JSON."""
        known = {field.name for field in fields(cls)}
        measured = ("losses", "logit_lens", "evaluations")
        return cls(**{k: _with_nan(v) if k in measured else v for k, v in values.items() if k in known})


def _mapped(value: Any, of_float: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(item, of_float) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, of_float) for item in value]
    return of_float(value) if isinstance(value, float) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


def mean(values: list[float]) -> float:
    """NaN where one of the values is, or none is there."""
    return sum(values) / len(values) if values else math.nan


def thirds(layers: int) -> dict[str, slice]:
    """Early, middle and late ones of ``layers``; fewer than three have no parts."""
    if layers < 3:
        return {"all": slice(layers)}
    ends = [round(layers * part / 3) for part in range(4)]
    return {name: slice(ends[i], ends[i + 1]) for i, name in enumerate(("early", "middle", "late"))}


def draw(report: TrainingReport, path: Path) -> None:
    """Write a picture (PNG): the loss against the step, and the KL of each layer.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(1, len(report.losses) + 1)
    for name, part in thirds(len(report.layers)).items():
        label = f"{name}: layer {span(report.layers[part])}"
        left.plot(steps, [mean(of_layers[part]) for of_layers in report.losses], linewidth=1, label=label)
    left.set(xlabel="step", ylabel=f"training loss ({report.arguments['loss']}), nats", title=Path(report.model).name)
    left.legend()
    begun = {"ridge": "after the ridge start", "lens": "as given"}.get(report.arguments["init"])
    shown = [("logit lens", report.logit_lens), *([(begun, report.kl_before)] if begun else [])]
    for label, kl in [*shown, (f"after {len(report.losses):,} steps", report.kl_after)]:
        right.plot(report.layers, kl, marker=".", label=label)
    right.set(xlabel="layer", ylabel="KL(model || lens), nats", title=f"{report.tokens['evaluated']:,} tokens held out")
    right.set_ylim(bottom=0)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    figure.savefig(path, format="png", dpi=130)


def span(layers: list[int]) -> str:
    """ "0 to 9", of layers in order."""
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
