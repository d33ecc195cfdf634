"""The statistics of a decoded model as pictures: a table for the terminal, a heatmap for the browser, trajectories.

This is the end of the way. The first two read a finished ``LensStats`` and the tokenizer; a trajectory, as tuned-lens
has them, holds hidden states and decodes when it is asked.
"""

from tuned_lens_fast.plotting.heatmap import heatmap_page
from tuned_lens_fast.plotting.prediction_trajectory import PredictionTrajectory
from tuned_lens_fast.plotting.table import print_table
from tuned_lens_fast.plotting.token_formatter import TokenFormatter
from tuned_lens_fast.plotting.trajectory_plotting import TrajectoryLabels, TrajectoryStatistic

__all__ = [
    "PredictionTrajectory",
    "TokenFormatter",
    "TrajectoryLabels",
    "TrajectoryStatistic",
    "heatmap_page",
    "print_table",
]
