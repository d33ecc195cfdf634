"""The target's logit, by the very arithmetic of the vocabulary pass.

A rank counts the logits above the target's. Were the target's logit a dot product summed in another order, rounding
could rank a token behind itself. So a tile is made of the targets' rows of W, multiplied as every tile is, and its
diagonal is what is wanted: row i's logit for row i's target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuned_lens_fast.kernels.launch import Tile, head_arguments
from tuned_lens_fast.kernels.logits import finish_logits

if TYPE_CHECKING:
    from tuned_lens_fast.engines.interface import Head


@triton.jit
def _target_logits(
    x,  # [R, D]
    w,  # [V, D]
    targets,  # int64 [R]
    logits,  # fp32 [R]
    R, stride_x, stride_w,
    bias,  # [V]
    scale, softcap,
    BLOCK: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A program multiplies a block of rows by its targets' rows of W, and keeps the diagonal."""
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
    acc = finish_logits(acc, bias, target, wanted, scale, softcap, BIAS, SCALE, SOFTCAP, True)
    own = tl.sum(tl.where(tl.arange(0, BLOCK)[:, None] == tl.arange(0, BLOCK)[None, :], acc, 0.0), 1)
    tl.store(logits + row, tl.where(wanted, own, float("nan")), mask=inside)


def target_logits(x: Tensor, head: Head, targets: Tensor, tile: Tile) -> Tensor:
    """fp32 ``[rows]``: the logit of every row's target; NaN in rows with a negative target (by which the
    vocabulary pass knows them), MASKED for a bias of -inf.

    Args:
        x: ``[rows, d_model]`` in the head's dtype. targets: int64 ``[rows]``.
        tile: the vocabulary pass's, whose depth the products share.
    """
    rows, d_model = x.shape
    logits = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = 16 if tile.block_rows < 64 else 64
    _target_logits[(triton.cdiv(rows, block),)](
        x, head.weight, targets, logits, rows, x.stride(0), head.weight.stride(0), **head_arguments(head),
        BLOCK=block, BK=tile.block_depth, D=d_model, PRECISION=tile.precision,
        num_warps=4, num_stages=4, enable_fp_fusion=True,
    )  # fmt: skip
    return logits
