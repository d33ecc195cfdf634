"""Rows to decode and the checks of what an engine answers, at any size: the interpreter's and a GPU's.

The head reads the rows as they are (no translator, no norm), so that float64 of the very same operands says
what is right and the tolerances are those of the vocabulary pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import reference
import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import NO_TARGET, Head, Norm, Query, Readout

ONE_PASS = frozenset({"log_prob", "rank", "entropy", "max_prob"})
DIVERGENCES = frozenset({"kl", "reverse_kl", "js", "tv"})


@dataclasses.dataclass(frozen=True)
class Problem:
    """``layers`` x ``positions`` rows, some flat, some peaked, and what is asked of them."""

    hidden: list[Tensor]  #: [positions, d_model] of every layer
    head: Head
    query: Query

    def decode(self, engine, memory_budget: int = 2**28) -> dict[str, Tensor]:
        translators = [None] * len(self.hidden)
        return engine.decode(self.hidden, Readout(translators, Norm("identity"), self.head), self.query, memory_budget)

    def asking(self, **changes) -> Problem:
        return dataclasses.replace(self, query=dataclasses.replace(self.query, **changes))

    def reading(self, **changes) -> Problem:
        return dataclasses.replace(self, head=dataclasses.replace(self.head, **changes))

    def check(self, got: dict[str, Tensor], at: Sequence[int] | slice = slice(None)) -> None:
        """Compare with float64 at the positions ``at`` of every layer."""
        query = self.query
        inputs = {"top_k": query.top_k, "watch": query.watch}
        if query.reference is not None:
            inputs["reference"] = reference.logits(query.reference[at].to(self.head.weight.dtype), self.head)
        if query.targets is not None:
            inputs["targets"] = query.targets[at]
        z = reference.logits(torch.stack([h[at] for h in self.hidden]), self.head)
        reference.check({name: value[:, at] for name, value in got.items()}, z, **inputs)


def problem(
    dtype: torch.dtype,
    d_model: int,
    vocab: int,
    device: torch.device | str,
    *,
    layers: int = 2,
    positions: int = 6,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    stats: frozenset[str] = ONE_PASS,
    top_k: int = 0,
    watch: int = 0,
    seed: int = 0,
) -> Problem:
    """Of six positions one is flat, one certain of its token, one has no target; the rest are ordinary."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weight = (normal(vocab, d_model) / d_model**0.5).to(dtype)
    offsets = None
    if bias:
        offsets = normal(vocab).to(dtype)
        offsets[3::7] = float("-inf")
    size = 3.0 / scale
    peaks = torch.randint(vocab, (positions,), generator=generator, device=device)
    hidden = []
    for _ in range(layers):
        h = normal(positions, d_model) * size
        h[::6] /= 1000
        h[1::6] = weight[peaks[1::6]].float() * (30 / scale) + h[1::6] / 10
        hidden.append(h.to(dtype))
    targets = torch.randint(vocab, (positions,), generator=generator, device=device)
    targets[1::6] = peaks[1::6]
    targets[2::6] = NO_TARGET
    own = None
    if stats & DIVERGENCES:
        own = (normal(positions, d_model) * size).to(dtype)
        own[3::6] = hidden[-1][3::6]  # the same distribution: every divergence is 0
    query = Query(
        frozenset(stats),
        targets if stats & {"log_prob", "rank"} else None,
        own,
        torch.randint(vocab, (watch,), generator=generator, device=device) if watch else None,
        top_k,
    )
    return Problem(hidden, Head(weight, offsets, scale, softcap), query)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor], at=slice(None)) -> None:
    """Two answers agree bit for bit at the positions ``at``, NaN with NaN."""
    assert a.keys() == b.keys()
    for name in a:
        left, right = (value[:, at].contiguous() for value in (a[name], b[name]))
        if left.dtype == torch.float32:
            left, right = left.view(torch.int32), right.view(torch.int32)
        assert torch.equal(left, right), name


def assert_void(got: dict[str, Tensor], layer: int, position: int) -> None:
    """A row of which nothing can be said: NaN, rank 0, top ids -1."""
    for name, value in got.items():
        row = value[layer, position]
        wanted = {"rank": 0, "top_ids": -1}.get(name)
        assert (row.isnan() if wanted is None else row == wanted).all(), (name, row)


def assert_close(got: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Two answers of fp32 arithmetic agree where fp32 can say: ranks and ids are left to float64."""
    assert got.keys() == other.keys()
    for name in got.keys() - {"rank", "top_ids"}:
        absolute, relative = (1e-3, 2e-4) if name in reference.LOOSE else (2e-4, 2e-5)
        torch.testing.assert_close(
            got[name],
            other[name],
            atol=absolute,
            rtol=relative,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
