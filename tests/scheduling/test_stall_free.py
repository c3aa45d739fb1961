"""Stall-free scheduling over a real cache manager: who runs, how much, and who has to go."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from hasten.cache.layout import KVLayout, LayerGroup
from hasten.cache.manager import CacheManager, Stream
from hasten.cache.prefix import root_key
from hasten.scheduling.base import Plan
from hasten.scheduling.stall_free import StallFree


class House:
    """Queues as the engine keeps them, without a model."""

    def __init__(
        self, blocks: int = 13, streams: int = 6, chunk: int = 0, budget: int = 20, **group: Any
    ) -> None:
        layout = KVLayout(2, 8, 8, (LayerGroup((0,), **group),))
        self.cache = CacheManager(layout, blocks, streams, blocks * 16)
        self.policy = StallFree(chunk)
        self.budget = budget
        self.waiting: list[Any] = []
        self.running: list[Any] = []

    def add(self, length: int, computed: int = 0, root: bytes | None = None, seed: int = 0) -> Any:
        """A waiting sequence, or one that runs already. Sequences added first rank first."""
        rng = random.Random(seed)
        tokens = [rng.randrange(99) for _ in range(length)]
        number = len(self.waiting) + len(self.running)
        sequence = SimpleNamespace(tokens=tokens, stream=Stream(tokens, root), rank=number)
        if computed:
            later = tokens[1:]
            del tokens[1:]  # as if the rest had come since, so that nothing is asked of the pool
            assert self.cache.attach(sequence.stream)
            tokens.extend(later)
            assert self.cache.reserve(sequence.stream, computed)
            self.cache.commit(sequence.stream, computed)
            self.running.append(sequence)
        else:
            self.waiting.append(sequence)
        return sequence

    def plan(self) -> Plan:
        """The plan, after a look at what must hold for every plan."""
        before = [s.stream.computed for s in self.running]
        plan = self.policy.plan(list(self.waiting), list(self.running), self.cache, self.budget)
        assert plan.rows == sum(g.rows for g in plan.grants) <= self.budget
        granted = [id(g.sequence) for g in plan.grants]
        assert len(set(granted)) == len(granted)
        gone = {id(s) for s in plan.preempted}
        assert len(gone) == len(plan.preempted) and not gone & set(granted)
        assert all(s in self.running for s in plan.preempted)
        assert all(s in self.waiting and id(s) in granted for s in plan.admitted)
        cap = self.policy.chunk or self.budget
        for grant in plan.grants:
            stream = grant.sequence.stream
            assert 1 <= grant.rows <= min(cap, stream.behind) and stream.table_row >= 0
            assert stream.blocks * 16 >= stream.computed + grant.rows, "pages are reserved"
            assert grant.reaches_end == (stream.computed + grant.rows == len(stream.tokens))
        for sequence, computed in zip(self.running, before, strict=True):
            expected = 0 if id(sequence) in gone else computed
            assert sequence.stream.computed == expected
        assert not any(self.cache.audit())
        return plan

    def step(self) -> Plan:
        """Plan, play the step (one new token where the end is reached), move the queues."""
        plan = self.plan()
        for sequence in plan.preempted:
            self.running.remove(sequence)
            self.waiting.append(sequence)
        for sequence in plan.admitted:
            self.waiting.remove(sequence)
            self.running.append(sequence)
        self.cache.take_copies()
        for grant in plan.grants:
            stream = grant.sequence.stream
            if grant.reaches_end:
                stream.tokens.append(7)
            self.cache.commit(stream, stream.computed + grant.rows)
        for queue in (self.waiting, self.running):
            queue.sort(key=lambda s: s.rank)
        return plan

    def finish(self, sequence: Any) -> None:
        self.cache.release(sequence.stream)
        self.running.remove(sequence)


def rows(plan: Plan) -> list[tuple[int, int]]:
    return [(g.sequence.rank, g.rows) for g in plan.grants]


def test_decodes_first_then_chunks_then_new_ones() -> None:
    house = House(budget=20)
    house.add(40, computed=10)  # in the middle of its prompt
    house.add(17, computed=16)
    house.add(33, computed=32)
    house.add(30)
    assert rows(house.plan()) == [(1, 1), (2, 1), (0, 18)]


def test_what_is_left_goes_to_the_next_in_line() -> None:
    house = House(budget=20)
    house.add(15, computed=10)
    house.add(17, computed=16)
    house.add(9)
    house.add(9)
    plan = house.plan()
    assert rows(plan) == [(1, 1), (0, 5), (2, 9), (3, 5)]
    assert [s.rank for s in plan.admitted] == [2, 3] and not plan.grants[-1].reaches_end


def test_chunk_caps_every_prompt_but_no_budget() -> None:
    house = House(budget=20, chunk=7)
    house.add(40, computed=10)
    house.add(40, computed=10)
    house.add(30)
    assert rows(house.plan()) == [(0, 7), (1, 7), (2, 6)]
    assert rows(House(budget=20, chunk=7).plan()) == []


def test_more_decodes_than_budget() -> None:
    house = House(budget=3)
    for _ in range(5):
        house.add(17, computed=16)
    assert rows(house.plan()) == [(0, 1), (1, 1), (2, 1)]


def test_a_prefix_hit_is_not_granted_again() -> None:
    house = House(budget=99)
    root = root_key("", "", "")
    house.add(41, computed=40, root=root)
    house.add(41, root=root)
    assert rows(house.plan()) == [(0, 1), (1, 9)]


def test_new_ones_wait_in_rank_order() -> None:
    """The first that does not fit stops the line, though a later one would fit."""
    house = House(blocks=6, budget=99)
    house.add(33, computed=32)  # 2 blocks held, 1 about to be
    house.add(60)
    house.add(5)
    assert rows(house.plan()) == [(0, 1)]


@pytest.mark.parametrize(("length", "fits"), [(31, True), (32, False)])
def test_admission_leaves_a_page_for_each_running_one(length: int, fits: bool) -> None:
    house = House(blocks=8, budget=99)
    house.add(20, computed=19)
    house.add(17, computed=16)  # its second block is taken in this step
    house.add(length)  # 4 of 8 blocks are left: 2 of headroom, and 2 for it with one position more
    plan = house.plan()
    assert rows(plan)[:2] == [(0, 1), (1, 1)]
    assert [s.rank for s in plan.admitted] == ([2] if fits else [])
    assert house.cache.pools[0].num_held == (6 if fits else 4)


def test_the_last_in_line_is_preempted() -> None:
    house = House(blocks=6, budget=9)
    for _ in range(3):
        house.add(33, computed=32)  # all full, each needs one more block
    plan = house.plan()
    assert [s.rank for s in plan.preempted] == [2]
    assert rows(plan) == [(0, 1), (1, 1)]
    assert house.cache.pools[0].num_held == 6


def test_a_decode_that_finds_nobody_behind_it_gives_way_itself() -> None:
    house = House(blocks=5, budget=9)
    house.add(40, computed=20)  # first in rank, in its prompt: 2 blocks
    house.add(49, computed=48)  # 3 blocks, needs a fourth
    plan = house.plan()
    assert [s.rank for s in plan.preempted] == [1] and rows(plan) == [(0, 9)]


def test_a_prompt_pushes_out_only_what_is_behind_it() -> None:
    house = House(blocks=6, budget=9)
    house.add(33, computed=32)  # takes a third block
    house.add(40, computed=16)
    house.add(40, computed=30)
    assert house.cache.pools[0].num_held == 5
    plan = house.plan()
    assert [s.rank for s in plan.preempted] == [2] and rows(plan) == [(0, 1), (1, 8)]
    # and it never pushes out a decode of the same step, though that is behind it
    house = House(blocks=5, budget=9)
    house.add(40, computed=32)
    house.add(40, computed=39)
    plan = house.plan()
    assert plan.preempted == [] and rows(plan) == [(1, 1)]


def test_no_admission_while_pages_are_short() -> None:
    house = House(blocks=6, budget=9)
    for _ in range(3):
        house.add(33, computed=32)
    house.add(1)
    plan = house.plan()
    assert plan.preempted and not plan.admitted


@pytest.mark.parametrize("group", [{}, {"window": 20, "sinks": 3}, {"head_groups": 2}], ids=repr)
@pytest.mark.parametrize("seed", range(6))
def test_everybody_comes_to_an_end(seed: int, group: dict[str, int]) -> None:
    """Tiny pools and random loads: no livelock, and the first in rank never steps back."""
    rng = random.Random(seed)
    blocks = rng.choice([3, 5, 8])
    chunk, budget = rng.choice([0, 3, 16]), rng.choice([1, 4, 40])
    house = House(blocks, rng.choice([1, 3, 6]), chunk, budget, **group)
    goals = {}
    root = root_key("", "", "") if seed % 2 else None
    for number in range(9):
        length = rng.randint(1, blocks * 16 - 1)
        sequence = house.add(length, root=root, seed=rng.randrange(3))
        sequence.rank = number
        goals[number] = min(blocks * 16, length + rng.randint(1, 30))
    steps = 0
    while house.waiting or house.running:
        steps += 1
        assert steps < 6000, "no end"
        first = min([*house.waiting, *house.running], key=lambda s: s.rank)
        plan = house.step()
        assert plan.grants, "an idle step while there is work"
        assert first not in plan.preempted
        for sequence in list(house.running):
            if len(sequence.tokens) >= goals[sequence.rank]:
                house.finish(sequence)
    assert house.cache.usage == 0


def test_bad_parameter() -> None:
    with pytest.raises(ValueError, match="chunk=-1: need 0"):
        StallFree(-1)
