"""The one randomized engine test: whatever happens around a request, it gives what it gives alone.

Arrivals, lengths, shared prefixes, sampling, forks, scripted drafts, cancellations, preemption
under a tiny pool; bit-equal log-probabilities; the page ledger balances after every step.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from hasten.methods import Card, cards
from hasten.models.base import Decoder
from hasten.stack import Stack
from tests.engine.world import World, params_of, prompt_of
from tests.speculation.examples import HABIT, example

MODELS = {
    "llama": {"intermediate_size": 64},  # whole groups of 4-bit weights
    "mistral": {"sliding_window": 20},
    "gemma2": {
        "sliding_window": 12,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 9.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "gemma3_text": {  # two kinds of rotation
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 12,
        "query_pre_attn_scalar": 8,
        "rope_local_base_freq": 100.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    "phi3": {
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1],
            "long_factor": [1.5, 3.0],
        },
    },
    "deepseek_v2": {
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


SEEN: Counter[str] = Counter()
"""What happened over all machines of a run."""

MACHINES = [  # (architecture, stack, 1 / share of the examples)
    ("llama", "", 1),
    ("mistral", "", 1),
    ("gemma2", "", 1),
    ("llama", "select=sink-window(sinks=3,window=21)", 1),
    ("gemma2", "select=sink-window(sinks=3,window=21)", 1),
    # the engine has nothing for these alone: fewer examples
    ("gemma3_text", "", 4),
    ("qwen3_moe", "", 4),
    ("phi3", "", 4),
    ("deepseek_v2", "", 2),  # pages without values
    ("llama", "weights=int8", 2),
    ("llama", "weights=int4", 2),
    ("qwen3_moe", "weights=int8", 4),
    # chosen drafts leave the text as it is under these, too
    ("llama", "verify=gumbel", 2),
    ("llama", "verify=chain", 4),
    ("llama", "verify=recursive", 4),
    ("llama", "verify=k-seq", 4),
]

SOAKED = [
    ("llama", ""),
    ("mistral", ""),
    ("gemma2", ""),
    ("llama", "select=sink-window(sinks=3,window=21)"),
    ("gemma3_text", ""),
    ("qwen3_moe", ""),
    ("phi3", ""),
    ("deepseek_v2", ""),
]

STACKS = [
    # every method of every slot, and a few settings that matter here
    *(pytest.param(card, id=f"{card.slots[0]}={card.name}") for card in cards()),
    "draft=prompt-lookup(k=3,max_ngram=2),codec=native(dtype=bfloat16)",
    "draft=prompt-lookup,select=sink-window(sinks=2,window=19),schedule=stall-free(chunk=5)",
    "draft=prompt-lookup,control=fixed(k=2),weights=checkpoint(dtype=float32)",
    "draft=prompt-lookup,weights=int8,codec=int8",
    "draft=prompt-lookup,verify=greedy",
    "draft=prompt-lookup,verify=gumbel",
    "draft=prompt-lookup,verify=chain",
    "draft=prompt-lookup,verify=recursive",
    "draft=prompt-lookup,verify=k-seq",
    "draft=prompt-lookup,weights=int4(asymmetric=true,head=int4)",
]


def built(
    tiny: Callable[..., Decoder], architecture: str, choices: str, habit: float = 0.0
) -> Decoder:
    """A tiny model of `MODELS` with its matrices as the stack has them."""
    weights = Stack({"weights": Stack.parse(choices)["weights"]})
    text = str(weights).partition("=")[2] or "checkpoint"
    return tiny(architecture, weights=text, habit=habit, **MODELS[architecture])


def machine(model: Decoder, choices: str, seen: Counter[str]) -> type[RuleBasedStateMachine]:
    """The engine's life as a state machine; ``seen`` counts what happened over all examples."""
    vocab = model.config.vocab_size

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.world = World(model, choices=choices, blocks=7)

        @rule(
            seed=st.integers(0, 2**16),
            tail=st.integers(1, 30),
            priority=st.sampled_from([0, 0, 0, 1]),
            tenant=st.sampled_from(["", "", "a"]),
        )
        def add(self, seed: int, tail: int, priority: int, tenant: str) -> None:
            rng = random.Random(seed)
            prompt = prompt_of(rng, vocab, tail)
            self.world.add(prompt, params_of(rng, vocab), priority=priority, tenant=tenant)

        @precondition(lambda self: self.world.engine.has_work)
        @rule(steps=st.integers(1, 8))
        def step(self, steps: int) -> None:
            for _ in range(steps):
                self.world.step()

        @precondition(lambda self: self.world.engine.requests)
        @rule(pick=st.integers(0, 100))
        def abort(self, pick: int) -> None:
            live = list(self.world.engine.requests)
            self.world.abort(live[pick % len(live)])

        def teardown(self) -> None:
            self.world.drain()
            stats = self.world.engine.stats
            seen["preemptions"] += stats.preemptions
            seen["accepted drafts"] += stats.speculation.accepted
            seen["recorded steps"] += stats.recorded_steps
            seen["prefix hits"] += self.world.engine.cache.stats.prefix_hits
            seen["checked"] += self.world.checked

    return Machine


@pytest.mark.parametrize(("architecture", "choices", "share"), MACHINES)
def test_every_request_gives_what_it_gives_alone(
    tiny: Callable[..., Decoder], architecture: str, choices: str, share: int
) -> None:
    model = built(tiny, architecture, choices)
    examples = -(-int(os.environ.get("HASTEN_EXAMPLES", "12")) // share)
    seen: Counter[str] = Counter()
    run_state_machine_as_test(
        machine(model, choices, seen),
        settings=settings(
            max_examples=examples, stateful_step_count=25, deadline=None, derandomize=True
        ),
    )
    SEEN.update(seen)
    SEEN["machines"] += 1


def test_the_examples_saw_everything() -> None:
    """The machines above are worth something only if what they are about happened."""
    if SEEN["machines"] < 5:
        pytest.skip("only after all machines have run")
    for what in ("preemptions", "accepted drafts", "recorded steps", "prefix hits", "checked"):
        assert SEEN[what] > 5, f"the examples saw too few {what}: {dict(SEEN)}"


@pytest.mark.parametrize("method", STACKS)
def test_every_method_under_load(
    tiny: Callable[..., Decoder], method: str | Card, tmp_path: Path
) -> None:
    """Each registered method as it is, not scripted: a tiny pool, forks, aborts, prefix hits."""
    choices = method if isinstance(method, str) else example(method, tmp_path)
    model = built(tiny, "llama", choices, HABIT)
    rng = random.Random(method if isinstance(method, str) else f"{method.slots[0]}={method.name}")
    world = World(model, drafts=None, choices=choices, blocks=9)
    added = 0
    while added < 30 or world.engine.has_work:
        if added < 30 and len(world.engine.requests) < 8:
            prompt = prompt_of(rng, model.config.vocab_size, rng.randint(1, 30))
            params = params_of(rng, model.config.vocab_size)
            if world.engine.stack["verify"].refuses(params):
                params = replace(params, temperature=0.0)
            world.add(prompt, params)
            added += 1
        if world.engine.requests and rng.random() < 0.03:
            world.abort(rng.choice(list(world.engine.requests)))
        world.step()
    world.drain()
    assert world.checked > 20
    drafts = world.engine.stats.speculation
    seldom = ("draft=aggressive", "draft=del", "=scripted")  # the exactness matrix has more
    if drafts.drafted and not any(name in choices for name in seldom):
        assert drafts.examined > drafts.accepted > 0, "drafts are to be right and wrong"


@pytest.mark.soak
@pytest.mark.parametrize(("architecture", "choices"), SOAKED)
def test_soak(tiny: Callable[..., Decoder], architecture: str, choices: str) -> None:
    """Thousands of requests through one engine: nothing may accumulate."""
    total = int(os.environ.get("HASTEN_SOAK_REQUESTS", "10000")) // len(SOAKED)
    model = built(tiny, architecture, choices)
    vocab = model.config.vocab_size
    rng = random.Random(f"soak {architecture}")
    world = World(model, choices=choices, blocks=9, max_sequences=6, budget=32)
    added = 0
    while added < total or world.engine.has_work:
        if added < total and len(world.engine.requests) < 12 and rng.random() < 0.4:
            prompt = prompt_of(rng, vocab, rng.randint(1, 30))
            world.add(prompt, params_of(rng, vocab), tenant=rng.choice(["", "b"]))
            added += 1
        if world.engine.requests and rng.random() < 0.02:
            world.abort(rng.choice(list(world.engine.requests)))
        world.step()
    world.drain()
    stats = world.engine.stats
    print(f"{architecture} {choices}: {world.checked} sequences checked, {stats}")
    assert (
        stats.preemptions > 0
        and stats.speculation.accepted > 0
        and world.engine.cache.stats.prefix_hits > 0
    )
