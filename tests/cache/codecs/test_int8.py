"""The int8 codec: its size, its error, and bits that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hasten.cache.codecs.int8 import Int8
from hasten.cache.layout import KVLayout
from hasten.engine.engine import Engine
from hasten.models.base import Decoder
from hasten.stack import Stack

from .test_native import logprobs


def test_parameters() -> None:
    assert Int8().card.exact == "lossy"  # type: ignore[attr-defined]
    assert Int8().layout(KVLayout(2, 8, 8, ())).dtype is torch.int8
    with pytest.raises(ValueError, match="keys is 'turned', expected rotated or pre-rope"):
        Int8("turned")


def test_a_row_takes_its_codes_and_a_scale(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama")
    facts = model.config
    layout = Engine(model, Stack.parse("codec=int8")).cache.layout
    value = 16  # dimensions, rounded up
    rows = 16 * facts.num_layers * facts.num_kv_heads
    assert layout.block_bytes() == rows * (facts.head_dim + 4 + value + 4)


@pytest.mark.parametrize("keys", ["rotated", "pre-rope"])
def test_close_to_float32_and_position_pure(keys: str, tiny: Callable[..., Decoder]) -> None:
    model, stack = tiny("llama"), f"codec=int8(keys={keys})"
    exact, coded = logprobs(model, "codec=native", 64), logprobs(model, stack, 64)
    assert coded == logprobs(model, stack, 7), "chunks change nothing"
    assert exact != coded
    assert max(abs(a - b) for a, b in zip(exact[:44], coded[:44], strict=True)) < 0.1
