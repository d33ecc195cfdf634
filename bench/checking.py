"""Are a contender's numbers right? A sample of rows is compared with float64 of the same inputs before any is timed.

Two limits: ``allowed`` is what this package promises of itself, and errors are told as shares of it; ``tolerated`` is
what still counts as the same job done, plain fp32 sums and, for 16-bit weights, logits rounded to 16 bits. A contender
beyond that, or with a NaN or a shape of its own, is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from presets import Problem
from torch import Tensor

LOOSE = frozenset({"reverse_kl", "js", "tv"})
#: How many times ``allowed`` is tolerated in fp32: the plain sum p (log p - log q) is up to 6 times beyond.
TOLERATED = 20.0
#: Relative rounding of a logit that is tolerated.
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Expected:
    """float64 statistics of a sample of rows."""

    layer: Tensor  #: int64 [sample]
    position: Tensor  #: int64 [sample]
    logits: Tensor  #: [sample, vocab]
    values: dict[str, Tensor]  #: name -> [sample]
    targets: Tensor  #: int64 [sample]
    dtype: torch.dtype  #: of the head


def logits(x: Tensor, problem: Problem) -> Tensor:
    """g(W x + b) in float64, ``[rows, vocab]``; W is widened a part at a time."""
    head = problem.head
    z = torch.cat([x @ part.double().t() for part in head.weight.split(16384)], 1)
    return head.transform(z if head.bias is None else z + head.bias.double())


@torch.no_grad()
def expect(problem: Problem, sample: int = 24, seed: int = 0) -> Expected:
    """Every statistic of ``sample`` rows, the first and the last row among them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(problem.rows, generator=generator)[: max(1, sample - 2)]
    rows = torch.cat([rows, torch.tensor([0, problem.rows - 1])]).unique()
    layer, position = rows // problem.positions, rows % problem.positions
    xs = []
    for i, p in zip(layer.tolist(), position.tolist(), strict=True):
        residual, translator = problem.hidden[i][p].double(), problem.translators[i]
        if translator is not None:
            translated = translator.weight.double() @ residual
            residual = residual + translated + (0 if translator.bias is None else translator.bias.double())
        # The head's linear layer is handed a state rounded to its dtype, by definition.
        xs.append(problem.norm(residual).to(problem.dtype).double())
    assert problem.query.targets is not None
    assert problem.query.reference is not None
    position = position.to(problem.device)
    targets = problem.query.targets[position]
    z = logits(torch.stack(xs), problem)
    log_q = z.log_softmax(1)
    log_p = logits(problem.query.reference[position].to(problem.dtype).double(), problem).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    values = {
        "lse": z.logsumexp(1),
        "entropy": -(q * log_q).sum(1),
        "log_prob": log_q.gather(1, targets.unsqueeze(1)).squeeze(1),
        "max_prob": q.amax(1),
        "kl": (p * (log_p - log_q)).sum(1),
        "reverse_kl": (q * (log_q - log_p)).sum(1),
        "js": ((p * (log_p - log_mean)).sum(1) + (q * (log_q - log_mean)).sum(1)) / 2,
        "tv": (p - q).abs().sum(1) / 2,
    }
    return Expected(layer.to(problem.device), position, z, values, targets, problem.dtype)


@dataclass(frozen=True)
class Verdict:
    """``wrong``: why the contender is refused, or None; ``errors``: name -> largest error over what is allowed."""

    wrong: str | None
    errors: dict[str, float]


def judge(answer: dict[str, Tensor], problem: Problem, expected: Expected) -> Verdict:
    """Compare an answer, which must hold everything the problem asks for, with what is expected."""
    lead = (problem.layers, problem.positions)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(problem.asked - {"top_k"} | ({"lse"} & answer.keys()), lead)
    if problem.query.top_k:
        shapes["top_ids"] = shapes["top_log_probs"] = (*lead, problem.query.top_k)
    errors: dict[str, float] = {}
    for name, shape in sorted(shapes.items()):
        if name not in answer or answer[name].shape != shape:
            came = f"shape {list(answer[name].shape)}" if name in answer else "nothing"
            return Verdict(f"{name}: {came}, wanted shape {list(shape)}", errors)
        got = answer[name].to(problem.device)[expected.layer, expected.position]
        if name in ("rank", "top_ids"):
            wrong = _wrong_ranks(got, expected) if name == "rank" else _wrong_ids(got, expected)
        else:
            want = expected.values[name] if name in expected.values else _best(got, expected)
            errors[name], wrong = _error(name, got, want, expected)
        if wrong:
            return Verdict(f"{name}: {wrong}", errors)
    return Verdict(None, errors)


def _best(got: Tensor, expected: Expected) -> Tensor:
    return expected.logits.log_softmax(1).topk(got.shape[1]).values


def _near(expected: Expected) -> Tensor:
    """Logits this close have no order, ``[sample, 1]``."""
    return ROUNDING[expected.dtype] * expected.logits.abs().amax(1, keepdim=True)


def _error(name: str, got: Tensor, want: Tensor, expected: Expected) -> tuple[float, str | None]:
    absolute, relative = (5e-4, 1e-4) if name in LOOSE else (1e-4, 1e-5)
    allowed = absolute + relative * want.abs()
    tolerated = TOLERATED * allowed
    if expected.dtype in (torch.float16, torch.bfloat16):
        rounding = 2 * _near(expected)
        tolerated = tolerated + (rounding if want.ndim == 2 else rounding.squeeze(1))
    off = (got.double() - want).abs()
    if not bool((off <= tolerated).all()):  # a NaN is not within anything
        at = int((off / tolerated).nan_to_num(nan=math.inf).flatten().argmax())
        return float((off / allowed).max()), f"{got.flatten()[at]:.6g}, float64 says {want.flatten()[at]:.6g}"
    return float((off / allowed).max()), None


def _wrong_ranks(got: Tensor, expected: Expected) -> str | None:
    z, near = expected.logits, _near(expected)
    own = z.gather(1, expected.targets.unsqueeze(1))
    low, high = 1 + (z > own + near).sum(1), (z > own - near).sum(1).clamp(min=1)
    outside = ((got < low) | (got > high)).nonzero()
    if not len(outside):
        return None
    at = int(outside[0])
    return f"{int(got[at])}, float64 says {int(low[at])} to {int(high[at])}"


def _wrong_ids(got: Tensor, expected: Expected) -> str | None:
    z = expected.logits
    if bool((got < 0).any() or (got >= z.shape[1]).any()):
        return "ids outside of the vocabulary"
    if bool((got.sort(1).values.diff(dim=1) == 0).any()):
        return "a token twice in a row's top k"
    off = (z.gather(1, got) - z.topk(got.shape[1]).values).abs()
    return None if bool((off <= _near(expected)).all()) else f"a logit {float(off.max()):.3g} away from float64's"
