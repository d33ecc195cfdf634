"""The products that csrc/ has for CPUs: x is packed once, and then multiplied by one tile of W after another."""

from __future__ import annotations

import torch
from torch import Tensor

from tuned_lens_fast.engines.eager import Matmul
from tuned_lens_fast.engines.interface import Head

#: Rows and columns that AMX's registers hold; x is padded to multiples of it.
AMX_BLOCK = 32
#: Rows that AVX2's product takes at once, and at most how much of W a thread packs: tokens and their weights.
FMA_ROWS, FMA_BLOCK = 6, (64, 256)
#: Of W, for AVX2's product; its sums are of fp32.
FMA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedMatmul(Matmul):
    """A product with x in an order of its own, which is kept: x meets one tile after another, as may the reference."""

    def __init__(self, head: Head, hidden: torch.dtype) -> None:
        super().__init__(head, hidden)
        self._recent: list[tuple[Tensor, Tensor]] = []

    def pack(self, x: Tensor) -> Tensor:
        """x ``[rows, d_model]`` as :meth:`run` wants it."""
        raise NotImplementedError

    def run(self, packed: Tensor, weight: Tensor, z: Tensor) -> None:
        """Write fp32 z ``[rows, width]``; each row of W is contiguous."""
        raise NotImplementedError

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        z = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
        self.run(self._packed(x), weight, z)
        return z

    def _packed(self, x: Tensor) -> Tensor:
        for known, packed in self._recent:
            if known is x:
                return packed
        packed = self.pack(x)
        self._recent = [*self._recent[-1:], (x, packed)]
        return packed


class FmaMatmul(PackedMatmul):
    """On AVX2's fused multiply-adds, in fp32 throughout; weights of 16 bits are widened a block at a time."""

    def weight(self, tokens: slice | Tensor) -> Tensor:
        """Their rows of W, in W's dtype."""
        return self.head.weight[tokens]

    def pack(self, x: Tensor) -> Tensor:
        """``[packs, d_model, 6]``: six rows side by side, with zeros for those there are not."""
        packs = -(-x.shape[0] // FMA_ROWS)
        padded = torch.nn.functional.pad(x, (0, 0, 0, packs * FMA_ROWS - x.shape[0]))
        return padded.unflatten(0, (packs, FMA_ROWS)).transpose(1, 2).contiguous()

    def run(self, packed: Tensor, weight: Tensor, z: Tensor) -> None:
        torch.ops.tuned_lens_fast.fma_matmul(packed, weight, z)

    def scratch(self, rows: int, tile: int) -> int:
        d_model = self.head.weight.shape[1]
        # Of the rows and of the reference: x padded and packed. Of every thread: a block of W.
        x = 2 * 2 * (rows + FMA_ROWS) * d_model * 4
        weight = _threads() * FMA_BLOCK[0] * (min(d_model, FMA_BLOCK[1]) + 8) * 4
        return x + weight + tile * d_model * self.head.weight.itemsize * (self.head.weight.stride(1) != 1)


class AmxMatmul(PackedMatmul):
    """On AMX, which multiplies bf16 alone: as many bf16 products as :func:`bf16_split` says."""

    def __init__(self, head: Head, hidden: torch.dtype, parts: int, most: int) -> None:
        super().__init__(head, hidden)
        self.parts, self.most = parts, most
        self.operand = torch.bfloat16 if head.weight.dtype == torch.bfloat16 else torch.float32

    def pack(self, x: Tensor) -> Tensor:
        return bf16_parts(x, self.parts)

    def run(self, packed: Tensor, weight: Tensor, z: Tensor) -> None:
        torch.ops.tuned_lens_fast.amx_matmul(packed, weight, self.most, z)

    def scratch(self, rows: int, tile: int) -> int:
        blocks, d_model = -(-tile // AMX_BLOCK), _padded(self.head.weight.shape[1])
        # Of the rows and of the reference: x and its parts. Of every thread: a block of W in its parts.
        x = 2 * _padded(rows) * d_model * (4 + 2 * self.parts)
        weight = min(_threads(), blocks) * 2 * AMX_BLOCK * d_model * self.parts
        return x + weight + tile * d_model * 4 * (self.head.weight.stride(1) != 1)


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


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


def _padded(size: int) -> int:
    return -(-size // AMX_BLOCK) * AMX_BLOCK


def bf16_parts(x: Tensor, count: int) -> Tensor:
    """x ``[rows, d_model]`` as a sum of bf16 ``[count, rows, d_model]``, padded with zeros for AMX's registers."""
    rows, d_model = map(_padded, x.shape)
    parts = x.new_zeros(count, rows, d_model, dtype=torch.bfloat16)
    inside = parts[:, : x.shape[0], : x.shape[1]]
    for part in inside:
        part.copy_(x)
        x = x - part
    return parts
