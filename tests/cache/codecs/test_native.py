"""The native codec: its types, and bits that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hasten.cache.codecs.native import Native
from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.models.base import Decoder
from hasten.stack import Stack


def test_types() -> None:
    assert Native().torch_dtype is torch.float32
    assert Native("bfloat16").torch_dtype is torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'half', expected one of float32, bfloat16"):
        Native("half")
    with pytest.raises(ValueError, match="keys is 'raw', expected rotated or pre-rope"):
        Native(keys="raw")


def test_keys_before_the_rotation_change_no_bit(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama")
    expected = logprobs(model, "codec=native", 64)
    assert logprobs(model, "codec=native(keys=pre-rope)", 64) == expected
    assert logprobs(model, "codec=native(keys=pre-rope)", 7) == expected


def logprobs(model: Decoder, stack: str, budget: int) -> list[float]:
    engine = Engine(
        model, Stack.parse(stack), EngineConfig(max_sequences=2, max_batch_tokens=budget)
    )
    prompt = [(7 * i * i + 3) % 61 for i in range(45)]
    params = SamplingParams(max_tokens=9, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    request = engine.add(prompt, params)
    out = []
    while engine.has_work:
        for delta in engine.step():
            out += [entry[0] for entry in delta.logprobs or []]
    assert request.prompt_logprobs is not None and request.prompt_logprobs[0] is None
    return [entry[0] for entry in request.prompt_logprobs[1:] if entry is not None] + out


def test_bfloat16_halves_the_bytes_and_stays_position_pure(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama")
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        engine = Engine(model, Stack.parse(f"codec=native(dtype={dtype})"))
        sizes[dtype] = engine.cache.layout.block_bytes()
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    half = "codec=native(dtype=bfloat16)"
    exact, rounded = logprobs(model, "codec=native", 64), logprobs(model, half, 64)
    assert len(exact) == len(rounded) == 44 + 9
    assert rounded == logprobs(model, half, 7), "chunks change nothing"
    assert exact != rounded
    assert max(abs(a - b) for a, b in zip(exact[:44], rounded[:44], strict=True)) < 0.5
