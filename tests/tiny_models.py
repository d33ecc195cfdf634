"""Tiny causal LMs of many types, random in every parameter so that no norm, bias or scale is trivial."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, D_MODEL, LAYERS = 101, 32, 3

_PLAIN = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"vocab_size": VOCAB, "n_embd": D_MODEL, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
_GPT |= {"bos_token_id": 1, "eos_token_id": 2}
_NO_KV = {k: v for k, v in _PLAIN.items() if k not in ("num_key_value_heads", "head_dim")}

#: type -> (config, kind of the final norm, whether its stored weight is w - 1)
TYPES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "gpt2": (_GPT, "layer", False),
    "gptj": (_GPT | {"rotary_dim": 4}, "layer", False),
    "codegen": (_GPT | {"rotary_dim": 4}, "layer", False),
    "gpt_neox": (_NO_KV, "layer", False),
    "opt": (_NO_KV | {"ffn_dim": 64, "word_embed_proj_dim": D_MODEL}, "layer", False),
    "bloom": ({"vocab_size": VOCAB, "hidden_size": D_MODEL, "n_layer": LAYERS, "n_head": 4}, "layer", False),
    "phi": (_NO_KV, "layer", False),
    "stablelm": (_PLAIN, "layer", False),
    "cohere": (_PLAIN | {"logit_scale": 0.3}, "layer", False),
    "nemotron": (_PLAIN, "layer", True),
    "olmo": (_PLAIN, "layer", False),
    "llama": (_PLAIN, "rms", False),
    "mistral": (_PLAIN, "rms", False),
    "qwen2": (_PLAIN, "rms", False),
    "qwen3": (_PLAIN, "rms", False),
    "phi3": (_PLAIN, "rms", False),
    "olmo2": (_PLAIN, "rms", False),
    "lfm2": (_PLAIN | {"layer_types": ["conv", "full_attention", "conv"]}, "rms", False),
    "granite": (_PLAIN | {"logits_scaling": 3.0}, "rms", False),
    "hyperclovax": (_PLAIN | {"logits_scaling": 3.0}, "rms", False),
    "minicpm3": (
        _PLAIN
        | {"num_key_value_heads": 4, "dim_model_base": 8}
        | {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        "rms",
        False,
    ),
    "nanochat": (_PLAIN | {"final_logit_softcapping": 2.0}, "rms", False),
    "gemma": (_PLAIN, "rms", True),
    "gemma2": (_PLAIN | {"final_logit_softcapping": 2.0}, "rms", True),
    "gemma3_text": (_PLAIN | {"final_logit_softcapping": 2.0}, "rms", True),
}


#: Models of several experts, which only some tests take.
MIXTURES = {
    "qwen3_moe": _PLAIN | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def tiny(model_type: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A model of ``TYPES`` or ``MIXTURES``, fp32, in eval mode."""
    torch.manual_seed(seed)
    values = (MIXTURES[model_type] if model_type in MIXTURES else TYPES[model_type][0]) | config
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**values), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model
