"""Gemma 3 without images (model_type "gemma3_text"): arXiv 2503.19786.

Beside Gemma 2: each query and key head is normed instead of capping the scores, and layers with a
sliding window turn with a base frequency of their own, while the other layers, one in six, may
have scaled rotations for long texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.activation import softcap
from hasten.kernels.embedding import embed
from hasten.kernels.rms_norm import add_rms_norm, rms_norm
from hasten.kernels.rows import scale
from hasten.models.base import KV, Decoder, ModelConfig, Weights, common_facts, layer_windows
from hasten.models.facts import Facts
from hasten.models.layers import Attention, GatedMLP, Linear, Rope, RopeFacts, rope_facts, vector

# What the published checkpoints leave unsaid.
ASSUMED = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """``rope`` is that of layers without a window, ``local_rope`` that of layers with one."""

    local_rope: RopeFacts
    attention_bias: bool
    score_scale: float
    logit_cap: float | None


def configure(facts: Facts, dtype: torch.dtype) -> Config:
    facts = Facts({**ASSUMED, **facts.values}, facts.path, facts.longest)
    facts.expect("hidden_activation", "gelu_pytorch_tanh")
    facts.expect("use_bidirectional_attention", False)
    facts.expect("attn_logit_softcapping", None)
    everywhere, local = rotations(facts)
    common = common_facts(everywhere, dtype, rope_theta=1e6, head_dim=256, tied=True)
    pattern = facts.count("sliding_window_pattern", 6)
    cap = "final_logit_softcapping"
    return Config(
        **common,
        windows=layer_windows(facts, lambda layer: (layer + 1) % pattern != 0),
        local_rope=rope_facts(local, common["head_dim"], 1e4),
        attention_bias=facts.flag("attention_bias", False),
        score_scale=facts.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_cap=facts.number(cap) if facts.states(cap) else None,
    )


def rotations(facts: Facts) -> tuple[Facts, Facts]:
    """The facts as layers without a window read them, and as layers with one do.

    transformers 5 states rotary parameters by kind of layer; before it, ``rope_theta`` and
    ``rope_scaling`` were those of layers without a window, ``rope_local_base_freq`` of the others.
    """
    kinds = facts.values.get("rope_parameters")
    if kinds is None:
        base = facts.values.get("rope_local_base_freq")
        return facts, seen(facts, rope_scaling=None, rope_theta=base)
    if not isinstance(kinds, dict) or not kinds.keys() <= {"full_attention", "sliding_attention"}:
        raise facts.wrong(
            "'rope_parameters' must hold objects 'full_attention' and 'sliding_attention', "
            f"found {kinds!r}"
        )
    plain = seen(facts, rope_scaling=None, rope_theta=None)
    return (
        seen(plain, rope_parameters=kinds.get("full_attention")),
        seen(plain, rope_parameters=kinds.get("sliding_attention")),
    )


def seen(facts: Facts, **changes: Any) -> Facts:
    """The facts with some of them replaced."""
    return Facts({**facts.values, **changes}, facts.path, facts.longest)


class Layer:
    """Attention, then feed-forward; each is normed before and after, and adds to the stream."""

    def __init__(self, config: Config, weights: Weights, index: int, rope: Rope) -> None:
        at = f"model.layers.{index}"
        self.eps = config.norm_eps

        def norm(name: str, size: int = config.hidden_size) -> Tensor:
            return 1.0 + vector(weights, f"{at}.{name}.weight", size)

        self.norm = norm("input_layernorm")
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
            q_norm=norm("self_attn.q_norm", config.head_dim),
            k_norm=norm("self_attn.k_norm", config.head_dim),
            scale=config.score_scale,
        )
        self.attended_norm = norm("post_attention_layernorm")
        self.mlp_norm = norm("pre_feedforward_layernorm")
        self.mlp = GatedMLP(
            config,
            weights,
            gate=f"{at}.mlp.gate_proj",
            up=f"{at}.mlp.up_proj",
            down=f"{at}.mlp.down_proj",
            activation="gelu_tanh",
        )
        self.fed_norm = norm("post_feedforward_layernorm")

    def __call__(self, hidden: Tensor, kv: KV) -> Tensor:
        attended = self.attention(rms_norm(hidden, self.norm, self.eps), kv)
        attended = rms_norm(attended, self.attended_norm, self.eps)
        normed, hidden = add_rms_norm(attended, hidden, self.mlp_norm, self.eps)
        return rms_norm(self.mlp(normed), self.fed_norm, self.eps, add=hidden)


class Model(Decoder):
    def __init__(self, config: Config, weights: Weights) -> None:
        self.config = config
        self.logit_cap = config.logit_cap
        tokens = {"model.embed_tokens": config.vocab_size}
        self.embedding = Linear.load(
            weights, tokens, config.hidden_size, role="head" if config.tied else "embedding"
        ).weight
        # The checkpoints were trained with this factor rounded to the type of the embedding.
        self.embedding_scale = float(torch.tensor(config.hidden_size**0.5, dtype=config.dtype))
        rope, local = Rope(config.rope), Rope(config.local_rope)
        self.layers = [
            Layer(config, weights, i, rope if window is None else local)
            for i, window in enumerate(config.windows)
        ]
        self.norm = 1.0 + vector(weights, "model.norm.weight", config.hidden_size)
        self.output = (
            Linear(self.embedding)
            if config.tied
            else Linear.load(
                weights, {"lm_head": config.vocab_size}, config.hidden_size, role="head"
            )
        )

    def embed(self, tokens: Tensor) -> Tensor:
        return scale(embed(tokens, self.embedding), self.embedding_scale)

    def layer(self, index: int, hidden: Tensor, kv: KV) -> Tensor:
        return self.layers[index](hidden, kv)

    def head(self, hidden: Tensor) -> Tensor:
        logits = self.output(self.final_norm(hidden))
        return logits if self.logit_cap is None else softcap(logits, self.logit_cap)
