"""The cost-aware controller against every fixed budget, on simulated engines."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.models.base import Decoder
from hasten.speculation.base import DraftProgress
from hasten.speculation.controllers.auto import TENANTS, Auto, AutoControl
from hasten.speculation.controllers.fixed import Fixed
from hasten.speculation.drafters.any import AnyOf, Portfolio
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from tests.speculation.controllers.simulated import Lots, Simulation, Text, machine

SLOW_ROWS = machine(3e-4, 1.5e-4)
FREE_ROWS = machine(1e-2, 1e-3, free=16)
FROM_TEXT = frozenset({"drafts-from-text"})
MODEL_LIKE: frozenset[str] = frozenset()
"""What a drafter does that may not be asked for trials."""


def any_of(*does: frozenset[str]) -> AnyOf:
    """A portfolio of simulated drafters, of which only their cards count."""
    draft = object.__new__(AnyOf)
    parts = tuple(SimpleNamespace(card=SimpleNamespace(does=d)) for d in does)
    object.__setattr__(draft, "of", parts)
    return draft


def rate(
    control: Any,
    quality: Callable[[int], float],
    pass_seconds: Callable[[int], float],
    batch: int = 1,
    tokens: int = 2000,
    cost: float = 1e-5,
    **options: Any,
) -> float:
    drafting = Lots(lambda k: cost, random.Random(3), options.pop("coverage", 1.0))
    texts = [Text(quality) for _ in range(batch)]
    simulation = Simulation(control, texts, pass_seconds, drafting=drafting, noise=0.1, **options)
    return simulation.run(tokens)


@pytest.mark.parametrize("pass_seconds", [SLOW_ROWS, FREE_ROWS])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("batch", [1, 8])
def test_near_the_best_fixed_budget(
    pass_seconds: Callable[[int], float], alpha: float, batch: int
) -> None:
    def quality(position: int) -> float:
        return alpha

    tokens = 2000 if batch == 1 else 800
    fixed = [rate(Fixed(k), quality, pass_seconds, batch, tokens) for k in (0, 1, 2, 4, 8, 16)]
    # short runs: what it takes to find out is part of them
    assert rate(Auto(), quality, pass_seconds, batch, tokens) > 0.9 * max(fixed)


@pytest.mark.parametrize("cost", [1e-5, 2e-3])
@pytest.mark.parametrize("does", [FROM_TEXT, MODEL_LIKE])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_useless_drafts_cost_little(batch: int, does: frozenset[str], cost: float) -> None:
    """Also where a proposal takes seven steps' time."""

    def never(position: int) -> float:
        return 0.0

    tokens = {1: 2000, 8: 800, 64: 400}[batch]
    off = rate(Fixed(0), never, SLOW_ROWS, batch, tokens, does=does)
    assert rate(Auto(), never, SLOW_ROWS, batch, tokens, cost, does=does) > 0.97 * off


@pytest.mark.parametrize("batch", [4, 32])
def test_useless_drafts_are_hardly_thought_of(batch: int) -> None:
    """Where weighing budgets takes a tenth of a step: one sequence may take a hundredth of the time
    for it, n of them together an n-th of that, half of it since nothing came of it so far."""
    pass_seconds = machine(1e-3, 1e-3)
    texts = [Text(lambda position: 0.0) for _ in range(batch)]
    simulation = Simulation(Auto(), texts, pass_seconds)
    drafted, calls = simulation.control.clock, itertools.count()
    simulation.control.clock = lambda: drafted() + pass_seconds(batch) / 10 * next(calls)
    simulation.run(200)
    # each time is the difference of two calls
    before, began = next(calls), simulation.seconds
    simulation.run(2000)
    thought = (next(calls) - before) / 2 * pass_seconds(batch) / 10
    assert thought / (simulation.seconds - began) < 0.02 / batch


@pytest.mark.parametrize("does", [FROM_TEXT, MODEL_LIKE])
def test_it_wakes_when_drafts_become_good(does: frozenset[str]) -> None:
    def turn(position: int) -> float:
        return 0.0 if position < 1500 else 0.97

    auto = Simulation(Auto(), [Text(turn)], SLOW_ROWS, does=does)
    auto.run(1400)
    asleep = auto.candidates
    for _ in range(50):
        auto.step()
    assert auto.candidates - asleep < 10
    auto.run(3000)
    before, had = auto.candidates, auto.tokens
    auto.run(500)
    assert (auto.candidates - before) / (auto.tokens - had) > 0.5


@pytest.mark.parametrize("does", [FROM_TEXT, MODEL_LIKE])
@pytest.mark.parametrize("planning", [0.0, 3e-5])
def test_a_good_text_after_many_useless_ones(does: frozenset[str], planning: float) -> None:
    """Also where weighing budgets takes a tenth of a step: it is soon known what is best."""
    simulation = Simulation(
        Auto(),
        [Text(lambda position: 0.0)],
        SLOW_ROWS,
        drafting=Lots(lambda k: 1e-5, _rng()),
        does=does,
    )
    calls = itertools.count()
    drafted = simulation.control.clock
    simulation.control.clock = lambda: drafted() + planning * next(calls)
    for _ in range(10):
        simulation.run(200)
        simulation.control.close(simulation.texts[0])
        simulation.texts[0] = Text(lambda position: 0.0)
    asleep = simulation.candidates / simulation.tokens
    assert asleep < 0.05
    before, steps = simulation.candidates, simulation.control.steps
    simulation.texts[0] = Text(lambda position: 0.97)
    simulation.run(160)
    assert simulation.control.steps - steps < 100
    assert simulation.candidates - before > 80


def test_runs_of_acceptance_beat_every_fixed_budget() -> None:
    def runs(position: int) -> float:
        return 0.98 if position // 100 % 2 else 0.03

    fixed = max(rate(Fixed(k), runs, SLOW_ROWS, tokens=3000) for k in (0, 1, 2, 4, 8))
    assert rate(Auto(), runs, SLOW_ROWS, tokens=3000) > 1.02 * fixed


def test_the_cost_of_drafting_counts() -> None:
    def good(position: int) -> float:
        return 0.9

    cheap = Simulation(Auto(), [Text(good)], SLOW_ROWS, drafting=Lots(lambda k: 1e-5, _rng()))
    dear = Simulation(
        Auto(), [Text(good)], SLOW_ROWS, does=MODEL_LIKE, drafting=Lots(lambda k: 3e-3, _rng())
    )
    cheap.run(1000)
    dear.run(1000)
    assert cheap.candidates > 500
    assert dear.candidates < 100


def test_it_learns_the_time_of_steps_without_a_look() -> None:
    def good(position: int) -> float:
        return 0.95

    best = max(rate(Fixed(k), good, SLOW_ROWS) for k in (0, 2, 4, 8))
    assert rate(Auto(), good, SLOW_ROWS, look=False) > 0.9 * best


def test_each_sequence_gets_the_drafter_that_suits_it() -> None:
    """Of two drafters, one is right in even texts only and the other in odd ones."""

    class Picky(Lots):
        def _chain(self, text: Any, budget: int) -> Any:
            number = text.whole.number
            quality = 0.95 if number % 2 == self.which else 0.02
            known = text.whole.quality
            text.whole.quality = lambda position: quality
            tree = super()._chain(text, budget)
            text.whole.quality = known
            return tree

    parts = [Picky(lambda k: 1e-5, random.Random(i), which=i) for i in range(2)]
    draft = any_of(FROM_TEXT, FROM_TEXT)
    texts = [Text(lambda position: 0.0) for _ in range(4)]
    for number, text in enumerate(texts):
        text.number = number  # type: ignore[attr-defined]
    simulation = Simulation(
        Auto(), texts, FREE_ROWS, drafting=Portfolio(parts, ["even", "odd"]), draft=draft
    )
    simulation.run(300)
    last = simulation.control.followers
    found = [[arm.value for arm in last[id(text)].arms] for text in texts]
    assert [values.index(max(values)) for values in found] == [0, 1, 0, 1]


def test_the_next_drafter_is_asked_where_the_better_one_has_nothing() -> None:
    """One proposes seldom and is right, the other always and is right three times of four."""
    parts = [
        Lots(lambda k: 1e-5, random.Random(1), coverage=0.3),
        Lots(lambda k: 1e-5, random.Random(2)),
    ]
    qualities = [0.98, 0.75]
    for part, quality in zip(parts, qualities, strict=True):
        part.quality = quality
    draft = any_of(FROM_TEXT, FROM_TEXT)

    def speed(drafting: Any, draft: Any) -> float:
        simulation = Simulation(
            Auto(), [Text(lambda p: 0.0)], FREE_ROWS, drafting=drafting, draft=draft
        )
        simulation.run(300)
        return simulation.run(6000)

    both = speed(Portfolio(parts, ["seldom", "always"]), draft)
    alone = [speed(part, None) for part in parts]
    assert both > 1.15 * max(alone)


@dataclass
class Reader(Lots):
    """A drafter that reads long prompts slowly: 3,000 tokens in 210 ms."""

    def propose(self, sequences: Sequence[Any], budgets: Sequence[int]) -> list[TokenTree]:
        for text, budget in zip(sequences, budgets, strict=True):
            if budget:
                self.spent += 7e-5 * (len(text.tokens) - (text.draft_state or 0))
                text.draft_state = len(text.tokens)
        return super().propose(sequences, budgets)


def reads(length: int, other: Lots) -> float:
    """Share of the texts of some length in which a good drafter reads the prompt, once it was
    learned what that brings."""
    reader = Reader(lambda k: 1e-5, random.Random(1), quality=0.95)
    simulation = Simulation(
        Auto(),
        [],
        FREE_ROWS,
        drafting=Portfolio([reader, other], ["reader", "other"]),
        draft=any_of(MODEL_LIKE, FROM_TEXT),
    )
    count = max(40, 4000 // length)
    before = 0.0
    for number in range(count):
        if number == count // 2:
            before = reader.spent
        text = Text(lambda p: 0.0, tokens=list(range(3000)), num_prompt=3000)
        text.draft_state = simulation.drafting.open(text)
        simulation.texts = [text]
        simulation.run(length)
        simulation.control.close(text)
    return (reader.spent - before) / 0.21 / (count - count // 2)


def test_what_a_drafter_has_to_read_first_must_pay_within_the_text() -> None:
    def other() -> Lots:
        return Lots(lambda k: 1e-5, _rng(), quality=0.4)

    assert reads(1000, other()) > 0.9
    assert reads(20, other()) < 0.1


def test_what_a_drafter_has_to_read_first_must_pay_where_it_is_used() -> None:
    """Texts in which it would pay, if another drafter did not do without it for most of them."""

    def other(coverage: float) -> Lots:
        return Lots(lambda k: 1e-5, _rng(), coverage=coverage, quality=0.98)

    assert reads(300, other(0.0)) > 0.9
    assert reads(300, other(0.9)) < 0.3


def test_not_all_find_out_that_a_drafter_is_dear() -> None:
    """What the first of a batch paid for reading is known to the others in the next step."""
    reader = Reader(lambda k: 1e-5, random.Random(1), quality=0.95)
    texts = [Text(lambda p: 0.0, tokens=list(range(3000)), num_prompt=3000) for _ in range(16)]
    rows_for_nothing = machine(1e-2, 1e-3, free=256)
    simulation = Simulation(Auto(), texts, rows_for_nothing, drafting=reader, does=MODEL_LIKE)
    simulation.run(40)
    assert 0.21 < reader.spent < 6 * 0.21


def test_a_draft_model_stops_where_its_chances_do_not_pay() -> None:
    simulation = Simulation(
        Auto(),
        [Text(lambda p: 0.9)],
        SLOW_ROWS,
        does=MODEL_LIKE,
        drafting=Lots(lambda k: 1e-5 * k, _rng()),
    )
    simulation.run(300)
    control, text = simulation.control, simulation.texts[0]
    sure = [control.should_stop(DraftProgress(text, d, 0.99)) for d in range(1, 9)]
    assert not any(sure)
    doubtful = [control.should_stop(DraftProgress(text, d, 0.4)) for d in range(1, 9)]
    assert doubtful[-1] and doubtful == sorted(doubtful)


def test_budgets_keep_to_the_room() -> None:
    simulation = Simulation(Auto(), [Text(lambda p: 0.99) for _ in range(6)], FREE_ROWS, max_rows=9)
    simulation.run(100)  # the simulation checks the sum of the budgets
    assert simulation.candidates > 0


def test_tenants_learn_apart_and_are_bounded() -> None:
    simulation = Simulation(Auto(), [Text(lambda p: 0.9)], SLOW_ROWS)
    control: AutoControl = simulation.control
    simulation.run(50)
    own = control.followers[id(simulation.texts[0])]
    assert own.arms[0].shared[0].asked + own.arms[0].shared[2].asked > 0
    for number in range(TENANTS + 5):
        other = control._follow(Text(lambda p: 0.9, tenant=f"tenant {number}"))
        assert all(curve.asked == 0 for curve in other.arms[0].shared)
    assert len(control.tenants) == TENANTS
    control.close(simulation.texts[0])
    assert not control.followers


@pytest.mark.parametrize("bad", [{"most": 0}, {"most": 65}, {"explore": 1.0}, {"explore": -0.1}])
def test_bad_parameters(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Auto(**bad)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "draft", ["prompt-lookup", "any(of=prompt-lookup(k=3)|prompt-lookup(max_ngram=1))"]
)
def test_output_is_that_of_plain_decoding(
    tiny: Callable[..., Decoder], draft: str, temperature: float
) -> None:
    model = tiny()
    found = []
    for stack in ("", f"draft={draft},control=auto"):
        engine = Engine(
            model, Stack.parse(stack), EngineConfig(max_sequences=3, max_batch_tokens=24)
        )
        params = SamplingParams(
            max_tokens=40, temperature=temperature, seed=5, n=2, ignore_eos=True
        )
        requests = [engine.add([1 + i, 2, 3, 1 + i, 2], params) for i in range(4)]
        while engine.has_work:
            engine.step()
        engine.check_ledger()
        found.append([s.tokens for r in requests for s in r.sequences])
    assert found[0] == found[1]


def _rng() -> random.Random:
    return random.Random(3)


@dataclass
class Grades(Lots):
    """Proposals that are good every third time, and known to be."""

    def grade(self, sequence: Any) -> int:
        text = getattr(sequence, "whole", sequence)
        return 4 if len(text.tokens) // 30 % 3 == 0 else 1

    def _chain(self, text: Any, budget: int) -> TokenTree:
        self.quality = 0.97 if self.grade(text) == 4 else 0.02
        return super()._chain(text, budget)


GRADED = FROM_TEXT | {"grades-proposals"}


@pytest.mark.parametrize("batch", [1, 8])
def test_grades_tell_when_to_draft(batch: int) -> None:
    """One drafter: it is asked for what it is sure of, which without grades costs as many bad
    proposals as it has good ones."""

    def simulated(does: frozenset[str]) -> Simulation:
        texts = [Text(lambda position: 0.0, [0] * (1 + 7 * i)) for i in range(batch)]
        drafting = Grades(lambda k: 1e-5, _rng())
        return Simulation(Auto(), texts, machine(1e-3, 1e-4), drafting=drafting, does=does)

    graded, blind = simulated(GRADED), simulated(FROM_TEXT)
    for simulation in (graded, blind):
        simulation.run(1500)
    assert graded.run(1500) > 1.05 * blind.run(1500)


def test_a_sure_copy_goes_before_a_draft_model_and_an_unsure_one_behind_it() -> None:
    copies = Grades(lambda k: 1e-5, _rng(), which=0)
    drafts = Lots(lambda k: 3e-5 * k, _rng(), which=1, quality=0.6)
    portfolio = Portfolio([copies, drafts], ["copies", "drafts"])
    simulation = Simulation(
        Auto(),
        [Text(lambda position: 0.0)],
        FREE_ROWS,
        drafting=portfolio,
        draft=any_of(GRADED, MODEL_LIKE),
    )
    simulation.run(2000)
    asked: dict[int, list[int]] = {1: [0, 0], 4: [0, 0]}
    for _ in range(600):
        grade = copies.grade(simulation.texts[0])
        simulation.step()
        shares = simulation.texts[0].draft_state.shares
        if shares:
            asked[grade][shares[0][0]] += 1
    assert asked[4][0] > 20 * asked[4][1]
    assert asked[1][1] > 20 * asked[1][0]


def test_nothing_is_planned_for_a_drafter_that_has_nothing() -> None:
    class Empty(Grades):
        def grade(self, sequence: Any) -> int:
            return 0

    text = Text(lambda position: 1.0)
    simulation = Simulation(
        Auto(), [text], FREE_ROWS, drafting=Empty(lambda k: 1e-5, _rng()), does=GRADED
    )
    simulation.run(300)
    assert not simulation.candidates and not simulation.drafting.spent


@pytest.mark.parametrize("slow", [1, 5])
def test_a_bad_moment_is_not_held_against_a_drafter(slow: int) -> None:
    """The first times that it is asked take fifteen steps each: an allocation, or a machine that
    was busy with something else."""
    calls = itertools.count()

    def seconds(budget: int) -> float:
        return 1e-4 * budget * (1 if next(calls) >= slow else 100)

    simulation = Simulation(
        Auto(),
        [Text(lambda position: 0.9)],
        FREE_ROWS,
        drafting=Lots(seconds, _rng()),
        does=MODEL_LIKE,
    )
    simulation.run(8000)
    plain = 1 / FREE_ROWS(1)
    assert simulation.run(1000) > 3 * plain


def test_all_stop_at_one_depth_where_depth_is_dear() -> None:
    """In a batch that has room for one candidate each, a few sequences with luck would go deeper,
    and all would wait for them."""
    passes = machine(2e-2, 4e-4, free=50)
    simulation = Simulation(
        Auto(),
        [Text(lambda position: 0.8) for _ in range(32)],
        passes,
        drafting=Lots(lambda k: 1e-3 * k, _rng()),
        does=MODEL_LIKE,
    )
    simulation.run(200)
    one_each = 32 * 1.8 / (passes(64) + 1e-3)
    assert simulation.run(400) > 0.95 * one_each


def test_a_clock_that_stands_still_is_no_error() -> None:
    simulation = Simulation(
        Auto(),
        [Text(lambda position: 0.5) for _ in range(3)],
        lambda rows: 0.0,
        drafting=Grades(lambda k: 0.0, _rng()),
        does=GRADED,
    )
    for _ in range(50):
        simulation.step()
    assert simulation.tokens >= 150


def test_a_lone_drafter_pays_for_its_reading_too() -> None:
    """Texts that end long before it pays: the plan counts what is read, and leaves it alone."""
    reader = Reader(lambda k: 1e-5, random.Random(1), quality=0.95)
    simulation = Simulation(Auto(), [], FREE_ROWS, drafting=reader, does=MODEL_LIKE)
    before = 0.0
    for number in range(80):
        if number == 40:
            before = reader.spent
        text = Text(lambda p: 0.0, tokens=list(range(3000)), num_prompt=3000)
        simulation.texts = [text]
        simulation.run(10)
        simulation.control.close(text)
    assert reader.spent - before < 0.21 * 40 / 4


def test_what_plain_steps_take_is_looked_at_again() -> None:
    """They were slow for a while, so drafts that lose seem to pay, and no step without any would
    say otherwise."""
    slow = True

    def passes(rows: int) -> float:
        seconds = 1e-2 + 4e-3 * (rows - 1)
        return 2 * seconds if slow and rows == 1 else seconds

    simulation = Simulation(Auto(), [Text(lambda position: 0.3)], passes, does=MODEL_LIKE)
    simulation.run(300)
    assert simulation.candidates > 100
    slow = False
    simulation.run(1000)
    assert simulation.run(1000) > 0.97 / passes(1)
