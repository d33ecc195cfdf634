"""The terminal's picture of a decoded model: layers down, positions across, each cell the top token there."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tuned_lens_fast.plotting.tokens import NO_TOKEN, fit, layer_names, one_text, token_texts, visible, watched_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuned_lens_fast.stats import LensStats

#: Widest cell; longer tokens are cut.
CELL = 12
#: Stops of the viridis scale at probabilities 0, 1/4, 1/2, 3/4 and 1.
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def _style(probability: float, bold: bool = False) -> Style:
    """Background for a probability in [0, 1] (NaN: none), and black or white, as reads well on it."""
    if probability != probability:
        return Style(bold=bold)
    at = min(max(probability, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(at), len(_VIRIDIS) - 2)
    rgb = [round(a + (at - low) * (b - a)) for a, b in zip(_VIRIDIS[low], _VIRIDIS[low + 1], strict=True)]
    light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 120
    colour = "#{:02x}{:02x}{:02x}".format(*rgb)
    return Style(color="black" if light else "white", bgcolor=colour, bold=bold)


def print_table(
    console: Console,
    stats: LensStats,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Any,
    max_positions: int = 64,
) -> None:
    """Print the top token of every layer and position, coloured by its probability.

    Positions are wrapped into blocks as wide as the terminal. Where there are no colours, the probability is
    written after the token, in percent. What was watched follows in a table of its own, of the last position shown.

    Args:
        stats: what ``decode_model`` returned for one text, ``[layers, positions]`` or a batch of one, with
            ``top_k`` >= 1; its last layer is the model's own output.
        input_ids: ``[positions]``, the text that was decoded, or what was given to ``decode_model``.
        max_positions: how many positions to show; the rest are counted in a line below.
    """
    stats, input_ids = one_text(stats, input_ids, tokenizer)
    assert input_ids is not None
    assert stats.top_ids is not None
    assert stats.top_log_probs is not None
    total = input_ids.shape[0]
    shown = min(total, max_positions)
    read = input_ids[:shown].tolist()
    following = [*input_ids[1 : shown + 1].tolist(), NO_TOKEN][:shown]
    top = stats.top_ids[:, :shown, 0].tolist()
    probabilities = stats.top_log_probs[:, :shown, 0].exp().tolist()
    texts = token_texts(tokenizer, [*read, *following, *chain.from_iterable(top)])
    names = layer_names(stats)

    colours = console.color_system is not None
    percent = 0 if colours else 4
    cell = min(CELL, max((cell_len(text) for text in texts.values()), default=1)) + percent
    label = max(len(name) for name in [*names, "layer"])
    per_block = max(1, (console.width - label) // (cell + 1))

    for start in range(0, shown, per_block):
        block = range(start, min(start + per_block, shown))
        table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="dim")
        table.add_column("layer", justify="right", style="dim", no_wrap=True, width=label)
        for position in block:
            header = Text(fit(texts[read[position]], cell), style="bold not dim")
            table.add_column(header, no_wrap=True, width=cell)
        for name, ids, values in zip(names, top, probabilities, strict=True):
            row = []
            for position in block:
                value, right = values[position], ids[position] == following[position]
                text = fit(texts[ids[position]], cell - percent)
                if not colours and value == value:
                    text += " " * (cell - percent - cell_len(text)) + f"{value:>4.0%}"
                text += " " * (cell - cell_len(text))
                row.append(Text(text, style=_style(value, bold=right) if colours else ""))
            table.add_row(name, *row)
        ahead = [Text("" if following[p] == NO_TOKEN else fit(texts[following[p]], cell)) for p in block]
        table.add_row("next", *ahead, style="dim")
        console.print(table)
        console.print()

    if stats.watch_log_probs is not None and stats.watch_log_probs.numel():
        called = [fit(visible(name), CELL) for name in watched_names(stats)]
        table = Table(*["layer", *called], box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="dim")
        for column in table.columns:
            column.justify = "right"
        for name, row in zip(names, stats.watch_log_probs[:, shown - 1].tolist(), strict=True):
            table.add_row(Text(name, style="dim"), *(f"{value:.2f}" for value in row))
        console.print(Text(f"log-probabilities at position {shown - 1}, nats", style="dim"))
        console.print(table)
        console.print()
    if colours:
        scale = Text("probability of the top token: 0 ", style="dim")
        for step in range(20):
            scale.append(" ", style=_style(step / 19))
        console.print(scale.append(" 1; bold: the token that came next", style="dim"))
    if shown < total:
        console.print(f"the first {shown} of {total} positions; --out has all", style="dim")
