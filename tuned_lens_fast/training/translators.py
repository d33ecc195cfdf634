"""What is trained of a lens: the matrices and biases of some layers, or two factors in place of each matrix.

Between the loss, which gives gradients of the lens's own translators, and the optimiser, which changes what is here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tuned_lens_fast.nn import TunedLens


class Translators:
    """The parameters that an optimiser changes, fp32, by layer.

    With a ``rank`` a matrix is the product of ``left`` ``[width, rank]`` and ``right`` ``[rank, width]``. The lens has
    the product: :meth:`pull` takes its gradient to the factors, :meth:`push` brings them back into it.
    """

    def __init__(self, lens: TunedLens, numbers: Sequence[int], bias_only: bool, rank: int | None, seed: int) -> None:
        lens.layer_translators.float()
        self._linear = {number: lens[number] for number in numbers}
        self._generator = torch.Generator().manual_seed(seed)
        self._bias_only = bias_only
        self._factors: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        if rank is not None:
            for number, linear in self._linear.items():
                width = len(linear.weight)
                left, right = linear.weight.new_zeros(width, rank), linear.weight.new_zeros(rank, width)
                self._factors[number] = (nn.Parameter(left), nn.Parameter(right))

    @torch.no_grad()
    def assign(self, number: int, weight: Tensor, bias: Tensor) -> None:
        """Make these a layer's translator, ``[width, width]`` and ``[width]``; a lens without biases takes none."""
        linear = self._linear[number]
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.copy_(bias)

    @torch.no_grad()
    def zero(self, number: int) -> None:
        """Make the layer's translator add nothing, as in the logit lens."""
        for parameter in self._linear[number].parameters():
            parameter.zero_()

    @torch.no_grad()
    def factorise(self) -> None:
        """Begin with the lens's matrices, each cut to the rank by its singular values."""
        for number, (left, right) in self._factors.items():
            u, singular, v = torch.linalg.svd(self._linear[number].weight.double(), full_matrices=False)
            rank = len(right)
            # Where both factors were zero, neither would ever have a gradient.
            zero = singular[:rank] <= 1e-7 * max(1e-30, float(singular[0]))
            random = torch.randn(right.shape, generator=self._generator, dtype=torch.float64) / math.sqrt(
                right.shape[1]
            )
            root = singular[:rank].sqrt()
            left.copy_(u[:, :rank] * root.masked_fill(zero, 0))
            right.copy_(torch.where(zero[:, None], random.to(v), v[:rank] * root[:, None]))
        self.push()

    def parameters(self, number: int) -> list[nn.Parameter]:
        """Those of a layer that are trained."""
        linear = self._linear[number]
        matrices = [] if self._bias_only else [*self._factors.get(number, [linear.weight])]
        return matrices + ([] if linear.bias is None else [linear.bias])

    def all(self) -> list[nn.Parameter]:
        """Those of all layers."""
        return [parameter for number in self._linear for parameter in self.parameters(number)]

    def gradients(self) -> list[Tensor]:
        """Those of the lens's own matrices and biases, before :meth:`pull`; zero where there was nothing to read."""
        found = []
        for linear in self._linear.values():
            for parameter in linear.parameters():
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    found.append(parameter.grad)
        return found

    @torch.no_grad()
    def pull(self) -> None:
        """Give the factors the gradients that follow from those of the lens's matrices."""
        for number, (left, right) in self._factors.items():
            weight = self._linear[number].weight
            if weight.grad is not None:
                left.grad, right.grad = weight.grad @ right.t(), left.t() @ weight.grad
                weight.grad = None

    @torch.no_grad()
    def push(self) -> None:
        """Make the lens's matrices the products of the factors."""
        for number, (left, right) in self._factors.items():
            self._linear[number].weight.copy_(left @ right)

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on, by name, on the CPU."""
        found = {}
        for number, linear in self._linear.items():
            for name, tensor in linear.state_dict().items():
                found[f"{number}.{name}"] = tensor.cpu().clone()
            for name, factor in zip(("left", "right"), self._factors.get(number, ()), strict=False):
                found[f"{number}.{name}"] = factor.detach().cpu().clone()
        return found

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take what :meth:`state` gave."""
        for number, linear in self._linear.items():
            for name, parameter in linear.named_parameters():
                parameter.copy_(state[f"{number}.{name}"])
            for name, factor in zip(("left", "right"), self._factors.get(number, ()), strict=False):
                factor.copy_(state[f"{number}.{name}"])

    @contextmanager
    def trainable(self, lens: TunedLens) -> Iterator[None]:
        """Within the block only these parameters of the lens have gradients; afterwards none has."""
        before = {parameter: parameter.requires_grad for parameter in lens.layer_translators.parameters()}
        try:
            lens.layer_translators.requires_grad_(False)
            for linear in self._linear.values():
                linear.weight.requires_grad_(not self._bias_only)
                if linear.bias is not None:
                    linear.bias.requires_grad_(True)
            yield
        finally:
            for parameter, flag in before.items():
                parameter.requires_grad_(flag).grad = None
