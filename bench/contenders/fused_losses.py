"""Fused losses of others: the target's log-probability without all logits at once, and nothing else.

They are handed what the head receives, which is computed the plain way first and counted in their time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from presets import Problem
from torch import Tensor

from contenders.adapter import Answer, Contender, head_inputs, importable

#: From x ``[rows, d_model]``, W, int64 targets ``[rows]`` and a softcap to the loss of every row.
Loss = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


def _contender(name: str, what: str, load: Callable[[], Loss], missing: Callable[[Problem], str | None]) -> Contender:
    """``load`` imports the loss; ``missing``: why it cannot be had here."""

    def prepare(problem: Problem) -> Callable[[], Answer]:
        assert problem.query.targets is not None
        loss, targets, head = load(), problem.query.targets.repeat(problem.layers), problem.head

        @torch.no_grad()
        def decode() -> Answer:
            found = loss(head_inputs(problem), head.weight, targets, head.softcap)
            return {"log_prob": -found.float().view(problem.layers, -1)}

        return decode

    def why_not(problem: Problem) -> str | None:
        bare = problem.head.bias is None and problem.head.scale == 1
        return missing(problem) or (None if bare else "takes no bias or scale of the head")

    return Contender(name, what, prepare, frozenset({"log_prob"}), why_not)


def _on_gpus(module: str, install: str) -> Callable[[Problem], str | None]:
    def missing(problem: Problem) -> str | None:
        return importable(module, install) if problem.device.type == "cuda" else "its kernels are for GPUs"

    return missing


def _pytorch() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()  # without any it holds all logits
    return lambda x, w, targets, _: F.linear_cross_entropy(x, w, targets, reduction="none", options=options)


def _no_pytorch(problem: Problem) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}; it came with 2.13"
    return None if problem.head.softcap is None else "takes no softcap"


def _cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, w, targets, softcap: linear_cross_entropy(x, w, targets, softcap=softcap, reduction="none")


def _liger() -> Loss:
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward as forward

    return lambda x, w, targets, softcap: forward(x, w, targets, softcap=softcap, reduction="none")[0]


LOSSES = [
    _contender(
        "linear_cross_entropy",
        "torch.nn.functional.linear_cross_entropy, in chunks of rows",
        _pytorch,
        _no_pytorch,
    ),
    _contender(
        "cut-cross-entropy",
        "Apple's linear_cross_entropy",
        _cut_cross_entropy,
        _on_gpus("cut_cross_entropy", "cut-cross-entropy"),
    ),
    _contender(
        "liger-kernel",
        "Liger-Kernel's fused_linear_cross_entropy, forward",
        _liger,
        _on_gpus("liger_kernel.ops.fused_linear_cross_entropy", "liger-kernel"),
    ),
]
