"""A small Llama for training: readable torch, parameter names equal to Hugging Face's.

Because the names and the layout agree, exporting is a copy of the state dict. Norms, softmax and
loss run in float32; the matrix products follow the surrounding autocast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama-style decoder. The output head is the embedding (tied)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("query heads must be a multiple of key-value heads")
        if self.head_dim % 2:
            raise ValueError("rotary embedding needs an even head_dim")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rope_tables(shape: LlamaShape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each ``[length, head_dim]``, halves repeated (Hugging Face convention)."""
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.arange(length, dtype=torch.float32)[:, None] * shape.rope_theta**-half
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of ``x [..., length, head_dim]`` by their angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in float32, returned in the type of the residual stream."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        q_size = shape.num_attention_heads * shape.head_dim
        kv_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.shape.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)
        k = self.k_proj(x).view(heads).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return cast(Tensor, self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)))


class MLP(nn.Module):
    """SwiGLU feed-forward block."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the float32 residual stream."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class Backbone(nn.Module):
    """Embedding, decoder layers and final norm: everything below the head."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        cos, sin = rope_tables(shape, shape.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.at_exits(tokens, (len(self.layers),))[0]

    def at_exits(self, tokens: Tensor, exits: Sequence[int]) -> list[Tensor]:
        """The normed stream after so many layers, for each of the rising ``exits``."""
        length = tokens.shape[1]
        cos, sin = self.get_buffer("cos")[:length], self.get_buffer("sin")[:length]
        x = self.embed_tokens(tokens)
        left = []
        for done, layer in enumerate(self.layers, 1):
            x = layer(x, cos, sin)
            if done in exits:
                left.append(self.norm(x))
        return left


class Llama(nn.Module):
    """Decoder with a tied head. ``forward`` maps tokens ``[B, L]`` to hidden states ``[B, L, H]``.

    The head is a method of its own so that the loss can be taken only at rows that carry weight;
    with a vocabulary larger than the hidden size the head is the dearest part of a small model.
    """

    def __init__(self, shape: LlamaShape, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.model = Backbone(shape)
        self.initialize(generator)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Normal(0, 0.02), writers to the residual stream scaled down by depth (GPT-2)."""
        deep = 0.02 / math.sqrt(2 * self.shape.num_hidden_layers)
        for name, value in self.named_parameters():
            if value.ndim == 1:
                continue
            std = deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            value.normal_(0.0, std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.model(tokens))

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., V]``."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())
