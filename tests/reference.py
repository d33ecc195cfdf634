"""Every statistic from dense float64 logits, by definition and sharing no code with the package."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOOSE = frozenset({"reverse_kl", "js", "tv"})


def head_inputs(hidden: Sequence[Tensor], translators: Sequence, norm) -> Tensor:
    """norm(h + A h + c) in float64, [L, P, d_model]."""
    rows = []
    for h, translator in zip(hidden, translators, strict=True):
        x = h.double()
        if translator is not None:
            x = x + x @ translator.weight.double().T
            if translator.bias is not None:
                x = x + translator.bias.double()
        if norm.kind == "layer":
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        elif norm.kind == "rms":
            x = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        if norm.kind in ("layer", "rms"):
            if norm.weight is not None:
                x = x * (norm.weight.double() + (1 if norm.unit_offset else 0))
            if norm.bias is not None:
                x = x + norm.bias.double()
        rows.append(x * norm.factor)
    return torch.stack(rows)


def logits(x: Tensor, head) -> Tensor:
    """g(W x + b) in float64, [..., vocab]."""
    z = x.double() @ head.weight.double().T
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def statistics(
    z: Tensor,
    *,
    targets: Tensor | None = None,
    reference: Tensor | None = None,
    watch: Tensor | None = None,
    top_k: int = 0,
) -> dict[str, Tensor]:
    """All statistics of logits z ``[L, P, vocab]``; targets ``[P]``; reference logits ``[P, vocab]``."""
    z = z.double()
    log_q = z - z.logsumexp(-1, keepdim=True)
    q = log_q.exp()
    found = {
        "lse": z.logsumexp(-1),
        "entropy": -torch.where(q > 0, q * log_q, 0.0).sum(-1),
        "max_prob": q.amax(-1),
    }
    if targets is not None:
        ids = targets.clamp(min=0).expand(z.shape[:-1]).unsqueeze(-1)
        none = (targets < 0).expand(z.shape[:-1])
        found["log_prob"] = log_q.gather(-1, ids).squeeze(-1).masked_fill(none, math.nan)
        found["rank"] = (1 + (z > z.gather(-1, ids)).sum(-1)).masked_fill(none, 0)
    if reference is not None:
        log_p = reference.double() - reference.double().logsumexp(-1, keepdim=True)
        p = log_p.exp().expand_as(q)
        log_p = log_p.expand_as(q)
        log_mean = ((p + q) / 2).log()
        found["kl"] = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
        found["reverse_kl"] = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)
        found["js"] = (
            torch.where(p > 0, p * (log_p - log_mean), 0.0) + torch.where(q > 0, q * (log_q - log_mean), 0.0)
        ).sum(-1) / 2
        found["tv"] = (p - q).abs().sum(-1) / 2
    if watch is not None:
        found["watch_log_probs"] = log_q[..., watch]
    if top_k:
        # A stable sort of descending logits leaves ties in the order of their ids.
        found["top_ids"] = z.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        found["top_log_probs"] = log_q.gather(-1, found["top_ids"])
    return found


def check(
    got: dict[str, Tensor], z: Tensor, *, targets: Tensor | None = None, scale: float | None = None, **inputs
) -> None:
    """Assert that ``got`` answers for logits z ``[L, P, vocab]`` (float64) within the project's tolerances.

    ``scale`` is the size of a logit: two that lie within 1e-4 of it have no order in fp32.
    """
    want = statistics(z, targets=targets, **inputs)
    z = z.double()
    near = 1e-4 * (scale if scale is not None else max(1.0, z[z.isfinite()].abs().max().item()))
    assert got.keys() <= want.keys(), got.keys() - want.keys()
    for name, value in got.items():
        expected = want[name]
        assert value.shape == expected.shape, (name, value.shape, expected.shape)
        if name == "rank":
            assert value.dtype == torch.int64
            zt = z.gather(-1, targets.clamp(min=0).expand(z.shape[:-1]).unsqueeze(-1))
            none = (targets < 0).expand(z.shape[:-1])
            low = (1 + (z > zt + near).sum(-1)).masked_fill(none, 0)
            high = (1 + (z > zt - near).sum(-1) - (zt > zt - near).squeeze(-1).long()).masked_fill(none, 0)
            assert ((value >= low) & (value <= high)).all(), (name, value, low, high)
        elif name == "top_ids":
            assert value.dtype == torch.int64
            assert (value.sort(-1).values.diff(dim=-1) > 0).all(), "a token twice among the top ids"
            there, here = z.gather(-1, expected), z.gather(-1, value)
            same = (value == expected) | ((there - here).abs() <= near) | (there == here)
            assert same.all(), (name, value, expected)
        else:
            assert value.dtype == torch.float32
            absolute, relative = (5e-4, 1e-4) if name in LOOSE else (1e-4, 1e-5)
            torch.testing.assert_close(
                value.double(),
                expected,
                atol=absolute,
                rtol=relative,
                equal_nan=True,
                msg=lambda m, n=name: n + m,
            )
