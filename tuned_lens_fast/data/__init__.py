"""Statistics that are too many to keep: documents in, a Parquet data set out, whole whatever happens in between.

This is the far end of the way from hidden state to statistics. ``chunk_and_tokenize`` stands before its beginning.
"""

from tuned_lens_fast.data.chunking import chunk_and_tokenize, get_columns_all_equal
from tuned_lens_fast.data.parts import load_run

__all__ = ["chunk_and_tokenize", "get_columns_all_equal", "load_run"]
