"""Every drafter with every exact verifier in every condition: not one token differs.

CI runs a covering array of strength 3, so any three settings meet in some row, with 64 tokens a
row. ``pytest -m soak`` runs all pairs of drafter and verifier in each condition with 10,000 tokens
(``HASTEN_CELL_TOKENS``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.models.base import Decoder
from tests.speculation.covering import covering_array, rows_of
from tests.speculation.matrix import FACTORS, Matrix, name

PARTS = 8
ROWS = rows_of(FACTORS, 3)


def test_the_array_covers_what_it_claims() -> None:
    levels = [3, 4, 2, 2, 5]
    rows = covering_array(levels, 3)
    for a in range(5):
        for b in range(a):
            for c in range(b):
                seen = {(row[a], row[b], row[c]) for row in rows}
                assert len(seen) == levels[a] * levels[b] * levels[c]
    assert len(rows) < 2 * 5 * 4 * 3


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.timeout(900)
def test_not_one_token_differs(tiny: Callable[..., Decoder], tmp_path: Path, part: int) -> None:
    matrix = Matrix(tiny, tmp_path)
    wrong = []
    for row in ROWS[part::PARTS]:
        difference = matrix.run(row)
        if difference:
            wrong.append(f"{name(row)}: {difference}")
    assert not wrong, f"{len(wrong)} rows differ, the first: {wrong[0]}"
    assert matrix.accepted > 5 and matrix.preempted and matrix.hits


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_many_tokens_a_cell(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    """All pairs of drafter and verifier, each in every condition; ``HASTEN_REPORT`` gets a table
    of tokens compared and accepted."""
    total = int(os.environ.get("HASTEN_CELL_TOKENS", "10000"))
    matrix = Matrix(tiny, tmp_path)
    plain = {key: values[0] for key, values in FACTORS.items()}
    conditions = [{}] + [
        {key: value}
        for key, values in FACTORS.items()
        if key not in ("draft", "verify")
        for value in values[1:]
    ]
    verifiers = [card.name for card in FACTORS["verify"]]
    lines = [f"| draft | {' | '.join(verifiers)} |", "|" + "---|" * (len(verifiers) + 1)]
    for draft in FACTORS["draft"]:
        cells = []
        for verify in FACTORS["verify"]:
            tokens, accepted, turn = matrix.compared, matrix.accepted, 0
            while turn < len(conditions) or matrix.compared - tokens < total:
                condition = conditions[turn % len(conditions)]
                row = {**plain, "draft": draft, "verify": verify, **condition}
                difference = matrix.run(row, tokens=64)
                assert difference is None, f"{name(row)}: {difference}"
                turn += 1
            cells.append(f"{matrix.compared - tokens:,} ({matrix.accepted - accepted:,})")
        lines.append(f"| `{draft.name}` | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if "HASTEN_REPORT" in os.environ:
        Path(os.environ["HASTEN_REPORT"]).write_text("\n".join(lines) + "\n")
