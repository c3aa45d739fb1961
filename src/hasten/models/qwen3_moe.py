"""Qwen 3 with experts (model_type "qwen3_moe"): arXiv 2505.09388. Qwen 3 with routed experts.

A layer is a mixture of experts or, by ``mlp_only_layers`` and ``decoder_sparse_step``, dense.
"""

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
    """``sparse`` tells for each layer whether it has experts; they are ``expert_size`` wide."""

    attention_bias: bool
    sparse: tuple[bool, ...]
    num_experts: int
    experts_per_token: int
    expert_size: int
    normalize_shares: bool


def configure(facts: Facts, dtype: torch.dtype) -> Config:
    facts.expect("hidden_act", "silu")
    common = common_facts(facts, dtype)
    sliding = facts.flag("use_sliding_window", False)
    # transformers 5 may write the second name.
    experts = facts.count("num_experts" if facts.states("num_experts") else "num_local_experts")
    dense = facts.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise facts.wrong(f"'mlp_only_layers' must list layers, found {dense!r}")
    step = facts.count("decoder_sparse_step", 1)
    return Config(
        **common,
        windows=layer_windows(facts, lambda _: sliding),
        attention_bias=facts.flag("attention_bias", False),
        sparse=tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(common["num_layers"])
        ),
        num_experts=experts,
        experts_per_token=facts.count("num_experts_per_tok", 8, most=experts),
        expert_size=facts.count("moe_intermediate_size"),
        normalize_shares=facts.flag("norm_topk_prob", False),
    )


def feed_forward(config: Config, weights: Weights, at: str, sparse: bool) -> Experts | GatedMLP:
    """What follows attention in one layer."""

    def mlp(name: str, size: int) -> GatedMLP:
        return GatedMLP(
            config,
            weights,
            gate=f"{name}.gate_proj",
            up=f"{name}.up_proj",
            down=f"{name}.down_proj",
            ffn_size=size,
        )

    if not sparse:
        return mlp(at, config.ffn_size)
    router = Linear.load(
        weights, {f"{at}.gate": config.num_experts}, config.hidden_size, role="router"
    )
    experts = [mlp(f"{at}.experts.{i}", config.expert_size) for i in range(config.num_experts)]
    return Experts(router, experts, config.experts_per_token, config.normalize_shares)


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
        self.mlp = feed_forward(config, weights, f"{at}.mlp", config.sparse[index])

    def __call__(self, hidden: Tensor, kv: KV) -> Tensor:
        attended = self.attention(rms_norm(hidden, self.norm, self.eps), kv)
        normed, hidden = add_rms_norm(attended, hidden, self.mlp_norm, self.eps)
        return self.mlp(normed, hidden)


class Model(StackedDecoder):
    layer_class = Layer
