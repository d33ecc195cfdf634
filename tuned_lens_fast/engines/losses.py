"""What a lens is trained on: the loss of every row and its gradient, in one walk over the vocabulary.

With p the model's own output, x = norm(r), r = h + A h + c, and q = softmax(z), z = scale (W x + b),

    d KL(p || q) / dx = scale (W^T q - W^T p)        d (-log q[target]) / dx = scale (W^T q - W[target])

Of these W^T p is one vector a position, shared by all layers, and W^T q = sum exp(z - m) W / s is summed with m and
s, tile by tile: two products a row. Where a softcap makes z no longer linear in x, its slope is another at every token:
the normalisers come first, and a second pass sums (q - p) slope W, three products a row.

From x back to h, A and c it is the chain rule on ``[rows, d_model]``, done here as well: what is kept of a row is gone
before the next chunk, and no more than the parameters' gradients outlives the loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tuned_lens_fast.engines.decoding import Engine, Reference
from tuned_lens_fast.engines.interface import NO_TARGET, Head, Norm, Query, Readout, Tiling
from tuned_lens_fast.engines.state import State, Wanted
from tuned_lens_fast.engines.statistics import LOG_FLOOR
from tuned_lens_fast.engines.tiling import flat_pieces, slices
from tuned_lens_fast.progress import report


@dataclass(frozen=True)
class Derivative:
    """By what losses are differentiated."""

    shares: Tensor  #: fp32, broadcast to [layers, positions]: each row's loss times it adds up to what is minimised
    weights: bool  #: the translators' A, or
    biases: bool  #: their c, or
    hidden: bool  #: h


@dataclass
class Losses:
    """The answer; of gradients there are those that were asked for, None for layers without a translator or bias."""

    rows: Tensor  #: fp32 [layers, positions], nats; 0 where there is no target
    weights: list[Tensor | None]  #: fp32 [width, width] of each layer
    biases: list[Tensor | None]  #: fp32 [width]
    hidden: list[Tensor | None]  #: [..., width], see :func:`gradient_dtype`


def question(targets: Tensor | None, reference: Tensor | None) -> Query:
    """KL(reference || lens), or the cross-entropy of the targets; see :class:`Query` for both."""
    return Query(frozenset({"kl"} if targets is None else {"log_prob"}), targets, reference)


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """Of the gradient by hidden states: theirs, but for fp16, which holds no small numbers."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


@torch.no_grad()
def losses(
    engine: Engine,
    hidden: list[Tensor],
    readout: Readout,
    query: Query,
    derivative: Derivative | None,
    memory_budget: int,
) -> Losses:
    """The losses of L layers at P positions, at least one of each, and their gradients.

    Args:
        hidden: L tensors ``[..., width]`` of one floating dtype on the head's device; views are fine.
        readout: with a translator for every entry of ``hidden``; of norms, those that are no modules.
        query: of :func:`question`.
        derivative: None for the losses alone, at half the price.
        memory_budget: bytes of scratch beyond the inputs and the answer.

    Raises:
        BudgetError: see :meth:`Engine.plan`.
    """
    layers, positions = len(hidden), hidden[0].shape[:-1].numel()
    rows = torch.empty(layers, positions, dtype=torch.float32, device=readout.head.weight.device)
    found = Losses(rows, [None] * layers, [None] * layers, [None] * layers)
    shares = None
    if derivative is not None:
        shares = derivative.shares.expand(layers, positions)
        for i, (h, translator) in enumerate(zip(hidden, readout.translators, strict=True)):
            if translator is not None and derivative.weights:
                found.weights[i] = rows.new_zeros(translator.weight.shape)
            if translator is not None and translator.bias is not None and derivative.biases:
                found.biases[i] = rows.new_zeros(translator.bias.shape)
            if derivative.hidden:
                found.hidden[i] = torch.empty(positions, h.shape[-1], dtype=gradient_dtype(h), device=h.device)
    start = 0
    for piece, part in flat_pieces(hidden, query):
        at = slice(start, start + piece[0].shape[0])
        own = Losses(rows[:, at], found.weights, found.biases, [g if g is None else g[at] for g in found.hidden])
        _walk(engine, piece, readout, part, None if shares is None else shares[:, at], memory_budget, own)
        start = at.stop
    found.hidden = [g if g is None else g.view(h.shape) for g, h in zip(found.hidden, hidden, strict=True)]
    return found


def _walk(
    engine: Engine,
    hidden: list[Tensor],
    readout: Readout,
    query: Query,
    shares: Tensor | None,
    memory_budget: int,
    found: Losses,
) -> None:
    """Put the losses of rows ``[positions, width]`` in ``found``, and with ``shares`` add up their gradients there."""
    norm, head = readout.norm, readout.head
    layers, positions = len(hidden), hidden[0].shape[0]
    tiling = engine.plan(positions, hidden[0].dtype, readout, query, memory_budget, shares is not None)
    for p in slices(positions, tiling.positions):
        part = query.at(p)
        # What is not learned from may be anything, a NaN too.
        none = None if part.targets is None else (part.targets == NO_TARGET).unsqueeze(1)
        reference = None  # before the next one takes its place
        if part.reference is not None:
            reference = engine.reference(part, head, tiling)
        for group in slices(layers, tiling.layers):
            entering = [h[p] if none is None else h[p].masked_fill(none, 1.0) for h in hidden[group]]
            residual = engine.residual(entering, readout.translators[group], tiling)
            x = engine.normed(residual, norm, head)
            loss, slope = _loss(engine, x, head, part, reference, shares is not None, tiling)
            found.rows[group, p] = loss.unflatten(0, (-1, p.stop - p.start))
            report(x.shape[0])
            del x, loss
            if slope is not None and shares is not None:
                slope *= shares[group, p].reshape(-1, 1)
                slope = through_norm(norm, residual, slope).unflatten(0, (-1, p.stop - p.start))
                for i, (h, of_row) in enumerate(zip(entering, slope, strict=True), group.start):
                    _add(found, i, p, h, readout, of_row)
            del entering, residual, slope


def _loss(
    engine: Engine,
    x: Tensor,
    head: Head,
    query: Query,
    reference: Reference | None,
    gradient: bool,
    tiling: Tiling,
) -> tuple[Tensor, Tensor | None]:
    """The losses of rows x, fp32 ``[rows]``, and their gradient by x, fp32 ``[rows, d_model]``."""
    linear = head.softcap is None
    running = frozenset() if query.targets is None else frozenset({"target"})
    wanted = Wanted(running, query.targets, u="rough" if gradient and linear else "")
    state = engine.vocabulary_pass(x, head, wanted, tiling)
    assert state.log_s is not None
    if query.targets is not None:
        assert state.target is not None
        none = (query.targets == NO_TARGET).repeat(len(x) // len(query.targets))
        loss = (state.log_s - (state.target - state.m)).masked_fill_(none, 0.0)
    else:
        assert reference is not None
        if not linear:
            loss, slope = _capped(engine, x, head, query, reference, state, gradient, tiling)
            return loss, slope
        loss = engine.kl_by_identity(x, state, reference)
    if not gradient:
        return loss, None
    if not linear:
        slope = _capped(engine, x, head, query, None, state, gradient, tiling)[1]
        assert slope is not None
    else:
        assert state.u is not None
        slope = state.u.mul_((head.scale / state.s).unsqueeze(1))
        at_once = slope.unflatten(0, (-1, _positions(query)))
        if query.targets is None:
            assert reference is not None
            assert reference.u is not None
            at_once -= reference.u
        else:
            at_once -= head.weight[query.targets.clamp(min=0)].float() * head.scale
    if query.targets is not None:
        slope.masked_fill_(none.unsqueeze(1), 0.0)
    return loss, slope


def _positions(query: Query) -> int:
    """Of a chunk."""
    values = query.reference if query.targets is None else query.targets
    assert values is not None
    return len(values)


def _capped(
    engine: Engine,
    x: Tensor,
    head: Head,
    query: Query,
    reference: Reference | None,
    state: State,
    gradient: bool,
    tiling: Tiling,
) -> tuple[Tensor, Tensor | None]:
    """KL(reference || lens) of rows x and the gradient by x, or that of the targets' cross-entropy, with a softcap."""
    assert head.softcap is not None
    assert state.log_s is not None
    matmul, width, at_once = engine.matmul(head), tiling.tile, _positions(query)
    rows = matmul.pack(x)
    own = None if reference is None else matmul.pack(reference.x)
    room, slopes = matmul.room(len(x), width), matmul.room(len(x), width)
    loss = torch.zeros_like(state.m)
    sums = loss.new_zeros(x.shape) if gradient else None
    for tile in matmul.tiles(width):
        z = matmul(rows, tile, width, room)
        slope = torch.div(z, head.softcap, out=slopes[:, : z.shape[1]]).square_().neg_().add_(1).mul_(head.scale)
        log_q = z.sub_(state.m.unsqueeze(1)).sub_(state.log_s.unsqueeze(1)).clamp_(min=LOG_FLOOR)
        q = log_q.exp().unflatten(0, (-1, at_once))
        if reference is not None and own is not None:
            assert reference.state.log_s is not None
            log_p = matmul(own, tile, width).sub_(reference.state.m.unsqueeze(1))
            log_p = log_p.sub_(reference.state.log_s.unsqueeze(1)).clamp_(min=LOG_FLOOR)
            p = log_p.exp()
            loss += torch.sub(log_p, log_q.unflatten(0, (-1, at_once))).mul_(p).sum(-1).flatten()
            q -= p
        else:
            assert query.targets is not None
            column = query.targets - tile.start
            met = ((column >= 0) & (column < q.shape[-1])).nonzero().squeeze(1)
            q[:, met, column[met]] -= 1
        if sums is not None:
            matmul.add_rows_of_weight(sums, slope.mul_(q.flatten(0, 1)), tile, exact=False)
    return loss, sums


def through_norm(norm: Norm, residual: Tensor, gradient: Tensor) -> Tensor:
    """The gradient by what the norm receives, of that by what it gives; overwrites the latter.

    With y = (r - mean r) / sqrt(var r + eps) or r / sqrt(mean r^2 + eps), and g the gradient by y,

        dr = (g - mean g - y mean(g y)) / sqrt(...)        for "rms" without mean g

    (Ba et al., 2016; Zhang and Sennrich, 2019). All in fp32, or wider, ``[rows, d_model]``.
    """
    gradient = gradient.to(torch.promote_types(residual.dtype, torch.float32))
    if norm.factor != 1.0:
        gradient *= norm.factor
    if norm.kind == "identity":
        return gradient
    if norm.weight is not None:
        weight = norm.weight.to(gradient.dtype)
        gradient *= weight + 1 if norm.unit_offset else weight
    y = residual.to(gradient.dtype)
    if norm.kind == "layer":
        y = y - y.mean(-1, keepdim=True)
        gradient -= gradient.mean(-1, keepdim=True)
    inverse = torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps)
    y = y * inverse
    return gradient.addcmul_(y, (gradient * y).mean(-1, keepdim=True), value=-1).mul_(inverse)


def _add(found: Losses, layer: int, p: slice, h: Tensor, readout: Readout, of_residual: Tensor) -> None:
    """One layer's share of the gradients, from that by its residual stream ``[positions, width]``.

    Products with 16-bit hidden states on a GPU are of that dtype, as the translator's own is; gradients are brought to
    its range for it.
    """
    translator = readout.translators[layer]
    weight, bias, of_hidden = found.weights[layer], found.biases[layer], found.hidden[layer]
    narrow = h.is_cuda and h.dtype in (torch.bfloat16, torch.float16)
    size = of_residual.abs().amax().clamp(min=torch.finfo(torch.float32).tiny) if narrow else None
    if bias is not None:
        bias += of_residual.sum(0)
    if weight is not None:
        if size is None:
            weight.addmm_(of_residual.t().float(), h.float())
        else:
            weight += torch.mm((of_residual / size).to(h.dtype).t(), h, out_dtype=torch.float32).mul_(size)
    if of_hidden is not None:
        if translator is None:
            of_hidden[p] = of_residual
        elif size is None:
            of_hidden[p] = torch.addmm(of_residual, of_residual, translator.weight.to(of_residual.dtype))
        else:
            a = translator.weight.to(h.dtype)
            change = torch.mm((of_residual / size).to(h.dtype), a, out_dtype=torch.float32).mul_(size)
            of_hidden[p] = change.add_(of_residual)
