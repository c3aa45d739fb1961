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


@pytest.fixture(scope="module")
def matrix(tiny: Callable[..., Decoder], tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tiny, tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("draft", FACTORS["draft"], ids=lambda card: card.name)
@pytest.mark.timeout(900)
def test_not_one_token_differs(matrix: Matrix, draft: Card) -> None:
    matrix.seen.clear()
    rows = [row for row in ROWS if row["draft"] is draft]
    wrong = []
    for row in rows:
        difference = matrix.run(row)
        if difference:
            wrong.append(f"{name(row)}: {difference}")
    assert not wrong, f"{len(wrong)} rows differ, the first: {wrong[0]}"
    # and the rows are about what they say: enough text, drafts that are right and wrong
    seen = matrix.seen
    assert seen["compared"] > 48 * len(rows), f"outputs end too early to compare anything: {seen}"
    assert seen["preempted"] and seen["hits"], seen
    if draft.name != "none":
        assert seen["accepted"] and seen["rejected"], seen
    # no script foresees two tokens, and how far del drafts hangs on the time that passes take
    if draft.name not in ("none", "scripted", "del"):
        assert seen["partly"], f"no draft was right at first and wrong later: {seen}"


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
    for condition in conditions:
        if condition.get("pool") == "tiny":  # where one request is alone it has room enough
            condition["together"] = 4
    cells = []
    for verify in FACTORS["verify"]:
        tokens, accepted, turn = matrix.seen["compared"], matrix.seen["accepted"], 0
        while turn < len(conditions) or matrix.seen["compared"] - tokens < total:
            seed, place = divmod(turn, len(conditions))
            row = {**plain, "draft": draft, "verify": verify, **conditions[place]}
            difference = matrix.run(row, tokens=64, seed=seed)
            assert difference is None, f"{name(row)}: {difference}"
            turn += 1
        seen = matrix.seen
        assert seen["preempted"] and seen["hits"], seen
        cells.append(f"{seen['compared'] - tokens:,} ({seen['accepted'] - accepted:,})")
    if "HASTEN_REPORT" in os.environ:
        with Path(os.environ["HASTEN_REPORT"]).open("a") as table:
            if not table.tell():
                verifiers = [card.name for card in FACTORS["verify"]]
                table.write(f"| draft | {' | '.join(verifiers)} |\n")
                table.write("|" + "---|" * (len(verifiers) + 1) + "\n")
            table.write(f"| `{draft.name}` | {' | '.join(cells)} |\n")
