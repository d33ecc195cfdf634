"""Logit and tuned lenses for every layer of a language model, without ever writing the logits.

The way from hidden state to statistics: ``models`` finds how a model ends and what passes through its blocks, ``nn``
holds the lenses, ``decode`` checks what is asked and returns a ``LensStats``, ``engines`` compute it (``kernels`` are
what the GPU engine runs), and ``data`` puts on disk what is too much to keep. ``training`` goes it backwards.
"""

from importlib.metadata import version

from tuned_lens_fast import load_artifacts, model_surgery, nn
from tuned_lens_fast.data.dataset import decode_documents
from tuned_lens_fast.decode import decode_model
from tuned_lens_fast.engines import engines
from tuned_lens_fast.models.residual_stream import residual_stream
from tuned_lens_fast.nn import Lens, LogitLens, TunedLens, TunedLensConfig, Unembed
from tuned_lens_fast.stats import LensStats
from tuned_lens_fast.training import TrainingReport, train
from tuned_lens_fast.training.evaluation import Evaluation, evaluate

__version__ = version("tuned-lens-fast")

__all__ = [
    "Evaluation",
    "Lens",
    "LensStats",
    "LogitLens",
    "TrainingReport",
    "TunedLens",
    "TunedLensConfig",
    "Unembed",
    "__version__",
    "decode_documents",
    "decode_model",
    "engines",
    "evaluate",
    "load_artifacts",
    "model_surgery",
    "nn",
    "residual_stream",
    "train",
]
