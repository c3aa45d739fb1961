"""Sinks and a window: what is read, what is given back, and that chunks change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.attention.selectors.sink_window import SinkWindow
from hasten.cache.layout import LayerGroup
from hasten.decoding.params import SamplingParams
from hasten.engine.batch import Batch, Segment
from hasten.engine.engine import Engine, EngineConfig
from hasten.models.base import Decoder, ModelConfig
from hasten.stack import Stack

GEMMA = {
    "sliding_window": 12,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 9.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
PROMPT = [(11 * i * i + 5 * i) % 61 for i in range(150)]


class Dense:
    """All keys and values in float64, and for each layer a mask of who sees what."""

    def __init__(self, config: ModelConfig, masks: list[Tensor]) -> None:
        self.head_dim = config.head_dim
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.masks = masks

    def project(self, layer: int, x: Tensor, linear: Any, norms: None, rope: Any) -> Tensor:
        heads = linear(x).double().unflatten(1, (-1, self.head_dim))
        q, k, self.v = heads.split(self.heads, 1)
        cos, sin = (table[: len(q)].double() for table in rope.tables(len(q)))
        self.k = turn(k, cos, sin)
        return turn(q, cos, sin)

    def append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Any) -> None:
        raise NotImplementedError("no model here makes keys and values otherwise")

    def attend(
        self, layer: int, q: Tensor, rope: Any, *, scale: float, softcap: float | None = None
    ) -> Tensor:
        shared = q.shape[1] // self.k.shape[1]
        k, v = self.k.repeat_interleave(shared, 1), self.v.repeat_interleave(shared, 1)
        scores = scale * torch.einsum("ihd,jhd->hij", q, k)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~self.masks[layer], -math.inf)
        return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1).float()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the head against each other."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def dense_logprobs(model: Decoder, tokens: list[int], sinks: int, window: int) -> np.ndarray:
    """log p of each token but the first, by the definition of the method."""
    i, j = torch.arange(len(tokens))[:, None], torch.arange(len(tokens))[None]
    masks = []
    for own in model.config.windows:
        if own is None:
            masks.append((j <= i) & ((j < sinks) | (j > i - window)))
        else:
            masks.append((j <= i) & (j > i - own))
    batch = Batch.build([Segment(0, 0, tokens, wanted="all")], [])
    hidden = model.forward(batch, Dense(model.config, masks))
    logits = model.logits(hidden, batch.wanted).double().log_softmax(-1)
    return logits[torch.arange(len(tokens) - 1), tokens[1:]].numpy()


def run(
    model: Decoder, choices: str, prompt: list[int], count: int = 1, **sizes: Any
) -> tuple[list[int], list[float], Engine, list[int]]:
    """(tokens, their log-probabilities from the second on, engine, pages held after each step)."""
    engine = Engine(model, Stack.parse(choices), EngineConfig(max_sequences=1, **sizes))
    params = SamplingParams(max_tokens=count, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    request = engine.add(prompt, params)
    out: list[float] = []
    pages = []
    while engine.has_work:
        for delta in engine.step():
            out += [entry[0] for entry in delta.logprobs or []]
        pages.append(next(pool.num_held for pool in engine.cache.pools))
        engine.check_ledger()
    scores = [entry[0] for entry in (request.prompt_logprobs or [])[1:] if entry is not None]
    return request.sequences[0].tokens, scores + out, engine, pages


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize(("sinks", "window"), [(4, 23), (0, 5), (17, 40), (3, 1), (33, 64)])
def test_it_is_attention_under_the_stated_mask(
    tiny: Callable[..., Decoder], architecture: str, sinks: int, window: int
) -> None:
    model = tiny(architecture, **(GEMMA if architecture == "gemma2" else {}))
    choices = f"select=sink-window(sinks={sinks},window={window})"
    tokens, got, _, _ = run(model, choices, PROMPT[:110], 7, max_batch_tokens=37)
    expected = dense_logprobs(model, tokens, sinks, window)
    assert np.abs(got - expected).max() < 2e-4
    other = dense_logprobs(model, tokens, sinks, window + 1)
    assert np.abs(got - other).max() > 1e-2, "the check sees a window that is one too wide"
    if sinks:
        other = dense_logprobs(model, tokens, sinks - 1, window)
        assert np.abs(got - other).max() > 1e-2


def test_a_window_as_long_as_the_text_changes_no_bit(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama")
    everything = run(model, "select=all", PROMPT[:90], 30)[:2]
    assert run(model, "select=sink-window(window=120)", PROMPT[:90], 30)[:2] == everything
    assert run(model, "select=sink-window(sinks=120,window=1)", PROMPT[:90], 30)[:2] == everything
    assert run(model, "select=sink-window(sinks=0,window=100)", PROMPT[:90], 30)[:2] != everything


@pytest.mark.parametrize("budget", [1, 7, 64, 150])
def test_chunks_change_no_bit(tiny: Callable[..., Decoder], budget: int) -> None:
    model = tiny("llama")
    choices = "select=sink-window(sinks=5,window=30)"
    whole = run(model, choices, PROMPT, 12, max_batch_tokens=512)[:2]
    assert run(model, choices, PROMPT, 12, max_batch_tokens=budget)[:2] == whole


def test_pages_in_between_are_given_back(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama")
    choices = "select=sink-window(sinks=20,window=30)"
    _, _, engine, pages = run(model, choices, PROMPT[:10], 200, max_batch_tokens=16)
    # two pages of sinks; a window of 30 lies on at most 3, one more until a page is full
    assert max(pages) <= 2 + 4
    assert max(run(model, "select=all", PROMPT[:10], 200)[3]) >= 13
    assert engine.cache.usage == 0


def test_drafts_change_no_bit(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama")
    choices = "select=sink-window(sinks=3,window=21)"
    plain = run(model, choices, PROMPT[:40], 150)
    drafted = run(model, f"{choices},draft=prompt-lookup(k=7)", PROMPT[:40], 150)
    assert drafted[:2] == plain[:2] and drafted[2].stats.speculation.accepted > 0


def test_layers_with_a_window_keep_it() -> None:
    method = SinkWindow(sinks=3, window=50)
    own = LayerGroup((1,), window=20)
    assert method.view(own) is own
    assert method.view(LayerGroup((0, 2), head_groups=2)) == LayerGroup((0, 2), 50, 3, 2)


@pytest.mark.parametrize("bad", [{"sinks": -1}, {"window": 0}])
def test_bad_parameters(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"sinks=.*, window=.*: need >= 0 and >= 1"):
        SinkWindow(**bad)
