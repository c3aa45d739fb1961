"""What the tests of the two front doors share."""

from __future__ import annotations

import random

from hasten.api.frontend import Frontend

SIZES = {"max_sequences": 32, "max_length": 512, "kv_bytes": 48 << 20}
"""Enough for these tests; the default would clear gigabytes of pages."""


def assert_idle(front: Frontend) -> None:
    """No request, nothing kept about one, no held page, and a ledger that balances."""
    assert not front.engine.requests and not front.engine.has_work
    assert not front._entries
    assert front.engine.cache.usage == 0
    front.engine.check_ledger()


def prompts(count: int, seed: int = 0) -> list[str]:
    """Prompts of different lengths; most repeat themselves, so that drafts are proposed, and some
    begin alike, so that prefixes are shared."""
    rng = random.Random(seed)
    words = ("def", "return", "self", "value", "for", "in", "range", "list", "import", "x", "y")
    made = []
    for i in range(count):
        phrase = " ".join(rng.choices(words, k=rng.randint(3, 12)))
        head = "# a beginning that several prompts share, longer than two pages of the cache\n" * 2
        made.append((head if i % 3 == 0 else "") + f"{phrase}\n" * rng.randint(1, 5))
    return made
