"""A statistic of a trajectory with its labels, and plotly's heatmap of it: layers up, positions across."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: Characters that are not seen and make labels differ: plotly draws equal ones in one place.
_UNSEEN = ("\u200b", "\u200c")


class ShapeError(AssertionError, ValueError):
    """Arrays that do not fit each other. An AssertionError too, since tuned-lens raises one."""


def trunc_string_left(string: str, new_len: int) -> str:
    """The last ``new_len`` characters of ``string``, with spaces before them where it has fewer."""
    return string[-new_len:].rjust(new_len) if new_len > 0 else ""


@dataclass
class TrajectoryLabels:
    """What is written into the cells of a figure, and shown where one points at them."""

    label_strings: NDArray[np.str_]  #: [layers, tokens]
    hover_over_entries: NDArray[np.str_] | None = None  #: [layers, tokens, rows, columns], a table for each cell

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers, tokens)."""
        return self.label_strings.shape

    def stride(self, stride: int) -> TrajectoryLabels:
        """Those of every ``stride``-th layer and of the last."""
        check_stride(stride)
        entries = self.hover_over_entries
        return replace(
            self,
            label_strings=_stride_keep_last(self.label_strings, stride),
            hover_over_entries=None if entries is None else _stride_keep_last(entries, stride),
        )

    def template_and_customdata(self, col_width_limit: int = 10) -> tuple[str, NDArray[np.str_]]:
        """The tables as plotly's ``hovertemplate`` and ``customdata`` ``[layers, tokens, rows * columns]``.

        A column is as wide as its longest entry and a space, at most ``col_width_limit``.
        """
        if self.hover_over_entries is None:
            raise ValueError("hover_over_entries: there are none to make a template of")
        entries = self.hover_over_entries.astype(np.str_)
        rows, columns = entries.shape[-2:]
        widths = np.minimum(np.char.str_len(entries).max(axis=(0, 1, 2)) + 1, col_width_limit)
        cut = np.vectorize(trunc_string_left, otypes=[np.str_])(entries, widths) if entries.size else entries
        template = "".join(
            "".join(f"%{{customdata[{row * columns + column}]}}" for column in range(columns)) + "<br>"
            for row in range(rows)
        )
        return template + "<extra></extra>", cut.reshape(*entries.shape[:2], rows * columns)


@dataclass
class TrajectoryStatistic:
    """One number for every layer and position, and how to draw it."""

    name: str
    stats: NDArray[np.float32]  #: [layers, tokens]
    sequence_labels: NDArray[np.str_] | None = None  #: [tokens], the input's
    trajectory_labels: TrajectoryLabels | None = None
    units: str | None = None
    max: float | None = None  #: of the colour scale; that of ``stats`` if None
    min: float | None = None
    includes_output: bool = True  #: whether the last layer is the model's own output
    _layer_labels: NDArray[np.str_] | None = None

    def __post_init__(self) -> None:
        if self.stats.ndim != 2:
            raise ShapeError(f"stats: got shape {[*self.stats.shape]}, wanted [layers, tokens]")
        labels = self.trajectory_labels
        if labels is not None and labels.shape != self.stats.shape:
            raise ShapeError(f"trajectory_labels: got {[*labels.shape]} labels, wanted {[*self.stats.shape]}")
        if self.sequence_labels is not None and self.sequence_labels.shape[-1] != self.stats.shape[-1]:
            raise ShapeError(
                f"sequence_labels: got {self.sequence_labels.shape[-1]}, wanted {self.stats.shape[-1]} as tokens"
            )
        if self._layer_labels is None:
            names = [str(layer) for layer in range(len(self.stats))]
            if self.includes_output and names:
                names[-1] = "output"
            self._layer_labels = np.array(names, dtype=np.str_)

    def clip(self, min: float, max: float) -> TrajectoryStatistic:
        """The same with values, and the colour scale, between ``min`` and ``max``."""
        if not min < max:
            raise ShapeError(f"min: got {min}, wanted less than max, {max}")
        return replace(self, stats=np.clip(self.stats, min, max), max=max, min=min)

    def stride(self, stride: int) -> TrajectoryStatistic:
        """That of every ``stride``-th layer and of the last."""
        check_stride(stride)
        labels, layers = self.trajectory_labels, self._layer_labels
        return replace(
            self,
            stats=_stride_keep_last(self.stats, stride),
            trajectory_labels=None if labels is None else labels.stride(stride),
            _layer_labels=None if layers is None else _stride_keep_last(layers, stride),
        )

    def heatmap(self, colorscale: str = "rdbu_r", log_scale: bool = False, **kwargs: Any) -> go.Heatmap:
        """Plotly's ``Heatmap``: layers up, tokens across.

        Args:
            colorscale: plotly's name of one.
            log_scale: colour by the logarithm; what is not positive stays blank.
            kwargs: other properties of the ``Heatmap``, or other values of those that are set here.

        Raises:
            ImportError: plotly is not installed.
        """
        go = _plotly()
        stats = np.asarray(self.stats, dtype=float)
        title = self.name if not self.units else f"{self.name} ({self.units})"
        colorbar: dict[str, Any] = {"title": {"text": title, "side": "right"}}
        shown = stats[np.isfinite(stats) & ((stats > 0) | (not log_scale))]
        low = self.min if self.min is not None and (self.min > 0 or not log_scale) else shown.min(initial=np.inf)
        high = self.max if self.max is not None else shown.max(initial=-np.inf)
        if not low <= high:  # nothing is shown
            low, high = (1.0, 1.0) if log_scale else (0.0, 0.0)
        z = stats
        if log_scale:
            z = np.log10(stats, where=stats > 0, out=np.full_like(stats, np.nan))
            low, high = np.log10(low), np.log10(high)
            ticks = np.arange(np.ceil(low), np.floor(high) + 1)
            colorbar |= {"tickmode": "array", "tickvals": ticks, "ticktext": [f"10^{tick:.0f}" for tick in ticks]}
        properties: dict[str, Any] = {
            "y": self._layer_labels, "z": z, "zmin": low, "zmax": high, "colorscale": colorscale, "colorbar": colorbar,
        }  # fmt: skip
        if self.sequence_labels is not None:
            properties["x"] = [f"{label}{_unseen(i)}" for i, label in enumerate(self.sequence_labels)]
        if self.trajectory_labels is not None:
            properties |= {"text": self.trajectory_labels.label_strings, "texttemplate": "<b>%{text}</b>"}
            if self.trajectory_labels.hover_over_entries is not None:
                template, customdata = self.trajectory_labels.template_and_customdata()
                properties |= {
                    "hoverlabel": {"bgcolor": "rgb(42, 42, 50)", "font": {"family": "Monospace"}},
                    "customdata": customdata,
                    "hovertemplate": template,
                }
        return go.Heatmap(**(properties | kwargs))

    def figure(self, title: str = "", colorscale: str = "rdbu_r", token_width: int = 80) -> go.Figure:
        """A plotly figure of :meth:`heatmap`, ``token_width`` pixels a token.

        Raises:
            ImportError: plotly is not installed.
        """
        return (
            _plotly()
            .Figure(self.heatmap(colorscale))
            .update_layout(
                title_text=title,
                title_x=0.5,
                width=200 + token_width * self.stats.shape[1],
                xaxis_title="Input",
                yaxis_title="Layer",
            )
        )


def _stride_keep_last(x: NDArray, stride: int) -> NDArray:
    """Every ``stride``-th of the first axis, and the last."""
    return np.concatenate([x[:-1:stride], x[-1:]])


def check_stride(stride: int) -> None:
    """Raises ShapeError unless it is a number of layers."""
    if stride < 1:
        raise ShapeError(f"stride: got {stride}, wanted a positive number of layers")


def _unseen(number: int) -> str:
    """A different one for every number, as short as its binary digits."""
    return "".join(_UNSEEN[int(digit)] for digit in f"{number:b}")


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError("figures need plotly: pip install 'tuned-lens-fast[plot]'") from error
    return go
