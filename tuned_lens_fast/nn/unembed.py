"""The end of a model as a lens needs it: final norm, head, and what the model does to its logits.

On the way from hidden state to statistics this stands behind the translator. Nothing here is a copy where the model's
tensors are plain: an :class:`Unembed` reads these, or what :mod:`tuned_lens_fast.models.resident` makes of those that
are split, offloaded or quantised, and describes them plainly (:class:`~tuned_lens_fast.engines.interface.Norm`,
:class:`~tuned_lens_fast.engines.interface.Head`) for the engines.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from tuned_lens_fast import model_surgery
from tuned_lens_fast.engines.interface import Head, Norm, Shard
from tuned_lens_fast.models.alias import frozen_alias
from tuned_lens_fast.models.checkpoint_end import load_end
from tuned_lens_fast.models.forward_pass import name_of
from tuned_lens_fast.models.resident import Resident, devices_of, execution_device, is_spread, plain
from tuned_lens_fast.models.tracing import LogitTransform, TracedModel
from tuned_lens_fast.models.wrappers import check_hooked, is_hooked_transformer, unwrapped


@dataclass
class InversionOutput:
    """What :meth:`Unembed.invert` found."""

    preimage: Tensor  #: [..., hidden_size], the hidden states h
    grad_norm: Tensor  #: norm of the loss's gradient at h
    kl: Tensor  #: mean of KL(target || softmax(unembed(h))), nats
    loss: Tensor  #: kl plus the weighted prior term
    nfev: int  #: evaluations of the loss


class Unembed(nn.Module):
    """Maps hidden states to logits the way the model does at its end.

    The norm and head stay the model's. They are no submodules of this one, so moving, casting, freezing or
    training a lens leaves the model as it was, while ``model.to(...)`` or new weights in the model are seen
    here. ``parameters()`` and ``state_dict()`` are empty; a state dict with norm and head in it loads, and
    they are not read. A deep copy reads the same model; a pickle holds the norm and head, so that it works
    alone.

    Of a model that is split (tensor parallelism, FSDP2), offloaded, or quantised at its head, norm and head are whole
    copies, made anew once an optimiser has changed the model's: every rank has to use this alike. A norm that is on
    another device than the head joins it.

    ``unembed.to(device)`` with another device than the model's keeps a copy there, since no storage can be on
    two devices; move the model instead where that matters. Casts do not reach the norm and head.
    """

    def __init__(self, model: Any, *, verify: bool = True) -> None:
        """Reads the end of ``model``: a causal LM of transformers, one inside of nnsight's or TransformerLens's wrapper
        (``NNsight``, ``LanguageModel``, ``TransformerBridge``), or TransformerLens's ``HookedTransformer``.

        A causal LM is run on a few tokens, which leaves nothing behind, and the logits of this Unembed for random
        hidden states are compared with its own.

        Args:
            model: with its weights loaded, wherever they are: on several devices, offloaded by accelerate, split by
                tensor parallelism or FSDP2. A quantised head is read as the matrix that it multiplies by.
            verify: False to leave out that comparison, and not to run the model's blocks.

        Raises:
            ValueError: ``model`` has no linear head, or its weights are not loaded (meta device).
            NotImplementedError: no lens can read the model, and why; or its logits are not those of this Unembed,
                and what differs; or it is in FSDP1 or a stage of a pipeline.
        """
        super().__init__()
        model = unwrapped(model)
        if is_hooked_transformer(model):
            norm, transform = model_surgery.get_final_norm(model), model_surgery.get_logit_transform(model)
            self._describe(Resident(norm), Resident(model.unembed), model.cfg.d_model, transform, model.cfg.n_layers)
            if verify:
                check_hooked(model, self)
            return
        self._describe_traced(TracedModel(model, run_blocks=verify), verify)

    @classmethod
    def from_checkpoint(cls, folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Unembed:
        """The end of a model out of its checkpoint: norm and head are read, on the CPU, and no block is.

        All but the blocks is run on a few tokens, and the logits for random hidden states compared, as for a model.

        Args:
            folder: a checkpoint of transformers in safetensors, of a causal LM.
            trust_remote_code: run the code that the checkpoint brings; see transformers.

        Raises:
            FileNotFoundError: no such folder, or no safetensors in it.
            ValueError: the folder is no checkpoint of a causal LM, is damaged, or lacks a weight of the end.
            NotImplementedError: as for a model.
        """
        unembed = cls.__new__(cls)
        nn.Module.__init__(unembed)
        model = load_end(folder, trust_remote_code)
        try:
            unembed._describe_traced(TracedModel(model, run_blocks=False), verify=True)
        except NotImplementedError:
            raise
        except RuntimeError as error:  # of tensors that are not loaded
            raise NotImplementedError(
                f"folder: the end of {name_of(model)} does not run without its blocks ({error}); load all of the model"
            ) from error
        return unembed

    @classmethod
    def from_modules(
        cls,
        final_norm: nn.Module | None,
        unembedding: nn.Linear,
        *,
        factor: float = 1.0,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> Unembed:
        """The end of any model, from its parts: ``z = softcap(scale * (W (factor * norm(h)) + b))``.

        Args:
            final_norm: from hidden states ``[..., d_model]`` to the same shape; None for a model without one.
            unembedding: the head.
            factor: what the normed hidden state is multiplied by.
            scale: what the logits are multiplied by.
            softcap: c in ``c * tanh(z / c)``; None for none.

        Raises:
            TypeError: a module or number of another type.
            ValueError: the norm does not take or give d_model, a number is not finite, or ``softcap`` or
                ``scale`` or ``factor`` is 0.
            NotImplementedError: a quantised head that does more than to multiply.
        """
        if not isinstance(unembedding, nn.Linear):
            raise TypeError(f"unembedding: got a {type(unembedding).__name__}, wanted an nn.Linear")
        if final_norm is not None and not isinstance(final_norm, nn.Module):
            raise TypeError(f"final_norm: got a {type(final_norm).__name__}, wanted an nn.Module or None")
        for name, number in (("factor", factor), ("scale", scale), ("softcap", softcap)):
            if number is None and name == "softcap":
                continue
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name}: got a {type(number).__name__}, wanted a number")
            if not math.isfinite(number) or number == 0 or (name == "softcap" and number < 0):
                wanted = "a positive number" if name == "softcap" else "a number that is not 0"
                raise ValueError(f"{name}: got {number}, wanted {wanted}")
        unembed = cls.__new__(cls)
        nn.Module.__init__(unembed)
        norm = nn.Identity() if final_norm is None else final_norm
        width = unembedding.in_features
        for name, module in (("final_norm", norm), ("unembedding", unembedding)):
            if any(p.is_meta for p in module.parameters()):
                raise ValueError(f"{name}: its weights are not loaded (meta device)")
        unembed._describe(Resident(norm), Resident(unembedding), width, LogitTransform(factor, scale, softcap), None)
        try:
            with torch.no_grad():
                shape = [*unembed.norm(torch.zeros(2, width, device=unembed.head.weight.device)).shape]
        except Exception as error:
            raise ValueError(f"final_norm: it does not take hidden states [2, {width}]: {error}") from error
        if shape != [2, width]:
            raise ValueError(f"final_norm: it gives {shape} for hidden states [2, {width}], wanted the same shape")
        return unembed

    def _describe_traced(self, traced: TracedModel, verify: bool) -> None:
        end = Resident(traced.norm, traced.sharded), traced.plain_head
        self._describe(*end, traced.width, traced.transform, traced.num_blocks, devices_of(traced.model))
        if verify:
            traced.verify(self, lambda h: self.norm(h.to(torch.promote_types(h.dtype, torch.float32))))

    def _describe(
        self,
        norm: Resident,
        head: Resident,
        width: int,
        transform: LogitTransform,
        layers: int | None,
        devices: Sequence[torch.device] = (),
    ) -> None:
        self._moved: tuple[nn.Module, nn.Linear] | None = None
        # A tuple of other things than modules is not registered as submodules.
        self._model_end: tuple[Resident, Resident] = (norm, head)
        self._transform = transform
        #: Width of a hidden state: d_model, or all streams of a model with several.
        self.hidden_size: int = width
        self._formula = _recognise(self._end()[0], width)
        #: Where the model computes, as far as that is known: states of any of these devices can be read.
        self.devices = [*devices]
        #: Blocks of the model, where they are known.
        self.num_hidden_layers: int | None = layers

    @property
    def final_norm(self) -> nn.Module:
        """The model's final norm as a frozen module on the same storage, without any factor."""
        return frozen_alias(self._end()[0])

    @property
    def unembedding(self) -> nn.Linear:
        """The model's head as a frozen linear layer on the same storage, without scale or softcap."""
        return frozen_alias(self._end()[1])

    @property
    def norm(self) -> Norm:
        """The final norm and factor as the engines take them; its tensors alias the model's."""
        module, factor = self._own_norm(), self._transform.factor
        if isinstance(module, nn.Identity):
            return Norm(kind="identity", factor=factor)
        if self._formula is None:
            return Norm(kind="module", module=frozen_alias(module), factor=factor, width=self.hidden_size)
        tensors = dict(module.named_parameters())
        return Norm(
            kind=self._formula.kind,
            weight=tensors[self._formula.weight].detach() if self._formula.weight else None,
            bias=tensors[self._formula.bias].detach() if self._formula.bias else None,
            eps=self._formula.eps,
            unit_offset=self._formula.unit_offset,
            factor=factor,
        )

    @property
    def head(self) -> Head:
        """The head, scale and softcap as the engines take them; its tensors alias the model's.

        Raises:
            TypeError: the model was split or quantised after this was made of it.
        """
        linear = self._end()[1]
        _check_head(linear)
        vocab = self._transform.vocab
        return Head(
            weight=linear.weight.detach()[:vocab],
            bias=None if linear.bias is None else linear.bias.detach()[:vocab],
            scale=self._transform.scale,
            softcap=self._transform.softcap,
        )

    def shard(self, rank: int, ranks: int) -> Shard:
        """What the rank holds of the head: of one that is split over as many ranks, the part that lies there already;
        else its share of the rows.
        """
        linear: Any = self._model_end[1].module
        if self._moved is None and isinstance(linear, nn.Linear) and is_spread(linear.weight):
            weight: Any = linear.weight
            if [placement.is_shard(0) for placement in weight.placements] == [
                True
            ] and weight.device_mesh.size() == ranks:
                self._model_end[1].forget()
                biases = None if linear.bias is None else plain(linear.bias)
                return self._shard(weight.to_local().detach(), biases, weight.shape[0], rank, ranks)
        head = self.head
        largest = -(-head.vocab // ranks)
        mine = slice(min(rank * largest, head.vocab), min((rank + 1) * largest, head.vocab))
        return self._shard(head.weight[mine], head.bias, head.vocab, rank, ranks)

    def _shard(self, weight: Tensor, biases: Tensor | None, rows: int, rank: int, ranks: int) -> Shard:
        """Of a head of so many rows, cut as ``torch.chunk`` does, the rank's, less those that the model cuts off."""
        vocab, largest = self._transform.vocab or rows, -(-rows // ranks)
        first = min(rank * largest, vocab)
        weight = weight[: max(0, vocab - first)]
        bias = None if biases is None else biases[first : first + len(weight)]
        head = Head(weight, bias, self._transform.scale, self._transform.softcap)
        return Shard(head, first, vocab, min(largest, vocab))

    def forward(self, h: Tensor) -> Tensor:
        """Logits, as the model itself computes them from the output of its last block.

        The norm is computed in fp32 (fp64 for fp64 ``h``), the product with the head in the head's dtype.
        Differentiable with respect to ``h`` only.

        Args:
            h: floating ``[..., hidden_size]``.

        Returns:
            ``[..., vocab]`` in the head's dtype.

        Raises:
            TypeError: ``h`` is not floating.
            ValueError: the last dimension of ``h`` is not hidden_size.
        """
        head = self.head
        check_hidden(h, self.hidden_size)
        x = self.norm(h.to(torch.promote_types(h.dtype, torch.float32)))
        return head.transform(F.linear(x.to(head.weight.dtype), head.weight, head.bias))

    def unembedding_hash(self) -> str:
        """A hash of the head's weight that identifies the model and survives a change of dtype.

        The same as tuned-lens 0.2.0's; see :func:`matrix_hash`.
        """
        return matrix_hash(self.unembedding.weight.detach())

    def invert(
        self,
        logits: Tensor,
        *,
        h0: Tensor | None = None,
        max_iter: int = 1000,
        optimizer: Literal["lbfgs", "sgd"] = "lbfgs",
        prior_weight: float = 0.0,
        prior: Distribution | None = None,
        step_size: float = 1.0,
        tol: float = 1e-3,
        weight: Tensor | None = None,
    ) -> InversionOutput:
        """Hidden states h whose next-token distribution q(h) comes closest to that of ``logits``.

        Minimises the mean over positions of KL(p || q(h)), p = softmax(logits), by gradient descent. With
        d_model below the vocabulary's size most p have no exact preimage (the softmax bottleneck,
        arXiv:1711.03953).

        Args:
            logits: ``[..., vocab]``.
            h0: where to start, ``[..., hidden_size]``; by default from least squares in W x + b.
            max_iter: at most about so many evaluations of the loss.
            optimizer: "lbfgs" or "sgd".
            prior_weight, prior: adds ``-prior_weight * prior.log_prob(norm(h))``, averaged over positions.
            step_size: the optimizer's.
            tol: stops when the loss or its gradient's norm is smaller.
            weight: how much each token counts in the divergence, broadcastable to ``logits``; by default 1.

        Returns:
            Its ``preimage`` is h itself, so that ``unembed(preimage)`` approximates ``logits``.

        Raises:
            ValueError: mismatched shapes, or no such optimizer.
            RuntimeError: the loss is not finite.
        """
        head = self.head
        vocab = head.vocab
        if logits.shape[-1:] != (vocab,):
            raise ValueError(f"logits: got shape {[*logits.shape]}, wanted [..., {vocab}]")
        if h0 is not None and h0.shape != (*logits.shape[:-1], self.hidden_size):
            raise ValueError(f"h0: got shape {[*h0.shape]}, wanted {[*logits.shape[:-1], self.hidden_size]}")
        if optimizer not in ("lbfgs", "sgd"):
            raise ValueError(f"optimizer: got {optimizer!r}, wanted 'lbfgs' or 'sgd'")

        log_p = logits.detach().float().log_softmax(-1)
        p = log_p.exp()
        weighted = p if weight is None else p * weight
        if h0 is None:
            guess = _first_guess(logits.detach(), self.norm, head)
            start = guess.repeat(
                *[1] * (guess.ndim - 1), self.hidden_size // guess.shape[-1]
            )  # the same in all streams
        else:
            start = h0.detach().float().clone()
        h = start.requires_grad_()
        opt: torch.optim.Optimizer
        if optimizer == "lbfgs":
            opt = torch.optim.LBFGS(
                [h], lr=step_size, max_iter=max_iter, tolerance_change=tol, line_search_fn="strong_wolfe"
            )
        else:
            opt = torch.optim.SGD([h], lr=step_size)
        nfev, kl, loss = 0, log_p.new_tensor(torch.inf), log_p.new_tensor(torch.inf)

        def evaluate() -> Tensor:
            nonlocal nfev, kl, loss
            nfev += 1
            log_q = self(h).float().log_softmax(-1)
            # A token of probability 0 has log p = -inf and contributes nothing.
            kl = torch.where(p == 0, 0, weighted * (log_p - log_q)).sum(-1).mean()
            loss = kl
            if prior is not None and prior_weight:
                loss = kl - prior_weight * prior.log_prob(self.norm(h)).mean()
            if not loss.isfinite():
                raise RuntimeError(f"the loss is {loss.item()} after {nfev} evaluations; are the logits finite?")
            opt.zero_grad()
            loss.backward()
            return loss

        grad_norm = log_p.new_tensor(torch.inf)
        while nfev < max_iter and grad_norm >= tol and loss >= tol:
            opt.step(evaluate)
            assert h.grad is not None
            grad_norm = h.grad.norm()
        return InversionOutput(h.detach(), grad_norm, kl.detach(), loss.detach(), nfev)

    def reads(self, head: nn.Module) -> bool:
        """Whether this is the end of the model with that very ``head``."""
        return self._moved is None and self._model_end[1].module is head

    def _end(self) -> tuple[nn.Module, nn.Linear]:
        """Norm and head on the lens's device: the model's, unless the lens was moved away from it."""
        norm, head = self._model_end
        linear = model_surgery.as_linear(head())
        if self._moved is not None and self._moved[1].weight.device != linear.weight.device:
            return self._moved
        self._moved = None
        return norm(linear.weight.device), linear

    def _own_norm(self) -> nn.Module:
        """The norm of :meth:`_end`, for which the head is not gathered."""
        norm, head = self._model_end
        device = execution_device(head.module)
        if self._moved is not None and self._moved[1].weight.device != device:
            return self._moved[0]
        return norm(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Unembed:
        """Follows the lens to another device; see the class."""
        norm, linear = self._end()
        here = linear.weight.device
        there = fn(torch.empty(0, device=here)).device
        if there != here:
            self._moved = (frozen_alias(norm).to(there), frozen_alias(linear).to(there))
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Reads nothing: norm and head are the model's, whatever a state dict holds."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Unembed:
        memo[id(self)] = duplicate = copy.copy(self)
        return duplicate


def check_hidden(h: Tensor, d_model: int) -> None:
    """Raises a TypeError or ValueError unless ``h`` is a floating tensor ``[..., d_model]``."""
    if not h.is_floating_point():
        raise TypeError(f"h: got {h.dtype}, wanted a floating dtype")
    if h.shape[-1:] != (d_model,):
        raise ValueError(f"h: got shape {[*h.shape]}, wanted [..., {d_model}]")


def matrix_hash(weight: Tensor) -> str:
    """SHA-256 of how NumPy prints a matrix ``[rows, columns]``, with one digit.

    A large matrix prints as its corners, so only these are read.
    """
    rows, columns = ([*range(3), n // 2, *range(n - 3, n)] if n > 6 else [*range(n)] for n in weight.shape)
    with np.printoptions(edgeitems=3, threshold=1000, linewidth=75, suppress=False, sign="-", floatmode="maxprec"):
        if weight.numel() > 1000:
            corners = weight[rows][:, columns].float().cpu().numpy()
            text = np.array2string(corners, precision=1, threshold=0)
        else:
            text = np.array2string(weight.float().cpu().numpy(), precision=1)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_head(linear: nn.Linear) -> None:
    """Raises a TypeError for a head that engines could not take tiles of, as one becomes that is split or quantised."""
    plain = type(linear.weight.data) in (Tensor, nn.Parameter)
    if not plain or not linear.weight.is_floating_point():
        kind = linear.weight.dtype if plain else f"a {type(linear.weight.data).__name__}"
        raise TypeError(f"model: its head has become {kind} since the lens was made; make the lens anew")


@dataclass(frozen=True)
class _Formula:
    """How a norm module computes: a formula of :class:`Norm`, and the names of the parameters in it."""

    kind: Literal["layer", "rms"]
    weight: str | None
    bias: str | None
    eps: float
    unit_offset: bool


def _recognise(module: nn.Module, d_model: int) -> _Formula | None:
    """The formula that gives what ``module`` gives on a few vectors; None if none does.

    Its parameters are replaced meanwhile: those that it has may hide a kind or an offset, being all zero or one of them
    large, and may change later.
    """
    parameters = dict(module.named_parameters())
    # TransformerLens's bridge keeps the model's norm inside of its own.
    leaves = {name.rpartition(".")[2]: name for name in parameters}
    weight, bias = leaves.get("weight", leaves.get("w")), leaves.get("bias", leaves.get("b"))
    if set(parameters) != {weight, bias} - {None} or any(p.shape != (d_model,) for p in parameters.values()):
        return None
    cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    some = next(iter(parameters.values()), torch.empty(0, **cpu))
    # Off-centre, so that LayerNorm and RMSNorm differ; one row so small that eps matters.
    x = torch.randn(3, d_model, generator=torch.Generator().manual_seed(0), **cpu) + 0.5
    x = (x * torch.tensor([[1.0], [30.0], [3e-3]], **cpu)).to(some.device)
    ranges = {weight: (0.5, 1.5), bias: (-1.0, 1.0)}
    values = {name: torch.linspace(*ranges[name], d_model, **cpu).to(some.device) for name in parameters}
    try:
        with torch.no_grad():
            wanted = torch.func.functional_call(frozen_alias(module), values, x).double()
    except Exception:  # of a module that wants another dtype, or that does not let go of its weights
        return None
    tolerance = 1e-4 * wanted.abs().amax(-1, keepdim=True)
    floats = (v for part in module.modules() for v in vars(part).values() if isinstance(v, float))
    epsilons = dict.fromkeys([*floats, 1e-5, 1e-6])
    for eps, kind, unit_offset in product(epsilons, ("rms", "layer"), (False, True) if weight else (False,)):
        formula = _Formula(kind, weight, bias, eps, unit_offset)
        norm = Norm(
            kind,
            weight=values[weight] if weight else None,
            bias=values[bias] if bias else None,
            eps=eps,
            unit_offset=unit_offset,
        )
        if ((norm(x.double()) - wanted).abs() <= tolerance).all():
            return formula
    return None


def _first_guess(logits: Tensor, norm: Norm, head: Head) -> Tensor:
    """Hidden states ``[..., d_model]``, exact where ``logits`` are the model's and its norm has a formula.

    Solves W x + b = g^-1(logits) by least squares, up to a constant that softmax does not see, then undoes
    what the norm does after normalising.
    """
    z = logits.float()
    lowest = z.masked_fill(z.isneginf(), torch.inf).amin(-1, keepdim=True)
    z = z.maximum(lowest)
    if head.softcap is not None:
        z = torch.atanh((z / head.softcap).clamp(-1 + 1e-6, 1 - 1e-6)) * head.softcap
    z = z / head.scale - (0 if head.bias is None else head.bias.float())
    weight = head.weight.float()
    weight = weight - weight.mean(0)
    gram = weight.T @ weight
    # A ridge, for vocabularies smaller than d_model.
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    x = torch.linalg.solve(gram, (z @ weight).reshape(-1, len(gram)).T).T.reshape(*z.shape[:-1], -1)
    x = x / norm.factor - (0 if norm.bias is None else norm.bias.float())
    if norm.weight is not None:
        scale = norm.weight.float() + (1 if norm.unit_offset else 0)
        x = torch.where(scale.abs() < 1e-6, 0, x / scale)
    return x.contiguous()
