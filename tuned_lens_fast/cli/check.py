"""``tuned-lens-fast check``: whether a run that decode wrote is complete and undamaged."""

from __future__ import annotations

import argparse
from pathlib import Path

from tuned_lens_fast.data.parts import check_run


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """The command's arguments."""
    command = commands.add_parser("check", help="say whether a run, written by decode --out, is complete and undamaged")
    command.set_defaults(run=run)
    command.add_argument("folder", type=Path, metavar="RUN", help="the folder")
    return command


def run(args: argparse.Namespace) -> int:
    state = check_run(args.folder)
    print(state)
    return 0 if state.complete else 1
