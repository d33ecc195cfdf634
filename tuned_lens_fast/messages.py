"""What others wrote, as messages repeat it: names, ids, keys and whole errors, cut to what a person reads.

It stands beside the way from hidden state to statistics, where bad input is told of.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any

#: Bounds what is looked at of a nested value; :func:`quoted` then cuts what is left.
_REPR = reprlib.Repr()
_REPR.maxlevel = 2


def quoted(value: object, most: int = 60) -> str:
    """``repr(value)``, about ``most`` characters of it, however long, large or deep ``value`` is."""
    start, end = 2 * most // 3, most // 3 - 3
    if isinstance(value, str):
        text = repr(value if len(value) <= most else f"{value[:start]}...{value[-end:]}")
    else:
        text = _REPR.repr(value)
    return text if len(text) <= most + 2 else f"{text[:start]}...{text[-end:]}"


def listed(values: Collection[object], most: int = 4) -> str:
    """The first ``most`` of ``values``, each quoted, and how many more there are; "nothing" for none."""
    more = f" and {len(values) - most:,} more" if len(values) > most else ""
    return ", ".join(map(quoted, islice(values, most))) + more or "nothing"


def ranges(numbers: Iterable[int]) -> str:
    """Increasing numbers as ``--layers`` takes them: "0,5,10-20"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def shortened(text: object, most: int = 300) -> str:
    """``text`` on one line, with "…" in place of what is behind its first ``most`` characters.

    Control characters, and those that turn a line's direction, are written as escapes.
    """
    whole = str(text)
    line = " ".join(whole[: 4 * most].split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return line if len(line) <= most and len(whole) <= 4 * most else line[:most] + "…"


def json_text(value: Any) -> str:
    """``value`` as JSON on one line; what is not seen where it is printed, in strings, is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
