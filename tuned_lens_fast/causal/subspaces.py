"""Causal bases: the directions of a layer's hidden states that change most what a lens reads, and their removal.

The method is that of Belrose et al. (arXiv:2303.08112, section 4).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuned_lens_fast.causal.utils import derange
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.models.block_output import stream_of, with_stream
from tuned_lens_fast.nn import Lens
from tuned_lens_fast.utils import maybe_all_reduce

T = TypeVar("T")
Mode = Literal["mean", "resample", "zero"]
_log = logging.getLogger(__name__)
#: A step that gains less than this share of the energy is the last.
_GAIN = 1e-4


@contextmanager
def ablate_subspace(
    model: T, A: Tensor, layer_index: int, mode: Mode = "zero", orthonormal: bool = False
) -> Iterator[T]:
    """The model with a subspace removed from what a block puts out, until the block is left.

    Args:
        model: a causal LM.
        A, mode, orthonormal: see :func:`remove_subspace`.
        layer_index: the block; negative ones count from the end.

    Raises:
        IndexError: no such block.
    """

    def removed(_module: nn.Module, _args: tuple, output: Any) -> Any:
        return with_stream(output, remove_subspace(stream_of(output), A, mode, orthonormal))

    hook = get_transformer_layers(model)[1][layer_index].register_forward_hook(removed)
    try:
        yield model
    finally:
        hook.remove()


class CausalBasis(NamedTuple):
    """An orthonormal basis of a subspace of hidden states, the direction that matters most first."""

    energies: Tensor  #: [k], nats: how far the predictions move, on average, when the direction is removed
    vectors: Tensor  #: [d_model, k], a direction a column


def extract_causal_bases(
    lens: Lens,
    hiddens: Sequence[Tensor],
    k: int,
    *,
    labels: Tensor | None = None,
    max_iter: int = 100,
    mode: Mode = "mean",
) -> Iterator[CausalBasis]:
    """For each layer the k directions whose removal changes most what the lens reads, found one after the other.

    Each is orthogonal to those before it, and maximises its energy by L-BFGS. The lens's logits of all ``hiddens`` of
    a layer exist meanwhile. With ``torch.distributed`` energies are means over processes.

    Args:
        lens: its parameters are frozen.
        hiddens: ``[..., d_model]`` of every layer, and one more, which is not read: transformers' ``hidden_states``.
        k: directions a layer; d_model of them if less than 1.
        labels: integer ``[batch, tokens]``; energy is then how much the cross-entropy of the next token grows, in
            place of KL(lens before || after).
        max_iter: at most about so many evaluations for a direction.
        mode: see :func:`remove_subspace`.

    Yields:
        The basis of each layer.

    Raises:
        ValueError: ``k`` is more than d_model.
    """
    lens.requires_grad_(False)
    width = hiddens[0].shape[-1]
    if k > width:
        raise ValueError(f"k: got {k}, wanted at most d_model, {width}")
    k = width if k < 1 else k
    for layer, hidden in enumerate(hiddens[:-1]):
        hidden = hidden.detach().float()
        with torch.no_grad():
            before = lens(hidden, layer).float().log_softmax(-1)
            vectors = _first_guess(lens, hidden, layer)[:, :k].contiguous()
        energies = torch.zeros(k, device=hidden.device)
        for j in range(k):
            found = vectors[:, :j]

            def projected(v: Tensor, found: Tensor = found) -> Tensor:
                """A unit vector orthogonal to those that are found."""
                v = v - found @ (found.mT @ v)
                return v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)

            def energy(v: Tensor, hidden: Tensor = hidden, before: Tensor = before, layer: int = layer) -> Tensor:
                after = lens(remove_subspace(hidden, v, mode, orthonormal=True), layer).float().log_softmax(-1)
                if labels is not None:
                    return _next_loss(after, labels) - _next_loss(before, labels)
                return F.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean()

            vectors[:, j], energies[j] = _maximised(energy, projected, vectors[:, j], max_iter)
        order = energies.argsort(descending=True)
        yield CausalBasis(energies[order], vectors[:, order])


def _maximised(energy: Any, projected: Any, start: Tensor, max_iter: int) -> tuple[Tensor, Tensor]:
    """The vector of largest energy, and its energy."""
    v = projected(start).detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([v], max_iter=max_iter, line_search_fn="strong_wolfe")
    evaluations = 0
    best, reached = v.detach().clone(), v.new_tensor(-torch.inf)

    def evaluate() -> Tensor:
        nonlocal evaluations, best, reached
        evaluations += 1
        optimizer.zero_grad()
        loss = -energy(projected(v))
        loss.backward()
        loss = maybe_all_reduce(loss.detach())
        assert v.grad is not None
        maybe_all_reduce(v.grad)
        if not loss.isfinite():
            _log.warning("the energy of a direction is not finite")
            optimizer.zero_grad()
            return torch.zeros_like(loss)
        if -loss > reached:
            best, reached = projected(v.detach()).clone(), -loss
        return loss

    with torch.enable_grad():
        while evaluations < max_iter:
            last = reached
            optimizer.step(evaluate)
            if not reached.isfinite() or reached - last <= _GAIN * reached.abs():
                break
    return best, reached


def _first_guess(lens: Lens, hidden: Tensor, layer: int) -> Tensor:
    """An orthonormal basis ``[d_model, d_model]``: the right singular vectors of the head after the lens's transform,
    which is as good as linear near the mean hidden state, the largest singular value first."""
    mean = hidden.flatten(0, -2).mean(0)
    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(lambda h: lens.transform_hidden(h, layer), mean)
    weight = lens.unembed.unembedding.weight.float()
    gram = weight.mT @ weight
    streams = len(mean) // len(gram)  # of a model with several, each is read
    gram = torch.block_diag(*[gram] * streams)
    return torch.linalg.eigh(jacobian.mT @ gram @ jacobian).eigenvectors.flip(-1)


def _next_loss(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy ``[]`` of predictions ``[batch, tokens, vocab]`` with the tokens that come next."""
    return F.nll_loss(log_probs[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(log_probs.device))


def remove_subspace(u: Tensor, A: Tensor, mode: Mode = "zero", orthonormal: bool = False) -> Tensor:
    """Vectors without what they have in the column space of ``A``, or with something else there.

    Args:
        u: ``[..., d]``.
        A: ``[d, k]`` of full rank, or one direction ``[d]``.
        mode: "zero" leaves nothing there, "mean" the mean over all vectors, "resample" what another vector has.
        orthonormal: the columns of ``A`` are.

    Returns:
        ``[..., d]``, what is orthogonal to ``A`` unchanged.

    Raises:
        ValueError: shapes that do not fit, another mode, or a single vector with "mean" or "resample".
    """
    A = A.unsqueeze(-1) if A.ndim == 1 else A
    if u.shape[-1] != len(A):
        raise ValueError(f"u: got shape {[*u.shape]}, wanted [..., {len(A)}] as A is {[*A.shape]}")
    if mode not in ("mean", "resample", "zero"):
        raise ValueError(f"mode: got {mode!r}, wanted 'mean', 'resample' or 'zero'")
    rows = u.flatten(0, -2)
    if mode == "zero":
        change = -u
    elif len(rows) < 2:
        raise ValueError(f"u: got {len(rows)} vector, wanted two or more for mode {mode!r}")
    else:
        change = (rows.mean(0) if mode == "mean" else derange(rows).view_as(u)) - u
    # Coordinates in A of the change's part there, which for columns that are not orthonormal least squares gives.
    A = A.to(u)
    coordinates = change @ A if orthonormal else change @ torch.linalg.pinv(A).mT
    return u + coordinates @ A.mT
