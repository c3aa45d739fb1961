"""OLMo 2 (model_type "olmo2"): arXiv 2501.00656.

Beside Llama: attention and feed-forward read the stream as it is and their results are normed,
and the whole query and key projections are normed before they are cut into heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.kernels.rms_norm import rms_norm
from hasten.models.base import KV, ModelConfig, StackedDecoder, Weights, common_facts
from hasten.models.facts import Facts
from hasten.models.layers import Attention, GatedMLP, Rope, vector


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    attention_bias: bool


def configure(facts: Facts, dtype: torch.dtype) -> Config:
    facts.expect("hidden_act", "silu")
    common = common_facts(facts, dtype, norm_eps=1e-5)
    return Config(
        **common,
        windows=(None,) * common["num_layers"],
        attention_bias=facts.flag("attention_bias", False),
    )


class Layer:
    """Attention, then feed-forward; the normed result of each is added to the stream."""

    def __init__(self, config: Config, weights: Weights, index: int, rope: Rope) -> None:
        at = f"model.layers.{index}"
        self.eps = config.norm_eps
        q_size, k_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
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
            q_norm=vector(weights, f"{at}.self_attn.q_norm.weight", q_size),
            k_norm=vector(weights, f"{at}.self_attn.k_norm.weight", k_size),
        )
        self.attended_norm = vector(
            weights, f"{at}.post_attention_layernorm.weight", config.hidden_size
        )
        self.mlp = GatedMLP(
            config,
            weights,
            gate=f"{at}.mlp.gate_proj",
            up=f"{at}.mlp.up_proj",
            down=f"{at}.mlp.down_proj",
        )
        self.fed_norm = vector(
            weights, f"{at}.post_feedforward_layernorm.weight", config.hidden_size
        )

    def __call__(self, hidden: Tensor, kv: KV) -> Tensor:
        attended = self.attention(hidden, kv)
        hidden = rms_norm(attended, self.attended_norm, self.eps, add=hidden)
        return rms_norm(self.mlp(hidden), self.fed_norm, self.eps, add=hidden)


class Model(StackedDecoder):
    layer_class = Layer
