"""S2D: exits, and keys that rows which left early did not compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hasten.engine.engine import Engine, EngineConfig
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.speculation.base import Outcome
from hasten.speculation.drafters.s2d import SortedDraftModel
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from tests.speculation.examples import tiny_draft, tiny_target
from tests.speculation.test_draft_model import alone, context, sequence
from tests.speculation.tree_checks import finite, no_row_is_uninitialised, same_as_alone


def model_of(tiny: Callable[..., Decoder]) -> Decoder:
    return tiny("llama", num_hidden_layers=4, seed=2)


def truncated(model: Decoder, layers: int) -> Decoder:
    """The first layers with the last norm and output matrix."""
    import copy
    from dataclasses import replace

    small = copy.copy(model)
    small.config = replace(model.config, num_layers=layers, windows=model.config.windows[:layers])
    small.layers = model.layers[:layers]  # type: ignore[attr-defined]
    return small


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_each_answer_is_that_of_its_exit(tiny: Callable[..., Decoder], threshold: float) -> None:
    """Whatever left early before: a row's answer is that of the sub-model at which it left."""
    model, exits = model_of(tiny), (1, 3, 4)
    subs = [truncated(model, layers) for layers in exits]
    runtime = SortedDraftModel(model, context(model), 4, exits, threshold)
    no_row_is_uninitialised(SimpleNamespace(drafting=SimpleNamespace(runtime=runtime)))  # type: ignore[arg-type]
    s = sequence([7, 3, 9, 1, 2, 2, 5, 8, 13, 21, 34, 55])
    state = runtime.open(s)
    rng = np.random.default_rng(0)
    seen = set()
    for round_ in range(12):
        _, rows = runtime.begin([state])
        for number in range(4):
            assert rows is not None and finite(rows.logits[0])
            text = s.tokens + state.token[1:]
            answers = [alone(sub, text) for sub in subs]
            sure = [np.exp(a.max()) / np.exp(a).sum() >= threshold for a in answers]
            level = next((i for i, yes in enumerate(sure[:-1]) if yes), len(exits) - 1)
            assert np.array_equal(rows.logits[0], answers[level]), (round_, number)
            seen.add(level)
            if number == 3:
                break
            assert runtime.room(state, number + 1)
            state.add(number, rows.best[0])
            rows = runtime.extend([state], [[number + 1]])
        tree = TokenTree.chain(state.token)
        state.place = range(len(tree))
        accepted = int(rng.integers(0, len(tree)))
        tokens = [*tree.token[1 : accepted + 1], int(rng.integers(61))]
        start = len(s.tokens) - 1
        s.tokens += tokens
        path = list(range(accepted + 1))
        runtime.settle(state, Outcome(s, start, tree, path, tokens, np.empty((0, 61))))
    assert sum(runtime.left_at) and seen == {i for i, n in enumerate(runtime.left_at) if n}
    if threshold == 0.2:
        assert len(seen) > 1, "the threshold decides nothing here"
    runtime.close(state)
    assert not runtime._shallow


def test_the_same_as_alone(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    draft = f"s2d(path={tiny_draft(tmp_path)},k=3,exits=1/2,threshold=0.3)"
    world = same_as_alone(tiny_target(tiny), draft, seed=8)
    assert all(world.engine.drafting.runtime.left_at), "both exits are taken"  # type: ignore[attr-defined]


def test_exits_are_checked(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    folder = tiny_draft(tmp_path)
    for inside, reason in (("", "states no exits"), (",exits=2/1", "must rise and end with")):
        with pytest.raises(MethodError, match=reason):
            stack = Stack.parse(f"draft=s2d(path={folder}{inside})")
            Engine(tiny("llama"), stack, EngineConfig(max_sequences=1))
    with pytest.raises(MethodError, match="layer counts"):
        Stack.parse("draft=s2d(exits=a/b)")
