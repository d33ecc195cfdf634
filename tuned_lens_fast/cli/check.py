"""``tuned-lens-fast check``: whether a run that decode wrote is complete and undamaged."""

from __future__ import annotations

import argparse
from pathlib import Path

from tuned_lens_fast.data.parts import check_run


def add(command: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    command.set_defaults(run=run)
    command.add_argument("folder", type=Path, metavar="RUN", help="the folder")


def run(args: argparse.Namespace) -> int:
    state = check_run(args.folder)
    print(state)
    return 0 if state.complete else 1
