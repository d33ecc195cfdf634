"""The browser's picture of a decoded model: one self-contained page, layers down, tokens across.

A cell shows the top token there; its colour is one statistic, to be chosen on the page; pointing at it shows
the top k and all statistics. Built with plotly, whose script the page carries, so that it works offline.
"""

from __future__ import annotations

import html
import importlib.util
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tuned_lens_fast.plotting.tokens import fit, layer_names, token_texts

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from transformers import PreTrainedTokenizerBase

    from tuned_lens_fast.stats import LensStats

#: More positions make a page that browsers are slow with; the rest are counted in the page's heading.
MAX_POSITIONS = 512

_FONT = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Noto Sans', sans-serif"
_MONO = "'JetBrains Mono', 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_INK, _PALE = "#1f2933", "#616e7c"
_ROW, _TOP, _BOTTOM, _LEFT, _RIGHT = 21, 30, 72, 64, 24  # pixels


@dataclass(frozen=True)
class _Colouring:
    """One choice of what the colour means."""

    name: str  #: of the statistic in LensStats
    label: str
    title: str
    scale: list[str]  #: from the lowest value to the highest
    span: tuple[float, float] | None = None  #: of the colour scale; None: from 0 to where 96% are
    log: bool = False  #: colour by log10


# Strong is "has made up its mind" or "is right"; for KL, "far from what the model finally says". None is so
# dark that the tokens' one ink could not be read on it.
_TEALS = ["#fcfdf4", "#e3f2d5", "#b9e2c5", "#86cfba", "#55b9b0"]
_BLUES = ["#f7fafd", "#dbe9f7", "#b5d3f0", "#88b9e6", "#5d9fdc"]
_GREENS = ["#fbfcf3", "#e6f3d3", "#c3e5b2", "#98d391", "#6cbd74"]
_REDS = ["#fefbf4", "#fde8cc", "#fac9a0", "#f4a37d", "#ec7d66"]
_COLOURINGS = (
    _Colouring("entropy", "entropy", "entropy, nats", _TEALS[::-1]),
    _Colouring("max_prob", "top token's probability", "probability of the top token", _BLUES, (0.0, 1.0)),
    _Colouring("log_prob", "next token's log-prob", "log-prob of next token, nats", _GREENS, (-12.0, 0.0)),
    _Colouring("rank", "next token's rank", "rank of the next token", _GREENS[::-1], log=True),
    _Colouring("kl", "KL from the output", "KL(output || layer), nats", _REDS),
)


def _drawn(value: float, log: bool) -> float | None:
    """What plotly draws: no more digits than a colour shows; NaN, infinity and rank 0 stay blank."""
    if not math.isfinite(value) or (log and value < 1):
        return None
    return float(f"{math.log10(value) if log else value:.4g}")


def _coloured(stats: LensStats, colouring: _Colouring, positions: int) -> dict[str, Any]:
    """The heatmap's properties under one choice of colour, as plotly's ``restyle`` takes them."""
    rows = getattr(stats, colouring.name)[:, :positions].tolist()
    z = [[_drawn(value, colouring.log) for value in row] for row in rows]
    finite = sorted(value for row in z for value in row if value is not None) or [0.0]
    # A few outliers, such as the KL of the embedding layer, would leave one colour for all the others.
    usual = finite[-1] if colouring.log else finite[int(0.96 * (len(finite) - 1))]
    low, high = colouring.span or (0.0, max(usual, 1e-3))
    title = colouring.title if high >= finite[-1] else f"{colouring.title} (right end: or more)"
    steps = len(colouring.scale) - 1
    properties: dict[str, Any] = {
        "z": z,
        "zmin": low,
        "zmax": high,
        "colorscale": [[i / steps, colour] for i, colour in enumerate(colouring.scale)],
        "colorbar.title.text": title,
        "colorbar.tickvals": None,
        "colorbar.ticktext": None,
    }
    if colouring.log:
        decades = range(math.floor(high) + 1)
        properties["colorbar.tickvals"] = list(decades)
        properties["colorbar.ticktext"] = [f"{10**decade:,}" for decade in decades]
    return properties


def _escape(text: str) -> str:
    """``text`` for plotly's labels, which understand a few tags and entities."""
    return html.escape(text, quote=False)


def _figure(
    stats: LensStats, tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, initial: dict[str, Any]
) -> go.Figure:
    """The heatmap itself, coloured as ``initial`` says. Other arguments: see :func:`heatmap_page`."""
    import plotly.graph_objects as go

    assert stats.top_ids is not None
    positions = min(input_ids.shape[0], MAX_POSITIONS)
    names = layer_names(stats)
    read = input_ids[:positions].tolist()
    following = input_ids[1 : positions + 1].tolist()
    top = stats.top_ids[:, :positions].tolist()
    texts = token_texts(tokenizer, [*read, *following, *stats.top_ids[:, :positions].flatten().tolist()])

    cell = max(56, min(96, 1280 // positions))  # pixels; at 11 pixels a letter takes about 6.3
    letters = int((cell - 6) / 6.3)
    labels = []
    for ids in top:
        cells = []
        for position, (token, *_) in enumerate(ids):
            text = _escape(fit(texts[token], letters))
            hit = position < len(following) and token == following[position]
            cells.append(f"<b>{text}</b>" if hit else text)
        labels.append(cells)

    trace = go.Heatmap(
        text=labels,
        texttemplate="%{text}",
        textfont={"size": 11, "color": _INK},
        customdata=_hover(stats, texts, read, following, names),
        hovertemplate="%{customdata}<extra></extra>",
        xgap=1,
        ygap=1,
        colorbar={
            "orientation": "h",
            "thickness": 10,
            "lenmode": "pixels",
            "len": 340,
            "outlinewidth": 0,
            "x": 0,
            "xanchor": "left",
            "y": 0,
            "yanchor": "top",
            "ypad": 14,
            "xpad": 0,
            "title": {"side": "bottom", "font": {"size": 12, "color": _PALE}},
            "tickfont": {"size": 11, "color": _PALE},
        },
    )
    figure = go.Figure(trace).update_traces(**{key.replace(".", "_"): value for key, value in initial.items()})
    figure.update_layout(
        width=_LEFT + cell * positions + _RIGHT,
        height=_TOP + _ROW * len(names) + _BOTTOM,
        margin={"l": _LEFT, "r": _RIGHT, "t": _TOP, "b": _BOTTOM, "pad": 0},
        font={"family": _FONT, "size": 12, "color": _INK},
        paper_bgcolor="white",
        plot_bgcolor="#eef1f4",
        hoverlabel={
            "bgcolor": "white",
            "bordercolor": "#9aa5b1",
            "align": "left",
            "font": {"family": _MONO, "size": 12, "color": _INK},
        },
        xaxis={
            "side": "top",
            "tickmode": "array",
            "tickvals": list(range(positions)),
            "tickangle": 0,
            "ticks": "",
            "ticktext": [_escape(fit(texts[token], letters)) for token in read],
            "tickfont": {"size": 12, "color": _INK},
            "ticklabelstandoff": 3,
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
        yaxis={
            "autorange": "reversed",
            "tickmode": "array",
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "ticklabelstandoff": 4,
            "tickfont": {"size": 11, "color": _PALE},
            "ticks": "",
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
        # The last row is no lens's reading but what the model says: set it apart.
        shapes=[
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": len(names) - 1.5,
                "y1": len(names) - 1.5,
                "line": {"color": "white", "width": 4},
            }
        ],
    )
    return figure


def _hover(
    stats: LensStats, texts: dict[int, str], read: list[int], following: list[int], names: list[str]
) -> list[list[str]]:
    """What pointing at each cell shows. Columns are padded, so it wants a monospaced font."""
    assert stats.top_ids is not None
    assert stats.top_log_probs is not None
    positions = len(read)
    values = {
        colouring.name: getattr(stats, colouring.name)[:, :positions].tolist()
        for colouring in _COLOURINGS
        if getattr(stats, colouring.name) is not None
    }
    ids = stats.top_ids[:, :positions].tolist()
    probabilities = stats.top_log_probs[:, :positions].exp().tolist()
    rows = []
    for layer, name in enumerate(names):
        row = []
        for position in range(positions):
            heading = "the model's own output" if name == "output" else f"layer {name}"
            lines = [f"<b>{heading}, position {position}</b>", f"reads      {_escape(texts[read[position]])}"]
            at = {key: value[layer][position] for key, value in values.items()}
            if position < len(following):
                lines.append(f"next is    {_escape(texts[following[position]])}")
                if "log_prob" in at:
                    lines.append(f"  log-prob {at['log_prob']:.3f} nats")
                if "rank" in at:
                    lines.append(f"  rank     {at['rank']:,}")
            if "entropy" in at:
                lines.append(f"entropy    {at['entropy']:.3f} nats")
            if "kl" in at:
                lines.append(f"KL         {at['kl']:.3f} nats")
            lines.append("")
            for token, probability in zip(ids[layer][position], probabilities[layer][position], strict=True):
                lines.append(f"{probability:>7.2%}  {_escape(texts[token])}")
            row.append("<br>".join(lines))
        rows.append(row)
    return rows


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
  body {{ margin: 0; background: white; color: {ink}; font: 14px/1.45 {font}; }}
  header {{ position: sticky; left: 0; width: fit-content; max-width: 100vw; box-sizing: border-box;
            padding: 22px 24px 14px {left}px; }}
  h1 {{ margin: 0 0 4px; font-size: 20px; font-weight: 600; letter-spacing: -0.01em; }}
  p {{ margin: 0 0 16px; max-width: 96ch; color: {pale}; }}
  nav {{ display: inline-flex; flex-wrap: wrap; overflow: hidden; border: 1px solid #cbd2d9;
         border-radius: 7px; }}
  button {{ border: 0; border-right: 1px solid #cbd2d9; padding: 6px 14px; background: white; color: {ink};
            font: inherit; font-size: 13px; cursor: pointer; }}
  button:last-child {{ border-right: 0; }}
  button:hover {{ background: #f0f3f6; }}
  button[aria-pressed=true] {{ background: {ink}; color: white; }}
</style>
</head>
<body>
<header><h1>{title}</h1><p>{note}</p><nav aria-label="Colour">{buttons}</nav></header>
{figure}
<script>
  const choices = {choices};
  const buttons = document.querySelectorAll("nav button");
  buttons.forEach((button, i) => button.addEventListener("click", () => {{
    buttons.forEach((other) => other.setAttribute("aria-pressed", other === button));
    Plotly.restyle("heatmap", choices[i]);
  }}));
</script>
</body>
</html>
"""


def heatmap_page(stats: LensStats, tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, title: str = "Lens") -> str:
    """A page of HTML that shows a decoded text and needs nothing from elsewhere.

    Args:
        stats: what ``decode_model`` returned for one text, ``[layers, positions]``, with ``top_k`` >= 1;
            its last layer is the model's own output. Statistics that it lacks are not offered as colours.
        input_ids: ``[positions]``, the text that was decoded; at most the first ``MAX_POSITIONS`` are drawn.
        title: of the page, plain text.

    Raises:
        ValueError: no top tokens, none of the statistics that a colour can stand for, or no positions.
        ModuleNotFoundError: plotly is not installed.
    """
    if importlib.util.find_spec("plotly") is None:
        raise ModuleNotFoundError("the heatmap needs plotly: pip install plotly")
    colourings = [colouring for colouring in _COLOURINGS if getattr(stats, colouring.name) is not None]
    total = input_ids.shape[0]
    if stats.top_ids is None or not colourings or not total:
        raise ValueError(
            "stats: a heatmap needs at least one position, top_k >= 1 and one of "
            + ", ".join(colouring.name for colouring in _COLOURINGS)
        )
    choices = [_coloured(stats, colouring, min(total, MAX_POSITIONS)) for colouring in colourings]
    note = (
        "Layers down, the text across. Each cell holds the token that the layer finds likeliest to come "
        "next, in bold where it is the one that came; the last row is the model's own output. Point at a "
        "cell for more."
    )
    if total > MAX_POSITIONS:
        note += f" Shown: the first {MAX_POSITIONS} of {total:,} positions."
    figure = _figure(stats, tokenizer, input_ids, choices[0])
    return _PAGE.format(
        title=html.escape(title),
        note=html.escape(note),
        buttons="".join(
            f'<button aria-pressed="{"false" if i else "true"}">{html.escape(colouring.label)}</button>'
            for i, colouring in enumerate(colourings)
        ),
        figure=figure.to_html(
            full_html=False, include_plotlyjs=True, div_id="heatmap", config={"displayModeBar": False}
        ),
        # restyle takes a list with one entry for every trace
        choices=json.dumps([{key: [value] for key, value in choice.items()} for choice in choices]),
        ink=_INK,
        pale=_PALE,
        font=_FONT,
        left=_LEFT,
    )
