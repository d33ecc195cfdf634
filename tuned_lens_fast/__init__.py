"""Logit and tuned lenses for every layer of a language model, without ever writing the logits.

The way from hidden state to statistics: ``nn`` holds the lenses, ``decode`` checks what is asked and returns a
``LensStats``, ``engines`` compute it, ``kernels`` are what the GPU engine runs.
"""

from tuned_lens_fast import load_artifacts, model_surgery, nn
from tuned_lens_fast.decode import decode_model
from tuned_lens_fast.engines import engines
from tuned_lens_fast.nn import Lens, LogitLens, TunedLens, TunedLensConfig, Unembed
from tuned_lens_fast.stats import LensStats

__version__ = "0.1.0"

__all__ = [
    "Lens",
    "LensStats",
    "LogitLens",
    "TunedLens",
    "TunedLensConfig",
    "Unembed",
    "__version__",
    "decode_model",
    "engines",
    "load_artifacts",
    "model_surgery",
    "nn",
]
