"""Trees whose candidates were drawn, through the engine at temperature 0: plain decoding's bits."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.methods import cards
from hasten.models.base import Decoder
from hasten.stack import Stack
from tests.engine.world import prompt_of
from tests.speculation.sampling_drafter import SamplingDrafter

VOCAB = 13


def texts(model: Decoder, stack: Stack, config: EngineConfig) -> tuple[list[list[int]], Engine]:
    engine = Engine(model, stack, config)
    rng = random.Random(4)
    requests = []
    for number in range(16):
        params = SamplingParams(
            max_tokens=rng.choice([1, 2, 7, 25]),
            temperature=0,
            n=rng.choice([1, 1, 3]),
            presence_penalty=rng.choice([0.0, 0.5]),
            stop_token_ids=rng.choice([(), (3, 8)]),
            ignore_eos=True,
        )
        requests.append(engine.add(prompt_of(rng, VOCAB, 1 + number % 5), params))
    while engine.has_work:
        engine.step()
        engine.check_ledger()
    assert all(s.error is None for r in requests for s in r.sequences)
    return [s.tokens for r in requests for s in r.sequences], engine


@pytest.mark.parametrize(
    "verify", [card.name for card in cards("verify") if card.name != "scripted"]
)
def test_greedy_texts_are_those_of_plain_decoding(
    tiny: Callable[..., Decoder], verify: str
) -> None:
    model = tiny("llama", vocab_size=VOCAB)
    plain, engine = texts(model, Stack.parse(""), EngineConfig(prefix_reuse=False))
    tight = EngineConfig(
        max_sequences=4, max_batch_tokens=40, kv_bytes=6 * engine.cache.layout.block_bytes()
    )
    methods = Stack.parse(f"verify={verify},control=fixed(k=7)").methods
    for kind in ("chain", "siblings", "groups", "sequences", "mixed"):
        drafter = SamplingDrafter(kind, VOCAB, depth=3)
        found, engine = texts(model, Stack({**methods, "draft": drafter}), tight)
        assert found == plain, kind
        drafts = engine.stats.speculation
        assert drafts.accepted > 0 and drafts.tokens > 100
        assert engine.stats.preemptions > 0
