"""Random hidden states to compare a lens with its model at, and when the two agree.

Beside the way from hidden state to statistics: what a description of a model's end is held to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: What the rows of random hidden states are multiplied by: an eps matters in small ones, its absence in large ones,
#: and a norm is no constant factor for all of them.
_ROW_SCALES = (1.0, 30.0, 3e-3, 1.0)


def random_like(like: Tensor | None, seed: int) -> Any:
    """Random values in the place of what a block returned, drawn without touching anybody's generator."""
    if not isinstance(like, Tensor) or not like.is_floating_point():
        return like
    values = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    if like.ndim >= 3:
        at = next((i for i in range(1, like.ndim - 1) if like.shape[i] > 1), 1)  # where positions are
        scales = torch.tensor(_ROW_SCALES, device="cpu").repeat(-(-like.shape[at] // len(_ROW_SCALES)))
        values *= scales[: like.shape[at]].view([-1 if i == at else 1 for i in range(like.ndim)])
    return values.to(like)


def constant_factor(source: Tensor, target: Tensor) -> float | None:
    """What ``target`` is ``source`` multiplied by, or its last positions; None where no number is it.

    Every element must be, within two roundings of the coarser dtype. Rows need to differ in size: ``[rows, width]`` of
    one size are proportional to their norm.
    """
    if source.shape[-1:] != target.shape[-1:] or not target.numel():
        return None
    wanted = target.reshape(-1, target.shape[-1]).to(source.device)
    rows = source.reshape(-1, source.shape[-1])[-len(wanted) :]
    if rows.shape != wanted.shape:
        return None
    if torch.equal(rows, wanted):
        return 1.0
    if len(wanted) == 1:
        return None  # one row is proportional to its norm too
    a, b = rows.double(), wanted.double()
    factor = float((a * b).sum() / a.square().sum())
    kinds = [torch.finfo(source.dtype), torch.finfo(target.dtype)]
    rounding = 2 * max(kind.eps for kind in kinds) * b.abs().clamp(min=max(kind.tiny for kind in kinds))
    return factor if factor and ((b - factor * a).abs() <= rounding).all() else None


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether they agree in every row ``[..., width]``, by its largest value: see :meth:`.TracedModel.verify`."""
    found = found.reshape(wanted.shape).to(wanted.device)
    error = torch.where(found == wanted, 0, found.double() - wanted.double()).abs()  # also where both are -inf
    tolerance = max(1e-4, 8 * torch.finfo(wanted.dtype).eps, 8 * torch.finfo(found.dtype).eps)
    largest = wanted.double().nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True)
    return bool((error <= (tolerance * largest).clamp(min=torch.finfo(wanted.dtype).tiny)).all())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest value that was wanted."""
    found = found.to(wanted.device)
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
