"""The page pool: three states, least-recently-used eviction, and a ledger that notices."""

from __future__ import annotations

import pytest

from hasten.cache.pool import PagePool


def states(pool: PagePool) -> tuple[int, int, int]:
    cached = len(pool._cached)
    return pool.num_available - cached, cached, pool.num_held


def test_pages_are_taken_once_and_come_back() -> None:
    pool = PagePool(5)
    pages = [pool.take() for _ in range(5)]
    assert sorted(pages) == list(range(5)) and states(pool) == (0, 0, 5)
    with pytest.raises(IndexError, match="empty"):
        pool.take()
    pool.drop(pages[2])
    assert states(pool) == (1, 0, 4) and pool.take() == pages[2]


def test_references_are_counted() -> None:
    pool = PagePool(3)
    page = pool.take()
    assert pool.share(page) == page and pool.references[page] == 2
    pool.drop(page)
    assert pool.num_held == 1
    pool.drop(page)
    assert states(pool) == (3, 0, 0)
    with pytest.raises(RuntimeError, match=f"page {page} is dropped more often"):
        pool.drop(page)
    assert pool.references[page] == 0
    with pytest.raises(KeyError):
        pool.share(page)  # free: its content is nobody's


def test_published_pages_stay_findable_after_their_last_owner() -> None:
    pool = PagePool(3)
    page = pool.take()
    pool.publish(page, b"a")
    assert pool.lookup(b"a") == page and pool.lookup(b"b") is None
    pool.drop(page)
    assert states(pool) == (2, 1, 0) and pool.lookup(b"a") == page
    assert pool.share(page) == page and states(pool) == (2, 0, 1)


def test_a_key_keeps_its_first_page_and_a_page_its_first_key() -> None:
    pool = PagePool(3)
    first, second = pool.take(), pool.take()
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    pool.publish(first, b"b")
    assert pool.lookup(b"a") == first and pool.lookup(b"b") is None
    pool.drop(second)
    assert states(pool) == (2, 0, 1), "a page that is in no index becomes free"


def test_eviction_takes_the_least_recently_used_after_all_free_ones() -> None:
    pool = PagePool(4)
    pages = [pool.take() for _ in range(4)]
    for page in pages[:3]:
        pool.publish(page, bytes([page]))
    for page in (pages[1], pages[0], pages[2], pages[3]):
        pool.drop(page)
    pool.drop(pool.share(pages[1]))  # used again: now the youngest
    assert pool.take() == pages[3] and pool.evictions == 0
    assert [pool.take() for _ in range(3)] == [pages[0], pages[2], pages[1]]
    assert pool.evictions == 3
    assert all(pool.lookup(bytes([page])) is None for page in pages)
    pool.publish(pages[0], b"new")
    assert pool.lookup(b"new") == pages[0]


def test_forget_empties_the_index_only() -> None:
    pool = PagePool(3)
    held, cached = pool.take(), pool.take()
    pool.publish(held, b"h")
    pool.publish(cached, b"c")
    pool.drop(cached)
    pool.forget()
    assert pool.lookup(b"h") is None and pool.lookup(b"c") is None
    assert states(pool) == (2, 0, 1) and pool.references[held] == 1
    assert not pool.audit([held])


def sound() -> tuple[PagePool, list[int]]:
    """Seven pages: 0 and 1 held (0 twice), 2 cached, the others free; and the owners' entries."""
    pool = PagePool(7)
    pages = [pool.take() for _ in range(3)]
    assert pages == [0, 1, 2]
    pool.publish(2, b"x")
    pool.drop(2)
    pool.share(0)
    return pool, [0, 1, 0]


def test_audit_of_a_sound_pool() -> None:
    pool, owned = sound()
    report = pool.audit(owned)
    assert not report and not (report.leaked or report.stolen or report.misfiled)


def test_audit_finds_a_leak_and_heal_returns_it() -> None:
    pool, owned = sound()
    leaked = pool.take()
    assert pool.audit(owned).leaked == [leaked]
    assert pool.heal(owned) == 1
    assert not pool.audit(owned) and pool.num_held == 2
    assert pool.heal(owned) == 0


def test_a_leaked_page_with_a_key_becomes_cached() -> None:
    pool, owned = sound()
    leaked = pool.take()
    pool.publish(leaked, b"y")
    pool.share(leaked)
    assert pool.heal(owned) == 1
    assert not pool.audit(owned) and pool.lookup(b"y") == leaked and states(pool) == (3, 2, 2)


def test_audit_finds_a_count_that_is_too_high_or_too_low() -> None:
    pool, _ = sound()
    assert pool.audit([0, 1]).leaked == [0]
    assert pool.audit([0, 0, 1, 1]).stolen == [1]
    assert pool.audit([0, 0, 1, 5]).stolen == [5]
    assert pool.audit([0, 0, 1, 2]).stolen == [2]


@pytest.mark.parametrize("page", [2, 5])
def test_heal_takes_a_stolen_page_from_the_lists(page: int) -> None:
    pool, owned = sound()
    pool.heal([*owned, page])
    assert not pool.audit([*owned, page])
    assert page not in [pool.take() for _ in range(pool.num_available)]


def test_audit_finds_a_misfiled_page() -> None:
    pool, owned = sound()
    lost = pool._free.pop()
    assert pool.audit(owned).misfiled == [lost]
    pool._free += [lost, lost]
    assert pool.audit(owned).misfiled == [lost]
    pool._free.pop()
    pool._free.append(1)
    assert pool.audit(owned).misfiled == [1]
    pool.heal(owned)
    assert not pool.audit(owned) and states(pool) == (4, 1, 2)
