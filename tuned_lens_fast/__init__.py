"""Logit and tuned lenses for every layer of a language model, without ever writing the logits.

The way from hidden state to statistics: ``models`` finds how a model ends and what passes through its blocks, ``nn``
holds the lenses, ``decode`` checks what is asked and returns a ``LensStats``, ``engines`` compute it (``kernels`` are
what the GPU engine runs), and ``data`` puts on disk what is too much to keep. ``training`` goes it backwards.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuned_lens_fast import (
        causal,
        data,
        load_artifacts,
        model_surgery,
        nn,
        plotting,
        stats,
        utils,
    )
    from tuned_lens_fast.data.dataset import decode_documents
    from tuned_lens_fast.data.stored_states import decode_states
    from tuned_lens_fast.decode import decode_model
    from tuned_lens_fast.engines import engines
    from tuned_lens_fast.models.parts import capture
    from tuned_lens_fast.models.residual_stream import residual_stream
    from tuned_lens_fast.nn import Lens, LogitLens, TunedLens, TunedLensConfig, Unembed
    from tuned_lens_fast.stats import LensStats
    from tuned_lens_fast.training import TrainingReport, train
    from tuned_lens_fast.training.evaluation import Evaluation, evaluate

__version__ = version("tuned-lens-fast")

#: Where each name is; imported when it is first used, so that the command line starts without PyTorch.
_PLACES = {
    "capture": "models.parts",
    "decode_documents": "data.dataset",
    "decode_states": "data.stored_states",
    "decode_model": "decode",
    "residual_stream": "models.residual_stream",
    **dict.fromkeys(["Lens", "LogitLens", "TunedLens", "TunedLensConfig", "Unembed"], "nn"),
    "LensStats": "stats",
    **dict.fromkeys(["TrainingReport", "train"], "training"),
    **dict.fromkeys(["Evaluation", "evaluate"], "training.evaluation"),
}
_MODULES = ("causal", "data", "load_artifacts", "model_surgery", "nn", "plotting", "stats", "utils")

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
    "capture",
    "causal",
    "data",
    "decode_documents",
    "decode_model",
    "decode_states",
    "engines",
    "evaluate",
    "load_artifacts",
    "model_surgery",
    "nn",
    "plotting",
    "residual_stream",
    "stats",
    "train",
    "utils",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _PLACES:
        found = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    @property
    def engines(self) -> Any:
        """The function, although the subpackage that it is in puts itself in its place when it is imported."""
        return import_module(f"{__name__}.engines").engines

    @engines.setter
    def engines(self, _: ModuleType) -> None: ...


if not TYPE_CHECKING:
    sys.modules[__name__].__class__ = _Package
