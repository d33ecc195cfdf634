"""Logits of a vocabulary tile: PyTorch's matrix product, and the one that csrc/ has for x86 processors.

x is put into the form that a product wants once, and then multiplied by one tile of W after another. Operands have the
head's precision, sums and logits are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.engines.state import SUMS, State, Wanted
from tuned_lens_fast.engines.tiling import slices

Function = TypeVar("Function", bound=Callable[..., Any])

#: Of W, that csrc/ multiplies; its sums are of fp32.
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The most rows and tokens that csrc/ sums at once, and the fewest; of W a thread packs so many tokens and bytes, or
#: LEAF tokens.
LEAF, SMALLEST_LEAF, BLOCK_TOKENS, BLOCK_BYTES = 32, 16, 128, 2**18
#: The most rows for which W is not packed but read, or widened: some words, so many of a token at the most.
FEW_ROWS, DEEPEST = 128, 288
#: The most rows for which a walk sums exp(z - m) W, and the most bytes that all threads' sums may take.
ROWS_WITH_U, BYTES_OF_U = 64, 2**25
#: Above so many top tokens, a pass's sorted insertion costs more than a selection from the tile.
MOST_IN_PASS = 64


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

    def scratch(self, rows: int, tile: int, top_k: int, sums: bool) -> int:
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
        return self.logits(x, weight, tokens, out)[:, skip:]

    def target_logits(self, x: Packed, targets: Tensor, width: int) -> Tensor:
        """Every row's target logit by a tile's own arithmetic: the diagonal of a product with the targets' rows of W.

        Another way of summing the same product may rank a token behind its equals. x has rows layers x positions,
        targets int64 ``[positions]``, no more than ``width`` of them, a tile's tokens; fp32 ``[rows]``.
        """
        z = self.logits_of(x, targets.clamp(min=0), width).unflatten(0, (-1, targets.shape[0]))
        return z.diagonal(dim1=1, dim2=2).flatten()

    def logits_of(self, x: Packed, ids: Tensor, width: int) -> Tensor:
        """fp32 logits ``[rows, ids]`` of at most ``width`` tokens, a tile's, by a tile's own arithmetic."""
        count = len(ids)
        if self.shape_dependent:  # any tokens will do for the rest, whose columns are dropped
            ids = torch.nn.functional.pad(ids, (0, width - count))
        return self.logits(x, self.head.weight[ids], ids)[:, :count]

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

    def logits(self, x: Packed, weight: Tensor, tokens: slice | Tensor, out: Tensor | None = None) -> Tensor:
        """What the model makes of the products with ``weight``, the rows of W of these tokens; see :meth:`multiply`."""
        return self._transformed(self.multiply(x, weight, out), tokens)

    def _transformed(self, z: Tensor, tokens: slice | Tensor) -> Tensor:
        head = self.head
        if head.bias is not None:
            z += head.bias[tokens].float()
        if head.scale != 1.0:
            z *= head.scale
        return z if head.softcap is None else z.div_(head.softcap).tanh_().mul_(head.softcap)


class NativeMatmul(Matmul):
    """csrc/'s: in fp32, or of pairs of bf16 where the processor multiplies these, into fp32."""

    shape_dependent = False

    def __init__(self, head: Head, parts: int = 0, most: int = 0) -> None:
        """``parts``, ``most``: of :func:`bf16_split`, where AMX is to be used; 0 where it is not."""
        super().__init__(head)
        self.parts, self.most = parts, most
        self.bias = None if head.bias is None else head.bias.float().contiguous()

    def pack(self, x: Tensor) -> Packed:
        return Packed(x.shape[0], x.float().contiguous())

    def multiply(self, x: Packed, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return self._multiply(x.values, weight, (None, 1.0, 0.0), out)

    def logits(self, x: Packed, weight: Tensor, tokens: slice | Tensor, out: Tensor | None = None) -> Tensor:
        bias = None if self.bias is None else self.bias[tokens]
        return self._multiply(x.values, weight, (bias, self.head.scale, self.head.softcap or 0.0), out)

    def _multiply(
        self, x: Tensor, weight: Tensor, transform: tuple[Tensor | None, float, float], out: Tensor | None = None
    ) -> Tensor:
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        z = self.room(len(x), len(weight)) if out is None else out
        torch.ops.tuned_lens_fast.logits(x, weight, *transform, self.parts, self.most, z)
        return z

    def walks(self, rows: int, wanted: Wanted) -> bool:
        """Whether :meth:`walk` finds all of it; a W that is not contiguous is made so a tile at a time."""
        few = not wanted.u or rows <= self.rows_with_u()
        return few and wanted.top_k <= MOST_IN_PASS and self.head.weight.stride(1) == 1

    def walk(self, x: Packed, wanted: Wanted, targets: Tensor | None, threshold: Tensor | None) -> State:
        """The state of every row after the whole vocabulary, no logit of which leaves a core's own caches.

        Where :meth:`walks` says so; targets and threshold are those of ``EagerEngine.tile_passes``.
        """
        head, sums = self.head, x.values.new_empty(x.rows, len(SUMS))
        r = sums.new_empty(x.rows, dtype=torch.int64) if "r" in wanted.running else None
        target = None if targets is None else sums.new_empty(x.rows)
        top = sums.new_empty(x.rows, wanted.top_k, dtype=torch.int64) if wanted.top_k else None
        u = torch.empty_like(x.values) if wanted.u else None
        product = (x.values, head.weight, self.bias, head.scale, head.softcap or 0.0, self.parts, self.most)
        torch.ops.tuned_lens_fast.vocabulary_walk(*product, targets, threshold, sums, r, target, top, u)
        return State(**dict(zip(SUMS, sums.unbind(1), strict=True)), r=r, target=target, top=top, u=u)

    def add_rows_of_weight(self, sums: Tensor, shares: Tensor, tokens: slice, exact: bool) -> None:
        if not self.parts or (exact and self.parts == 1):
            super().add_rows_of_weight(sums, shares, tokens, exact)
        else:
            sums += self._multiply(shares, self.head.weight[tokens].t().contiguous(), (None, 1.0, 0.0))

    def rows_with_u(self) -> int:
        """The most rows for which a walk sums exp(z - m) W; of more, PyTorch multiplies a tile's exp(z - m) by W."""
        return min(ROWS_WITH_U, BYTES_OF_U // (_threads() * 4 * max(1, self.head.weight.shape[1])))

    def scratch(self, rows: int, tile: int, top_k: int, sums: bool) -> int:
        weight, parts = self.head.weight, max(1, self.parts)
        deep, added = weight.shape[1] + LEAF, (tile + LEAF) * sums * bool(self.parts)
        # Of the rows and of the reference: x in fp32. Of those that are multiplied: their parts.
        x = (rows + LEAF) * 4 * (2 * weight.shape[1] + parts * max(deep, added))
        # Of every thread: a block of W or, of few rows, some of its tokens and all logits; and what is found of a row.
        token = max(deep, added) * parts * (2 if self.parts else 4)
        block, logits = max(LEAF * token, min(BLOCK_TOKENS * token, BLOCK_BYTES)), LEAF * BLOCK_TOKENS * 4
        few = LEAF * min(token, DEEPEST * 4) + min(-(-rows // LEAF) * LEAF, FEW_ROWS) * (BLOCK_TOKENS + LEAF) * 4
        thread = max(block, few) + logits
        thread += rows * 8 * (3 + (top_k if top_k <= MOST_IN_PASS else 0))
        thread += min(rows, self.rows_with_u()) * sums * 4 * weight.shape[1]
        bias = 0 if self.bias is None else self.head.vocab * 4
        copies = tile * weight.shape[1] * 4 * ((weight.stride(1) != 1) + bool(added)) + rows * deep * 4 * bool(added)
        return x + min(_threads(), -(-self.head.vocab // SMALLEST_LEAF)) * thread + bias + copies


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


@constant_in_graphs
def _threads() -> int:
    return torch.get_num_threads()
