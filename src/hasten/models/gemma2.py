"""Gemma 2 (model_type "gemma2"): arXiv 2408.00118.

Beside Llama: scores and logits are soft-capped, every second layer has a sliding window, norms
multiply by ``1 + w`` and also follow attention and feed-forward, and embeddings are scaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.kernels.activation import softcap
from hasten.kernels.embedding import embed
from hasten.kernels.rms_norm import add_rms_norm, rms_norm
from hasten.kernels.rows import scale
from hasten.models.base import KV, Decoder, ModelConfig, Weights, common_facts, layer_windows
from hasten.models.facts import Facts
from hasten.models.layers import Attention, GatedMLP, Linear, Rope, vector


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    attention_bias: bool
    score_scale: float
    score_cap: float | None
    logit_cap: float | None


def configure(facts: Facts, dtype: torch.dtype) -> Config:
    facts.expect("hidden_activation", "gelu_pytorch_tanh")
    facts.expect("use_bidirectional_attention", False)
    return Config(
        **common_facts(facts, dtype, head_dim=256, tied=True),
        windows=layer_windows(facts, lambda layer: layer % 2 == 0),
        attention_bias=facts.flag("attention_bias", False),
        score_scale=facts.number("query_pre_attn_scalar", 256) ** -0.5,
        score_cap=cap(facts, "attn_logit_softcapping", 50.0),
        logit_cap=cap(facts, "final_logit_softcapping", 30.0),
    )


def cap(facts: Facts, key: str, default: float) -> float | None:
    """A cap that is missing has its default, one that is null is off."""
    return None if key in facts.values and not facts.states(key) else facts.number(key, default)


class Layer:
    """Attention, then feed-forward; each is normed before and after, and adds to the stream."""

    def __init__(self, config: Config, weights: Weights, index: int, rope: Rope) -> None:
        at = f"model.layers.{index}"
        self.eps = config.norm_eps

        def norm(name: str) -> Tensor:
            return 1.0 + vector(weights, f"{at}.{name}.weight", config.hidden_size)

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
            scale=config.score_scale,
            softcap=config.score_cap,
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
        rope = Rope(config.rope)
        tokens = {"model.embed_tokens": config.vocab_size}
        self.embedding = Linear.load(
            weights, tokens, config.hidden_size, role="head" if config.tied else "embedding"
        ).weight
        # The checkpoints were trained with this factor rounded to the type of the embedding.
        self.embedding_scale = float(torch.tensor(config.hidden_size**0.5, dtype=config.dtype))
        self.layers = [Layer(config, weights, i, rope) for i in range(config.num_layers)]
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
