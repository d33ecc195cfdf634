"""The browser's picture of decoded models: one self-contained page, layers down, tokens across.

``encode.py`` makes the parts, ``page/`` has the page's own sources, and this puts them into one file that needs nothing
from elsewhere: its policy lets its own script run and no other, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tuned_lens_fast.messages import quoted
from tuned_lens_fast.plotting.encode import DRAWN, drawn_names, parts
from tuned_lens_fast.plotting.tokens import one_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuned_lens_fast.stats import LensStats

#: Cells (layers x positions) that a notebook is given, about 2 MB of page; what is beyond is left out and counted.
NOTEBOOK_CELLS = 2**16


def heatmap_page(
    stats: LensStats,
    tokenizer: PreTrainedTokenizerBase | None,
    input_ids: Tensor | None,
    title: str = "Lens",
    *,
    watch: Iterable[int] | Mapping[str, Any] | None = None,
) -> str:
    """A page of HTML that shows a decoded text and needs nothing from elsewhere.

    Args:
        stats: what ``decode_model`` returned for one text, ``[layers, positions]``, or a batch of one; its last layer
            is the model's own output. The page offers each statistic that is there.
        tokenizer: None shows ids in place of tokens.
        input_ids: ``[positions]``, the text that was decoded, or what was given to ``decode_model``; None if it is not
            known.
        title: of the page, plain text.
        watch: the tokens that ``stats.watch_log_probs`` is of, in their order, so that the page can name them, or
            groups by name; what was watched by name has it from ``stats.watch`` too.

    Raises:
        ValueError: none of the statistics that a colour can stand for, no positions, or shapes that differ.
    """
    return compare_page([(title, stats, input_ids)], tokenizer, title, watch=watch)


def compare_page(
    runs: Sequence[tuple[str, LensStats, Tensor | None]],
    tokenizer: PreTrainedTokenizerBase | None,
    title: str = "Lens",
    *,
    watch: Iterable[int] | Mapping[str, Any] | None = None,
) -> str:
    """A page as :func:`heatmap_page` makes it, of several decodes: two side by side, linked, or their difference.

    Such as one text through the logit lens and a tuned lens, or two texts. Positions and layers of the same number are
    set beside each other.

    Args:
        runs: ``(name, stats, input_ids)`` of each.

    Raises:
        ValueError: as :func:`heatmap_page`, or no runs.
    """
    if not runs:
        raise ValueError("runs: got none, wanted at least one (name, stats, input_ids)")
    drawn = []
    for name, stats, input_ids in runs:
        stats, ids = one_text(stats, input_ids, tokenizer)
        _check(stats, ids)
        drawn.append((name, stats.to("cpu"), None if ids is None else ids.cpu()))
    return written(*parts(drawn, tokenizer, title, watch))


def written(header: dict[str, Any], found: dict[str, bytes]) -> str:
    """The page with these parts in it; those of a header that says it is served are fetched."""
    style, script = _source("page.css"), "\n".join(map(_source, ("data.js", "draw.js", "page.js")))
    # "<" would let a text end the script that holds it.
    first = json.dumps(header, ensure_ascii=False).replace("<", "\\u003c")
    lines = [f'<script type="application/json" id="header">{first}</script>']
    for name, part in found.items():
        lines.append(f'<script type="text/plain" id="{name}">{base64.b64encode(part).decode()}</script>')
    return Template(_source("page.html")).substitute(
        title=html.escape(header["title"]),
        policy=f"script-src {hashed(script)}; style-src {hashed(style)}; "
        + ("connect-src 'self'" if header["served"] else "connect-src 'none'"),
        style=style,
        parts="\n".join(lines),
        script=script,
    )


class NotebookPage:
    """The page as a notebook shows it: in a frame that it cannot reach out of, of at most about 3 MB."""

    def __init__(
        self, stats: LensStats, tokenizer: PreTrainedTokenizerBase | None = None, input_ids: Tensor | None = None
    ) -> None:
        """Arguments and errors: as :func:`heatmap_page`."""
        stats, input_ids = one_text(stats, input_ids, tokenizer)
        _check(stats, input_ids)
        rows, total = stats.lse.shape
        shown = min(total, max(1, NOTEBOOK_CELLS // rows))
        title = "Lens" if shown == total else f"Lens: the first {shown:,} of {total:,} positions"
        self.page = heatmap_page(stats[:, :shown], tokenizer, None if input_ids is None else input_ids[:shown], title)
        self.height = min(760, 220 + 20 * rows)  # pixels

    def _repr_html_(self) -> str:
        return (
            f'<iframe sandbox="allow-scripts allow-downloads" srcdoc="{html.escape(self.page)}" '
            f'style="width: 100%; height: {self.height}px; border: 1px solid #8884; border-radius: 6px"></iframe>'
        )


def _check(stats: LensStats, input_ids: Tensor | None) -> None:
    shape = [*stats.lse.shape]
    if not all(shape) or not drawn_names(stats):
        raise ValueError(f"stats: a page needs at least one position and layer, and one of {', '.join(DRAWN)}")
    if input_ids is not None and [*input_ids.shape] != shape[1:]:
        raise ValueError(
            f"input_ids: got shape {quoted([*input_ids.shape])}, wanted {shape[1:]}, as stats has positions"
        )


def _source(name: str) -> str:
    return (files("tuned_lens_fast.plotting") / "page" / name).read_text(encoding="utf-8")


def hashed(source: str) -> str:
    """``source`` as a policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
