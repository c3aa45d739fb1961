"""Page tables: reserve, share, commit, give back, and the ledger after every step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hasten.cache.layout import PAGE_SIZE, KVLayout, LayerGroup
from hasten.cache.manager import CacheManager, Stream, _with_head
from hasten.cache.prefix import root_key

ROOT = root_key("plain", "m", "")
FULL = LayerGroup((0,))
SPLIT = LayerGroup((0,), head_groups=2)
WINDOW = LayerGroup((1,), window=20)
SINKS = LayerGroup((2,), window=9, sinks=18, head_groups=4)


def manager(*groups: LayerGroup, blocks: int = 13, streams: int = 4, longest: int = 200) -> Any:
    return CacheManager(KVLayout(4, 8, 8, groups or (FULL,)), blocks, streams, longest)


def text(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


def compute(cache: CacheManager, stream: Stream, upto: int | None = None, step: int = 7) -> None:
    """What a prompt in chunks does."""
    upto = len(stream.tokens) if upto is None else upto
    while stream.computed < upto:
        end = min(upto, stream.computed + step)
        assert cache.reserve(stream, end)
        cache.commit(stream, end)


def snapshot(cache: CacheManager) -> Any:
    return (
        [table.tolist() for table in cache.tables],
        [(list(p.references), list(p._free), list(p._cached), dict(p._index)) for p in cache.pools],
        list(cache._free_rows),
        dict(cache._streams),
        list(cache.pending_copies),
    )


def held(cache: CacheManager, stream: Stream, group: int = 0) -> list[int]:
    """Blocks of which the stream has all pages; it never has only some."""
    there = cache.tables[group][stream.table_row] >= 0
    assert (there.all(0) == there.any(0)).all()
    return np.flatnonzero(there.all(0)).tolist()


def balanced(cache: CacheManager) -> bool:
    return not any(cache.audit())


def test_a_stream_from_attach_to_release() -> None:
    cache = manager(FULL, SPLIT)
    stream = Stream(text(37))
    assert stream.behind == 37 and cache.attach(stream)
    assert (stream.computed, stream.blocks) == (0, 0)
    assert cache.reserve(stream, 20) and held(cache, stream) == [0, 1]
    assert [pool.num_held for pool in cache.pools] == [2, 4]
    cache.commit(stream, 20)
    assert stream.behind == 17 and cache.reserve(stream, 37)
    assert cache.usage == pytest.approx(3 / 13)
    cache.release(stream)
    cache.release(stream)
    assert cache.usage == 0 and stream.table_row == -1 and stream.computed == 0
    assert all((table == -1).all() for table in cache.tables) and balanced(cache)


def test_rejected_candidates_return_their_pages() -> None:
    cache = manager()
    stream = Stream(text(15))
    cache.attach(stream)
    assert cache.reserve(stream, 15 + 50) and stream.blocks == 5
    cache.commit(stream, 17)
    assert stream.blocks == 2 and held(cache, stream) == [0, 1] and cache.pools[0].num_held == 2
    assert cache.reserve(stream, 33)
    cache.commit(stream, 32)
    assert held(cache, stream) == [0, 1]


@pytest.mark.parametrize("group", [FULL, SPLIT])
def test_a_prefix_is_found_in_whole_blocks(group: LayerGroup) -> None:
    cache = manager(group)
    first = Stream(text(40), ROOT)
    cache.attach(first)
    compute(cache, first)
    second = Stream([*text(40)[:36], 5, 6], ROOT)
    assert cache.attach(second)
    assert second.computed == 32 and held(cache, second) == [0, 1]
    tables = cache.tables[0]
    shared, other = tables[second.table_row], tables[first.table_row]
    assert (shared[:, :2] == other[:, :2]).all() and (shared[:, 2:] == -1).all()
    assert all(cache.pools[0].references[page] == 2 for page in shared[:, :2].flat)
    assert (cache.stats.prefix_queries, cache.stats.prefix_hits) == (2, 1)
    assert balanced(cache)
    cache.release(first)
    cache.release(second)
    third = Stream(text(40), ROOT)
    assert cache.attach(third) and third.computed == 32, "cached pages live on without owners"
    cache.release(third)
    cache.forget_prefixes()
    assert cache.attach(third) and third.computed == 0


def test_one_position_stays_uncomputed() -> None:
    cache = manager()
    first = Stream(text(32), ROOT)
    cache.attach(first)
    compute(cache, first)
    same = Stream(text(32), ROOT)
    cache.attach(same)
    assert same.computed == 16
    longer = Stream([*text(32), 1], ROOT)
    cache.attach(longer)
    assert longer.computed == 32


def test_tenants_and_private_streams_share_nothing() -> None:
    cache = manager()
    first = Stream(text(40), root_key("plain", "m", "a"))
    private = Stream(text(40), None)
    for stream in (first, private):
        cache.attach(stream)
        compute(cache, stream)
    for root in (root_key("plain", "m", "b"), root_key("plain", "n", "a"), None):
        stream = Stream(text(40), root)
        assert cache.attach(stream) and stream.computed == 0
        cache.release(stream)
    assert cache.stats.prefix_hits == 0
    assert cache.stats.prefix_queries == 3


def test_a_difference_before_a_block_hides_it() -> None:
    cache = manager()
    first = Stream(text(50), ROOT)
    cache.attach(first)
    compute(cache, first)
    changed = text(50)
    changed[3] += 1
    other = Stream(changed, ROOT)
    cache.attach(other)
    assert other.computed == 0
    changed = text(50)
    changed[20] += 1
    cache.release(other)
    other = Stream(changed, ROOT)
    cache.attach(other)
    assert other.computed == 16


def test_window_gives_back_what_no_later_row_sees() -> None:
    cache = manager(FULL, WINDOW, SINKS)
    stream = Stream(text(100))
    cache.attach(stream)
    for end in range(1, 101):
        assert cache.reserve(stream, end)
        cache.commit(stream, end)
        for group, (window, sinks) in enumerate([(10**6, 0), (20, 0), (9, 18)]):
            sees = {p // 16 for p in range(end) if p > end - window or p < sinks}
            have = set(held(cache, stream, group))
            assert sees <= have
            # blocks are looked at when one fills up, so at most one more is held
            seen_then = end // 16 * 16
            assert have <= {
                p // 16 for p in range(end) if p > seen_then - window or p < -(-sinks // 16) * 16
            }
    assert held(cache, stream, 1) == [4, 5, 6] and held(cache, stream, 2) == [0, 1, 5, 6]
    cache.release(stream)
    assert all(pool.num_held == 0 for pool in cache.pools) and balanced(cache)


@pytest.mark.parametrize("groups", [(WINDOW,), (FULL, WINDOW), (SINKS,), (FULL, WINDOW, SINKS)])
def test_windowed_groups_resume_where_all_that_is_seen_is_cached(
    groups: tuple[LayerGroup, ...],
) -> None:
    """Every block goes to a fate by chance; the hit is the longest length at which all resume."""
    rng = random.Random(repr(groups))
    lengths = set()
    for _ in range(40):
        cache = manager(*groups, blocks=17)
        first = Stream(text(100), ROOT)
        cache.attach(first)
        compute(cache, first)
        there = [set(range(6)) for _ in groups]  # what is given back stays findable
        for group, pool in enumerate(cache.pools):
            for block in range(6):
                if rng.random() < 0.2:
                    there[group].discard(block)
                    head_group = rng.randrange(groups[group].head_groups)  # one is enough
                    page = pool._index.pop(_with_head(first.keys[block], head_group))
                    del pool._key[page]
                    if pool._cached.pop(page, None):
                        pool._free.append(page)
        assert all(pool._index.keys() == set(pool._key.values()) for pool in cache.pools)
        second = Stream(text(100), ROOT)
        assert cache.attach(second)

        def resumes(length: int, there: list[set[int]] = there) -> bool:
            at = length * PAGE_SIZE  # the first row to run
            for group, have in zip(groups, there, strict=True):
                for p in range(at):
                    seen = group.window is None or p > at - group.window or p < group.sinks
                    if seen and p // PAGE_SIZE not in have:
                        return False
            return True

        expected = max(n for n in range(7) if resumes(n))
        lengths.add(expected)
        assert second.computed == expected * PAGE_SIZE
        for group in range(len(groups)):
            for block in held(cache, second, group):
                pages = cache.tables[group][second.table_row, :, block].tolist()
                keys = [_with_head(first.keys[block], h) for h in range(len(pages))]
                assert pages == [cache.pools[group].lookup(key) for key in keys]
        assert balanced(cache)
        compute(cache, second)
        assert balanced(cache)
    assert len(lengths) > 1, "only one case was tried"


def test_copy_on_write_after_a_fork() -> None:
    cache = manager(FULL, SPLIT)
    parent = Stream(text(23), ROOT)
    cache.attach(parent)
    compute(cache, parent)
    twin = Stream([*parent.tokens, 8], ROOT)
    parent.tokens.append(9)
    assert cache.fork(parent, twin)
    assert twin.computed == 23 and balanced(cache)
    assert all((t[parent.table_row] == t[twin.table_row]).all() for t in cache.tables)
    before = [t[parent.table_row].copy() for t in cache.tables]
    assert cache.reserve(twin, 24)
    copies = cache.take_copies()
    assert len(copies) == 3 and cache.take_copies() == []
    for group, old, new in copies:
        head_group = before[group][:, 1].tolist().index(old)
        assert cache.tables[group][twin.table_row, head_group, 1] == new != old
        assert cache.tables[group][parent.table_row, head_group, 1] == old
    assert all((t[parent.table_row, :, 0] == t[twin.table_row, :, 0]).all() for t in cache.tables)
    assert cache.reserve(parent, 24) and cache.take_copies() == [], "the last owner writes in place"
    assert balanced(cache)
    # both fill their block: different tokens, so both are published
    for stream in (parent, twin):
        stream.tokens += text(20, seed=4)
        compute(cache, stream)
    for stream in (parent, twin):
        again = Stream(stream.tokens[:33], ROOT)
        assert cache.attach(again) and again.computed == 32
        pages = cache.tables[0][:, 0, 1]
        assert pages[again.table_row] == pages[stream.table_row]
        cache.release(again)


def test_a_fork_at_a_block_boundary_copies_nothing_and_shares_no_candidates() -> None:
    cache = manager()
    parent = Stream(text(16), ROOT)
    cache.attach(parent)
    compute(cache, parent)
    assert cache.reserve(parent, 40)
    twin = Stream(text(17), ROOT)
    assert cache.fork(parent, twin) and held(cache, twin) == [0]
    assert cache.reserve(twin, 17) and cache.take_copies() == [] and balanced(cache)
    pages = cache.tables[0][:, 0, 1]
    assert pages[twin.table_row] != pages[parent.table_row]


def test_a_fork_needs_a_table_row() -> None:
    cache = manager(streams=1)
    parent = Stream(text(20))
    cache.attach(parent)
    compute(cache, parent)
    before = snapshot(cache)
    assert not cache.fork(parent, Stream(text(20))) and snapshot(cache) == before


def test_attach_refuses_without_changing_anything() -> None:
    cache = manager(FULL, SPLIT, blocks=5, streams=2)
    first = Stream(text(40), ROOT)
    cache.attach(first)
    compute(cache, first)
    before, stats = snapshot(cache), repr(cache.stats)
    # 3 blocks are held, 2 shared; 5 - 3 = 2 are left
    for length, headroom, fits in [(63, 0, True), (64, 0, False), (47, 1, True), (48, 1, False)]:
        stream = Stream(text(40)[:34] + text(length - 34, 1), ROOT)
        assert cache.attach(stream, headroom) is fits, (length, headroom)
        if fits:
            cache.release(stream)
        assert stream.table_row == -1 and stream.computed == 0
        again = snapshot(cache)
        assert again == before if not fits else again[0] == before[0]
    assert repr(cache.stats) != stats
    second = Stream([1])
    assert cache.attach(second)
    before = snapshot(cache)
    assert not cache.attach(Stream([2])) and snapshot(cache) == before, "no table row"


def test_headroom_counts_cached_pages_that_come_back_to_life() -> None:
    cache = manager(blocks=4)
    first = Stream(text(40), ROOT)
    cache.attach(first)
    compute(cache, first)
    cache.release(first)  # 2 cached, 2 free
    again = Stream(text(40), ROOT)
    assert not cache.attach(again, headroom=2)
    assert cache.attach(again, headroom=1) and again.computed == 32
    assert cache.reserve(again, 41) and cache.reserve(again, 64) and not cache.reserve(again, 65)


def test_reserve_refuses_without_changing_anything() -> None:
    cache = manager(FULL, SPLIT, blocks=4, longest=100)
    stream, twin = Stream(text(20)), Stream(text(20))
    cache.attach(stream)
    compute(cache, stream)
    cache.fork(stream, twin)
    before = snapshot(cache)
    assert not cache.reserve(twin, 49)  # a copy and two blocks: one page too many
    assert not cache.reserve(twin, 10_000)  # beyond the table
    assert snapshot(cache) == before
    assert cache.reserve(twin, 48) and len(cache.take_copies()) == 3
    before = snapshot(cache)
    assert not cache.reserve(stream, 33) and snapshot(cache) == before
    assert cache.reserve(stream, 32)


def test_eviction_forgets_the_ends_of_chains_first() -> None:
    cache = manager(blocks=6)
    first = Stream(text(70), ROOT)
    cache.attach(first)
    compute(cache, first)  # 4 full blocks and one begun
    cache.release(first)
    hog = Stream(text(48, seed=9))
    cache.attach(hog)
    assert cache.reserve(hog, 48)  # two free pages and one cached
    assert cache.pools[0].evictions == 1
    cache.release(hog)
    again = Stream(text(70)[:49], ROOT)
    assert cache.attach(again) and again.computed == 48


def test_a_planted_leak_is_found_and_healed(caplog: pytest.LogCaptureFixture) -> None:
    cache = manager(FULL, SPLIT)
    stream = Stream(text(30))
    cache.attach(stream)
    compute(cache, stream)
    stream_blocks = stream.blocks
    page = cache.pools[1].take()
    reports = cache.audit()
    assert not reports[0] and reports[1].leaked == [page]
    assert cache.heal([stream]) == 1 and cache.stats.leaked_pages == 1
    assert "1 leaked pages found" in caplog.text
    assert balanced(cache) and cache.heal([stream]) == 0
    # a stream that holds pages although nobody runs it: its two blocks of both groups come back
    assert cache.heal([]) == stream_blocks and not cache.streams and cache.usage == 0


def test_a_planted_theft_is_found() -> None:
    cache = manager()
    first, second = Stream(text(30)), Stream(text(30, 1))
    for stream in (first, second):
        cache.attach(stream)
        compute(cache, stream)
    table = cache.tables[0]
    mine, other = table[first.table_row, 0, 0], table[second.table_row, 0, 0]
    table[second.table_row, 0, 0] = mine
    report = cache.audit()[0]
    assert report.stolen == [mine] and report.leaked == [other] and not report.misfiled


class Machine(RuleBasedStateMachine):
    """Random life of streams; the runner's writes are played, so that a wrong share shows."""

    groups: tuple[LayerGroup, ...] = (FULL,)

    def __init__(self) -> None:
        super().__init__()
        self.cache = manager(*self.groups, streams=3)
        self.live: list[Stream] = []
        self.written: dict[tuple[int, int, int], tuple[int, ...]] = {}

    def pick(self, number: int) -> Stream:
        return self.live[number % len(self.live)]

    @rule(
        length=st.integers(1, 120),
        cut=st.sampled_from([0, 7, 16, 33, 64, 120]),
        seed=st.integers(0, 3),
        headroom=st.integers(0, 2),
        private=st.booleans(),
    )
    def attach(self, length: int, cut: int, seed: int, headroom: int, private: bool) -> None:
        tokens = (text(120)[:cut] + text(120, seed + 1))[:length]
        stream = Stream(tokens, None if private else ROOT)
        before = snapshot(self.cache)
        if self.cache.attach(stream, headroom):
            self.live.append(stream)
            assert stream.behind >= 1
            missing = -(-(len(tokens) + 1) // 16) - stream.blocks
            assert all(p.num_available >= missing for p in self.cache.pools)
            self.check_content(stream)
        else:
            assert snapshot(self.cache) == before

    @precondition(lambda self: self.live)
    @rule(
        number=st.integers(0, 9),
        rows=st.integers(1, 40),
        candidates=st.sampled_from([0, 0, 1, 5, 18, 40]),
        accepted=st.integers(0, 40),
    )
    def step(self, number: int, rows: int, candidates: int, accepted: int) -> None:
        stream = self.pick(number)
        if stream.behind == 0:
            stream.tokens.append(len(stream.tokens) % 5)
        rows = min(rows, stream.behind)
        end = stream.computed + rows
        candidates = candidates if end == len(stream.tokens) else 0
        before = snapshot(self.cache)
        if not self.cache.reserve(stream, end + candidates):
            assert snapshot(self.cache) == before
            if candidates == 0 or not self.cache.reserve(stream, end):
                return
            candidates = 0
        for group, old, new in self.cache.take_copies():
            for offset in range(PAGE_SIZE):
                self.written[group, new, offset] = self.written.get((group, old, offset), ())
        accepted = min(accepted, candidates)
        stream.tokens += [7] * accepted
        for position in range(stream.computed, end + candidates):
            history = tuple(stream.tokens[: position + 1])  # rejected ones are short: garbage
            for key in self.pages(stream, position):
                self.written[key] = history
        self.cache.commit(stream, end + accepted)
        self.check_content(stream)

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 9), token=st.integers(0, 3))
    def fork(self, number: int, token: int) -> None:
        stream = self.pick(number)
        for _ in range(4):
            if stream.behind:
                self.step(number, rows=40, candidates=0, accepted=0)
        if stream.behind:
            return
        twin = Stream([*stream.tokens, token], stream.root)
        stream.tokens.append(9)
        if self.cache.fork(stream, twin):
            self.live.append(twin)
            self.check_content(twin)

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        stream = self.pick(number)
        self.live.remove(stream)
        self.cache.release(stream)

    @rule()
    def forget(self) -> None:
        self.cache.forget_prefixes()

    def pages(self, stream: Stream, position: int) -> list[tuple[int, int, int]]:
        block, offset = divmod(position, PAGE_SIZE)
        found = []
        for group, table in enumerate(self.cache.tables):
            found += [(group, p, offset) for p in table[stream.table_row, :, block].tolist()]
        return found

    def check_content(self, stream: Stream) -> None:
        """Every position that a later row can see holds this very history."""
        for position in range(stream.computed):
            for group, page, offset in self.pages(stream, position):
                spec = self.groups[group]
                visible = spec.window is None or (
                    position > stream.computed - spec.window or position < spec.sinks
                )
                if visible:
                    assert page >= 0
                    there = self.written[group, page, offset]
                    assert there == tuple(stream.tokens[: position + 1])

    @invariant()
    def books_balance(self) -> None:
        assert balanced(self.cache)
        for stream in self.live:
            self.check_content(stream)
        for pool in self.cache.pools:
            assert {v: k for k, v in pool._index.items()} == pool._key

    def teardown(self) -> None:
        for stream in self.live:
            self.cache.release(stream)
        assert self.cache.usage == 0 and balanced(self.cache)


@pytest.mark.parametrize("groups", [(FULL,), (SPLIT, WINDOW), (SINKS,)], ids=repr)
def test_random_lives(groups: tuple[LayerGroup, ...]) -> None:
    machine = type("Machine", (Machine,), {"groups": groups})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None)
    )
