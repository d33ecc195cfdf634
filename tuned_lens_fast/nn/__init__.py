"""Lenses and the unembedding they share with their model."""

from tuned_lens_fast.nn.lenses import Lens, LogitLens, TunedLens, TunedLensConfig
from tuned_lens_fast.nn.unembed import InversionOutput, Unembed

__all__ = ["InversionOutput", "Lens", "LogitLens", "TunedLens", "TunedLensConfig", "Unembed"]
