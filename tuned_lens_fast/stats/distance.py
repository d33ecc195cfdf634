"""Divergences of two sets of logits that are there, differentiable; those of lenses are ``decode``'s.

Logits of 16 bits are widened: sums over a vocabulary are not good in them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl_divergence(logit_p: Tensor, logit_q: Tensor, dim: int = -1) -> Tensor:
    """KL(P || Q) in nats, summed over ``dim``. A token that P excludes adds nothing."""
    log_p, log_q = _log_softmax(logit_p, dim), _log_softmax(logit_q, dim)
    return _expected(log_p, log_q).sum(dim)


def js_divergence(logit_p: Tensor, logit_q: Tensor, dim: int = -1) -> Tensor:
    """Jensen-Shannon divergence in nats, summed over ``dim``: the mean of KL(P || M) and KL(Q || M), M being the mean
    of P and Q. Symmetric, and at most ln 2 (Lin, 1991)."""
    log_p, log_q = _log_softmax(logit_p, dim), _log_softmax(logit_q, dim)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_expected(log_p, log_m) + _expected(log_q, log_m)).sum(dim) / 2


def js_distance(logit_p: Tensor, logit_q: Tensor, dim: int = -1) -> Tensor:
    """The square root of :func:`js_divergence`, a metric (Endres and Schindelin, 2003)."""
    return js_divergence(logit_p, logit_q, dim).clamp(min=0).sqrt()


def sqrtmh(x: Tensor) -> Tensor:
    """The positive semi-definite square root of a Hermitian positive semi-definite matrix ``[..., n, n]``, by its
    eigenvalues in double precision; negative ones count as 0."""
    values, vectors = torch.linalg.eigh(x.to(torch.promote_types(x.dtype, torch.float64)))
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mH).to(x.dtype)


def _log_softmax(logits: Tensor, dim: int) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim)


def _expected(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q) of every token; 0 where p is, of which the gradient is 0 too."""
    there = log_p > -math.inf
    difference = torch.where(there, log_p, 0.0) - torch.where(there, log_q, 0.0)
    return log_p.exp() * difference
