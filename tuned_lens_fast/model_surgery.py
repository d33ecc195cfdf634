"""Finds the parts of a model that a lens reads: its blocks, its final norm, its head, and what follows the
head.

This is where the way from hidden state to statistics begins: everything after this module sees plain
descriptions (:class:`~tuned_lens_fast.nn.Unembed`), never a model. Parts are found by the names that
transformers' decoders use; a model whose parts are not where these names point is refused rather than guessed
at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

#: Where a decoder's stack of blocks lies, if not in `model.base_model` itself, tried in this order.
_STACKS = ("decoder", "language_model", "model", "local_decoder", "encoder", "H_module")
#: What decoders call the norm after their last block.
_FINAL_NORMS = (
    "norm",
    "final_layer_norm",
    "final_layernorm",
    "ln_f",
    "norm_f",
    "final_norm",
    "embedding_norm",
    "layer_norm",
    "layernorm",
    "ln_out",
    "out_norm",
    "output_layernorm",
)
#: What decoders call their list of blocks.
_LAYERS = ("layers", "h", "blocks", "layer")

_ABSENT = object()

#: Models whose logits are not `head(norm(h))` of one residual stream h `[..., d_model]`, and why.
_UNSUITED = {
    "deepseek_v4": "it mixes several residual streams before its final norm",
    "gemma3n": "it mixes several residual streams before its final norm",
    "gemma3n_text": "it mixes several residual streams before its final norm",
    "hy_v4": "it mixes several residual streams before its final norm",
    "inkling2_text": "its output attends to the states of earlier blocks",
    "inkling_text": "it cuts its vocabulary after the head",
    "modernbert-decoder": "it has a hidden layer between its final norm and its head",
    "qwen4_exp": "it mixes several residual streams before its final norm",
    "qwen4_exp_text": "it mixes several residual streams before its final norm",
    "reformer": "its output depends on two residual streams",
    "xlm": "its output is not a function of the last block's alone",
}

#: Where each model type keeps c of `c tanh(z / c)`. By type, since some types ignore the entry they have.
_SOFTCAP = {
    **dict.fromkeys(
        (
            "beam",
            "gemma2",
            "gemma3_text",
            "gemma4",
            "gemma4_text",
            "gemma4_unified",
            "gemma4_unified_text",
            "nanochat",
            "vaultgemma",
        ),
        "final_logit_softcapping",
    ),
    "recurrent_gemma": "logits_soft_cap",
    "xlstm": "output_logit_soft_cap",
}
#: Where each keeps the number its logits are multiplied by.
_MULTIPLIED = {
    "cohere": "logit_scale",
    "cohere2": "logit_scale",
    "cohere2_moe": "logit_scale",
    "cohere_compass_text": "logit_scale",
    "falcon_h1": "lm_head_multiplier",
    "hyperclovax": "logits_scaling",
}
#: Where each keeps the number its logits are divided by.
_DIVIDED = dict.fromkeys(
    ("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
    "logits_scaling",
)
#: Where each keeps the number its normed state is divided by before the head.
_STATE_DIVIDED = {"minicpm3": "logits_scaling"}


@dataclass(frozen=True)
class LogitTransform:
    """What a model does around its head: ``z = softcap(scale * (W (factor * norm(h)) + b))``."""

    factor: float = 1.0
    scale: float = 1.0
    softcap: float | None = None


def get_final_norm(model: Any) -> nn.Module:
    """The norm between the last block and the head; the model's own module, not a copy.

    Raises:
        ValueError: ``model`` has no ``base_model``, or it has no final norm.
        NotImplementedError: the model's type is not known, or no lens can read it.
    """
    if is_hooked_transformer(model):
        return model.ln_final
    for path, stack in _stacks(model):
        for name in _FINAL_NORMS:
            norm = getattr(stack, name, _ABSENT)
            if isinstance(norm, nn.Module):
                return norm
            if norm is None:
                raise ValueError(f"model: {_name(model)} has no final norm, {path}.{name} is None")
    raise NotImplementedError(
        f"model: no final norm found in {_name(model)}; looked in {type(model.base_model).__name__} "
        f"for {', '.join(_FINAL_NORMS)}"
    )


def get_unembedding_matrix(model: Any) -> nn.Linear:
    """The head, the linear layer from the normed hidden state to the logits.

    The model's own module; for a TransformerLens ``HookedTransformer``, which has none, a new one on the same
    storage.

    Raises:
        ValueError: ``model`` has no head, or one that is not linear.
    """
    head = model.unembed if is_hooked_transformer(model) else _output_embeddings(model)
    return as_linear(head)


def get_transformer_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The model's blocks: the path of their list from ``model``, such as "base_model.h", and the list itself.

    Raises:
        ValueError: ``model`` has no ``base_model``.
        NotImplementedError: the model's type is not known.
    """
    for path, stack in _stacks(model):
        for name in _LAYERS:
            if isinstance(layers := getattr(stack, name, None), nn.ModuleList):
                return f"{path}.{name}", layers
    raise NotImplementedError(
        f"model: no list of blocks found in {_name(model)}; looked in {type(model.base_model).__name__} "
        f"for {', '.join(_LAYERS)}"
    )


def get_logit_transform(model: Any) -> LogitTransform:
    """The scale, softcap and factor that the model's type applies around its head; all neutral for most."""
    if is_hooked_transformer(model):
        softcap = getattr(model.cfg, "output_logits_soft_cap", None)
        return LogitTransform(softcap=softcap if softcap and softcap > 0 else None)
    model_type = getattr(getattr(model, "config", None), "model_type", "")

    def entry(table: dict[str, str]) -> float | None:
        return getattr(model.config.get_text_config(), table[model_type], None) if model_type in table else None

    return LogitTransform(
        factor=1.0 / (entry(_STATE_DIVIDED) or 1.0),
        scale=(entry(_MULTIPLIED) or 1.0) / (entry(_DIVIDED) or 1.0),
        softcap=entry(_SOFTCAP),
    )


def is_hooked_transformer(model: Any) -> bool:
    """Whether this is a TransformerLens model, told by its parts: that library need not be installed."""
    return hasattr(model, "ln_final") and hasattr(getattr(model, "unembed", None), "W_U")


def as_linear(head: Any) -> nn.Linear:
    """``head`` if it is an ``nn.Linear``; for TransformerLens's ``Unembed`` one on the same storage."""
    if isinstance(head, nn.Linear):
        return head
    if not hasattr(head, "W_U"):
        raise ValueError(f"model: its head is a {type(head).__name__}, wanted an nn.Linear")
    d_model, vocab = head.W_U.shape
    linear = nn.Linear(d_model, vocab, device="meta")
    linear.weight = nn.Parameter(head.W_U.detach().T, requires_grad=False)
    bias = getattr(head, "b_U", None)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return linear


def _output_embeddings(model: Any) -> nn.Module:
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    if head is None:
        raise ValueError(f"model: {type(model).__name__} has no head; load it with AutoModelForCausalLM")
    return head


def _stacks(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the places where a stack of blocks can lie."""
    if getattr(model, "base_model", None) is None:
        raise ValueError(f"model: {type(model).__name__} has no `base_model`; wanted a transformers causal LM")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _UNSUITED:
        raise NotImplementedError(f"model: no lens can read {_name(model)}: {_UNSUITED[model_type]}")
    yield "base_model", model.base_model
    for name in _STACKS:
        if isinstance(stack := getattr(model.base_model, name, None), nn.Module):
            yield f"base_model.{name}", stack


def _name(model: Any) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (model type {model_type!r})"
