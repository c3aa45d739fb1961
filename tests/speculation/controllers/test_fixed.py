"""The fixed controller: the same budget for everybody, never more than there is room."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.speculation.base import Load
from hasten.speculation.controllers.fixed import Fixed


@given(k=st.integers(0, 20), sequences=st.integers(0, 9), left=st.integers(0, 50))
def test_budgets(k: int, sequences: int, left: int) -> None:
    waiting: list[Any] = [None] * sequences
    budgets = Fixed(k).plan(waiting, Load(decoding=sequences, rows_taken=3, rows_left=left))
    assert len(budgets) == sequences and len(set(budgets)) <= 1
    assert sum(budgets) <= left and all(0 <= b <= k for b in budgets)
    if sequences:
        # as many as k allows, or so many that one more each would not fit
        assert budgets[0] == k or (budgets[0] + 1) * sequences > left


def test_bad_parameter() -> None:
    with pytest.raises(ValueError, match="k=-1: a budget cannot be negative"):
        Fixed(-1)
