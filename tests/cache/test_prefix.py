"""Keys of the prefix index: equal exactly for equal history in equal surroundings."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.cache.layout import PAGE_SIZE
from hasten.cache.prefix import block_key, root_key

names = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=4)


@given(st.tuples(names, names, names), st.tuples(names, names, names))
def test_roots_differ_when_anything_differs(a: tuple[str, ...], b: tuple[str, ...]) -> None:
    assert (root_key(*a) == root_key(*b)) == (a == b)


def test_words_do_not_run_together() -> None:
    assert root_key("ab", "c", "") != root_key("a", "bc", "")
    assert root_key("", "a", "") != root_key("a", "", "")


def test_a_key_knows_all_tokens_before_it() -> None:
    rng = random.Random(3)
    blocks = [[rng.randrange(1 << 17) for _ in range(PAGE_SIZE)] for _ in range(3)]

    def chain(blocks: list[list[int]], tenant: str = "") -> bytes:
        key = root_key("plain", "m", tenant)
        for block in blocks:
            key = block_key(key, block)
        return key

    seen = {chain(blocks), chain(blocks, "other"), chain(blocks[::-1]), chain(blocks[1:])}
    for block in range(3):
        for place in range(PAGE_SIZE):
            changed = [list(b) for b in blocks]
            changed[block][place] ^= 1 << rng.randrange(17)
            seen.add(chain(changed))
    assert len(seen) == 4 + 3 * PAGE_SIZE
    assert chain([list(b) for b in blocks]) == chain(blocks)
    assert len(chain(blocks)) == 32


@pytest.mark.parametrize("length", [0, PAGE_SIZE - 1, PAGE_SIZE + 1])
def test_only_full_blocks_have_keys(length: int) -> None:
    with pytest.raises(AssertionError):
        block_key(b"root", [1] * length)
