"""The careful way without this package: plain PyTorch, one layer's logits at a time, each thing computed once.

And the same under torch.compile. Its kl is the plain fp32 sum, less exact than the identity our engines use.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import torch
import torch.nn.functional as F
from presets import Problem
from torch import Tensor

from contenders.adapter import ALL, Answer, Contender, head_input
from tuned_lens_fast.engines.interface import Head, Norm, Translator
from tuned_lens_fast.engines.statistics import divergences


@dataclass(frozen=True)
class Reference:
    """The model's own output: log-probabilities, probabilities and their negative entropy."""

    log_p: Tensor
    p: Tensor
    negentropy: Tensor


def log_probs(x: Tensor, head: Head) -> Tensor:
    """fp32 ``[positions, vocab]``."""
    return head.transform(F.linear(x, head.weight, head.bias).float()).log_softmax(-1)


def read_layer(
    hidden: Tensor,
    translator: Translator | None,
    norm: Norm,
    head: Head,
    targets: Tensor,
    reference: Reference | None,
    wanted: frozenset[str],
    top_k: int,
) -> Answer:
    """All that is ``wanted`` of one layer."""
    log_q = log_probs(head_input(hidden, translator, norm, head.weight.dtype), head)
    own = log_q.gather(1, targets.unsqueeze(1))
    found = {}
    if "log_prob" in wanted:
        found["log_prob"] = own.squeeze(1)
    if "rank" in wanted:
        # A sum of floats: that of bools takes several times as long on a CPU.
        found["rank"] = torch.gt(log_q, own, out=torch.empty_like(log_q)).sum(1).long() + 1
    if "max_prob" in wanted:
        found["max_prob"] = log_q.amax(1).exp()
    if top_k:
        found["top_log_probs"], found["top_ids"] = log_q.topk(top_k, dim=1)
    if reference is not None and "kl" in wanted:
        found["kl"] = reference.negentropy - torch.linalg.vecdot(reference.p, log_q)
    if wanted & {"entropy", "reverse_kl", "js", "tv"}:
        q = log_q.exp()
        if "entropy" in wanted:
            found["entropy"] = -torch.linalg.vecdot(q, log_q)
        if reference is not None and "reverse_kl" in wanted:
            found["reverse_kl"] = torch.linalg.vecdot(q, log_q - reference.log_p)
        if reference is not None and "js" in wanted:
            log_mean = ((q + reference.p) / 2).log()
            of_q = torch.linalg.vecdot(q, log_q - log_mean)
            found["js"] = (of_q + torch.linalg.vecdot(reference.p, reference.log_p - log_mean)) / 2
        if reference is not None and "tv" in wanted:
            found["tv"] = (q - reference.p).abs().sum(1) / 2
    return found


def _prepare(read: Callable[..., Answer], problem: Problem) -> Callable[[], Answer]:
    query, head = problem.query, problem.head

    @torch.no_grad()
    def loop() -> Answer:
        reference = None
        if divergences(query):
            assert query.reference is not None
            log_p = log_probs(query.reference.to(head.weight.dtype), head)
            p = log_p.exp()
            reference = Reference(log_p, p, torch.linalg.vecdot(p, log_p))
        layers = [
            read(hidden, translator, problem.norm, head, query.targets, reference, query.stats, query.top_k)
            for hidden, translator in zip(problem.hidden, problem.translators, strict=True)
        ]
        return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}

    return loop


def no_compiler(problem: Problem) -> str | None:
    """Why torch.compile cannot work on the problem's device, or None."""
    if problem.device.type == "cuda":
        return None
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return "torch.compile needs a C++ compiler on a CPU; none is installed"
    return None


def compiled(function: FunctionType) -> Callable:
    """``function`` under torch.compile for one problem: what is compiled for another's sizes is kept apart.

    torch.compile keeps its results by code object, hence the copy.
    """
    assert function.__closure__ is None
    assert function.__kwdefaults__ is None
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return torch.compile(own, dynamic=False)


def _prepare_compiled(problem: Problem) -> Callable[[], Answer]:
    loop = _prepare(compiled(read_layer), problem)
    loop()  # compiles
    return loop


ANSWERS = ALL - {"lse"}
PLAIN = Contender("loop", "plain PyTorch, one layer at a time", lambda p: _prepare(read_layer, p), ANSWERS)
COMPILED = Contender("compiled", "the loop under torch.compile", _prepare_compiled, ANSWERS, no_compiler)
