"""Logits of a vocabulary tile: PyTorch's matrix product, and those that csrc/ has for CPUs.

x is put into the order that a product wants once, and then multiplied by one tile of W after another. Operands have the
head's precision, sums and logits are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.engines.tiling import slices

Function = TypeVar("Function", bound=Callable[..., Any])

#: Rows and columns that AMX's registers hold; x is padded to multiples of it.
AMX_BLOCK = 32
#: Rows that AVX2's product takes at once, and at most how much of W a thread packs: tokens and their weights.
FMA_ROWS, FMA_BLOCK = 6, (64, 256)
#: Of W, for AVX2's product; its sums are of fp32.
FMA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def constant_in_graphs(function: Function) -> Function:
    """Have ``torch.compile`` call ``function`` once and take what it returns for a constant.

    So does ``torch.compiler.assume_constant_result``, which imports ``torch._dynamo``: as long again as PyTorch takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Packed(NamedTuple):
    """Rows x as a product wants them."""

    rows: int
    values: Tensor


class Matmul:
    """PyTorch's product, on any device."""

    #: Whether a logit's bits depend on how many others are multiplied with it.
    shape_dependent = True

    def __init__(self, head: Head) -> None:
        self.head = head
        dtype = head.weight.dtype
        #: Where PyTorch multiplies 16-bit numbers into fp32, they stay so; elsewhere both are widened.
        self.narrow = head.weight.is_cuda and dtype in (torch.bfloat16, torch.float16)
        self.operand = dtype if self.narrow else torch.promote_types(torch.float32, dtype)
        self._wide: Tensor | None = None

    def pack(self, x: Tensor) -> Packed:
        """x ``[rows, d_model]`` in the head's dtype, for :meth:`multiply`."""
        return Packed(x.shape[0], x.to(self.operand))

    def multiply(self, x: Packed, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """fp32 x W^T of rows of W in its own dtype, ``[rows, tokens]``; on a CPU in ``out``, if that is given."""
        if self.narrow:
            return torch.mm(x.values, weight.t(), out_dtype=torch.float32)
        out = out if self.operand == torch.float32 else None
        return torch.mm(x.values, self._widened(weight).t(), out=out).float()

    def _widened(self, weight: Tensor) -> Tensor:
        """Rows of W as PyTorch multiplies them, until the next ones are asked for.

        Where they have to be another dtype they share one room, and so do a tile's logits with those before: to hand
        memory back to the system and be given it anew takes a fifth of a product's time.
        """
        if weight.dtype == self.operand:
            return weight
        if self._wide is None or len(self._wide) < len(weight):
            self._wide = weight.new_empty(weight.shape, dtype=self.operand)
        return self._wide[: len(weight)].copy_(weight)

    def scratch(self, rows: int, tile: int, sums: bool) -> int:
        """Bytes that products need beside x, a tile of W in fp32 and the logits; ``sums``: also those that add up."""
        return 0

    def tiles(self, width: int) -> Iterator[slice]:
        """The vocabulary, ``width`` tokens at a time."""
        return slices(self.head.vocab, width)

    def room(self, rows: int, width: int) -> Tensor:
        """For the logits of one tile after another: fp32 ``[rows, width]``, uninitialised."""
        return torch.empty(rows, width, dtype=torch.float32, device=self.head.weight.device)

    def __call__(self, x: Packed, tokens: slice | Tensor, width: int, out: Tensor | None = None) -> Tensor:
        """fp32 logits ``[rows, tokens]`` of a tile, or of the tokens with the ids given.

        With ``out``, of :meth:`room`, they may be put there, over those that were there before.

        The last tile's product is as wide as the others, for the same shapes give the same rounding; the
        columns it shares with the tile before are cut off.
        """
        skip = 0
        if isinstance(tokens, slice) and self.shape_dependent:
            skip = max(0, tokens.start - max(0, tokens.stop - width))
            tokens = slice(tokens.start - skip, tokens.stop)
        weight = self.head.weight[tokens]
        if out is not None and len(weight) < out.shape[1]:
            out = out[:, : len(weight)]
        return self._logits(self.multiply(x, weight, out), tokens)[:, skip:]

    def target_logits(self, x: Packed, targets: Tensor, width: int) -> Tensor:
        """Every row's target logit by a tile's own arithmetic: the diagonal of a product with the targets' rows of W.

        Another way of summing the same product may rank a token behind its equals. x has rows layers x positions,
        targets int64 ``[positions]``, no more than ``width`` of them, a tile's tokens; fp32 ``[rows]``.
        """
        z = self.logits_of(x, targets.clamp(min=0), width).unflatten(0, (-1, targets.shape[0]))
        return z.diagonal(dim1=1, dim2=2).flatten()

    def logits_of(self, x: Packed, ids: Tensor, width: int) -> Tensor:
        """fp32 logits ``[rows, ids]`` of at most ``width`` tokens, a tile's, by a tile's own arithmetic."""
        weight = self.head.weight[ids]
        if self.shape_dependent:
            # What stands in the rest does not matter, its columns are dropped.
            as_wide = weight.new_empty(width, weight.shape[1])
            as_wide[: len(ids)] = weight
            weight = as_wide
        return self._logits(self.multiply(x, weight)[:, : len(ids)], ids)

    def add_rows_of_weight(self, sums: Tensor, shares: Tensor, tokens: slice, exact: bool) -> None:
        """Add shares W to ``sums``, fp32 ``[rows, d_model]``; shares: fp32 ``[rows, tokens]``, of a tile.

        exact: to fp32's rounding, where W is of 16 bits too; else shares are rounded to its dtype.
        """
        weight = self.head.weight[tokens]
        if self.narrow and not exact:
            sums += torch.mm(shares.to(weight.dtype), weight, out_dtype=torch.float32)
        elif exact:
            sums += shares @ self._widened(weight).float()  # adding on the way, vendor libraries sum less exactly
        else:
            sums.addmm_(shares, self._widened(weight).float())

    def _logits(self, z: Tensor, tokens: slice | Tensor) -> Tensor:
        """What the model makes of the products of these tokens."""
        head = self.head
        if head.bias is not None:
            z += head.bias[tokens].float()
        if head.scale != 1.0:
            z *= head.scale
        return z if head.softcap is None else z.div_(head.softcap).tanh_().mul_(head.softcap)


class FmaMatmul(Matmul):
    """On AVX2's fused multiply-adds, in fp32 throughout; weights of 16 bits are widened a block at a time."""

    shape_dependent = False

    def pack(self, x: Tensor) -> Packed:
        """``[packs, d_model, 6]``: six rows side by side, with zeros for those there are not."""
        packs = -(-x.shape[0] // FMA_ROWS)
        padded = torch.nn.functional.pad(x.float(), (0, 0, 0, packs * FMA_ROWS - x.shape[0]))
        return Packed(x.shape[0], padded.unflatten(0, (packs, FMA_ROWS)).transpose(1, 2).contiguous())

    def multiply(self, x: Packed, weight: Tensor, out: Tensor | None = None) -> Tensor:
        z = self.room(x.rows, weight.shape[0]) if out is None else out
        torch.ops.tuned_lens_fast.fma_matmul(x.values, _rows_contiguous(weight), z)
        return z

    def scratch(self, rows: int, tile: int, sums: bool) -> int:
        weight = self.head.weight
        # Of the rows and of the reference: x padded and packed. Of every thread: a block of W.
        x = 2 * 2 * (rows + FMA_ROWS) * weight.shape[1] * 4
        block = _threads() * FMA_BLOCK[0] * (min(weight.shape[1], FMA_BLOCK[1]) + 8) * 4
        return x + block + tile * weight.shape[1] * weight.itemsize * (weight.stride(1) != 1)


class AmxMatmul(Matmul):
    """On AMX, which multiplies bf16 alone: as many bf16 products as :func:`bf16_split` says."""

    shape_dependent = False

    def __init__(self, head: Head, parts: int, most: int) -> None:
        super().__init__(head)
        self.parts, self.most = parts, most

    def pack(self, x: Tensor) -> Packed:
        """``[parts, rows, d_model]`` in bf16."""
        return Packed(x.shape[0], bf16_parts(x.float(), self.parts))

    def multiply(self, x: Packed, weight: Tensor, out: Tensor | None = None) -> Tensor:
        weight = weight if weight.dtype == torch.bfloat16 else self._widened(weight)
        z = self.room(x.rows, weight.shape[0]) if out is None else out
        torch.ops.tuned_lens_fast.amx_matmul(x.values, _rows_contiguous(weight), self.most, z)
        return z

    def add_rows_of_weight(self, sums: Tensor, shares: Tensor, tokens: slice, exact: bool) -> None:
        if exact and self.parts == 1:
            super().add_rows_of_weight(sums, shares, tokens, exact)
            return
        weight = self.head.weight[tokens]
        weight = (weight if weight.dtype == torch.bfloat16 else weight.float()).t().contiguous()
        added = self.room(*sums.shape)
        torch.ops.tuned_lens_fast.amx_matmul(bf16_parts(shares, self.parts), weight, self.most, added)
        sums += added

    def scratch(self, rows: int, tile: int, sums: bool) -> int:
        weight = self.head.weight
        blocks, d_model = -(-tile // AMX_BLOCK), _padded(weight.shape[1])
        # Of the rows and of the reference: x and its parts. Of every thread: a block of W in its parts.
        x = 2 * _padded(rows) * d_model * (4 + 2 * self.parts)
        block = min(_threads(), blocks) * 2 * AMX_BLOCK * (d_model + _padded(tile) * sums) * self.parts
        adding = (_padded(rows) * _padded(tile) * 2 * self.parts + rows * d_model * 4) * sums
        return x + block + adding + tile * d_model * 4 * ((weight.stride(1) != 1) + sums)


def bf16_split(dtype: torch.dtype, fp32_precision: str) -> tuple[int, int] | None:
    """Parts of every number, and the most that the numbers of two parts that are multiplied may add up to.

    bf16 takes one product, fp16 four (and is exact). Of fp32, ``torch.backends.mkldnn.matmul.fp32_precision`` says what
    is wanted: "none", the default, takes six and is as exact as PyTorch's own product; "tf32" and "bf16", or
    ``torch.set_float32_matmul_precision("high")``, take three, with about 16 bits; "ieee" leaves it to PyTorch: None.
    """
    return {
        torch.bfloat16: (1, 0),
        torch.float16: (2, 2),
        torch.float32: {"none": (3, 2), "ieee": None}.get(fp32_precision, (2, 1)),
    }.get(dtype)


def bf16_parts(x: Tensor, count: int) -> Tensor:
    """x ``[rows, d_model]`` as a sum of bf16 ``[count, rows, d_model]``, padded with zeros for AMX's registers."""
    rows, d_model = map(_padded, x.shape)
    parts = x.new_zeros(count, rows, d_model, dtype=torch.bfloat16)
    inside = parts[:, : x.shape[0], : x.shape[1]]
    for part in inside:
        part.copy_(x)
        x = x - part
    return parts


def _rows_contiguous(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _padded(size: int) -> int:
    return -(-size // AMX_BLOCK) * AMX_BLOCK


@constant_in_graphs
def _threads() -> int:
    return torch.get_num_threads()
