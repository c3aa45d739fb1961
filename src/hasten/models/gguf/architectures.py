"""What GGUF's metadata keys and tensor names mean to the architectures of this package.

A GGUF file says in its own words what config.json and the Hugging Face layout say. This module
turns it into those: `facts_of` gives the values of config.json, `source_of` the tensor that holds
a tensor of the layout. An architecture is one row of `ARCHITECTURES`.

Source of the words and of what the converter does to tensors: the conversion scripts of llama.cpp
(https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py and conversion/).
"""

from __future__ import annotations

import logging
import math
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from hasten.models.facts import CheckpointError, Facts
from hasten.models.gguf.file import GGUF
from hasten.models.gguf.tokens import ending_ids

log = logging.getLogger(__name__)

GENERAL = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
"""Keys of config.json and of the metadata (after the architecture's name and a dot)."""

NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.temperature_scale": 0.0,
    "embedding_scale": 1.0,
    "expert_gating_func": 1,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.0,
    "logit_scale": 1.0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "residual_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
}
"""Keys that change what a model computes, and the value with which they do not."""

MAX_HEAD_DIM = 1024  # bounds the tables of the rotary embedding, which no tensor accounts for

SAID_ELSEWHERE = {"vocab_size", "attention.layer_norm_epsilon"}
SAID_ELSEWHERE |= {"tensor_data_layout", "rope.scaling.finetuned"}

TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
SANDWICH = {  # a norm before and after each part
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")


class Source(NamedTuple):
    """Where a tensor comes from: a tensor of the file, or one expert of a stacked one.

    ``heads``: its rows are stored with the two halves of each of so many heads interleaved.
    ``shift``: what was added to its values.
    """

    name: str
    expert: int | None = None
    heads: int | None = None
    shift: float = 0.0


class Metadata:
    """The keys of one architecture in a file, and which of them were read."""

    def __init__(self, gguf: GGUF, architecture: str) -> None:
        self.gguf = gguf
        self.prefix = f"{architecture}."
        self.read: set[str] = set()

    def get(self, key: str, default: int | float | str | None = None) -> Any:
        self.read.add(key)
        return self.gguf.get(self.prefix + key, default)

    def count(self, key: str, default: int) -> int:
        value = self.get(key, default)
        if type(value) is not int:
            raise self.gguf.wrong(f"{self.prefix + key!r} must be an integer, found {value!r}")
        return value

    def window(self) -> int | None:
        return self.get("attention.sliding_window") or None  # 0 means none

    def unread(self) -> list[str]:
        names = [key[len(self.prefix) :] for key in self.gguf.values if key.startswith(self.prefix)]
        return sorted(set(names) - self.read - SAID_ELSEWHERE)


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        model_type: the module of `hasten.models` that runs it; None = ``more`` chooses.
        parts: the layout's names inside a layer, and the file's inside a block.
        more: completes the values of config.json.
        interleaved: query and key rows are stored for rotation of neighbours instead of halves.
        norm_shift: was added to the weights of all norms.
    """

    model_type: str | None
    parts: dict[str, str]
    more: Callable[[dict[str, Any], Metadata], None] = lambda values, keys: None
    interleaved: bool = False
    norm_shift: float = 0.0


def _llama(values: dict[str, Any], keys: Metadata) -> None:
    """Llama, Mistral and Mixtral are all "llama" in GGUF; their tensors tell them apart."""
    window, tensors = keys.window(), keys.gguf.tensors
    if values.get("num_experts"):
        values["num_local_experts"] = values["num_experts"]
        values |= {"model_type": "mixtral", "sliding_window": window}
    elif window:
        values |= {"model_type": "mistral", "sliding_window": window}
    else:
        values |= {
            "model_type": "llama",
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        }


def _qwen3moe(values: dict[str, Any], keys: Metadata) -> None:
    values["norm_topk_prob"] = True  # not stated in the file: all of this architecture do it


def _gemma2(values: dict[str, Any], keys: Metadata) -> None:
    values |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": keys.get("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _gemma_scalar(values, largest=46),
    }


def _gemma3(values: dict[str, Any], keys: Metadata) -> None:
    window = keys.window()
    layers = values["num_hidden_layers"]
    kinds = _sliding_layers(keys, layers) if window else [False] * layers
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}
    values |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": window,
        "layer_types": ["sliding_attention" if kind else "full_attention" for kind in kinds],
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "query_pre_attn_scalar": _gemma_scalar(values, largest=62),
        "rope_parameters": {
            "full_attention": values["rope_parameters"],
            "sliding_attention": local,
        },
    }


def _sliding_layers(keys: Metadata, layers: int) -> list[bool]:
    """A list of truth values, or every so many layers one without a window."""
    key = "attention.sliding_window_pattern"
    if keys.gguf.is_array(keys.prefix + key):
        keys.read.add(key)
        if keys.gguf.length(keys.prefix + key) != layers:
            raise keys.gguf.wrong(f"{keys.prefix + key!r} must list {layers} layers")
        return [bool(kind) for kind in keys.gguf.numbers(keys.prefix + key)]
    every = keys.count(key, 6)
    if every < 1:
        raise keys.gguf.wrong(f"{keys.prefix + key!r} must be a positive number, found {every!r}")
    return [(layer + 1) % every != 0 for layer in range(layers)]


def _gemma_scalar(values: dict[str, Any], largest: int) -> float:
    """Gemma's largest model (told by its layers) scales scores by another size than the head's."""
    if values["num_hidden_layers"] == largest:
        return float(values["hidden_size"] // values["num_attention_heads"])
    return float(values["head_dim"])


def _phi3(values: dict[str, Any], keys: Metadata) -> None:
    values["sliding_window"] = keys.window()
    keys.get("rope.scaling.original_context_length")  # stated where nothing is scaled, too
    # A little more, so that head_dim times it does not fall below the integer.
    share = values.pop("rotated") / values["head_dim"]
    values["partial_rotary_factor"] = math.nextafter(share, 1.0)


def _deepseek2(values: dict[str, Any], keys: Metadata) -> None:
    """Multi-head latent attention. Files since 2025 state sizes after absorption in the plain
    keys and those of a head in keys that end in ``_mla``; older ones the latter in the plain."""
    rotated, value_dim = values.pop("rotated"), values.pop("value_dim")
    head_dim = keys.count("attention.key_length_mla", values["head_dim"])
    groups = keys.count("expert_group_count", 1)
    values |= {
        "num_key_value_heads": values["num_attention_heads"],
        "head_dim": rotated,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": head_dim - rotated,
        "v_head_dim": keys.get("attention.value_length_mla", value_dim),
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "kv_lora_rank": keys.get("attention.kv_lora_rank"),
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "n_routed_experts": values["num_experts"],
        "n_shared_experts": keys.get("expert_shared_count") or None,
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups,
        "topk_group": keys.get("expert_group_used_count", 1),
    }
    if (temperature := keys.get("rope.scaling.yarn_log_multiplier")) is not None:
        if not isinstance(temperature, int | float):
            raise keys.gguf.wrong(
                f"'{keys.prefix}rope.scaling.yarn_log_multiplier' must be a number"
            )
        # Written as a tenth of mscale_all_dim, and read as if mscale were the same.
        weight = round(temperature * 10, 6)
        values["rope_parameters"] |= {"mscale": weight, "mscale_all_dim": weight}


def _follows(stretch: object, context: object, values: dict[str, Any]) -> bool:
    """Whether LongRoPE's factor is but a float32 of what its formula gives; that is exact then."""
    positions = values["max_position_embeddings"]
    if type(context) is not int or type(positions) is not int or context < 2:
        return False
    growth = max(1.0, positions / context)
    formula = math.sqrt(1 + math.log(growth) / math.log(context))
    return isinstance(stretch, float) and math.isclose(stretch, formula, rel_tol=1e-6)


ARCHITECTURES = {
    "llama": Architecture(
        None,
        ATTENTION
        | NORMS
        | MLP
        | {
            "block_sparse_moe.gate": "ffn_gate_inp",
            "block_sparse_moe.experts.w1": "ffn_gate_exps",
            "block_sparse_moe.experts.w2": "ffn_down_exps",
            "block_sparse_moe.experts.w3": "ffn_up_exps",
        },
        _llama,
        interleaved=True,
    ),
    "qwen2": Architecture("qwen2", ATTENTION | NORMS | MLP),
    "qwen3": Architecture("qwen3", ATTENTION | QK_NORMS | NORMS | MLP),
    "qwen3moe": Architecture("qwen3_moe", ATTENTION | QK_NORMS | NORMS | EXPERTS, _qwen3moe),
    "gemma2": Architecture("gemma2", ATTENTION | SANDWICH | MLP, _gemma2, norm_shift=1.0),
    "gemma3": Architecture(
        "gemma3_text", ATTENTION | QK_NORMS | SANDWICH | MLP, _gemma3, norm_shift=1.0
    ),
    "phi3": Architecture(
        "phi3",
        NORMS
        | {
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        _phi3,
    ),
    "deepseek2": Architecture(
        "deepseek_v2",
        ATTENTION
        | NORMS
        | MLP
        | EXPERTS
        | {
            "self_attn.q_a_proj": "attn_q_a",
            "self_attn.q_a_layernorm": "attn_q_a_norm",
            "self_attn.q_b_proj": "attn_q_b",
            "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
            "self_attn.kv_a_layernorm": "attn_kv_a_norm",
            "self_attn.kv_b_proj": "attn_kv_b",
            "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
            "mlp.shared_experts.up_proj": "ffn_up_shexp",
            "mlp.shared_experts.down_proj": "ffn_down_shexp",
        },
        _deepseek2,
    ),
    "olmo2": Architecture(
        "olmo2",
        ATTENTION
        | QK_NORMS
        | MLP
        | {
            "post_attention_layernorm": "post_attention_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
    ),
}
"""By ``general.architecture``."""


def architecture_of(gguf: GGUF) -> Architecture:
    name = gguf.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"'general.architecture' is {name!r}, which cannot be loaded from GGUF",
            gguf.path,
            f"Supported: {', '.join(sorted(ARCHITECTURES))}. Or use the checkpoint in the Hugging "
            "Face layout.",
        )
    return ARCHITECTURES[str(name)]


def facts_of(gguf: GGUF) -> Facts:
    """What config.json and generation_config.json of the model would say."""
    architecture = architecture_of(gguf)
    keys = Metadata(gguf, str(gguf.get("general.architecture")))
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(
            "tensor 'token_embd.weight' is missing",
            gguf.path,
            "Give the file of a language model, not of a vocabulary, adapter or projector.",
        )
    values: dict[str, Any] = {ours: keys.get(key) for ours, key in GENERAL.items()}
    values |= {
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": gguf.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ending_ids(gguf),
    }
    facts = Facts(values, gguf.path)
    heads = facts.count("num_attention_heads")
    share = max(1, facts.count("hidden_size") // heads)
    values["head_dim"] = facts.count("head_dim", share, most=MAX_HEAD_DIM)
    facts.count("num_hidden_layers", most=4096)
    values["rope_parameters"] = _rope(keys, values)
    sizes = {"rotated": "rope.dimension_count", "value_dim": "attention.value_length"}
    for name, key in sizes.items():
        values[name] = keys.get(key, values["head_dim"])
        facts.count(name, most=MAX_HEAD_DIM)
    architecture.more(values, keys)
    for name, key in sizes.items():  # unless the architecture has a use for it
        if values.pop(name, values["head_dim"]) != values["head_dim"]:
            raise gguf.wrong(f"'{keys.prefix}{key}' is not the size of a head")
    _check(keys)
    return facts


SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def recommended(gguf: GGUF) -> dict[str, Any]:
    """Sampling settings of the metadata, under the names of generation_config.json."""
    stated = {ours: gguf.get(f"general.sampling.{key}") for ours, key in SAMPLING.items()}
    return {name: value for name, value in stated.items() if value is not None}


def _check(keys: Metadata) -> None:
    """Nothing that changes what the model computes goes unread."""
    if "attention.sliding_window" not in keys.read and keys.window():
        raise keys.gguf.wrong(f"'{keys.prefix}attention.sliding_window' is not known here")
    for key, neutral in NEUTRAL.items():
        if key not in keys.read and (value := keys.get(key, neutral)) != neutral:
            raise keys.gguf.wrong(f"'{keys.prefix}{key}' is {value}; only {neutral} can be run")
    if unread := keys.unread():
        log.warning(
            "%s: metadata keys %s are not known and were ignored",
            keys.gguf.path,
            ", ".join(keys.prefix + key for key in unread),
        )


def _rope(keys: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters as transformers 5 states them."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    kind = keys.get("rope.scaling.type", "none")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear"))
    if kind == "linear" or (kind == "none" and factor not in (None, 1.0)):
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": keys.get("rope.scaling.original_context_length"),
            "attention_factor": keys.get("rope.scaling.yarn_attn_factor"),
            "beta_fast": keys.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": keys.get("rope.scaling.yarn_beta_slow"),
        }
        if keys.get("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
            raise keys.gguf.wrong("only a 'rope.scaling.yarn_ext_factor' of 1 can be run")
    elif kind not in ("none", "longrope"):
        raise keys.gguf.wrong(f"'rope.scaling.type' {kind!r} is not known")
    if "rope_factors_long.weight" in keys.gguf.tensors:
        context = keys.get("rope.scaling.original_context_length")
        stretch = keys.get("rope.scaling.attn_factor", 1.0)
        rope |= {
            "rope_type": "longrope",
            "original_max_position_embeddings": context,
            "long_factor": list(_floats(keys.gguf, "rope_factors_long.weight")),
            "short_factor": list(_floats(keys.gguf, "rope_factors_short.weight")),
            "attention_factor": None if _follows(stretch, context, values) else stretch,
        }
    elif kind == "longrope":
        raise keys.gguf.wrong("tensor 'rope_factors_long.weight', for LongRoPE, is missing")
    if "rope_freqs.weight" in keys.gguf.tensors:
        # Llama 3's scaling, worked out by the converter: a divisor of each frequency. LongRoPE
        # with both lists equal computes just that.
        divisors = list(_floats(keys.gguf, "rope_freqs.weight"))
        rope |= {
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": values["max_position_embeddings"],
        }
    return rope


def _floats(gguf: GGUF, name: str) -> array[float]:
    """A small float32 tensor, without torch."""
    tensor = gguf.tensors.get(name)
    if tensor is None or tensor.kind.name != "F32" or tensor.nbytes > 1 << 16:
        raise gguf.wrong(f"tensor {name!r} must exist and be a short one of float32")
    return array("f", tensor.part.map[tensor.offset : tensor.offset + tensor.nbytes])


def source_of(architecture: Architecture, name: str, heads: int, kv_heads: int) -> Source | None:
    """Where the file keeps a tensor of the layout; None if the table does not say."""
    if name in TOP:
        return Source(TOP[name], shift=architecture.norm_shift if "norm" in name else 0.0)
    match = LAYER.fullmatch(name)
    if not match:
        return None
    layer, part, kind = match.groups()
    expert = EXPERT.fullmatch(part)
    stored = architecture.parts.get(f"{expert[1]}.{expert[3]}" if expert else part)
    if stored is None:
        return None
    rows = {"attn_q": heads, "attn_k": kv_heads}.get(stored) if architecture.interleaved else None
    shift = architecture.norm_shift if "norm" in part else 0.0
    return Source(f"blk.{layer}.{stored}.{kind}", int(expert[2]) if expert else None, rows, shift)
