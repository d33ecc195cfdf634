"""Finds the parts of a model that a lens reads: its blocks, its final norm, its head, and what follows the head.

This is where the way from hidden state to statistics begins: everything after this module sees plain descriptions
(:class:`~tuned_lens_fast.nn.Unembed`), never a model. Parts are found by running the model on a few tokens
(:mod:`tuned_lens_fast.models.tracing`), not by the names of classes or attributes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tuned_lens_fast.models.blocks import find_blocks, linear_head
from tuned_lens_fast.models.tracing import LogitTransform, TracedModel
from tuned_lens_fast.models.wrappers import is_hooked_transformer, unwrapped


def get_final_norm(model: Any) -> nn.Module:
    """The norm between the last block and the head; the model's own module, not a copy.

    Of a model with more than one module there, one that calls them all; of one with none an ``nn.Identity``. The
    model runs on a few tokens, all but its blocks.

    Raises:
        ValueError: ``model`` is no causal LM, or its weights are not loaded.
        NotImplementedError: no lens can read the model.
    """
    model = unwrapped(model)
    if is_hooked_transformer(model):
        return getattr(model, "ln_final", nn.Identity())  # there is none with normalization_type=None
    return TracedModel(model, run_blocks=False).norm


def get_unembedding_matrix(model: Any) -> nn.Linear:
    """The head, the linear layer from the normed hidden state to the logits.

    The model's own module; for a TransformerLens ``HookedTransformer``, which has none, a new one on the same
    storage.

    Raises:
        ValueError: ``model`` has no head, or one that is not linear.
    """
    model = unwrapped(model)
    return as_linear(model.unembed) if is_hooked_transformer(model) else linear_head(model)


def get_transformer_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The model's blocks: the path of their list from ``model``, such as "base_model.h", and the list itself.

    Raises:
        ValueError: ``model`` has no config.
        NotImplementedError: no list of blocks is found.
    """
    model = unwrapped(model)
    if is_hooked_transformer(model):
        return "blocks", model.blocks
    path, blocks = find_blocks(model)
    prefix = getattr(model, "base_model_prefix", None)
    if prefix and path.startswith(f"{prefix}."):
        path = f"base_model.{path.removeprefix(f'{prefix}.')}"
    return path, blocks


def get_logit_transform(model: Any) -> LogitTransform:
    """The factor before the model's head, and the scale, softcap and cut after it; all neutral for most models.

    Measured by running the model on a few tokens, all but its blocks.

    Raises:
        ValueError, NotImplementedError: see :func:`get_final_norm`.
    """
    model = unwrapped(model)
    if is_hooked_transformer(model):
        softcap = getattr(model.cfg, "output_logits_soft_cap", None)
        return LogitTransform(softcap=softcap if softcap and softcap > 0 else None)
    return TracedModel(model, run_blocks=False).transform


def as_linear(head: Any) -> nn.Linear:
    """``head`` if it is an ``nn.Linear``; for TransformerLens's ``Unembed`` one on the same storage."""
    if isinstance(head, nn.Linear):
        return head
    d_model, vocab = head.W_U.shape
    linear = nn.Linear(d_model, vocab, device="meta")
    linear.weight = nn.Parameter(head.W_U.detach().T, requires_grad=False)
    bias = getattr(head, "b_U", None)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return linear
