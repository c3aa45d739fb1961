"""Tiny random models of every architecture, made with transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or huggingface_hub are imported

from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)


def sizes(**changes: Any) -> dict[str, Any]:
    """Odd on purpose: no size is a power of two, few are multiples of a vector width."""
    return {
        "vocab_size": 97,
        "hidden_size": 66,
        "intermediate_size": 101,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "attn_implementation": "eager",
        **changes,
    }


def whole_heads(**changes: Any) -> dict[str, Any]:
    """Sizes for architectures whose heads share ``hidden_size`` evenly."""
    stated = sizes(**{"hidden_size": 90, "eos_token_id": 2, "pad_token_id": None, **changes})
    return {key: value for key, value in stated.items() if key != "head_dim"}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.05, 1.1, 1.3, 1.4],
    "long_factor": [1.1, 1.5, 2.5, 4.0, 7.0],
}
BY_KIND = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 33,
    "first_k_dense_replace": 1,
}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**sizes(vocab_size=251, rms_norm_eps=1e-5)),
    "llama-llama3": lambda: LlamaConfig(
        **sizes(rope_parameters=LLAMA3, tie_word_embeddings=True, attention_bias=True)
    ),
    "llama-linear": lambda: LlamaConfig(
        **sizes(rope_parameters=LINEAR, num_key_value_heads=3, mlp_bias=True, head_dim=20)
    ),
    "llama-yarn": lambda: LlamaConfig(**sizes(rope_parameters=YARN, num_key_value_heads=6)),
    "qwen2": lambda: Qwen2Config(
        **{k: v for k, v in sizes(hidden_size=60).items() if k != "head_dim"},
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    "qwen3": lambda: Qwen3Config(**sizes(head_dim=20, hidden_size=60, tie_word_embeddings=True)),
    "mistral": lambda: MistralConfig(**sizes(sliding_window=8, num_key_value_heads=3)),
    "gemma2": lambda: Gemma2Config(
        **sizes(hidden_size=72, num_hidden_layers=4, vocab_size=300, sliding_window=8),
        query_pre_attn_scalar=10,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=1.0,
    ),
    "mixtral": lambda: MixtralConfig(**sizes(num_local_experts=5, num_experts_per_tok=2)),
    "deepseek_v2": lambda: DeepseekV2Config(**sizes(**LATENT, q_lora_rank=None)),
    "deepseek_v2-groups": lambda: DeepseekV2Config(
        **sizes(**{**LATENT, **GROUPS}, q_lora_rank=21, attention_bias=True, mlp_bias=True),
        rope_parameters={**YARN, "mscale": 0.9, "mscale_all_dim": 0.707},
        n_shared_experts=1,
        routed_scaling_factor=1.7,
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **sizes(hidden_size=75, num_attention_heads=5, num_key_value_heads=1, vocab_size=300),
        sliding_window=8,
        sliding_window_pattern=3,
        query_pre_attn_scalar=10,
        rope_parameters=BY_KIND,
    ),
    "gemma3_text-capped": lambda: Gemma3TextConfig(
        **sizes(hidden_size=72, vocab_size=300, attention_bias=True, tie_word_embeddings=False),
        sliding_window=21,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=1.0,
    ),
    "phi3": lambda: Phi3Config(
        **whole_heads(num_attention_heads=3, num_key_value_heads=1, rms_norm_eps=1e-6),
        sliding_window=8,
        tie_word_embeddings=True,
    ),
    "phi3-longrope": lambda: Phi3Config(
        **whole_heads(num_attention_heads=5, num_key_value_heads=5, hidden_size=80),
        rope_parameters={**LONGROPE, "partial_rotary_factor": 0.65},
        original_max_position_embeddings=32,
        sliding_window=512,
    ),
    "olmo2": lambda: Olmo2Config(
        **whole_heads(num_attention_heads=5, num_key_value_heads=5, vocab_size=251)
    ),
    "olmo2-grouped": lambda: Olmo2Config(
        **whole_heads(num_attention_heads=9, num_key_value_heads=3, attention_bias=True),
        rope_parameters=LINEAR,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **sizes(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=37, head_dim=20),
        norm_topk_prob=True,
    ),
    "qwen3_moe-mixed": lambda: Qwen3MoeConfig(
        **sizes(num_experts=5, num_experts_per_tok=2, num_hidden_layers=4),
        moe_intermediate_size=37,
        decoder_sparse_step=2,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=8,
        attention_bias=True,
    ),
}


def randomized(config: PretrainedConfig, seed: int = 0) -> Any:
    """A model whose parameters are all random and large enough that logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.3, 1.2, generator=generator)
            else:
                # Gemma's scaled and tied embedding would otherwise outweigh its layers.
                small = "embed" in name and config.model_type.startswith("gemma")
                parameter.normal_(0.0, 0.05 if small else 0.25, generator=generator)
    return model


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
