"""The final norm, from the residual stream to what the head's linear layer receives, in the head's dtype.

A program owns a few whole rows and holds them in registers, so that a row is read once, whatever d_model is;
all arithmetic is fp32. LayerNorm's variance is that of the row with its mean taken off: the mean of squares
minus the square of the mean would cancel where the mean is large against the spread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from tuned_lens_fast.engines.interface import Norm


@triton.jit(do_not_specialize=["rows"])
def _normalize(
    r,  # [rows, D]
    weight,  # [D] or None
    bias,  # [D] or None
    x,  # [rows, D]
    rows, stride_r, stride_x, eps, factor,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, CENTRE: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows of x = factor * norm(r), a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    y = tl.load(r + row[:, None] * stride_r + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        if CENTRE:
            mean = tl.sum(y, 1) / D
            y = tl.where(inside, y - mean[:, None], 0.0)
        scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(y * y, 1) / D + eps))
        y *= scale[:, None]
        if weight is not None:
            w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
            if UNIT_OFFSET:
                w += 1.0
            y *= w[None, :]
        if bias is not None:
            y += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    y *= factor
    tl.store(x + row[:, None] * stride_x + column[None, :], y.to(x.dtype.element_ty), mask=inside)


def configuration(d_model: int) -> dict[str, int]:
    """Rows of one program and its warps: 16 elements a thread, so that loads are wide and nothing spills."""
    block = triton.next_power_of_2(d_model)
    rows = max(1, 2048 // block)
    return {"BLOCK": block, "ROWS": rows, "num_warps": min(32, max(4, rows * block // 512))}


def normalize(r: Tensor, norm: Norm, out: Tensor) -> Tensor:
    """``norm(r)`` for every row, computed in fp32 and rounded once, to out's dtype.

    Row i of the result depends on row i of ``r`` alone, bit for bit.

    Args:
        r: ``[rows, d_model]``, bf16, fp16 or fp32: what the translator wrote, or hidden states where there is
            none. Rows may lie any distance apart; where the features of a row are not adjacent, ``r`` is
            copied first.
        norm: of any kind but "module", which only its own module can compute.
        out: ``[rows, d_model]``, bf16, fp16 or fp32, with adjacent features.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes that do not fit, or a norm of kind "module".
    """
    rows, d_model = r.shape
    if norm.kind == "module":
        raise ValueError("norm: got kind 'module', wanted 'layer', 'rms' or 'identity'; call its module")
    if out.shape != r.shape or out.stride(-1) != 1:
        raise ValueError(
            f"out: got shape {list(out.shape)} with strides {list(out.stride())}, "
            f"wanted {list(r.shape)} with adjacent features"
        )
    for name, parameter in (("weight", norm.weight), ("bias", norm.bias)):
        if parameter is not None and parameter.shape != (d_model,):
            raise ValueError(f"norm.{name}: got shape {list(parameter.shape)}, wanted [{d_model}]")
    if rows == 0:
        return out
    if r.stride(-1) != 1:
        r = r.contiguous()
    weight, bias = (p if p is None else p.contiguous() for p in (norm.weight, norm.bias))
    config = configuration(d_model)
    _normalize[(triton.cdiv(rows, config["ROWS"]),)](
        r, weight, bias, out, rows, r.stride(0), out.stride(0), norm.eps, norm.factor,
        D=d_model, NORM=norm.kind != "identity", CENTRE=norm.kind == "layer", UNIT_OFFSET=norm.unit_offset,
        enable_fp_fusion=True, **config,
    )  # fmt: skip
    return out
