"""What a profile of steps says, and that it costs nothing when none is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hasten import _native
from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.engine.profile import profiling
from hasten.models.base import Decoder
from hasten.stack import Stack

Make = Callable[..., Decoder]


@pytest.mark.parametrize("record", ["1", "0"])
def test_operations_are_counted_by_kind_of_step(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    monkeypatch.setenv("HASTEN_RECORD", record)
    model = tiny("llama")
    engine = Engine(model, Stack.parse(None), EngineConfig(max_sequences=1))

    def run() -> None:
        engine.add(list(range(2, 32)), SamplingParams(max_tokens=6, ignore_eos=True))
        while engine.has_work:
            engine.step()

    with profiling() as engine.profile:
        run()
    profile, layers = engine.profile, model.config.num_layers
    assert (profile.other.count, profile.decode.count) == (1, 5)
    assert (profile.other.rows, profile.decode.rows) == (30, 5)
    assert (profile.other.recorded, profile.decode.recorded) == (0, 5 * int(record))
    operations = profile.decode.operations
    assert operations["attention"].calls == operations["qkv"].calls == 5 * layers
    assert operations["linear"].calls == 5 * (2 * layers + 1)
    assert operations["linear_gated"].calls == 5 * layers
    assert operations["row_top"].calls == operations["embed"].calls == 5
    read = sum(operations[name].bytes for name in ("qkv", "linear", "linear_gated"))
    assert read == pytest.approx(5 * model.weight_bytes, rel=0.02)
    assert 0 < profile.decode.native_seconds < profile.decode.seconds
    assert operations["attention"].bytes == profile.decode.kv_bytes
    assert profile.decode.kv_bytes == engine.stats.decode_kv_bytes > 0
    run()  # a profile that has ended takes no times
    assert _native.take_profile() == {}
    assert operations["embed"].calls == 5
