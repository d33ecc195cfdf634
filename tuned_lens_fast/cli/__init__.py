"""The command line, ``tuned-lens-fast``: a module for each command, which says what it takes and does it.

A command's module is imported when it is used, and PyTorch with it.

Exit codes: 0; 1 for an error in the work; 2 for one in how the command was used; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import tuned_lens_fast
from tuned_lens_fast.cli.arguments import Parser, is_replaced
from tuned_lens_fast.cli.output import quiet_libraries
from tuned_lens_fast.messages import shortened

#: Each one's module, and what it is for, in the order of ``--help``.
_COMMANDS = {
    "decode": ("decode", "read texts at every layer of a model"),
    "explore": ("explore", "look at a run, or at prompts, in a browser"),
    "train": ("train", "train a tuned lens of a model"),
    "eval": ("evaluate", "measure a lens on texts, beside the logit lens and the model"),
    "info": ("info", "describe a model or a tuned lens, and the engines that work here"),
    "check": ("check", "say whether a run, written by decode --out, is complete and undamaged"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``argv`` (by default the process's own) and return its exit code."""
    args = _parse(argv)
    try:
        with quiet_libraries(args.debug):
            code: int | None = args.run(args)
    except KeyboardInterrupt:
        resumes = getattr(args, "resumes", lambda args: False)(args)
        print(f"tuned-lens-fast: interrupted{'; the same command resumes' if resumes else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has gone. Keep the interpreter's last flush from complaining too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"tuned-lens-fast: error: {shortened(error, 1000) or type(error).__name__}", file=sys.stderr)
        return 1
    return code or 0


def _parser() -> Parser:
    parser = Parser(prog="tuned-lens-fast", description="What a language model believes at every layer.")
    parser.add_argument("--version", action="version", version=f"tuned-lens-fast {tuned_lens_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)
    for name, (_, purpose) in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        command.set_defaults(parser=command)
    return parser


class _Command(Parser):
    """A command's parser, which gets its arguments when there are some to parse."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.get_default("run") is None:
            import_module(f"{__name__}.{_COMMANDS[self.prog.split()[-1]][0]}").add(self)
            self.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
        return super().parse_known_args(args, namespace)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    if is_replaced(argv):
        from tuned_lens_fast.cli.replaced import translated

        argv = translated(argv)
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "check"):
        args.check(args.parser, args, rest)
    if rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args
