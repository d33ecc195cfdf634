"""Every model type that transformers' AutoModelForCausalLM knows, tiny and random in every parameter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: Encoders with a head for their own tokens, and decoders of encoder-decoders.
OTHERS = {
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small",
    "camembert", "data2vec-text", "electra", "ernie", "marian", "mbart", "megatron-bert", "musicgen",
    "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "rembert", "roberta", "roberta-prelayernorm",
    "roc_bert", "roformer", "trocr", "whisper", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
}  # fmt: skip
#: Types that cannot be built tiny, and why.
UNBUILT = {
    "gemma3n": "its vision tower needs the package timm; its text model is gemma3n_text",
    "gemma4_assistant": "it only drafts for another model, whose states it takes",
    "gemma4_unified_assistant": "it only drafts for another model, whose states it takes",
    "musicgen": "it has no tokens of its own without a text encoder and an audio codec",
    "musicgen_melody": "it has no tokens of its own without a text encoder and an audio codec",
}
#: Decoders, and wrappers of vision or audio models around one.
DECODERS = [t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if t not in OTHERS and t not in UNBUILT]

VOCAB, WIDTH, LAYERS = 101, 32, 3

#: Sizes by the names that configs give them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "hidden_size_global"), WIDTH),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "dim_head"), 8),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dense_intermediate_size"), 64
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim", "lru_width"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("vocab_size_per_layer_input", "image_token_id"), VOCAB),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id",), 1),
    **dict.fromkeys(("eos_token_id",), 2),
}


#: What changes logits at a model's end, by the names that configs give it: chosen so that all of it shows.
_ENDS: dict[str, Any] = {
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), 2.0),
    **dict.fromkeys(("logit_scale", "lm_head_multiplier"), 0.3),
    "logits_scaling": 3.0,
    "unpadded_vocab_size": VOCAB - 4,
}

_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
_INDEXED = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
_INDEXED |= {"indexer_budget": 8, "indexer_compress_ratio": 2}

#: What single types need besides, in their config or, of a wrapper, in its text config.
_SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _HYBRID | {"linear_head_dim": 8, "linear_num_heads": 4},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    | {"layer_types": ["full_attention"] * 3},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"per_layer_config": {}},
        "swa_qk_nope_head_dim": 8,
        "swa_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "gemma3n": {"num_kv_shared_layers": 0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _MAMBA | _HYBRID,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 16], "axial_pos_embds_dim": [8, 24]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _HYBRID,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 16, "chunk_size": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 8},
    "qwen3_5": _HYBRID,
    "qwen3_5_moe": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp": _HYBRID | _INDEXED,
    "qwen4_exp_text": _HYBRID | _INDEXED,
    "zamba": {"layers_block_type": ["hybrid", "linear_attention", "hybrid"], "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["hybrid", "linear_attention", "hybrid"], "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def _kwargs(config: PretrainedConfig) -> dict[str, Any]:
    """What ``config`` and the configs inside it are to be built with."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            found[name] = _kwargs(value)
        elif name in _SIZES and value is not None:
            found[name] = _SIZES[name]
        elif name in _ENDS:
            found[name] = _ENDS[name]
    if "kv_lora_rank" in found and "num_key_value_heads" in found:  # latent attention has a key head for each
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def config_of(model_type: str) -> PretrainedConfig:
    """The default config of a type, with everything made small."""
    cls = CONFIG_MAPPING[model_type]
    kwargs = _kwargs(cls())
    for name, value in _SETTINGS.get(model_type, {}).items():
        if isinstance(kwargs.get(name), dict):
            kwargs[name] |= value
        else:
            kwargs.get("text_config", kwargs)[name] = value
    return cls(**kwargs)


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A model in fp32 and evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(model_type), dtype=torch.float32).eval()
    if model_type == "xmod":
        model.set_default_language("en_XX")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model
