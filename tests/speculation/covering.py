"""Covering arrays: few rows in which every combination of values of any few factors occurs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from math import prod

Row = tuple[int, ...]


def covering_array(levels: Sequence[int], strength: int, seed: int = 0) -> list[Row]:
    """Rows with a value below ``levels[f]`` for each factor f, such that for any ``strength``
    factors every combination of their values is in some row.

    Greedy (AETG; Cohen et al., 1997): each row starts from a combination that is still missing and
    is the best of some random completions.
    """
    rng = random.Random(seed)
    groups = list(combinations(range(len(levels)), strength))
    missing = {
        group: set(product(*(range(levels[f]) for f in group)))
        for group in groups
        if prod(levels[f] for f in group)
    }
    rows: list[Row] = []
    while missing:
        group = max(missing, key=lambda g: len(missing[g]))
        best: Row = ()
        gain = 0
        for _ in range(12):
            row = [rng.randrange(n) for n in levels]
            for factor, value in zip(group, rng.choice(sorted(missing[group])), strict=True):
                row[factor] = value
            found = sum(tuple(row[f] for f in g) in left for g, left in missing.items())
            if found > gain:
                best, gain = tuple(row), found
        rows.append(best)
        for g in list(missing):
            missing[g].discard(tuple(best[f] for f in g))
            if not missing[g]:
                del missing[g]
    return rows


def rows_of(factors: Mapping[str, Sequence[object]], strength: int) -> list[dict[str, object]]:
    """The same by name."""
    names = list(factors)
    array = covering_array([len(factors[name]) for name in names], strength)
    return [
        {name: factors[name][value] for name, value in zip(names, row, strict=True)}
        for row in array
    ]
