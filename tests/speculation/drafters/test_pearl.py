"""PEARL: drafts that were written beside the target's pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.engine.engine import Engine, EngineConfig
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.models.loading import load_model
from hasten.stack import Stack
from tests.speculation.examples import tiny_draft, tiny_target
from tests.speculation.tree_checks import check_trees, drive, same_as_alone, trees_of


def test_a_draft_equal_to_the_target_is_always_ahead(tmp_path: Path) -> None:
    """The first pass has no draft; then each verifies k - 1 tokens and finds the next draft done:
    k tokens a pass, and no token beyond a whole chain for free."""
    folder = tiny_draft(tmp_path)
    engine = Engine(
        load_model(folder, progress=False),
        Stack.parse(f"draft=pearl(path={folder},k=4)"),
        EngineConfig(max_sequences=3),
    )
    drive(engine, [[5] * n + [n] for n in (3, 20, 40)], tokens=42)
    found = engine.stats.speculation
    assert found.alpha_drafted == 1.0
    # prompt, one pass without a draft (it is written meanwhile), then chains of 3, then of 4
    drafting = engine.drafting
    assert drafting.carried >= found.passes - 3 * 2  # type: ignore[attr-defined]
    assert found.tau is not None and found.tau > 3.2


@pytest.mark.parametrize(("verify", "drawn"), [("sample-match", False), ("chain", True)])
def test_chains(tmp_path: Path, verify: str, drawn: bool) -> None:
    draft = f"pearl(path={tiny_draft(tmp_path)},k=3)"
    seen = trees_of(tmp_path, draft, verify, temperature=0.8, budget=6)
    check_trees(seen, drawn=drawn)
    assert all(tree.is_chain for _, tree, _ in seen)


def test_the_same_as_alone(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    draft = f"pearl(path={tiny_draft(tmp_path)},k=3)"
    world = same_as_alone(tiny_target(tiny), draft, seed=9, least=10)
    assert world.engine.drafting.carried > 5  # type: ignore[attr-defined]


def test_nothing_unverified_reaches_the_caller(tmp_path: Path) -> None:
    """What is ahead of the target is never output: after every step the tokens are those of plain
    decoding so far."""
    folder = tiny_draft(tmp_path)
    model = load_model(folder, progress=False)
    plain = drive(Engine(model, Stack.parse(""), EngineConfig(max_sequences=1)), [[3, 1, 4]])[0]
    engine = Engine(
        model, Stack.parse(f"draft=pearl(path={folder},k=4)"), EngineConfig(max_sequences=1)
    )
    from hasten.decoding.params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    request = engine.add([3, 1, 4], params)
    while engine.has_work:
        engine.step()
        out = request.sequences[0].tokens[3:]
        assert out == plain[: len(out)]


def test_one_token_would_always_be_spent() -> None:
    with pytest.raises(MethodError, match="two or more"):
        Stack.parse("draft=pearl(k=1)")
