"""Acceptance by lot: the chosen rate, the same lots again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hasten.decoding.params import SamplingParams, StructuredOutputs
from hasten.engine.engine import Engine, EngineConfig
from hasten.models.base import Decoder
from hasten.speculation.verifiers.scripted import ScriptedVerify
from hasten.stack import Stack


def decode(model: Decoder, stack: str, requests: int = 40) -> tuple[Engine, list[list[int]]]:
    engine = Engine(model, Stack.parse(stack), EngineConfig(max_sequences=8, max_length=128))
    added = [
        engine.add([1, 2], SamplingParams(max_tokens=100, ignore_eos=True, seed=i))
        for i in range(requests)
    ]
    while engine.has_work:
        engine.step()
    engine.check_ledger()
    return engine, [r.sequences[0].tokens for r in added]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_acceptance(tiny: Callable[..., Decoder], alpha: float) -> None:
    engine, found = decode(tiny(), f"draft=scripted(k=3),verify=scripted(alpha={alpha})")
    statistics = engine.stats.speculation
    assert statistics.alpha_examined == pytest.approx(alpha, abs=0.04)
    assert all(len(tokens) == 102 for tokens in found)


def test_siblings_are_tried_in_turn(tiny: Callable[..., Decoder]) -> None:
    engine, _ = decode(tiny(), "draft=scripted(k=1,width=2),verify=scripted(alpha=0.5)")
    assert engine.stats.speculation.alpha_examined == pytest.approx(0.75, abs=0.04)


def test_the_same_again(tiny: Callable[..., Decoder]) -> None:
    model, stack = tiny(), "draft=scripted,verify=scripted"
    assert decode(model, stack, 5)[1] == decode(model, stack, 5)[1]


def test_bad_parameter() -> None:
    with pytest.raises(ValueError, match="a probability lies between"):
        ScriptedVerify(1.5)


def test_what_a_constraint_forbids_is_not_accepted_by_lot() -> None:
    params = SamplingParams(structured_outputs=StructuredOutputs(regex="a"))
    assert "structured_outputs" in str(ScriptedVerify().refuses(params))
