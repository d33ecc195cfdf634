"""The residual stream of a running model: what enters each block, what the last one puts out, what the head gets.

This is where the way from hidden state to statistics begins. The states are taken where they pass, with hooks:
transformers' own ``hidden_states`` are normed at the end in most models, and shifted or rescaled in some.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.models.block_output import Layout, first_tensor, stream_of
from tuned_lens_fast.models.blocks import linear_head
from tuned_lens_fast.models.forward_pass import model_inputs, name_of
from tuned_lens_fast.models.tracing import TracedModel
from tuned_lens_fast.models.wrappers import is_hooked_transformer, unwrapped


class Recorder:
    """What :func:`recorded` gives: the states of the model's last forward pass in the thread that made this."""

    def __init__(self, model: Any, blocks: Sequence[nn.Module], positions: slice | None) -> None:
        self._model = model
        self._blocks = blocks
        self._positions = positions
        self._thread = threading.get_ident()
        self._tokens = 0
        self._layout: Layout | None = None
        self._entering: dict[nn.Module, list[Tensor]] = {}
        self._at_head: list[Tensor] = []

    def take(self) -> tuple[list[Tensor], Tensor]:
        """The states of the one forward pass since the last take.

        Returns:
            The residual stream that enters each wanted block, ``[batch, positions, width]``, and what the head's
            linear layer would receive, ``[batch, positions, d_model]``; the recorder keeps neither. Several streams
            are one, side by side.

        Raises:
            ValueError: the model did not call its head once, and each block once.
        """
        entering, at_head = self._entering, self._at_head
        self._entering, self._at_head = {}, []
        calls = [len(entering.get(block, ())) for block in self._blocks]
        if len(at_head) != 1 or set(calls) - {1}:
            raise ValueError(
                f"model: {name_of(self._model)} calls its head {len(at_head)} times a pass and its blocks {calls}, "
                f"wanted each once: what is called again and again has no one state to read"
            )
        return [entering[block][0] for block in self._blocks], at_head[0]

    def is_mine(self) -> bool:
        """Whether the pass that is being made is one of the recorder's own thread."""
        return threading.get_ident() == self._thread

    def states(self, stream: Tensor) -> Tensor:
        """``[batch, positions, width]`` of what a block takes or returns: the wanted positions of the prompt."""
        if stream.ndim > 3:
            if self._layout is None:
                # Which dimension is which cannot be told from a shape of which two sizes are the same.
                self._layout = TracedModel(self._model, run_blocks=False).layout
            stream = self._layout.flat(stream)
        # Some models put positions of their own before the prompt's.
        stream = stream[:, stream.shape[1] - self._tokens :]
        return self._cut(stream)

    def _cut(self, state: Tensor) -> Tensor:
        # A copy: a view would keep the states of all positions alive.
        return state if self._positions is None else state[:, self._positions].clone()

    # PyTorch notes that a hook takes keywords a moment after it has the hook: another thread's pass may come in
    # between, and has none for it.
    def _count_tokens(self, _: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        if self.is_mine():
            self._tokens = (args[0] if args else (kwargs or {})["input_ids"]).shape[-1]

    def _keep_entering(self, block: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        if self.is_mine():
            self._entering.setdefault(block, []).append(self.states(first_tensor(args, kwargs or {})))

    def _keep_at_head(self, _: nn.Module, args: tuple) -> tuple:
        if not self.is_mine():
            return args
        self._at_head.append(self._cut(args[0]))
        return (args[0][..., -1:, :], *args[1:])


@contextmanager
def recorded(model: Any, layers: Sequence[int] | None = None, positions: slice | None = None) -> Iterator[Recorder]:
    """Records forward passes of ``model`` that the caller makes inside, as many as wanted.

    The model is in evaluation mode meanwhile; afterwards its modes are restored and the hooks are gone. Its head is
    handed the last position only, so that no logits of a whole prompt are made. Passes that other threads make are
    neither recorded nor cut, but the modes are the model's, and so theirs too.

    Args:
        model: a transformers causal LM.
        layers: the blocks whose entering states are wanted, all if None.
        positions: those whose states are wanted, all if None.

    Raises:
        IndexError: no such block.
        TypeError: ``model`` is TransformerLens's ``HookedTransformer``.
        ValueError: ``model`` has no config, or no linear head.
        NotImplementedError: see :func:`~tuned_lens_fast.model_surgery.get_transformer_layers`.
    """
    model = unwrapped(model)
    if is_hooked_transformer(model):
        raise TypeError("model: got a HookedTransformer, whose states its run_with_cache gives; wanted a causal LM")
    head = linear_head(model)
    blocks = get_transformer_layers(model)[1]
    wanted = [blocks[layer] for layer in (range(len(blocks)) if layers is None else layers)]
    recorder = Recorder(model, wanted, positions)
    hooks = []
    modes = {module: module.training for module in model.modules()}
    try:
        hooks.append(model.register_forward_pre_hook(recorder._count_tokens, with_kwargs=True))
        for block in set(wanted):
            hooks.append(block.register_forward_pre_hook(recorder._keep_entering, with_kwargs=True))
        hooks.append(head.register_forward_pre_hook(recorder._keep_at_head))
        model.eval()
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def last_output(model: Any, recorder: Recorder) -> Iterator[list[Tensor]]:
    """A list that what the last block puts out, ``[batch, positions, width]``, is added to at each recorded pass."""
    last: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple, output: Any) -> None:
        if recorder.is_mine():
            last.append(recorder.states(stream_of(output)))

    hook = get_transformer_layers(model)[1][-1].register_forward_hook(keep)
    try:
        yield last
    finally:
        hook.remove()


@torch.no_grad()
def residual_stream(model: Any, input_ids: Tensor, *, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """The residual stream of ``model`` on a prompt: what enters each block, and what the last one puts out.

    Entry i is what a lens reads at layer i; the last is what the model's final norm receives, which the last of
    transformers' ``hidden_states`` is not. Builds no graph.

    Args:
        model: a transformers causal LM; it runs in evaluation mode and is left in the modes it was in.
        input_ids: integer ids ``[positions]`` or ``[batch, positions]``.
        attention_mask: of the same shape, 0 at padding on either side.

    Returns:
        One tensor ``[*input_ids.shape, width]`` more than the model has blocks; width is d_model, or that of all
        streams side by side in a model with several.

    Raises:
        TypeError: ``model`` is TransformerLens's ``HookedTransformer``.
        ValueError: the model calls its blocks more than once, or its head other than once, or has none.
        NotImplementedError: see :func:`~tuned_lens_fast.model_surgery.get_transformer_layers`.
    """
    model = unwrapped(model)
    with recorded(model) as recorder, last_output(model, recorder) as last:
        model(**model_inputs(model, input_ids, attention_mask))
        entering, _ = recorder.take()
    return tuple(h.reshape(*input_ids.shape, -1) for h in (*entering, *last))
