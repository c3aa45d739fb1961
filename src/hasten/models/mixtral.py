"""Mixtral (model_type "mixtral"): arXiv 2401.04088. Mistral with routed experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.kernels.rms_norm import add_rms_norm, rms_norm
from hasten.models.base import KV, ModelConfig, StackedDecoder, Weights, common_facts, layer_windows
from hasten.models.facts import Facts
from hasten.models.layers import Attention, Experts, GatedMLP, Linear, Rope, vector


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    num_experts: int
    experts_per_token: int


def configure(facts: Facts, dtype: torch.dtype) -> Config:
    facts.expect("hidden_act", "silu")
    sliding = facts.states("sliding_window")
    experts = facts.count("num_local_experts", 8)
    return Config(
        **common_facts(facts, dtype, rope_theta=1e6, norm_eps=1e-5),
        windows=layer_windows(facts, lambda _: sliding),
        num_experts=experts,
        experts_per_token=facts.count("num_experts_per_tok", 2, most=experts),
    )


class Layer:
    """Attention, then experts; each reads a normed copy and adds to the stream."""

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
        )
        self.moe_norm = vector(weights, f"{at}.post_attention_layernorm.weight", config.hidden_size)
        moe = f"{at}.block_sparse_moe"
        experts = [
            GatedMLP(
                config,
                weights,
                gate=f"{moe}.experts.{expert}.w1",
                up=f"{moe}.experts.{expert}.w3",
                down=f"{moe}.experts.{expert}.w2",
            )
            for expert in range(config.num_experts)
        ]
        router = Linear.load(
            weights, {f"{moe}.gate": config.num_experts}, config.hidden_size, role="router"
        )
        self.moe = Experts(router, experts, config.experts_per_token, normalize=True)

    def __call__(self, hidden: Tensor, kv: KV) -> Tensor:
        attended = self.attention(rms_norm(hidden, self.norm, self.eps), kv)
        normed, hidden = add_rms_norm(attended, hidden, self.moe_norm, self.eps)
        return self.moe(normed, hidden)


class Model(StackedDecoder):
    layer_class = Layer
