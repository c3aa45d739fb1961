"""Mistral (model_type "mistral"): arXiv 2310.06825. Llama with one sliding window in all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.rms_norm import add_rms_norm, rms_norm
from hasten.models.base import KV, ModelConfig, StackedDecoder, Weights, common_facts, layer_windows
from hasten.models.facts import Facts
from hasten.models.layers import Attention, GatedMLP, Rope, vector


def configure(facts: Facts, dtype: torch.dtype) -> ModelConfig:
    facts.expect("hidden_act", "silu")
    sliding = facts.states("sliding_window")
    return ModelConfig(
        **common_facts(facts, dtype),
        windows=layer_windows(facts, lambda _: sliding),
    )


class Layer:
    """Attention, then feed-forward; each reads a normed copy and adds to the stream."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int, rope: Rope) -> None:
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
