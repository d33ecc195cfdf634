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

LOSS = frozenset({"log_prob"})


def _prepare(loss: Callable[[Tensor, Tensor, Tensor], Tensor], problem: Problem) -> Callable[[], Answer]:
    """``loss`` takes x ``[rows, d_model]``, W and int64 targets ``[rows]``, and gives the loss of every row."""
    assert problem.query.targets is not None
    targets = problem.query.targets.repeat(problem.layers)

    @torch.no_grad()
    def decode() -> Answer:
        found = loss(head_inputs(problem), problem.head.weight, targets)
        return {"log_prob": -found.float().view(problem.layers, -1)}

    return decode


def _bare_head(problem: Problem) -> str | None:
    return None if problem.head.bias is None and problem.head.scale == 1 else "takes no bias or scale of the head"


def _gpu_only(module: str, install: str) -> Callable[[Problem], str | None]:
    def why(problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return "its kernels are for GPUs"
        return importable(module, install) or _bare_head(problem)

    return why


def _pytorch(problem: Problem) -> Callable[[], Answer]:
    options = torch.nn.LinearCrossEntropyOptions()  # without any it holds all logits

    def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, weight, targets, reduction="none", options=options)

    return _prepare(loss, problem)


def _no_pytorch(problem: Problem) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}; it came with 2.13"
    return "takes no softcap" if problem.head.softcap is not None else _bare_head(problem)


def _cut_cross_entropy(problem: Problem) -> Callable[[], Answer]:
    from cut_cross_entropy import linear_cross_entropy

    def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, softcap=problem.head.softcap, reduction="none")

    return _prepare(loss, problem)


def _liger(problem: Problem) -> Callable[[], Answer]:
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return fused_linear_cross_entropy_forward(x, weight, targets, softcap=problem.head.softcap, reduction="none")[0]

    return _prepare(loss, problem)


PYTORCH = Contender(
    "linear_cross_entropy", "torch.nn.functional.linear_cross_entropy, in chunks of rows", _pytorch, LOSS, _no_pytorch
)
CUT_CROSS_ENTROPY = Contender(
    "cut-cross-entropy",
    "Apple's linear_cross_entropy",
    _cut_cross_entropy,
    LOSS,
    _gpu_only("cut_cross_entropy", "cut-cross-entropy"),
)
LIGER = Contender(
    "liger-kernel",
    "Liger-Kernel's fused_linear_cross_entropy, forward",
    _liger,
    LOSS,
    _gpu_only("liger_kernel.ops.fused_linear_cross_entropy", "liger-kernel"),
)
