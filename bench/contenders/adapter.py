"""What an adapter is, and the plain way to the head's input that adapters of others' functions share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from presets import Problem
from torch import Tensor

from tuned_lens_fast.engines.interface import Norm, Translator
from tuned_lens_fast.engines.statistics import STATISTICS

#: What a contender returns: tensors named and shaped as an engine's answer.
Answer = dict[str, Tensor]
ALL = frozenset({*STATISTICS, "lse", "top_k"})


def always(problem: Problem) -> str | None:
    """For those that work everywhere."""
    return None


@dataclass(frozen=True)
class Contender:
    """One way to do the job."""

    name: str
    what: str  #: one line for a reader of the table
    prepare: Callable[[Problem], Callable[[], Answer]]
    answers: frozenset[str] = ALL  #: the statistics it can compute
    unavailable: Callable[[Problem], str | None] = always  #: why it does not run on this problem here, or None
    floor: bool = False  #: the bare product, by which the others' times are divided; it answers nothing
    ours: bool = False

    def why_not(self, problem: Problem) -> str | None:
        """Why it has no time for this problem, or None."""
        if not self.floor and not problem.asked <= self.answers:
            return f"computes {', '.join(sorted(self.answers))} only"
        return self.unavailable(problem)


def importable(module: str, install: str) -> str | None:
    """None, or why ``module`` cannot be imported and what would change that."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises whatever it likes
        if isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]:
            return f"not installed; pip install {install}"
        return f"cannot be imported: {type(error).__name__}: {str(error)[:160]}"
    return None


def head_input(hidden: Tensor, translator: Translator | None, norm: Norm, dtype: torch.dtype) -> Tensor:
    """norm(h + A h + c) ``[positions, d_model]`` in ``dtype``, the residual stream in fp32."""
    residual = hidden.float()
    if translator is not None:
        bias = None if translator.bias is None else translator.bias.to(hidden.dtype)
        residual = residual + torch.nn.functional.linear(hidden, translator.weight.to(hidden.dtype), bias)
    return norm(residual).to(dtype)


def head_inputs(problem: Problem) -> Tensor:
    """What the head receives for every layer and position, ``[layers * positions, d_model]``."""
    pairs = zip(problem.hidden, problem.translators, strict=True)
    return torch.cat([head_input(h, translator, problem.norm, problem.dtype) for h, translator in pairs])
