"""What the commands' arguments are made of: a parser that errs on one line, and values read from text."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from tuned_lens_fast.messages import quoted, shortened

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


#: What the commands' help says of it.
ALSO = "A command line of tuned-lens, with --model.name, runs too: docs/differences.md has what becomes of its flags."


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tuned-lens-fast: error: {shortened(message)} (see {self.prog} --help)\n")


def is_replaced(argv: Sequence[str]) -> bool:
    """Whether a command line is of the replaced library: it has ``--model.name``."""
    return any(word.partition("=")[0] == "--model.name" for word in argv)


def positive(text: str) -> int:
    # As many digits as 64 bits have.
    if not re.fullmatch(r"\d{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {quoted(text)}, wanted a whole number from 1")
    return int(text)


def whole(text: str) -> int:
    return 0 if text == "0" else positive(text)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {quoted(text)}, wanted a number from 0")
    return value


def layer_numbers(text: str) -> list[int]:
    """ "0,5,10-20" as sorted numbers."""
    numbers: set[int] = set()
    for part in text.split(","):
        # No model has 10,000 layers, and a range may not be any number of them.
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise argparse.ArgumentTypeError(f'got {quoted(text)}, wanted layers such as "0,5,10-20"')
        numbers.update(range(low, high + 1))
    return sorted(numbers)


def byte_count(text: str) -> int:
    """ "256MiB" as a number of bytes."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if not match or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"got {quoted(text)}, wanted a size such as 256MiB or 1GB")
    return int(float(match[1]) * _UNITS[match[2]])


def add_model_options(command: argparse.ArgumentParser) -> None:
    """How MODEL is loaded."""
    group = command.add_argument_group("the model")
    group.add_argument("--gguf-file", metavar="NAME", help="the file in MODEL that holds its weights as GGUF")
    group.add_argument(
        "--revision",
        default="main",
        metavar="NAME",
        help="of MODEL on the hub: a branch, tag or commit (default: main)",
    )
    group.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the model's weights (default: as they are stored; float32 for GGUF)",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that MODEL brings, which can do all that you can (default: refuse such a model)",
    )
    place = group.add_mutually_exclusive_group()
    place.add_argument("--device", help="such as cpu or cuda:0 (default: cuda if there is one)")
    place.add_argument(
        "--device-map",
        choices=["auto", "balanced", "balanced_low_0", "sequential"],
        help="spread the model over all GPUs, and what does not fit over CPU and disk, as accelerate calls it",
    )


def add_engine_options(command: argparse.ArgumentParser) -> None:
    """How layers are read."""
    from tuned_lens_fast.engines import ENGINES

    command.add_argument(
        "--chunk", type=positive, metavar="N", help="positions that run at once (default: what the budget allows)"
    )
    command.add_argument(
        "--engine", choices=["auto", *ENGINES], default="auto", help="what reads the layers (default: auto)"
    )
    command.add_argument(
        "--memory-budget",
        type=byte_count,
        metavar="SIZE",
        help="scratch that the lens may use, such as 1GiB or a number of bytes (default: 256MiB, on a GPU a sixteenth "
        "of its memory)",
    )
