"""GGUF files made from checkpoints in the Hugging Face layout, with the `gguf` package.

Written after what the conversion scripts of llama.cpp do, and apart from the tables that read the
files: tensor names come from the package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoConfig

Array = NDArray[Any]
Store = Callable[[str, Array], tuple[Array, Type]]
"""From a tensor's name and values to its stored bytes and type."""

ARCH = {
    "deepseek_v2": "deepseek2",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)\.weight")
RANDOM_BLOCKS = {  # bytes of the two float16 (or one) that scale a block
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
}


def plain(name: str, values: Array) -> tuple[Array, Type]:
    return values, Type.F32


def halved(name: str, values: Array) -> tuple[Array, Type]:
    """Matrices as float16."""
    return (values, Type.F32) if values.ndim == 1 else (values.astype(np.float16), Type.F16)


def bfloat(name: str, values: Array) -> tuple[Array, Type]:
    """Matrices as bfloat16."""
    if values.ndim == 1:
        return values, Type.F32
    raw = torch.from_numpy(values).bfloat16().view(torch.uint8).numpy()
    return raw, Type.BF16


def blocks(*kinds: Type) -> Store:
    """Matrices in turn in each of the types. Types that the package cannot quantize get random
    blocks of about the right size instead."""
    turn = iter(range(1 << 30))
    rng = np.random.default_rng(1)

    def store(name: str, values: Array) -> tuple[Array, Type]:
        if values.ndim == 1:
            return values, Type.F32
        kind = kinds[next(turn) % len(kinds)]
        if kind not in RANDOM_BLOCKS:
            return gguf.quants.quantize(values, kind), kind
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // size, nbytes), np.uint8)
        for at in RANDOM_BLOCKS[kind]:
            scales = rng.uniform(1e-4, 3e-4, (*raw.shape[:-1], 1)).astype(np.float16)
            raw[..., at : at + 2] = scales.view(np.uint8)
        return raw.reshape(*raw.shape[:-2], -1), kind

    return store


def values_of(raw: Array, kind: Type) -> Array:
    """What the package reads from stored bytes, float32."""
    if kind is Type.F32:
        return raw
    if kind is Type.F16:
        return raw.astype(np.float32)
    return gguf.quants.dequantize(raw, kind)


def interleave(rows: Array, heads: int) -> Array:
    """How the converter stores query and key rows of Llama."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def convert(
    folder: Path,
    out: Path,
    store: Store = plain,
    *,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    twin: dict[str, torch.Tensor] | None = None,
    absorbed: bool = False,
    **split: int,
) -> Path:
    """Write the checkpoint in ``folder`` as ``out``. ``twin`` receives the values as stored, under
    the names of the layout. With ``absorbed`` DeepSeek's keys and values are apart, as in newer
    files. Other keywords go to the writer."""
    config = AutoConfig.from_pretrained(folder)
    arch = ARCH.get(config.model_type, config.model_type)
    tensors = {k: v.float().numpy() for k, v in load_file(folder / "model.safetensors").items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    writer = gguf.GGUFWriter(out, arch, **split)
    metadata(writer, config, arch)
    if arch == "deepseek2":
        latent(writer, config, absorbed)
    edit(writer)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    stacked: dict[str, list[tuple[Array, Type]]] = {}
    for name, values in sorted(tensors.items(), key=lambda item: (len(item[0]), item[0])):
        gemma = config.model_type.startswith("gemma") and name.endswith("norm.weight")
        raw, kind = store(name, values + 1 if gemma else values)
        if twin is not None:
            twin[name] = torch.from_numpy(values_of(raw, kind) - (1 if gemma else 0))
        if arch == "llama" and (match := re.search(r"\.(q|k)_proj\.", name)):
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
            raw = interleave(raw, heads[match[1]])
        if match := EXPERT.fullmatch(name):
            merged = re.sub(
                r"model\.layers\.(\d+)\.block_sparse_moe", r"layers.\1.feed_forward", match[1]
            )
            stacked.setdefault(f"{merged}.{match[3]}", []).append((raw, kind))
            continue
        stem, _, suffix = name.rpartition(".")
        if stem.endswith("kv_b_proj") and absorbed:
            sizes = (config.num_attention_heads, -1, raw.shape[-1])
            k, v = np.split(raw.reshape(sizes), [config.qk_nope_head_dim], axis=1)
            at = names.get_name(stem).replace("attn_kv_b", "")
            writer.add_tensor(f"{at}attn_k_b.weight", np.ascontiguousarray(k.swapaxes(1, 2)))
            writer.add_tensor(f"{at}attn_v_b.weight", np.ascontiguousarray(v))
            continue
        stored = names.get_name(stem)
        assert stored, name
        writer.add_tensor(f"{stored}.{suffix}", np.ascontiguousarray(raw), raw_dtype=kind)
    for name, parts in stacked.items():
        kind = parts[0][1]
        assert all(k is kind for _, k in parts)
        whole = np.stack([raw for raw, _ in parts])
        writer.add_tensor(f"{names.get_name(name)}.weight", whole, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def metadata(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if isinstance(config.eos_token_id, int):
        writer.add_eos_token_id(config.eos_token_id)
    if isinstance(config.bos_token_id, int):
        writer.add_bos_token_id(config.bos_token_id)
    if arch == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    if "full_attention" in rope:
        if (local := rope["sliding_attention"]["rope_theta"]) != 10000.0:
            writer.add_float32("gemma3.rope.freq_base_swa", local)
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, head_dim))
    if kind == "longrope":
        for name in ("long", "short"):
            values = np.array(rope[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", values)
    if arch == "phi3":
        context = rope.get("original_max_position_embeddings")
        context = context or getattr(config, "original_max_position_embeddings", None)
        writer.add_rope_scaling_orig_ctx_len(context or config.max_position_embeddings)
        share = rope.get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(
            int(share * config.hidden_size) // config.num_attention_heads
        )
        writer.add_sliding_window(config.sliding_window or 0)
        if kind == "longrope":
            scale = np.log(config.max_position_embeddings / context)
            writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + scale / np.log(context))))
    if arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type in ("mistral", "mixtral") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if experts := getattr(config, "num_local_experts", None) or getattr(
        config, "num_experts", None
    ):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def latent(writer: gguf.GGUFWriter, config: Any, absorbed: bool) -> None:
    for key in ("key_length", "value_length", "head_count_kv"):
        writer.kv_data[0].pop(f"deepseek2.attention.{key}")
    size = config.qk_nope_head_dim + config.qk_rope_head_dim
    if absorbed:
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(size)
        writer.add_value_length_mla(config.v_head_dim)
    else:
        writer.add_head_count_kv(config.num_attention_heads)
        writer.add_key_length(size)
        writer.add_value_length(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts or 0)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.kv_data[0].pop("deepseek2.expert_count", None)
    writer.kv_data[0].pop("deepseek2.expert_used_count", None)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.topk_method == "group_limited_greedy":
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if (weight := config.rope_parameters.get("mscale_all_dim")) is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * weight)


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> Array:
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, np.float32) / head_dim)
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for length in 2 * np.pi / frequencies:
        share = min(1.0, max(0.0, (context / length - low) / (high - low)))
        divisors.append(1 / ((1 - share) / factor + share))
    return np.array(divisors, np.float32)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, model: str, pre: str = "default") -> None:
    """The tokenizer.json and tokenizer_config.json of ``folder`` as metadata."""
    stated = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    vocabulary = dict(stated["model"]["vocab"])
    added = {token["content"]: token for token in stated["added_tokens"]}
    vocabulary |= {content: token["id"] for content, token in added.items()}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    assert [vocabulary[token] for token in tokens] == list(range(len(tokens)))
    kinds = []
    for token in tokens:
        if token in added:
            special = added[token]["special"]
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        elif model == "llama" and re.fullmatch("<0x..>", token):
            kinds.append(gguf.TokenType.BYTE)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if model == "gpt2":
        merges = stated["model"]["merges"]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    ids = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id}
    for name, add in ids.items():
        if token := config.get(f"{name}_token"):
            writer.kv_data[0].pop(f"tokenizer.ggml.{name}_token_id", None)
            add(vocabulary[token])
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text())
