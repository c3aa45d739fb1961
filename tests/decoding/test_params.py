"""Sampling parameters: limits, defaults of the model, and errors that name the field."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hasten.decoding.params import (
    MAX_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP,
    MAX_STOP_CHARS,
    SamplingParams,
)


@pytest.mark.parametrize(
    "good",
    [
        {"max_tokens": None, "min_tokens": 10**6},
        {"max_tokens": 0},
        {"max_tokens": 7, "min_tokens": 7},
        {"temperature": 0},
        {"temperature": 1e-320},
        {"temperature": 100},
        {"top_k": 0, "top_p": 1, "typical_p": 1e-9, "min_p": 1},
        {"repetition_penalty": 1e-3, "presence_penalty": -100, "frequency_penalty": 100},
        {"n": MAX_N, "logprobs": MAX_LOGPROBS, "prompt_logprobs": 0},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"stop": "x" * MAX_STOP_CHARS},
        {"stop": ["x"] * MAX_STOP},
        {"logit_bias": dict.fromkeys(range(MAX_BIAS), -1e30)},
    ],
)
def test_what_is_allowed(good: dict[str, Any]) -> None:
    SamplingParams(**good)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"max_tokens": -1}, "max_tokens is -1, must be at least 0"),
        ({"max_tokens": 2.0}, "max_tokens is 2.0, expected a whole number"),
        ({"max_tokens": True}, "max_tokens is True, expected a whole number"),
        ({"max_tokens": "9"}, "max_tokens is '9', expected a whole number"),
        ({"max_tokens": 7, "min_tokens": 8}, "min_tokens is 8, must be at least 0 and at most 7"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"n": 0}, "n is 0, must be at least 1 and at most 128"),
        ({"n": MAX_N + 1}, "n is 129"),
        ({"n": 1.5}, "n is 1.5, expected a whole number"),
        ({"temperature": -0.1}, "temperature is -0.1, must be at least 0 and at most 100"),
        ({"temperature": 101}, "temperature is 101"),
        ({"temperature": math.nan}, "temperature is nan, expected a finite number"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.5}, "top_k is 2.5, expected a whole number"),
        ({"top_p": 0}, "top_p is 0, must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"typical_p": 0.0}, "typical_p is 0.0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"min_p": -1}, "min_p is -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, must be above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf, expected a finite number"),
        ({"presence_penalty": 101}, "presence_penalty is 101"),
        ({"frequency_penalty": -101}, "frequency_penalty is -101"),
        ({"logprobs": MAX_LOGPROBS + 1}, "logprobs is 101"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": 0.5}, "seed is 0.5, expected a whole number"),
        ({"stop": ""}, "a stop string has 1 to 1000 characters"),
        ({"stop": ["ok", ""]}, "a stop string has 1 to 1000 characters"),
        ({"stop": ["x" * (MAX_STOP_CHARS + 1)]}, "a stop string has"),
        ({"stop": [7]}, "a stop string has"),
        ({"stop": ["x"] * (MAX_STOP + 1)}, "number of stop strings is 65"),
        ({"logit_bias": {3: math.inf}}, "logit_bias inf is not finite"),
        ({"logit_bias": {3: math.nan}}, "logit_bias nan is not finite"),
        ({"logit_bias": dict.fromkeys(range(MAX_BIAS + 1), 0.0)}, "entries in logit_bias is"),
    ],
)
def test_what_is_refused(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**bad)
    assert words in str(error.value)


def test_stop_is_always_a_tuple() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop == ("ab", "c")
    assert SamplingParams().stop == ()


def test_request_before_model_before_neutral() -> None:
    params = SamplingParams(temperature=0.3, top_k=0, max_tokens=9)
    full = params.resolved({"temperature": 0.7, "top_k": 40, "top_p": 0.9, "unknown": 1})
    assert (full.temperature, full.top_k, full.top_p) == (0.3, 0, 0.9)
    assert (full.min_p, full.typical_p, full.repetition_penalty) == (0.0, 1.0, 1.0)
    assert full.max_tokens == 9
    assert full.resolved({"top_p": 0.1}) is full
    with pytest.raises(ValueError, match="top_p is 7"):
        SamplingParams().resolved({"top_p": 7})
