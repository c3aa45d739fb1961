"""Phi 3, 3.5 and 4 (model_type "phi3"): arXiv 2404.14219.

Beside Llama: query, key and value are stored as one matrix, gate and up as another; texts longer
than the original context use LongRoPE, and only a part of each head may turn (Phi 4 mini).
LongRoPE's factors are chosen once, by the longest sequence that is to run (see
`hasten.models.layers.rope_facts`): with ``max_length`` within the original context they are the
short ones, else the long ones for every text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.rms_norm import add_rms_norm, rms_norm
from hasten.models.base import KV, ModelConfig, StackedDecoder, Weights, common_facts, layer_windows
from hasten.models.facts import Facts
from hasten.models.layers import Attention, GatedMLP, Rope, vector


def configure(facts: Facts, dtype: torch.dtype) -> ModelConfig:
    facts.expect("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        facts.expect(key, False)
    common = common_facts(facts, dtype, norm_eps=1e-5, partial_rotary=True)
    stated = facts.values.get("rope_parameters") or facts.values.get("rope_scaling") or {}
    for key in ("rope_type", "type"):  # "yarn" would be LongRoPE to some versions, YaRN to others
        Facts(stated, facts.path).expect(key, "default", "longrope", "su")
    # The checkpoints for long texts state a window that no text fills.
    sliding = facts.states("sliding_window")
    sliding = sliding and facts.count("sliding_window") < common["max_positions"]
    return ModelConfig(**common, windows=layer_windows(facts, lambda _: sliding))


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
            q=f"{at}.self_attn.qkv_proj",
            out=f"{at}.self_attn.o_proj",
        )
        self.mlp_norm = vector(weights, f"{at}.post_attention_layernorm.weight", config.hidden_size)
        self.mlp = GatedMLP(
            config,
            weights,
            gate=f"{at}.mlp.gate_up_proj",
            down=f"{at}.mlp.down_proj",
        )

    def __call__(self, hidden: Tensor, kv: KV) -> Tensor:
        attended = self.attention(rms_norm(hidden, self.norm, self.eps), kv)
        normed, hidden = add_rms_norm(attended, hidden, self.mlp_norm, self.eps)
        return self.mlp(normed, hidden)


class Model(StackedDecoder):
    layer_class = Layer
