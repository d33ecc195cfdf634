"""The target's logit, by the very arithmetic of the statistics kernel.

A rank counts the logits above the target's. Were the target's logit a dot product summed in another order, rounding
could rank a token behind itself. So a tile is made of the targets' rows of W, multiplied as every tile is, and its
diagonal is what is wanted: row i's logit for row i's target.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuned_lens_fast.kernels.launch import Tile
from tuned_lens_fast.kernels.logits import MASKED, transform


@triton.jit
def _target_logits(
    x, w, bias, targets, logits, R, stride_x, stride_w, scale, softcap,
    BLOCK: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < R
    target = tl.load(targets + row, mask=inside, other=-1)
    wanted = target >= 0
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in tl.range(0, D, BK):
        depth = k + tl.arange(0, BK)
        deep = depth[None, :] < D
        a = tl.load(x + row.to(tl.int64)[:, None] * stride_x + depth[None, :], mask=inside[:, None] & deep, other=0.0)
        b = tl.load(w + target[:, None] * stride_w + depth[None, :], mask=wanted[:, None] & deep, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias + target, mask=wanted, other=0.0).to(tl.float32)[None, :]
    acc = transform(acc, scale, softcap, SCALE, SOFTCAP)
    if BIAS:
        acc = tl.maximum(acc, MASKED, propagate_nan=tl.PropagateNan.ALL)
    own = tl.arange(0, BLOCK)[:, None] == tl.arange(0, BLOCK)[None, :]
    tl.store(logits + row, tl.sum(tl.where(own, acc, 0.0), 1), mask=inside)


def target_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, targets: Tensor, tile: Tile,
    precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """fp32 [rows]: the logit of every row's target; rows with a negative target hold no meaning.

    Args:
        x: [rows, d_model]. weight: [vocab, d_model]. bias: [vocab] or None. targets: int64 [rows].
        tile: the statistics kernel's, whose depth the products share.
    """
    rows, d_model = x.shape
    logits = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = 16 if tile.block_rows < 64 else 64
    _target_logits[(triton.cdiv(rows, block),)](
        x, weight, bias, targets, logits, rows, x.stride(0), weight.stride(0), scale, softcap or 1.0,
        BLOCK=block, BK=tile.block_depth, D=d_model, PRECISION=precision,
        BIAS=bias is not None, SCALE=scale != 1.0, SOFTCAP=softcap is not None,
        num_warps=4, num_stages=4, enable_fp_fusion=True,
    )  # fmt: skip
    return logits
