"""A decoded text as one figure for a paper: a statistic as colours, the likeliest tokens as text."""

from __future__ import annotations

import html
import importlib.util
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from tuned_lens_fast.messages import quoted
from tuned_lens_fast.plotting.encode import DRAWN, WATCHED_SPAN, Drawn, drawn_names, usual_span, visible_line
from tuned_lens_fast.plotting.tokens import NO_TOKEN, fit, layer_names, one_text, token_texts, watched_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuned_lens_fast.stats import LensStats

_LETTERS = 9  #: of a token that a cell has room for


def figure(
    stats: LensStats,
    tokenizer: PreTrainedTokenizerBase | None = None,
    input_ids: Tensor | None = None,
    *,
    statistic: str = "max_prob",
    backend: Literal["matplotlib", "plotly"] = "matplotlib",
    colours: str = "viridis",
) -> Any:
    """A heatmap of one statistic: layers down, the text across, each cell the likeliest token there.

    Args:
        stats: of one text, ``[layers, positions]`` or a batch of one; every position is drawn,
            ``stats[:, 10:30]`` draws some.
        tokenizer: None leaves tokens out.
        input_ids: ``[positions]``, what was read, above the columns; None: their numbers.
        statistic: a field of ``stats``, such as "kl", or a name in ``stats.watch``; ranks are coloured by their
            logarithm.
        backend: whose figure it is.
        colours: the name of a scale that ``backend`` has.

    Returns:
        a ``matplotlib.figure.Figure`` or a ``plotly.graph_objects.Figure``.

    Raises:
        ValueError: no such statistic or backend, or shapes that differ.
        ModuleNotFoundError: ``backend`` is not installed.
    """
    if backend not in ("matplotlib", "plotly"):
        raise ValueError(f'backend: got {quoted(backend)}, wanted "matplotlib" or "plotly"')
    stats, input_ids = one_text(stats, input_ids, tokenizer)
    if not stats.lse.numel():
        raise ValueError(f"stats: got shape {[*stats.lse.shape]}, wanted [layers, positions] of one text")
    named = drawn_names(stats)
    watched = (
        {}
        if stats.watch_log_probs is None
        else dict(zip(watched_names(stats), stats.watch_log_probs.unbind(-1), strict=True))
    )
    if statistic not in (*named, *watched):
        raise ValueError(f"statistic: got {quoted(statistic)}, wanted one of {', '.join([*named, *watched])}")
    if input_ids is not None and input_ids.shape != stats.lse.shape[1:]:
        raise ValueError(f"input_ids: got shape {[*input_ids.shape]}, wanted {[*stats.lse.shape[1:]]}")
    if importlib.util.find_spec(backend) is None:
        raise ModuleNotFoundError(f"backend: {backend} is not installed: pip install {backend}")
    if statistic in named:
        drawn, found = DRAWN[statistic], getattr(stats, statistic).cpu()
    else:
        title = f"log-probability of {visible_line(statistic)}, nats"
        drawn, found = Drawn(statistic, statistic, title, WATCHED_SPAN), watched[statistic].cpu()
    values = found.double().numpy()
    if drawn.log:
        values = np.log10(np.where(values > 0, values, np.nan))
    read, top = (None if ids is None else ids.cpu() for ids in (input_ids, stats.top_ids))
    across = [str(position) for position in range(values.shape[1])]
    words = [[""] * values.shape[1] for _ in range(values.shape[0])]
    if tokenizer is not None:
        first = torch.full((0, 0), NO_TOKEN) if top is None else top[..., 0]
        texts = token_texts(tokenizer, [*first.flatten().tolist(), *([] if read is None else read.tolist())])
        if top is not None:
            words = [[fit(texts[token], _LETTERS) for token in row] for row in first.tolist()]
        if read is not None:
            across = [fit(texts[token], _LETTERS) for token in read.tolist()]
    title = f"log10 of {drawn.title}" if drawn.log else drawn.title
    span = None if drawn.log else drawn.span or usual_span(found, False)
    draw = _matplotlib if backend == "matplotlib" else _plotly
    return draw(values, words, across, layer_names(stats), title, span, colours)


def _matplotlib(
    values: np.ndarray,
    words: list[list[str]],
    across: list[str],
    layers: list[str],
    title: str,
    span: tuple[float, float] | None,
    colours: str,
) -> Any:
    from matplotlib.figure import Figure

    rows, columns = values.shape
    drawing = Figure(figsize=(1.6 + 0.72 * columns, 0.9 + 0.24 * rows), layout="constrained")
    axes = drawing.subplots()
    low, high = span or (None, None)
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    # Without parse_math a token such as $x$ would be read as mathematics.
    axes.set_xticks(range(columns), across, parse_math=False, fontsize=8)
    axes.set_yticks(range(rows), layers, fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_ylabel("layer")
    axes.spines[:].set_visible(False)
    for row, line in enumerate(words):
        for column, word in enumerate(line):
            red, green, blue, _ = image.to_rgba(values[row, column])
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 and np.isfinite(values[row, column])
            ink = "white" if dark else "black"
            axes.text(
                column, row, word, ha="center", va="center", fontsize=7, color=ink, parse_math=False, clip_on=True
            )
    # Pointed where values lie beyond the scale.
    below, above = (bool((values < image.norm.vmin).any()), bool((values > image.norm.vmax).any()))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
    drawing.colorbar(image, ax=axes, label=title, pad=0.01, extend=extend)
    return drawing


def _plotly(
    values: np.ndarray,
    words: list[list[str]],
    across: list[str],
    layers: list[str],
    title: str,
    span: tuple[float, float] | None,
    colours: str,
) -> Any:
    import plotly.graph_objects as go

    def plain(text: str) -> str:
        """For labels that understand a few tags, and mathematics between dollar signs."""
        return html.escape(text, quote=False).replace("$", "&#36;")

    low, high = span or (None, None)
    rows, columns = values.shape
    trace = go.Heatmap(
        z=values,
        text=[[plain(word) for word in line] for line in words],
        texttemplate="%{text}",
        colorscale=colours,
        zmin=low,
        zmax=high,
        colorbar={"title": {"text": title, "side": "right"}},
        hovertemplate="%{text}<br>%{z:.3f}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    labels = [plain(text) for text in across]
    return go.Figure(trace).update_layout(
        width=160 + 64 * columns,
        height=110 + 22 * rows,
        margin={"l": 60, "r": 20, "t": 40, "b": 20},
        plot_bgcolor="#eceff2",
        xaxis={
            "side": "top", "tickmode": "array", "tickvals": [*range(columns)], "ticktext": labels, "showgrid": False,
        },
        yaxis={
            "autorange": "reversed", "tickmode": "array", "tickvals": [*range(rows)], "ticktext": layers,
            "title": {"text": "layer"}, "showgrid": False,
        },
    )  # fmt: skip
