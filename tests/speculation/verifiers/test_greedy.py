"""Greedy: the argmax path (see test_losslessness.py), and nothing that samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, RequestRefused
from hasten.models.base import Decoder
from hasten.speculation.verifiers.greedy import Greedy
from hasten.stack import Stack


def test_requests_that_sample_are_refused(tiny: Callable[..., Decoder]) -> None:
    engine = Engine(tiny("llama"), Stack.parse("verify=greedy"))
    with pytest.raises(RequestRefused, match=r"temperature is 0\.7; ask for temperature 0"):
        engine.add([3], SamplingParams(temperature=0.7))
    assert not engine.has_work
    engine.add([3], SamplingParams(max_tokens=2))  # this model's default is 0
    assert engine.has_work


def test_what_the_model_asks_for_counts() -> None:
    params = SamplingParams()
    assert Greedy().refuses(params.resolved({})) is not None
    assert Greedy().refuses(params.resolved({"temperature": 0.0})) is None
