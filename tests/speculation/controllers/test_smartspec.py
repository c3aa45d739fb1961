"""Goodput: lengths by load, acceptance from examined candidates, and no freeze at zero."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.models.base import Decoder
from hasten.speculation.base import Load, Outcome
from hasten.speculation.controllers.fixed import Fixed
from hasten.speculation.controllers.smartspec import Rate, SmartSpec, SmartSpecControl
from hasten.speculation.latency import PassTimes
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from tests.speculation.controllers.simulated import Lots, Simulation, Text, machine


def known(seconds: Callable[[int], float], rows: int = 512) -> PassTimes:
    times = PassTimes(rows)
    times.value = [seconds(knot) for knot in times.knots]
    times.count = [3] * len(times.knots)
    return times


def load(decoding: int, left: int = 256) -> Load:
    return Load(decoding=decoding, rows_taken=decoding, rows_left=left)


def outcome(drafted: int, accepted: int, ended: bool = False) -> Outcome:
    tree = TokenTree.chain([0] * (drafted + 1))
    tokens = [1] * (accepted + (not ended))
    nothing = np.empty((0, 0), np.float32)
    return Outcome(SimpleNamespace(), 0, tree, list(range(accepted + 1)), tokens, nothing)  # type: ignore[arg-type]


def test_the_formula_of_the_sheet() -> None:
    rate = Rate(0.8)
    for k in range(6):
        assert 1 + rate.extra(k) == pytest.approx((1 - 0.8 ** (k + 1)) / (1 - 0.8))


def test_acceptance_counts_examined_candidates_only() -> None:
    """Of eight candidates two were accepted and the third rejected: 2 of 3, not 2 of 8."""
    rate = Rate(0.5)
    rate.observe([outcome(8, 2)], weight=1.0)
    assert rate.acceptance == pytest.approx(2 / 3)
    rate.observe([outcome(4, 4)], weight=1.0)
    assert rate.acceptance == 1.0
    rate.observe([outcome(4, 1, ended=True)], weight=1.0)
    assert rate.acceptance == 1.0  # nothing was examined behind the end
    rate.observe([outcome(4, 0), outcome(0, 0)], weight=1.0)
    assert (rate.acceptance, rate.coverage) == (0.0, 0.5)


def test_longer_at_low_load_and_none_at_high_load() -> None:
    control = SmartSpecControl(SmartSpec(), known(machine(1e-2, 1e-3, free=16)), Rate(0.8))
    lengths = [control._length(load(batch)) for batch in (1, 2, 4, 8, 16, 32)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 8 and lengths[-1] == 0


def test_the_scan_stops_at_the_first_drop() -> None:
    """A second, higher maximum behind a drop is not found: as in the paper's code."""

    def odd(rows: int) -> float:
        return 1.0 if rows == 2 else 1e-3

    control = SmartSpecControl(SmartSpec(bonus=1.0), known(odd), Rate(0.9))
    assert control._length(load(1)) == 0


def test_the_bonus_of_length_zero() -> None:
    # one candidate at acceptance .05 for free gains 5 %
    free = known(lambda rows: 1e-3)
    assert SmartSpecControl(SmartSpec(), free, Rate(0.05))._length(load(1)) == 0
    assert SmartSpecControl(SmartSpec(bonus=1.0), free, Rate(0.05))._length(load(1)) > 0


def test_prompt_chunks_count() -> None:
    control = SmartSpecControl(SmartSpec(), known(machine(1e-3, 1e-3, free=16)), Rate(0.8))
    alone = control._length(load(2))
    beside = control._length(Load(decoding=2, rows_taken=16, rows_left=256))
    assert alone > beside == 0


def test_one_length_for_all_and_decisions_every_twenty_steps() -> None:
    texts: list[Any] = [Text(lambda p: 0.8) for _ in range(4)]
    control = SmartSpecControl(SmartSpec(), known(machine(1e-2, 1e-3, free=32)), Rate(0.8))
    first = control.plan(texts, load(4))
    assert len(set(first)) == 1 and first[0] > 0
    control.rate.acceptance = 0.0
    found = [control.plan(texts, load(4)) for _ in range(20)]
    assert found[:19] == [first] * 19 and found[19] == [0] * 4


def test_budgets_keep_to_the_room() -> None:
    control = SmartSpecControl(SmartSpec(), known(lambda rows: 1e-3), Rate(0.9))
    texts: list[Any] = [Text(lambda p: 0.8) for _ in range(4)]
    for left in (0, 3, 4, 9):
        assert sum(control.plan(texts, load(4, left))) <= left


def test_it_does_not_freeze_at_zero() -> None:
    def turn(position: int) -> float:
        return 0.0 if position < 1000 else 0.97

    simulation = Simulation(SmartSpec(), [Text(turn)], machine(1e-3, 1e-4))
    simulation.run(900)
    for _ in range(25):
        simulation.step()
    simulation.run(4000)
    assert simulation.control.length > 0 or max(simulation.budgets) > 0
    before, had = simulation.candidates, simulation.tokens
    simulation.run(500)
    assert (simulation.candidates - before) / (simulation.tokens - had) > 0.5


@pytest.mark.parametrize("per_request", [False, True])
@pytest.mark.parametrize("batch", [1, 64])
def test_near_plain_decoding_where_drafts_fail(batch: int, per_request: bool) -> None:
    def run(control: Any) -> float:
        texts = [Text(lambda p: 0.1) for _ in range(batch)]
        drafting = Lots(lambda k: 1e-5, random.Random(3))
        return Simulation(control, texts, machine(3e-4, 1.5e-4), drafting=drafting).run(1500)

    assert run(SmartSpec(per_request=per_request)) > 0.95 * run(Fixed(0))


def test_per_request_lengths_go_to_those_who_use_them() -> None:
    texts = [Text(lambda p: 0.97), Text(lambda p: 0.02)]
    method = SmartSpec(per_request=True, every=5)
    simulation = Simulation(method, texts, machine(1e-3, 1e-4))
    simulation.run(1000)
    good, bad = (simulation.control.lengths[id(text)] for text in texts)
    assert good >= 2 > bad
    simulation.control.close(texts[0])
    assert id(texts[0]) not in simulation.control.own


@pytest.mark.parametrize(
    "bad", [{"most": 0}, {"every": 0}, {"acceptance": 1.0}, {"weight": 0.0}, {"bonus": 0.9}]
)
def test_bad_parameters(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        SmartSpec(**bad)


def test_output_is_that_of_plain_decoding(tiny: Callable[..., Decoder]) -> None:
    model, found = tiny(), []
    for stack in ("", "draft=prompt-lookup,control=smartspec(every=2,per_request=true,probe=3)"):
        engine = Engine(model, Stack.parse(stack), EngineConfig(max_sequences=3))
        params = SamplingParams(max_tokens=40, temperature=0.7, seed=1, ignore_eos=True)
        requests = [engine.add([1, 2, 3, 1 + i, 2], params) for i in range(5)]
        while engine.has_work:
            engine.step()
        found.append([r.sequences[0].tokens for r in requests])
    assert found[0] == found[1]
