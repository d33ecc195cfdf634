"""Lenses and the unembedding they share with their model."""

from tuned_lens_fast.nn.lenses import Lens, LogitLens, TunedLens, TunedLensConfig
from tuned_lens_fast.nn.unembed import Unembed

__all__ = ["Lens", "LogitLens", "TunedLens", "TunedLensConfig", "Unembed"]
