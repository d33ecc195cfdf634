"""What the commands print: JSON, and what libraries say while they work, which is kept off the screen."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tuned_lens_fast.messages import json_text, shortened


def print_json(value: Any) -> None:
    sys.stdout.write(json_text(value) + "\n")
    sys.stdout.flush()


@contextmanager
def quiet_libraries(debug: bool) -> Iterator[None]:
    """Keep what libraries say while they load a model off the screen, our own warnings to a line each."""
    if debug:
        yield
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        yield


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        print(f"tuned-lens-fast: warning: {shortened(message, 1000)}", file=sys.stderr)
