"""``python -m tuned_lens_fast``: the command line."""

import sys

from tuned_lens_fast.cli import main

sys.exit(main())
