"""What a decode returns, and statistics of logits that a caller has at hand."""

from tuned_lens_fast.stats.distance import js_distance, js_divergence, kl_divergence
from tuned_lens_fast.stats.lens_stats import LensStats
from tuned_lens_fast.stats.logit_stats import LogitStats

__all__ = ["LensStats", "LogitStats", "js_distance", "js_divergence", "kl_divergence"]
