"""Divergences between the lens and the model's own output.

Where logits are linear in x, KL(reference || lens) needs no second look at the vocabulary: with p = softmax(z_T) and
u = W^T p, both shared by all layers,

    KL = lse - lse_T - (x - x_T) . u

``kl_by_identity`` is that dot product, and ``Expectation`` computes u (and, of every row, what its gradient needs).
Everything else is a second pass over the vocabulary with both normalisers known (``divergence_pass``): a program keeps
the reference's tile in registers and passes all layers of its positions by it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuned_lens_fast.engines.state import State
from tuned_lens_fast.engines.statistics import DIVERGENCES
from tuned_lens_fast.kernels.launch import Tile, head_arguments, processors, vocabulary_splits
from tuned_lens_fast.kernels.logits import EMPTY, LN2, LOG2E, MASKED, tile_logits

if TYPE_CHECKING:
    from tuned_lens_fast.engines.interface import Head

#: fp16 keeps nothing below 6e-8, so probabilities are multiplied by this before they are split into two parts.
PART_SCALE = 2.0**14
#: Tokens that one sum of matrix units goes over where ``Expectation`` multiplies with W again.
SLAB = 4096
#: Slices of the vocabulary in ``divergence_pass``; each costs 16 bytes of sums a row.
MOST_SLICES = 32


@triton.jit(do_not_specialize=["rows", "width"])
def _softmax_parts(
    z,  # fp32 [rows, width]
    state,  # fp32 [3, rows]: m, s, and the sum of what is multiplied
    decay,  # fp32 [rows]
    parts,  # [PARTS * rows, width] in W's dtype: exp(z - m) and what its rounding lost
    rows, width, stride_z,
    BLOCK: tl.constexpr, SCALE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A program a row: a tile's exponentials in one part or two, and the row's m and sums with them."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), EMPTY, tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        largest = tl.maximum(largest, tl.load(z + row * stride_z + start + column, mask=inside, other=EMPTY))
    m = tl.load(state + row)
    m_new = tl.maximum(m, tl.max(largest, 0))
    s = tl.zeros((BLOCK,), tl.float32)
    kept = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        y = tl.load(z + row * stride_z + start + column, mask=inside, other=MASKED) - m_new
        p = tl.exp2(y * LOG2E)
        s += p
        p *= SCALE
        high = p.to(parts.dtype.element_ty)
        tl.store(parts + row * width + start + column, high, mask=inside)
        kept += high.to(tl.float32)
        if PARTS == 2:
            low = (p - high.to(tl.float32)).to(parts.dtype.element_ty)
            kept += low.to(tl.float32)
            tl.store(parts + (rows + row) * width + start + column, low, mask=inside)
    shrink = tl.exp2((m - m_new) * LOG2E)
    tl.store(decay + row, shrink)
    tl.store(state + row, m_new)
    tl.store(state + rows + row, tl.load(state + rows + row) * shrink + tl.sum(s, 0))
    tl.store(state + 2 * rows + row, tl.load(state + 2 * rows + row) * shrink + tl.sum(kept, 0))


@triton.jit(do_not_specialize=["terms"])
def _accumulate(
    u,  # fp32 [rows, D]
    products,  # fp32 [terms, rows, D]
    decay,  # fp32 [rows]
    elements, terms,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """u * decay + the products."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    added = tl.zeros((BLOCK,), tl.float32)
    for _ in range(terms):
        added += tl.load(products + at, mask=inside, other=0.0)
        products += elements
    total = tl.load(u + at, mask=inside, other=0.0) * tl.load(decay + at // D, mask=inside, other=0.0)
    tl.store(u + at, total + added, mask=inside)


def tiles(vocab: int, width: int) -> Iterator[slice]:
    """The vocabulary as ``Expectation`` takes it: whole slabs, as many as fit into ``width``, then the rest."""
    slabs = width // SLAB * SLAB
    whole = vocab // SLAB * SLAB if slabs else 0
    if slabs:
        yield from (slice(start, min(start + slabs, whole)) for start in range(0, whole, slabs))
    width = min(width, SLAB)
    yield from (slice(start, min(start + width, vocab)) for start in range(whole, vocab, width))


class Expectation:
    """sum exp(z - m) W of rows whose logits come a vocabulary tile at a time, in one pass.

    With two parts it takes two 16-bit products a tile: in one, a probability would keep 8 bits in bf16 and u would be
    off by 1e-2 of a nat in KL; the sum of two parts keeps 16 and is off by 3e-5. For a gradient one is enough, and for
    fp32 one is all. u is normalised by the sum of what was multiplied.

    Matrix units add with truncation, the more of it the longer a sum: over 16,384 tokens it cost KL twice the error
    on an H100 that it did over 4,096. So a tile's products are those of slabs of its tokens, all in one launch, and
    what is added up here is fp32.
    """

    def __init__(self, rows: int, d_model: int, device: torch.device, parts: int = 2) -> None:
        self.u = torch.zeros(rows, d_model, dtype=torch.float32, device=device)
        self._parts = parts
        self._state = torch.zeros(3, rows, dtype=torch.float32, device=device)
        self._state[0] = EMPTY.value
        self._decay = torch.empty(rows, dtype=torch.float32, device=device)

    def add(self, z: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Meet one tile: z fp32 ``[rows, width]``, weight ``[width, d_model]``.

        ``product``: (a ``[slabs, rows, tokens]``, b ``[slabs, tokens, d_model]``) -> a @ b in fp32. A width beyond
        ``SLAB`` is a multiple of it.
        """
        rows, width = z.shape
        parts = torch.empty(self._parts * rows, width, dtype=weight.dtype, device=z.device)
        _softmax_parts[(rows,)](
            z, self._state, self._decay, parts, rows, width, z.stride(0),
            BLOCK=2048, SCALE=PART_SCALE, PARTS=self._parts, num_warps=8,
        )  # fmt: skip
        slabs = triton.cdiv(width, SLAB)
        by_slab = parts.unflatten(1, (slabs, -1)).transpose(0, 1), weight.unflatten(0, (slabs, -1))
        elements = self.u.numel()
        _accumulate[(triton.cdiv(elements, 4096),)](
            self.u, product(*by_slab), self._decay, elements, slabs * self._parts,
            D=self.u.shape[1], BLOCK=4096, num_warps=8,
        )  # fmt: skip

    def state(self) -> State:
        """The closed state of the rows, once every tile was met."""
        m, s, kept = self._state
        return State(m, s, u=self.u.mul_((s / kept).unsqueeze(1))).closed()


@triton.jit(do_not_specialize=["positions"])
def _kl_by_identity(
    x,  # [rows, D]
    x_reference,  # [positions, D]
    u,  # fp32 [positions, D]
    m,  # fp32 [rows], as log_s
    log_s,
    m_reference,  # fp32 [positions], as log_s_reference
    log_s_reference,
    kl,  # fp32 [rows]
    positions, stride_x, stride_reference, stride_u,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a row: the dot product, and the difference of the normalisers."""
    row = tl.program_id(0).to(tl.int64)
    position = row % positions
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < D
        a = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_reference + position * stride_reference + column, mask=inside, other=0.0).to(tl.float32)
        acc += (a - b) * tl.load(u + position * stride_u + column, mask=inside, other=0.0)
    largest = tl.load(m + row) - tl.load(m_reference + position)
    spread = tl.load(log_s + row) - tl.load(log_s_reference + position)
    tl.store(kl + row, (largest - tl.sum(acc, 0)) + spread)


def kl_by_identity(x: Tensor, x_reference: Tensor, u: Tensor, state: State, reference: State) -> Tensor:
    """KL(reference || lens), fp32 ``[rows]``, nats.

    Args:
        x: ``[layers * positions, d_model]``, layer by layer. x_reference: ``[positions, d_model]``.
        u: fp32 ``[positions, d_model]``, W^T softmax(reference), times the head's scale.
        state, reference: closed, of both.
    """
    rows = x.shape[0]
    kl = torch.empty(rows, dtype=torch.float32, device=x.device)
    _kl_by_identity[(rows,)](
        x, x_reference, u, state.m, state.log_s, reference.m, reference.log_s, kl, x_reference.shape[0],
        x.stride(0), x_reference.stride(0), u.stride(0), D=x.shape[1], BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return kl


@triton.jit(do_not_specialize=["positions", "vocab", "layers", "tiles_per_split"])
def _divergence_pass(
    x,  # [layers * positions, D]
    x_reference,  # [positions, D]
    w,  # [V, D]
    m,  # fp32 [layers * positions], as log_s
    log_s,
    m_reference,  # fp32 [positions], as log_s_reference
    log_s_reference,
    sums,  # fp32 [splits, 4, layers * positions]
    positions, vocab, layers, tiles_per_split, stride_x, stride_reference, stride_w,
    bias,  # [V]
    scale, softcap,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, KL: tl.constexpr, REVERSE: tl.constexpr, JS: tl.constexpr,
    TV: tl.constexpr,
):  # fmt: skip
    """A program's slice of the vocabulary for a block of positions at every layer; see Statistic.term."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    position = block * BM + tl.arange(0, BM)
    inside = position < positions
    own_m = tl.load(m_reference + position, mask=inside, other=0.0)
    own_log_s = tl.load(log_s_reference + position, mask=inside, other=0.0)
    rows = layers.to(tl.int64) * positions
    for tile in tl.range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocab, BN))):
        token = tile * BN + tl.arange(0, BN)
        real = token < vocab
        reference = tile_logits(
            x_reference, w, bias, position.to(tl.int64), token.to(tl.int64), inside, real, stride_reference, stride_w,
            scale, softcap, BM, BN, BK, D, PRECISION, BIAS, SCALE, SOFTCAP,
        )  # fmt: skip
        log_p = tl.where(real[None, :], (reference - own_m[:, None]) - own_log_s[:, None], MASKED)
        p = tl.exp2(log_p * LOG2E)
        row = position.to(tl.int64) - positions
        for _ in tl.range(0, layers):
            row += positions
            z = tile_logits(
                x, w, bias, row, token.to(tl.int64), inside, real, stride_x, stride_w,
                scale, softcap, BM, BN, BK, D, PRECISION, BIAS, SCALE, SOFTCAP,
            )  # fmt: skip
            row_m = tl.load(m + row, mask=inside, other=0.0)
            row_log_s = tl.load(log_s + row, mask=inside, other=0.0)
            log_q = tl.where(real[None, :], (z - row_m[:, None]) - row_log_s[:, None], MASKED)
            q = tl.exp2(log_q * LOG2E)
            # This program alone owns its sums, so it may add to them tile by tile.
            at = sums + split.to(tl.int64) * 4 * rows + row
            if KL:  # sum p log(p / q) + q - p: every term is >= 0 and its first order in an error of lse is none
                kl = tl.sum(tl.where(p > 0.0, p * (log_p - log_q), 0.0) - p + q, 1)
                tl.store(at, tl.load(at, mask=inside, other=0.0) + kl, mask=inside)
            if REVERSE:
                reverse = tl.sum(tl.where(q > 0.0, q * (log_q - log_p), 0.0) - q + p, 1)
                tl.store(at + rows, tl.load(at + rows, mask=inside, other=0.0) + reverse, mask=inside)
            if JS:
                log_m = tl.log2(tl.maximum(p + q, 1e-37, propagate_nan=tl.PropagateNan.ALL)) * LN2 - LN2
                js = tl.where(p > 0.0, p * (log_p - log_m), 0.0) + tl.where(q > 0.0, q * (log_q - log_m), 0.0)
                js = 0.5 * tl.sum(js, 1)
                tl.store(at + 2 * rows, tl.load(at + 2 * rows, mask=inside, other=0.0) + js, mask=inside)
            if TV:
                tv = 0.5 * tl.sum(tl.abs(p - q), 1)
                tl.store(at + 3 * rows, tl.load(at + 3 * rows, mask=inside, other=0.0) + tv, mask=inside)


def divergence_pass(
    x: Tensor, x_reference: Tensor, head: Head, state: State, reference: State, names: Collection[str], tile: Tile
) -> dict[str, Tensor]:
    """The divergences ``names`` of rows from the reference: fp32 ``[rows]``, nats (tv: a share of 1).

    Args:
        x: ``[layers * positions, d_model]``, layer by layer. x_reference: ``[positions, d_model]``, x's dtype.
        state, reference: closed, of both.
    """
    positions, d_model = x_reference.shape
    layers = x.shape[0] // positions
    small = tile.block_rows < 64
    # Four fp32 tiles are alive at once: the reference's and the layer's logits and their exponentials.
    bm, bn = (16, 16) if small else (32, 64) if x.dtype == torch.float32 else (64, 128)
    bk = min(tile.block_depth, 32 if x.dtype == torch.float32 else 64)
    tiles = triton.cdiv(head.vocab, bn)
    blocks = triton.cdiv(positions, bm)
    per_split = triton.cdiv(tiles, min(vocabulary_splits(blocks, tiles, processors(x.device)), MOST_SLICES))
    splits = triton.cdiv(tiles, per_split)
    sums = torch.zeros(splits, len(DIVERGENCES), layers * positions, dtype=torch.float32, device=x.device)
    _divergence_pass[(blocks, splits)](
        x, x_reference, head.weight, state.m, state.log_s, reference.m, reference.log_s, sums,
        positions, head.vocab, layers, per_split, x.stride(0), x_reference.stride(0), head.weight.stride(0),
        **head_arguments(head), BM=bm, BN=bn, BK=bk, D=d_model, PRECISION=tile.precision,
        KL="kl" in names, REVERSE="reverse_kl" in names, JS="js" in names, TV="tv" in names,
        num_warps=4 if small or x.dtype == torch.float32 else 8, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return {name: total for name, total in zip(DIVERGENCES, sums.sum(0), strict=True) if name in names}
