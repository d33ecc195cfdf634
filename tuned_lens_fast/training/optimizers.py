"""How a step is taken: the optimisers with their customary settings, and how the learning rate runs.

At the end of the way through training, behind the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tuned_lens_fast.training.workers import Workers

#: Where the caller names none.
DEFAULT_OPTIMIZER = "adam"
_MOMENTUM = 0.9


@dataclass(frozen=True)
class Recipe:
    """What an optimiser does where the caller says nothing else."""

    learning_rate: float
    weight_decay: float
    warmup: Callable[[int], int]  #: steps of warmup, of how many in all
    meaning: str  #: for people


#: "sgd" is the recipe of tuned-lens and of the paper (Belrose et al., arXiv:2303.08112), "adam" the former's other one.
RECIPES = {
    "sgd": Recipe(1.0, 1e-3, lambda steps: 0, "momentum 0.9 with Nesterov's step; the rate is times 1 - 0.9"),
    "adam": Recipe(1e-3, 1e-3, lambda steps: min(1000, steps // 5), "with amsgrad"),
    "muon": Recipe(1e-2, 0.0, lambda steps: 0, "orthogonal steps for matrices, Adam for biases"),
}


def optimizers(
    name: str, parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float, workers: Workers
) -> list[torch.optim.Optimizer]:
    """The optimiser ``name`` of :data:`RECIPES`, its state spread over the workers; "muon" is two.

    Raises:
        ImportError: this PyTorch has no Muon.
    """
    if name == "sgd":
        # PyTorch adds momentum up without 1 - momentum, which would make every step ten times as long.
        options = {"lr": learning_rate * (1 - _MOMENTUM), "weight_decay": weight_decay}
        return [workers.optimizer(torch.optim.SGD, parameters, momentum=_MOMENTUM, nesterov=True, **options)]
    options = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "adam":
        return [workers.optimizer(torch.optim.Adam, parameters, betas=(_MOMENTUM, 0.999), amsgrad=True, **options)]
    check_muon()
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(workers.optimizer(torch.optim.Muon, matrices, **options))
    if vectors:
        found.append(workers.optimizer(torch.optim.Adam, vectors, **options))
    return found


def check_muon() -> None:
    """That this PyTorch has it.

    Raises:
        ImportError: it does not.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"optimizer: 'muon' needs torch.optim.Muon, which PyTorch {torch.__version__} has not")


def _linear(done: float) -> float:
    return 1 - done


def _constant(done: float) -> float:
    return 1.0


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


#: What the learning rate is multiplied with, by how much of the steps behind the warmup is done.
SCHEDULES: dict[str, Callable[[float], float]] = {"linear": _linear, "cosine": _cosine, "constant": _constant}


def rate(schedule: str, step: int, steps: int, warmup: int) -> float:
    """What the learning rate of ``step`` (from 0) is multiplied with: it rises in ``warmup`` steps, then falls."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))
