"""Adapters for tiny models: random ones, as only trained ones are good and none is right."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from hasten.models.base import Decoder
from hasten.training.kangaroo import AdapterModule, write_adapter
from tests.engine.world import World, params_of, prompt_of

SHAPES = {
    "llama": {"num_hidden_layers": 4},
    "mistral": {"num_hidden_layers": 4, "sliding_window": 20},
    "gemma2": {
        "num_hidden_layers": 4,
        "sliding_window": 12,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 9.0,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
    },
    "deepseek_v2": {
        "num_hidden_layers": 3,
        "q_lora_rank": None,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
}


def random_adapter(model: Decoder, path: Path, layer: int = 2, seed: int = 0) -> AdapterModule:
    """An adapter of random weights, whose attention matters, written to ``path``."""
    module = AdapterModule(model, seed=seed)
    spread = model.config.hidden_size**-0.5
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for part in (module.q_proj, module.k_proj, module.v_proj):
            part.weight.normal_(0.0, spread, generator=generator)
        generator = torch.Generator().manual_seed(seed)
        module.o_proj.weight.normal_(0.0, 0.2, generator=generator)
        for norm in (module.input_norm, module.output_norm):
            norm.weight.uniform_(0.5, 1.5, generator=generator)
    write_adapter(path, model, module, layer)
    return module


def run_load(world: World, rng: random.Random, requests: int = 30, aborts: float = 0.03) -> None:
    """Requests of every kind under a small pool, from two tenants; `World` checks each."""
    vocab, added = world.model.config.vocab_size, 0
    while added < requests or world.engine.has_work:
        if added < requests and len(world.engine.requests) < 8:
            prompt = prompt_of(rng, vocab, rng.randint(1, 30))
            world.add(prompt, params_of(rng, vocab), tenant=rng.choice(["", "a"]))
            added += 1
        if world.engine.requests and rng.random() < aborts:
            world.abort(rng.choice(list(world.engine.requests)))
        world.step()
    for pool in world.engine.cache.pools:
        assert pool.num_held == 0
