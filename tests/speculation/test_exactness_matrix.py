"""Every drafter with every exact verifier in every condition: not one token differs.

CI runs a covering array of strength 3, so any three settings meet in some row, with 64 tokens a
row. ``pytest -m soak`` runs all pairs of drafter and verifier in each condition with 10,000 tokens
a pair (``HASTEN_CELL_TOKENS``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.methods import Card
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
    rows = ROWS[part::PARTS]
    for row in rows:
        difference = matrix.run(row)
        if difference:
            wrong.append(f"{name(row)}: {difference}")
    assert not wrong, f"{len(wrong)} rows differ, the first: {wrong[0]}"
    assert matrix.compared > 48 * len(rows), "outputs end too early to compare anything"
    assert matrix.accepted > len(rows) and matrix.preempted and matrix.hits


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("draft", FACTORS["draft"], ids=lambda card: card.name)
def test_many_tokens_a_cell(tiny: Callable[..., Decoder], tmp_path: Path, draft: Card) -> None:
    """A drafter with each verifier in every condition, on prompts that are new in each round over
    the conditions. ``HASTEN_REPORT`` names a file that gets a row of tokens compared (and drafts
    accepted) for each drafter."""
    total = int(os.environ.get("HASTEN_CELL_TOKENS", "10000"))
    matrix = Matrix(tiny, tmp_path)
    plain = {key: values[0] for key, values in FACTORS.items()}
    conditions = [{}] + [
        {key: value}
        for key, values in FACTORS.items()
        if key not in ("draft", "verify")
        for value in values[1:]
    ]
    cells = []
    for verify in FACTORS["verify"]:
        tokens, accepted, turn = matrix.compared, matrix.accepted, 0
        while turn < len(conditions) or matrix.compared - tokens < total:
            seed, place = divmod(turn, len(conditions))
            row = {**plain, "draft": draft, "verify": verify, **conditions[place]}
            difference = matrix.run(row, tokens=64, seed=seed)
            assert difference is None, f"{name(row)}: {difference}"
            turn += 1
        cells.append(f"{matrix.compared - tokens:,} ({matrix.accepted - accepted:,})")
    if "HASTEN_REPORT" in os.environ:
        with Path(os.environ["HASTEN_REPORT"]).open("a") as table:
            if not table.tell():
                verifiers = [card.name for card in FACTORS["verify"]]
                table.write(f"| draft | {' | '.join(verifiers)} |\n")
                table.write("|" + "---|" * (len(verifiers) + 1) + "\n")
            table.write(f"| `{draft.name}` | {' | '.join(cells)} |\n")
