"""What a lens is trained on: ``lens.loss``, its divergence from the model's output or its cross-entropy.

It stands beside ``decode``: checks what came and hands it to an engine, as one operator with a derivative,
``tuned_lens_fast::lens_loss``. Gradients are computed on the way forward, where logits are on hand, and scaled on the
way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from tuned_lens_fast.engines import ENGINES, choose, operators
from tuned_lens_fast.engines.decoding import current
from tuned_lens_fast.engines.interface import NO_TARGET, DecodableLens, Head, Norm, Readout, Translator
from tuned_lens_fast.engines.losses import Derivative, gradient_dtype, losses, question
from tuned_lens_fast.reading import is_affine, readout_of, transformed
from tuned_lens_fast.validation import check_budget, check_hidden, check_layers, check_query


def loss(
    lens: DecodableLens,
    hidden_states: Tensor | Sequence[Tensor],
    *,
    targets: Tensor | None = None,
    reference: Tensor | None = None,
    layers: Iterable[int] | None = None,
    reduction: Literal["mean", "none"] = "mean",
    engine: str = "auto",
    memory_budget: int | None = None,
) -> Tensor:
    """How far ``lens`` is, at every layer, from the model's output or from the tokens that followed; for training.

    With a ``reference`` it is KL(model || lens), with ``targets`` the cross-entropy, in nats. Logits are never held:
    loss and gradient are one walk over the vocabulary, two matrix products a row (three with a softcap). Differentiable
    in the lens's translators, and in hidden states that require grad; the model's norm and head are constants. There is
    no second derivative.

    With "mean", gradients are computed in the forward call and only scaled in the backward one; with "none" the
    backward call walks the vocabulary again, since what each row counts for is known only then.

    Args:
        lens: any :class:`~tuned_lens_fast.nn.Lens`.
        hidden_states: ``[L, ..., d_model]``, or a sequence of L tensors ``[..., d_model]``; see
            :func:`~tuned_lens_fast.decode.decode`.
        targets: integer ids ``[...]``, -100 for none. Exactly one of this and ``reference`` is given.
        reference: ``[..., d_model]``, what the head's linear layer receives at the model's own output; a constant.
        layers: the translator each entry is read with. If None 0..L-1, less those that the lens lacks.
        reduction: "mean" over the positions that have a target, or all; "none" for the loss of each, 0 where there is
            no target.
        engine: "auto", or one of :func:`tuned_lens_fast.engines`.
        memory_budget: bytes of scratch beyond inputs, results and the gradients of both; 256 MiB if None. A final norm
            that no formula of this package is, and a lens that is no affine map, are left to PyTorch to differentiate,
            beyond the budget.

    Returns:
        fp32 ``[L]``; with "none" ``[L, ...]``. The mean over no positions is NaN.

    Raises:
        ValueError: neither or both of ``targets`` and ``reference``, another ``reduction``, and what
            :func:`~tuned_lens_fast.decode.decode` refuses.
        IndexError, TypeError: as there.
        NotImplementedError: in the backward call, for a second derivative (``create_graph=True``).
    """
    if (targets is None) == (reference is None):
        given = "neither" if targets is None else "both"
        raise ValueError(f"targets, reference: got {given}, wanted one: targets= for cross-entropy, reference= for KL")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: got {reduction!r}, wanted 'mean' or 'none'")
    head, norm = lens.unembed.head, lens.unembed.norm
    hidden, lead = check_hidden(hidden_states, head, norm.hidden_width(head))
    hidden, numbers = check_layers(lens, layers, hidden)
    stats = ["kl"] if targets is None else ["log_prob"]
    query = check_query(head, lead, targets, reference, 0, None, stats)
    if query.reference is not None:
        query = replace(query, reference=query.reference.detach())
    budget = check_budget(memory_budget)
    chosen = choose(engine, head.weight.device, head.weight.dtype)
    readout, mean = readout_of(lens, numbers), reduction == "mean"
    if not is_affine(lens):
        hidden = [transformed(lens, entry, number) for entry, number in zip(hidden, numbers, strict=True)]
    shares = counted = None
    if mean:
        counted = torch.full((), lead.numel(), device=head.weight.device)
        if query.targets is not None:
            counted = (query.targets != NO_TARGET).sum()
        shares = counted.clamp(min=1).float().reciprocal().reshape(1, 1)
    if norm.kind == "module":
        # An operator takes no modules: what is before the head is PyTorch's to differentiate.
        hidden = [
            _at_head(h, translator, norm, head) for h, translator in zip(hidden, readout.translators, strict=True)
        ]
        readout = Readout((None,) * len(hidden), Norm("identity"), head)
    flat = operators.flat(hidden, readout, question(query.targets, query.reference))
    # Without an average to be taken, what each row counts for is not known before the backward call.
    now = [mean and torch.is_grad_enabled() and any(t.requires_grad for t in group) for group in flat[:3]]
    found = torch.ops.tuned_lens_fast.lens_loss(*flat, shares, mean, *now, chosen.name, budget)[0]
    return found.reshape(len(hidden), *lead) if counted is None else torch.where(counted > 0, found, torch.nan)


def _at_head(h: Tensor, translator: Translator | None, norm: Norm, head: Head) -> Tensor:
    """norm(h + A h + c) of states ``[..., width]`` in the head's dtype, differentiable."""
    r = h.to(torch.promote_types(torch.float32, h.dtype))
    if translator is not None:
        bias = None if translator.bias is None else translator.bias.to(r.dtype)
        r = r + torch.nn.functional.linear(r, translator.weight.to(r.dtype), bias)
    return norm(r).to(head.weight.dtype)


def _lens_loss(*flat: Any) -> list[Tensor]:
    """The losses, then the gradients asked for, a layer each: those of hidden states, of weights, of biases.

    Losses are ``[L, positions]``, or with ``add_up`` times their shares and added up, ``[L]``. Layers without a
    translator or a bias have no entry.
    """
    hidden, readout, query, shares, add_up, of_hidden, of_weights, of_biases, engine, budget = operators.bundled(*flat)
    derivative = None
    if of_hidden or of_weights or of_biases:
        derivative = Derivative(shares, of_weights, of_biases, of_hidden)
    if not hidden or not hidden[0].numel():
        rows = torch.empty(len(hidden), 0, device=readout.head.weight.device)
        gradients = [like.zero_() for like in _differentiated(hidden, readout, derivative)]
    else:
        device = readout.head.weight.device
        with torch.autocast(device.type, enabled=False), current(device):
            found = losses(ENGINES[engine], hidden, readout, query, derivative, budget)
        rows = found.rows
        gradients = [g for g in (*found.hidden, *found.weights, *found.biases) if g is not None]
    return [(rows * shares).sum(1) if add_up else rows, *gradients]


def _differentiated(hidden: Sequence[Tensor], readout: Readout, derivative: Derivative | None) -> list[Tensor]:
    """Tensors like the gradients that are answered, in order; uninitialised."""
    if derivative is None:
        return []
    groups: tuple[tuple[bool, Sequence[Tensor | None]], ...] = (
        (derivative.hidden, [*hidden]),
        (derivative.weights, [None if t is None else t.weight for t in readout.translators]),
        (derivative.biases, [None if t is None else t.bias for t in readout.translators]),
    )
    return [
        torch.empty_like(
            tensor,
            dtype=gradient_dtype(tensor) if number == 0 else torch.float32,
            memory_format=torch.contiguous_format,
        )
        for number, (wanted, group) in enumerate(groups)
        if wanted
        for tensor in group
        if tensor is not None
    ]


_LIBRARY = torch.library.Library("tuned_lens_fast", "FRAGMENT")
_LIBRARY.define(
    f"lens_loss({operators.SCHEMA}, Tensor? shares, bool add_up, bool of_hidden, bool of_weights, bool of_biases, "
    "str engine, int memory_budget) -> Tensor[]"
)
_LIBRARY.impl("lens_loss", _lens_loss, "CompositeExplicitAutograd")


@torch.library.register_fake("tuned_lens_fast::lens_loss", lib=_LIBRARY)
def _shapes(*flat: Any) -> list[Tensor]:
    hidden, readout, _, _, add_up, of_hidden, of_weights, of_biases, _, _ = operators.bundled(*flat)
    weight = readout.head.weight
    positions = hidden[0].shape[:-1].numel() if hidden else 0
    rows = weight.new_empty(len(hidden), positions, dtype=torch.float32)
    derivative = Derivative(weight, of_weights, of_biases, of_hidden)
    return [rows.sum(1) if add_up else rows, *_differentiated(hidden, readout, derivative)]


def _save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    """Gradients, where they are there; else all that came, for a second walk."""
    ctx.set_materialize_grads(False)  # which would be zeros as large as the gradients that are saved
    ctx.hidden_dtypes, ctx.weight_dtypes, ctx.bias_dtypes = ([t.dtype for t in group] for group in inputs[:3])
    ctx.translated, ctx.biased = inputs[3:5]
    # For what cannot be differentiated autograd wants None, or as many of them as a list has entries.
    ctx.none = [[] if isinstance(value, list) and not value else None for value in inputs[3:]]
    ctx.added_up, ctx.wanted = inputs[operators.COUNT + 1], inputs[operators.COUNT + 2 : operators.COUNT + 5]
    if ctx.added_up:
        ctx.save_for_backward(*output[1:])
        return
    ctx.layout = [
        len(value) if number < 3 else None if isinstance(value, Tensor) else (value,)
        for number, value in enumerate(inputs)
    ]
    ctx.save_for_backward(
        *(tensor for group in inputs[:3] for tensor in group),
        *(value for value in inputs[3:] if isinstance(value, Tensor)),
    )


def _backward(ctx: Any, upstream: list[Tensor | None]) -> tuple:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "loss: it has no second derivative; call backward() or torch.autograd.grad() without create_graph=True"
        )
    slope = upstream[0]
    assert slope is not None  # nothing else has a derivative
    if ctx.added_up:
        gradients = iter(ctx.saved_tensors)
    else:
        saved = iter(ctx.saved_tensors)
        inputs = [
            [next(saved) for _ in range(kept)] if isinstance(kept, int) else next(saved) if kept is None else kept[0]
            for kept in ctx.layout
        ]
        inputs[operators.COUNT] = slope.contiguous()
        of_hidden, of_weights, of_biases = ctx.needs_input_grad[:3]
        inputs[operators.COUNT + 2 : operators.COUNT + 5] = ctx.wanted = [
            any(of_hidden),
            any(of_weights),
            any(of_biases),
        ]
        gradients = iter(torch.ops.tuned_lens_fast.lens_loss(*inputs)[1:])
    found = []
    for wanted, layers, dtypes in zip(
        ctx.wanted,
        (range(len(ctx.hidden_dtypes)), ctx.translated, ctx.biased),
        (ctx.hidden_dtypes, ctx.weight_dtypes, ctx.bias_dtypes),
        strict=True,
    ):
        found.append(
            [
                ((next(gradients) * slope[layer]) if ctx.added_up else next(gradients)).to(dtype) if wanted else None
                for layer, dtype in zip(layers, dtypes, strict=True)
            ]
        )
    return *found, *ctx.none


torch.library.register_autograd("tuned_lens_fast::lens_loss", _backward, setup_context=_save, lib=_LIBRARY)
