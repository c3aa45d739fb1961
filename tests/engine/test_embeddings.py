"""Embeddings: the last hidden state of a prompt, the same bits however it was computed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hasten.api.frontend import Frontend
from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig, RequestRefused
from hasten.models.base import Decoder
from hasten.models.loading import REFERENCE
from hasten.stack import Stack
from tests.engine.world import prompt_of

Make = Callable[..., Decoder]

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def embed_all(engine: Engine, prompts: list[list[int]], **options: Any) -> list[list[float]]:
    """Embeddings of prompts that run together."""
    names = [engine.add(p, GREEDY, embed=True, **options).id for p in prompts]
    found: dict[str, list[float]] = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.sequence.request.embed:
                assert delta.tokens == [] and delta.sequence.finish_reason == "length"
                assert delta.embedding is not None
                found[delta.sequence.request.id] = delta.embedding
            else:
                assert delta.embedding is None
    engine.check_ledger()
    return [found[name] for name in names]


def engine_of(model: Decoder, stack: str = "", **config: Any) -> Engine:
    return Engine(model, Stack.parse(stack), EngineConfig(**config))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_bits_depend_on_nothing_but_the_prompt(tiny: Make, name: str) -> None:
    extra = {"gemma2": {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 16}}
    model = tiny(name, **extra.get(name, {}))
    vocab, rng = model.config.vocab_size, random.Random(2)
    prompts = [prompt_of(rng, vocab, tail) for tail in (1, 2, 7, 16, 17, 40, 3, 1)]
    prompts.append(prompts[5])  # the same once more: all but its last tokens is a prefix hit
    alone = [
        embed_all(engine_of(model, prefix_reuse=False, max_sequences=1), [p])[0] for p in prompts
    ]
    assert all(len(e) == model.config.hidden_size for e in alone)
    assert alone[0] != alone[1] and alone[5] == alone[8]
    for config in (
        {"max_sequences": 16},
        {"max_sequences": 3, "max_batch_tokens": 5},  # chunks of a few rows
        {"max_sequences": 4, "max_batch_tokens": 24, "kv_bytes": 12 * block_bytes(model)},
    ):
        engine = engine_of(model, "draft=prompt-lookup", **config)
        for i, prompt in enumerate(prompts[:4]):  # beside sequences that generate
            engine.add(prompt, GREEDY, request_id=f"text-{i}")
        assert embed_all(engine, prompts) == alone
        hits = engine.cache.stats.prefix_hits
        assert embed_all(engine, prompts) == alone  # from cached pages
        assert engine.cache.stats.prefix_hits > hits


def block_bytes(model: Decoder) -> int:
    return model.config.kv_layout().block_bytes()


def test_limits_are_those_of_a_prompt(tiny: Make) -> None:
    engine = engine_of(tiny("llama"), max_length=32)
    assert len(embed_all(engine, [[5] * 32])) == 1  # nothing has to fit behind it
    with pytest.raises(RequestRefused, match="32"):
        engine.add([5] * 33, GREEDY, embed=True)


def test_an_aborted_embedding_leaves_nothing(tiny: Make) -> None:
    engine = engine_of(tiny("llama"), max_sequences=2, max_batch_tokens=4)
    engine.add([5] * 20, GREEDY, embed=True, request_id="a")
    engine.step()
    assert [d.embedding for d in engine.abort("a")] == [None]
    assert not engine.has_work and engine.cache.usage == 0
    engine.check_ledger()


def test_the_reference_model_agrees_with_transformers() -> None:
    from transformers import AutoModel

    front = Frontend("reference", max_sequences=4, max_length=512, kv_bytes=16 << 20)
    theirs = AutoModel.from_pretrained(str(REFERENCE / "target"), dtype=torch.float32).eval()
    texts = ["def add(a, b):\n    return a + b\n", "import", "The list of names\n" * 30]
    names = [front.submit(text, embed=True).id for text in texts]
    pieces = {}
    while front.engine.has_work:
        pieces |= {piece.request_id: piece for piece in front.step()}
    for name, text in zip(names, texts, strict=True):
        ids = torch.tensor([front.tokenizer.encode(text)])
        with torch.no_grad():
            expected = theirs(input_ids=ids).last_hidden_state[0, -1].numpy()
        assert np.abs(expected).max() > 0.1  # the tolerance says something
        np.testing.assert_allclose(np.float32(pieces[name].embedding), expected, atol=1e-4)
        assert pieces[name].text == "" and pieces[name].token_ids == []
