"""``python -m tuned_lens_fast``: the command line."""

import sys
from typing import Any

from tuned_lens_fast.cli import main


def __getattr__(name: str) -> Any:
    if name == "Main":
        raise AttributeError("tuned_lens_fast.__main__ has no Main: main(argv) takes the command line's arguments")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main())
