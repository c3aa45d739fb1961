"""Counts against the law that they should come from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def chi2(counts: NDArray[Any], probs: NDArray[Any]) -> float:
    """p-value of Pearson's test (Wilson-Hilferty); cells with few expected are put together."""
    total = counts.sum()
    assert counts[probs == 0].sum() == 0, "an impossible outcome"
    order = np.argsort(-probs)
    cells: list[list[float]] = []
    for i in order[probs[order] > 0]:
        if cells and (probs[i] * total < 8 or cells[-1][1] < 8):
            cells[-1][0] += counts[i]
            cells[-1][1] += probs[i] * total
        else:
            cells.append([counts[i], probs[i] * total])
    freedom = len(cells) - 1
    assert freedom > 0
    x = sum((seen - due) ** 2 / due for seen, due in cells)
    z = ((x / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))
