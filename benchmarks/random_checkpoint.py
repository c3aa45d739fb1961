"""Checkpoints with random weights in the shapes of real models: cost only, no meaning.

How fast a dense model decodes does not depend on what its weights say.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from hasten.models.loading import REFERENCE


@dataclass(frozen=True)
class Shape:
    """A dense decoder with heads of 64 dimensions whose head is its embedding."""

    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    theta: float


SHAPES = {
    "ref-small": Shape("llama", 384, 8, 6, 2, 1024, 4096, 1e4),
    "qwen0.5b": Shape("qwen2", 896, 24, 14, 2, 4864, 151936, 1e6),  # Qwen2-0.5B's config.json
    "llama1b": Shape("llama", 2048, 16, 32, 8, 8192, 128256, 5e5),  # Llama-3.2-1B's
}


def write(folder: Path, shape: Shape) -> None:
    """A checkpoint in bfloat16 with a tokenizer that can decode every id."""
    folder.mkdir(parents=True)
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[shape.kind]],
        "model_type": shape.kind,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": 64,
        "intermediate_size": shape.inner,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "rope_theta": shape.theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder, shape.vocab)
    torch.manual_seed(0)
    save_file(dict(_tensors(shape)), folder / "model.safetensors", {"format": "pt"})


def _tensors(shape: Shape) -> list[tuple[str, torch.Tensor]]:
    def normal(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02)

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    queries, keys = 64 * shape.heads, 64 * shape.kv_heads
    matrices = {
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, queries),
        "mlp.gate_proj": (shape.inner, shape.hidden),
        "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner),
    }
    tensors = [
        ("model.embed_tokens.weight", normal(shape.vocab, shape.hidden)),
        ("model.norm.weight", ones.clone()),
    ]
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        for name, size in matrices.items():
            tensors.append((f"{at}.{name}.weight", normal(*size)))
        if shape.kind == "qwen2":
            for name, width in (("q", queries), ("k", keys), ("v", keys)):
                tensors.append((f"{at}.self_attn.{name}_proj.bias", normal(width)))
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors.append((f"{at}.{name}.weight", ones.clone()))
    return tensors


def _write_tokenizer(folder: Path, vocab: int) -> None:
    """The bundled model's, with entries that no text reaches up to the size of the vocabulary."""
    target = REFERENCE / "target"
    spec = json.loads((target / "tokenizer.json").read_text())
    words = spec["model"]["vocab"]
    for token in range(len(words), vocab):
        words[f"unused-{token}"] = token
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    facts = json.loads((target / "tokenizer_config.json").read_text())
    facts.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=1))
