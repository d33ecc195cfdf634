"""The statistics of a decoded model as pictures: a table for the terminal, a page to explore, a figure for a paper.

This is the end of the way: everything here reads a finished ``LensStats`` and the tokenizer.
"""

from tuned_lens_fast.plotting.figure import figure
from tuned_lens_fast.plotting.heatmap import NotebookPage, compare_page, heatmap_page
from tuned_lens_fast.plotting.table import print_table

__all__ = ["NotebookPage", "compare_page", "figure", "heatmap_page", "print_table"]
