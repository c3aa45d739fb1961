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
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
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
                small = "embed" in name and config.model_type == "gemma2"
                parameter.normal_(0.0, 0.05 if small else 0.25, generator=generator)
    return model


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
