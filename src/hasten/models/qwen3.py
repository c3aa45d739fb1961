"""Qwen 3 (model_type "qwen3"): arXiv 2505.09388. Llama with a norm on each query and key head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.kernels.rms_norm import add_rms_norm, rms_norm
from hasten.models.base import KV, ModelConfig, StackedDecoder, Weights, common_facts, layer_windows
from hasten.models.facts import Facts
from hasten.models.layers import Attention, GatedMLP, Rope, vector


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    attention_bias: bool


def configure(facts: Facts, dtype: torch.dtype) -> Config:
    facts.expect("hidden_act", "silu")
    first = facts.count("max_window_layers", 28, least=0)
    sliding = facts.flag("use_sliding_window", False)
    return Config(
        **common_facts(facts, dtype, head_dim=128),
        windows=layer_windows(facts, lambda layer: sliding and layer >= first),
        attention_bias=facts.flag("attention_bias", False),
    )


class Layer:
    """Attention, then feed-forward; each reads a normed copy and adds to the stream."""

    def __init__(self, config: Config, weights: Weights, index: int, rope: Rope) -> None:
        at = f"model.layers.{index}"
        self.eps = config.norm_eps
        self.norm = vector(weights, f"{at}.input_layernorm.weight", config.hidden_size)
        self.attention = Attention(
            config,
            weights,
            index,
            rope,
            q=f"{at}.self_attn.q_proj",
            k=f"{at}.self_attn.k_proj",
            v=f"{at}.self_attn.v_proj",
            out=f"{at}.self_attn.o_proj",
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            q_norm=vector(weights, f"{at}.self_attn.q_norm.weight", config.head_dim),
            k_norm=vector(weights, f"{at}.self_attn.k_norm.weight", config.head_dim),
        )
        self.mlp_norm = vector(weights, f"{at}.post_attention_layernorm.weight", config.hidden_size)
        self.mlp = GatedMLP(
            config,
            weights,
            gate=f"{at}.mlp.gate_proj",
            up=f"{at}.mlp.up_proj",
            down=f"{at}.mlp.down_proj",
        )

    def __call__(self, hidden: Tensor, kv: KV) -> Tensor:
        attended = self.attention(rms_norm(hidden, self.norm, self.eps), kv)
        normed, hidden = add_rms_norm(attended, hidden, self.mlp_norm, self.eps)
        return self.mlp(normed, hidden)


class Model(StackedDecoder):
    layer_class = Layer
