"""The statistics of a decoded model as pictures: a table, a page to explore, a figure for a paper.

This is the end of the way. All of these read a finished ``LensStats`` and the tokenizer; a trajectory, as tuned-lens
has them, holds hidden states and decodes when it is asked.
"""

from tuned_lens_fast.plotting.figure import figure
from tuned_lens_fast.plotting.heatmap import NotebookPage, compare_page, heatmap_page
from tuned_lens_fast.plotting.prediction_trajectory import PredictionTrajectory
from tuned_lens_fast.plotting.table import print_table
from tuned_lens_fast.plotting.token_formatter import TokenFormatter
from tuned_lens_fast.plotting.trajectory_plotting import TrajectoryLabels, TrajectoryStatistic

__all__ = [
    "NotebookPage",
    "PredictionTrajectory",
    "TokenFormatter",
    "TrajectoryLabels",
    "TrajectoryStatistic",
    "compare_page",
    "figure",
    "heatmap_page",
    "print_table",
]
