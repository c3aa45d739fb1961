"""Llama 1 to 3 (model_type "llama"): arXiv 2302.13971 and 2407.21783."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.kernels.rms_norm import add_rms_norm, rms_norm
from hasten.models.base import KV, ModelConfig, StackedDecoder, Weights, common_facts
from hasten.models.facts import Facts
from hasten.models.layers import Attention, GatedMLP, Rope, vector


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    attention_bias: bool
    mlp_bias: bool


def configure(facts: Facts, dtype: torch.dtype) -> Config:
    facts.expect("hidden_act", "silu")
    common = common_facts(facts, dtype)
    return Config(
        **common,
        windows=(None,) * common["num_layers"],
        attention_bias=facts.flag("attention_bias", False),
        mlp_bias=facts.flag("mlp_bias", False),
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
        )
        self.mlp_norm = vector(weights, f"{at}.post_attention_layernorm.weight", config.hidden_size)
        self.mlp = GatedMLP(
            config,
            weights,
            gate=f"{at}.mlp.gate_proj",
            up=f"{at}.mlp.up_proj",
            down=f"{at}.mlp.down_proj",
            bias=config.mlp_bias,
        )

    def __call__(self, hidden: Tensor, kv: KV) -> Tensor:
        return self.feed(self.attend(hidden, kv), hidden)

    def attend(self, hidden: Tensor, kv: KV) -> Tensor:
        """What attention adds to the stream."""
        return self.attention(rms_norm(hidden, self.norm, self.eps), kv)

    def feed(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """The stream after both are in it."""
        normed, hidden = add_rms_norm(attended, hidden, self.mlp_norm, self.eps)
        return self.mlp(normed, hidden)


class Model(StackedDecoder):
    layer_class = Layer
