"""A stack without constraints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, RequestRefused
from hasten.models.base import Decoder
from hasten.stack import Stack


def test_what_asks_for_one_is_refused(tiny: Callable[..., Decoder]) -> None:
    engine = Engine(tiny("llama"), Stack.parse("constrain=none"))
    with pytest.raises(RequestRefused, match="constrain=grammar"):
        engine.add([5], SamplingParams(structured_outputs=cast(Any, {"regex": "a"})))
    request = engine.add([5], SamplingParams(max_tokens=3, ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert request.sequences[0].num_output == 3
