"""How exact an fp32 product is that is made of bf16 products: python bench/split_products.py

Of SmolLM2-135M's own hidden states: the largest difference from float64 of every statistic, as a share of what this
package promises. The parts are multiplied by PyTorch's fp32 product, which is exact for products of bf16 numbers.
It comes first, and then csrc/'s own fp32 product, on processors that have a unit for it.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
from checking import expect, judge
from contenders.ours import decode
from presets import BUDGET, problems, question
from torch import Tensor

from tuned_lens_fast.engines.eager import EagerEngine
from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.engines.matmul import Matmul, NativeMatmul, Packed
from tuned_lens_fast.engines.native import product_unit

POSITIONS = 128
#: Rows compared with float64.
SAMPLE = 400
#: Name -> parts of every number, and the most that the numbers of two parts that are multiplied add up to.
SPLITS = {"one product": (1, 0), "three": (2, 1), "four": (2, 2), "six": (3, 2)}


def bf16_parts(x: Tensor, count: int) -> list[Tensor]:
    """x as a sum of bf16 numbers, each the rounded rest of those before."""
    parts: list[Tensor] = []
    for _ in range(count):
        parts.append(x.bfloat16())
        x = x - parts[-1]
    return parts


class SplitMatmul(Matmul):
    """fp32 as a sum of bf16 parts."""

    def __init__(self, parts: int, most: int, head: Head) -> None:
        super().__init__(head)
        self.parts, self.most = parts, most

    def multiply(self, x: Packed, weight: Tensor, out: Tensor | None = None) -> Tensor:
        left, right = (torch.stack(bf16_parts(each, self.parts)).float() for each in (x.values, weight))
        pairs = itertools.product(range(self.parts), repeat=2)
        return sum(
            (left[i] @ right[j].t() for i, j in sorted(pairs, key=sum, reverse=True) if i + j <= self.most),
            start=torch.zeros(1),
        )


def main() -> None:
    [problem] = problems("smollm2-135m", [], [POSITIONS], [], "real", dtype=torch.float32, device="cpu", budget=BUDGET)
    problem = problem.asking(*question("log_prob,rank,entropy,kl,top_10"))
    expected = expect(problem, SAMPLE)
    products = {"PyTorch's fp32": Matmul, **({} if product_unit() == "plain" else {"csrc/'s fp32": NativeMatmul})}
    for name, product in (products | {name: partial(SplitMatmul, *split) for name, split in SPLITS.items()}).items():
        engine = EagerEngine()
        engine.matmul = product  # type: ignore[method-assign]
        verdict = judge(decode(engine, problem), problem, expected)
        print(f"{name}:", verdict.wrong or ", ".join(f"{s} {e:.2f}" for s, e in verdict.errors.items()), flush=True)


if __name__ == "__main__":
    main()
