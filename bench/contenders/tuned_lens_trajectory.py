"""tuned-lens 0.2.0: PredictionTrajectory.from_lens_and_cache, then its methods for what was asked.

Its lens is built of the very tensors the others read. It keeps the log-probabilities of all layers and positions.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from presets import Problem
from torch import Tensor, nn

from contenders.adapter import Answer, Contender, importable

#: Peak of memory over that of the log-probabilities of all layers: rank sorts twice into int64.
COPIES = 9


class _Cache(dict):
    """As much of TransformerLens's ActivationCache as from_lens_and_cache reads: the layers and a tokenizer."""

    def __init__(self, hidden: list[Tensor]) -> None:
        super().__init__({("resid_pre", layer): h for layer, h in enumerate(hidden)})
        self.model = SimpleNamespace(tokenizer=None, cfg=SimpleNamespace(n_layers=len(hidden)))


class _Module(nn.Module):
    """A final norm as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h.float()).to(h.dtype)


def trainable_lens(problem: Problem) -> nn.Module:
    """Its TunedLens with the problem's tensors in it."""
    from tuned_lens.nn import TunedLens, TunedLensConfig, Unembed

    vocab, d_model = problem.head.weight.shape
    unembed = Unembed.__new__(Unembed)  # its __init__ wants a whole model, and copies what it needs of it
    nn.Module.__init__(unembed)
    unembed.final_norm = _Module(problem.norm)
    with torch.device("meta"):
        unembed.unembedding = nn.Linear(d_model, vocab, bias=problem.head.bias is not None)
    unembed.unembedding.weight = nn.Parameter(problem.head.weight, requires_grad=False)
    if problem.head.bias is not None:
        unembed.unembedding.bias = nn.Parameter(problem.head.bias, requires_grad=False)
    unembed.unembedding_hash = lambda: ""
    lens = TunedLens(unembed, TunedLensConfig("", d_model, problem.layers, bias=True))
    for linear, translator in zip(lens, problem.translators, strict=True):
        linear.weight.data = torch.zeros(d_model, d_model) if translator is None else translator.weight
        bias = None if translator is None else translator.bias
        linear.bias.data = torch.zeros_like(linear.weight[0]) if bias is None else bias
    return lens.to(problem.device, problem.dtype)


def _prepare(problem: Problem) -> Callable[[], Answer]:
    from tuned_lens.plotting import PredictionTrajectory

    lens, query = trainable_lens(problem).requires_grad_(False), problem.query
    targets = query.targets
    assert targets is not None
    assert query.reference is not None

    @torch.no_grad()
    def trajectory() -> Answer:
        model_logits = F.linear(query.reference, problem.head.weight, problem.head.bias)
        found = PredictionTrajectory.from_lens_and_cache(
            lens, targets, _Cache(problem.hidden), model_logits, targets=targets
        )
        answer: dict[str, np.ndarray] = {}
        if "log_prob" in query.stats:
            answer["log_prob"] = -found.cross_entropy().stats
        if "rank" in query.stats:
            answer["rank"] = found.rank().stats
        if "entropy" in query.stats:
            answer["entropy"] = found.entropy().stats
        if "max_prob" in query.stats:
            answer["max_prob"] = found.max_probability().stats
        if "kl" in query.stats:
            answer["kl"] = found.forward_kl().stats
        if query.top_k:
            # It has the top k as decorated strings only; this is how it finds their ids.
            ids = np.argpartition(found.log_probs, -query.top_k, axis=-1)[..., -query.top_k :]
            values = np.take_along_axis(found.log_probs, ids, axis=-1)
            order = np.argsort(-values, axis=-1)
            answer["top_ids"] = np.take_along_axis(ids, order, axis=-1)
            answer["top_log_probs"] = np.take_along_axis(values, order, axis=-1)
        # Its last entry is the model's own output.
        return {name: torch.from_numpy(np.ascontiguousarray(value[:-1])) for name, value in answer.items()}

    return trajectory


def _unavailable(problem: Problem) -> str | None:
    missing = importable("tuned_lens.plotting", "--no-deps tuned-lens==0.2.0")
    if missing:
        return missing
    needed = COPIES * 4 * (problem.layers + 1) * problem.positions * problem.head.vocab
    available = _available_bytes()
    if needed > 0.8 * available:
        return f"would need about {needed / 2**30:.0f} GiB of memory; {available / 2**30:.0f} GiB are free"
    return None


def _available_bytes() -> int:
    import psutil

    return psutil.virtual_memory().available


TRAJECTORY = Contender(
    "tuned-lens",
    "tuned-lens 0.2.0: PredictionTrajectory.from_lens_and_cache and its methods",
    _prepare,
    frozenset({"log_prob", "rank", "entropy", "max_prob", "kl", "top_k"}),
    _unavailable,
)
