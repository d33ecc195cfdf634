"""Statistics that are too many to keep: documents in, a Parquet data set out, whole whatever happens in between.

This is the far end of the way from hidden state to statistics.
"""

from tuned_lens_fast.data.parts import load_run

__all__ = ["load_run"]
