"""DeepSeek-V2 (model_type "deepseek_v2"): arXiv 2405.04434. Latent attention and many experts.

**Attention.** Each position is compressed to a latent vector c, and keys and values of all heads
are linear in it: ``k_h = [U_h c, r]`` and ``v_h = V_h c`` with one rotated part r for all heads.
So ``q_h . k_h = (U_h^T q_h') . c + q_h'' . r``, and ``sum p v_h = V_h sum p c``: heads attend over
the latents themselves. The cache holds [r, c] as one key for all heads, whose last dimensions are
also its value, and nothing else.

**Experts.** A row's routed experts are chosen among the best groups of experts; shared ones serve
every row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.cache.layout import KVLayout, LayerGroup
from hasten.kernels.linear import linear_grouped, pack, pack_grouped
from hasten.kernels.moe import route
from hasten.kernels.rms_norm import add_rms_norm, rms_norm
from hasten.kernels.rows import add, scale
from hasten.models.base import KV, MAX_HEADS, ModelConfig, StackedDecoder, Weights, common_facts
from hasten.models.facts import Facts
from hasten.models.layers import GatedMLP, Linear, Mixture, Rope, vector

LATENT_EPS = 1e-6  # of the norms inside of attention, whatever rms_norm_eps says


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """``num_kv_heads`` is 1 and ``head_dim`` the size of what is stored: a stored key.

    Attributes:
        q_rank: size of the compressed query; None = queries are not compressed.
        rank: size of the latent vector.
        rope_dim, plain_dim: rotated and other dimensions of a query head.
        value_dim: size of a head's value.
        scale: multiplies the scores.
        dense_layers: leading layers without experts.
        groups, top_groups: of experts; 1 and 1 = any expert can be chosen.
    """

    q_rank: int | None
    rank: int
    rope_dim: int
    plain_dim: int
    value_dim: int
    scale: float
    attention_bias: bool
    mlp_bias: bool
    dense_layers: int
    num_experts: int
    experts_per_token: int
    groups: int
    top_groups: int
    shared_experts: int
    expert_size: int
    routed_scale: float

    def kv_layout(self, dtype: torch.dtype = torch.float32) -> KVLayout:
        layers = LayerGroup(tuple(range(self.num_layers)))
        return KVLayout(1, self.head_dim, self.rank, (layers,), dtype, values_in_keys=True)


def configure(facts: Facts, dtype: torch.dtype) -> Config:
    facts.expect("hidden_act", "silu")
    facts.expect("scoring_func", "softmax")
    facts.expect("topk_method", "greedy", "group_limited_greedy")  # "noaux_tc" is DeepSeek-V3
    facts.expect("norm_topk_prob", False)  # published implementations disagree about true
    facts.expect("rope_interleave", True)
    facts.expect("moe_layer_freq", 1)
    rank = facts.count("kv_lora_rank", 512, most=MAX_HEADS)
    rope_dim = facts.count("qk_rope_head_dim", 64, most=MAX_HEADS)
    plain_dim = facts.count("qk_nope_head_dim", 128, most=MAX_HEADS)
    # config.json counts heads before compression, and may give the rotated part as head_dim
    values = {**facts.values, "num_key_value_heads": None, "head_dim": rope_dim}
    common = common_facts(Facts(values, facts.path, facts.longest), dtype)
    common.update(num_kv_heads=1, head_dim=rope_dim + rank)
    experts = facts.count("n_routed_experts", 64)
    limited = facts.values.get("topk_method") == "group_limited_greedy"
    groups = facts.count("n_group", most=experts) if limited else 1
    top_groups = facts.count("topk_group", most=groups) if limited else 1
    if experts % groups:
        raise facts.wrong(f"'n_group' {groups} does not divide {experts} experts")
    return Config(
        **common,
        windows=(None,) * common["num_layers"],
        q_rank=_count_or_none(facts, "q_lora_rank", 1536),
        rank=rank,
        rope_dim=rope_dim,
        plain_dim=plain_dim,
        value_dim=facts.count("v_head_dim", 128, most=MAX_HEADS),
        scale=_softmax_scale(facts, plain_dim + rope_dim),
        attention_bias=facts.flag("attention_bias", False),
        mlp_bias=facts.flag("mlp_bias", False),
        dense_layers=facts.count("first_k_dense_replace", 0, least=0),
        num_experts=experts,
        experts_per_token=facts.count("num_experts_per_tok", most=experts // groups * top_groups),
        groups=groups,
        top_groups=top_groups,
        shared_experts=_count_or_none(facts, "n_shared_experts", 2) or 0,
        expert_size=facts.count("moe_intermediate_size", 1407),
        routed_scale=facts.number("routed_scaling_factor", 1.0),
    )


def _count_or_none(facts: Facts, key: str, default: int) -> int | None:
    """A missing key means the default, null that there is none."""
    return None if facts.values.get(key, default) is None else facts.count(key, default)


def _softmax_scale(facts: Facts, size: int) -> float:
    """1 / sqrt(size), times YaRN's temperature where it applies to all dimensions: once for the
    queries and once for the keys (the rotation carries what is left, see ``rope_facts``)."""
    stated = facts.values.get("rope_parameters") or facts.values.get("rope_scaling") or {}
    rope = Facts(stated, facts.path)
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if kind == "default" or not stated.get("mscale_all_dim"):
        return size**-0.5
    factor = rope.number("factor")
    weight = rope.number("mscale_all_dim")
    temperature = 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
    return temperature**2 * size**-0.5


def _rotated_first(plain: int, rotated: int) -> list[int]:
    """The order in which we hold outputs that the checkpoint has as plain ones, then rotated ones.

    The checkpoint rotates pairs of neighbours; the kernel rotates the first dimensions and pairs
    the first half of them with the second. A score is a sum over dimensions, so that queries and
    keys may change their order alike.
    """
    size = plain + rotated
    return [*range(plain, size, 2), *range(plain + 1, size, 2), *range(plain)]


class LatentAttention:
    """Attention of all heads over one latent vector a position, see the head of this file."""

    def __init__(self, config: Config, weights: Weights, layer: int, rope: Rope, at: str) -> None:
        self.layer = layer
        self.rope = rope
        self.scale = config.scale
        self.heads, self.rank, self.rope_dim = config.num_heads, config.rank, config.rope_dim
        self.q_size = config.plain_dim + config.rope_dim
        heads, rank, plain = config.num_heads, config.rank, config.plain_dim
        hidden, bias = config.hidden_size, config.attention_bias

        self.q_down: Linear | None = None
        q_name, q_inputs = f"{at}.q_proj", hidden
        if config.q_rank is not None:
            q_name, q_inputs = f"{at}.q_b_proj", config.q_rank
            self.q_down = Linear.load(weights, {f"{at}.q_a_proj": q_inputs}, hidden, bias)
            self.q_norm = vector(weights, f"{at}.q_a_layernorm.weight", q_inputs)
        size, order = self.q_size, _rotated_first(plain, self.rope_dim)
        q = weights.get(f"{q_name}.weight", (heads * size, q_inputs)).to(weights.dtype)
        self.q = Linear(pack(q.view(heads, size, q_inputs)[:, order].flatten(0, 1)))

        name = f"{at}.kv_a_proj_with_mqa"
        size, order = rank + self.rope_dim, _rotated_first(rank, self.rope_dim)
        kv = weights.get(f"{name}.weight", (size, hidden)).to(weights.dtype)
        kv_bias = vector(weights, f"{name}.bias", size)[order] if bias else None
        self.kv_down = Linear(pack(kv[order]), kv_bias)
        self.kv_norm = vector(weights, f"{at}.kv_a_layernorm.weight", rank)

        size = plain + config.value_dim
        up = weights.get(f"{at}.kv_b_proj.weight", (heads * size, rank)).to(weights.dtype)
        up = up.view(heads, size, rank)
        self.to_latent = pack_grouped(up[:, :plain].transpose(1, 2).contiguous())
        self.from_latent = pack_grouped(up[:, plain:])
        self.out = Linear.load(weights, {f"{at}.o_proj": hidden}, heads * config.value_dim, bias)

    def __call__(self, x: Tensor, kv: KV) -> Tensor:
        rows, rope = x.shape[0], self.rope_dim
        compressed = x
        if self.q_down is not None:
            compressed = rms_norm(self.q_down(x), self.q_norm, LATENT_EPS)
        heads = self.q(compressed).view(rows, self.heads, self.q_size)  # rotated, then plain
        q = torch.empty((rows, self.heads, rope + self.rank))
        scale(heads[..., :rope], 1.0, q[..., :rope])
        linear_grouped(heads[..., rope:], self.to_latent, q[..., rope:])
        key = self.kv_down(x)  # [R, rotated + latent]
        rms_norm(key[:, rope:], self.kv_norm, LATENT_EPS, out=key[:, rope:])
        k = key[:, None]
        kv.append(self.layer, q, k, k[..., :0], self.rope)
        seen = kv.attend(self.layer, q, self.rope, scale=self.scale)
        values = linear_grouped(seen.view(rows, self.heads, self.rank), self.from_latent)
        return self.out(values.flatten(1))


class Experts:
    """``sum over chosen e of share(e) * mlp_e(x)``, plus the experts that every row goes through.

    The shares are probabilities over all experts, times ``routed_scale``. The shared experts are
    stored as one wider one.
    """

    def __init__(self, config: Config, weights: Weights, at: str) -> None:
        self.config = config
        self.router = Linear.load(
            weights, {f"{at}.gate": config.num_experts}, config.hidden_size, role="router"
        )
        self.experts = Mixture(
            [
                mlp(config, weights, f"{at}.experts.{expert}", config.expert_size)
                for expert in range(config.num_experts)
            ]
        )
        self.shared: GatedMLP | None = None
        if config.shared_experts:
            size = config.expert_size * config.shared_experts
            self.shared = mlp(config, weights, f"{at}.shared_experts", size, config.mlp_bias)

    def __call__(self, x: Tensor, stream: Tensor) -> Tensor:
        """y [R, H], plus ``stream`` [R, H]."""
        config = self.config
        ids, shares = route(
            self.router(x), config.experts_per_token, False, config.groups, config.top_groups
        )
        shared = None if self.shared is None else self.shared(x)
        return add(stream, self.experts(x, ids, scale(shares, config.routed_scale), shared))


def mlp(config: Config, weights: Weights, at: str, size: int, bias: bool = False) -> GatedMLP:
    return GatedMLP(
        config,
        weights,
        gate=f"{at}.gate_proj",
        up=f"{at}.up_proj",
        down=f"{at}.down_proj",
        ffn_size=size,
        bias=bias,
    )


class Layer:
    """Attention, then feed-forward; each reads a normed copy and adds to the stream."""

    def __init__(self, config: Config, weights: Weights, index: int, rope: Rope) -> None:
        at = f"model.layers.{index}"
        self.eps = config.norm_eps
        self.norm = vector(weights, f"{at}.input_layernorm.weight", config.hidden_size)
        self.attention = LatentAttention(config, weights, index, rope, f"{at}.self_attn")
        self.mlp_norm = vector(weights, f"{at}.post_attention_layernorm.weight", config.hidden_size)
        self.mlp: GatedMLP | Experts
        if index < config.dense_layers:
            self.mlp = mlp(config, weights, f"{at}.mlp", config.ffn_size, config.mlp_bias)
        else:
            self.mlp = Experts(config, weights, f"{at}.mlp")

    def __call__(self, hidden: Tensor, kv: KV) -> Tensor:
        attended = self.attention(rms_norm(hidden, self.norm, self.eps), kv)
        normed, hidden = add_rms_norm(attended, hidden, self.mlp_norm, self.eps)
        return self.mlp(normed, hidden)


class Model(StackedDecoder):
    layer_class = Layer
