"""The statistics of a decoded model as pictures: a table for the terminal and a heatmap for the browser.

This is the end of the way: everything here reads a finished ``LensStats`` and the tokenizer.
"""

from tuned_lens_fast.plotting.heatmap import heatmap_page
from tuned_lens_fast.plotting.table import print_table

__all__ = ["heatmap_page", "print_table"]
