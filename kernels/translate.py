"""The translator: r = h + A h + c, the first step on the way from hidden state to statistics.

A program owns one tile of r, [BM rows, BN features], and walks d_model once. The residual and the bias join
the fp32 accumulator after the product, and r stays fp32 until the final norm has read it: Gemma's residual
stream reaches 100,000, which fp16 cannot hold, and bf16 would round the small change a translator makes away.

The operands come through plain pointers rather than TMA: the translator is 2 d^2 of the 2 d (d + vocab)
operations of a decode, 3% for an 8B model, so that faster loads could save less than one percent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuned_lens_fast.kernels.launch import Precision

#: Row blocks that run side by side before the next column block: they share a slice of A in L2.
GROUP = tl.constexpr(8)


@triton.jit(do_not_specialize=["rows"])
def _translate(
    h,  # [rows, D]
    weight,  # [D, D]
    bias,  # [D] or None
    r,  # fp32 [rows, D]
    rows, stride_h, stride_weight, stride_r,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of r = h + weight h + bias, a program."""
    row_blocks = tl.cdiv(rows, BM)
    band_size = GROUP * tl.cdiv(D, BN)
    pid = tl.program_id(0)
    first_block = pid // band_size * GROUP
    band_rows = tl.minimum(row_blocks - first_block, GROUP)
    within = pid % band_size
    block = first_block + within % band_rows

    row = block.to(tl.int64) * BM + tl.arange(0, BM)
    column = within // band_rows * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Outside r the last row and feature are computed again and not stored: a product without masks.
    h_row = h + tl.minimum(row, rows - 1)[:, None] * stride_h
    a = h_row + k[None, :]
    b = weight + tl.minimum(column, D - 1).to(tl.int64)[:, None] * stride_weight + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        if D % BK == 0:
            ak = tl.load(a)
            bk = tl.load(b)
        else:
            inside = (k < D - start)[None, :]
            ak = tl.load(a, mask=inside, other=0.0)
            bk = tl.load(b, mask=inside, other=0.0)
        acc = tl.dot(ak, bk.T, acc, input_precision=PRECISION)
        a += BK
        b += BK

    stored = column < D
    acc += tl.load(h_row + column[None, :], mask=stored[None, :], other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + column, mask=stored, other=0.0).to(tl.float32)[None, :]
    tl.store(r + row[:, None] * stride_r + column[None, :], acc, mask=(row < rows)[:, None] & stored[None, :])


def configuration(dtype: torch.dtype, aligned: bool, precision: str = "ieee") -> dict[str, int]:
    """Tile, warps and pipeline stages of the product; the same on every architecture.

    128x256 tiles, which wgmma likes best, spill on sm_90 and sm_100 once pointers take their registers; so do
    128x128 tiles with 4 warps. Without alignment, operands pass through registers, and only a small tile
    leaves room for them.
    """
    if not aligned:
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    bk = {("ieee", torch.float32): 16, ("tf32", torch.float32): 32}.get((precision, dtype), 64)
    return {"BM": 128, "BN": 128, "BK": bk, "num_warps": 8, "num_stages": 3}


def translate(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    precision: Precision = "ieee",
) -> Tensor:
    """h + weight h + bias for every row.

    The product is computed in h's dtype with an fp32 accumulator; residual and bias are added in fp32. Row i
    of the result depends on row i of ``h`` alone, bit for bit.

    Args:
        h: ``[rows, d_model]`` bf16, fp16 or fp32. Rows may lie any distance apart; where the features of a
            row are not adjacent, ``h`` is copied first.
        weight: ``[d_model, d_model]`` in h's dtype; a lens kept in another dtype is cast by the caller, once.
        bias: ``[d_model]``, any floating dtype.
        out: fp32 ``[rows, d_model]`` with adjacent features; made if not given.
        precision: of an fp32 product; "tf32" keeps 10 bits of the operands' mantissas.

    Returns:
        ``out``.

    Raises:
        TypeError: a dtype other than these. ValueError: shapes that do not fit.
    """
    rows, d_model = h.shape
    if h.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"h: got {h.dtype}, wanted bfloat16, float16 or float32")
    if weight.dtype != h.dtype:
        raise TypeError(f"weight: got {weight.dtype}, wanted h's dtype, {h.dtype}")
    if weight.shape != (d_model, d_model):
        raise ValueError(f"weight: got shape {list(weight.shape)}, wanted [{d_model}, {d_model}]")
    if bias is not None and bias.shape != (d_model,):
        raise ValueError(f"bias: got shape {list(bias.shape)}, wanted [{d_model}]")
    if out is None:
        out = torch.empty(rows, d_model, dtype=torch.float32, device=h.device)
    if out.dtype != torch.float32:
        raise TypeError(f"out: got {out.dtype}, wanted torch.float32")
    if out.shape != h.shape or out.stride(-1) != 1:
        raise ValueError(
            f"out: got shape {list(out.shape)} with strides {list(out.stride())}, "
            f"wanted {list(h.shape)} with adjacent features"
        )
    if rows == 0:
        return out
    h, weight = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (h, weight))
    # In multiples of 16, as Triton specialises strides: it emits wide loads for nothing less.
    aligned = all(t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (h, weight))
    config = configuration(h.dtype, aligned, precision)
    grid = (triton.cdiv(rows, config["BM"]) * triton.cdiv(d_model, config["BN"]),)
    _translate[grid](
        h, weight, None if bias is None else bias.contiguous(), out,
        rows, h.stride(0), weight.stride(0), out.stride(0),
        D=d_model, PRECISION=precision, enable_fp_fusion=True, **config,
    )  # fmt: skip
    return out
