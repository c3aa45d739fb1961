"""EasySpec: fuzzy layers, exact calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.speculation.base import Outcome
from hasten.speculation.draft_model import DraftModel
from hasten.speculation.drafters.easyspec import Grouped
from hasten.speculation.tree import TokenTree
from tests.speculation.examples import tiny_draft, tiny_target
from tests.speculation.test_draft_model import alone, context, sequence
from tests.speculation.tree_checks import same_as_alone


def rows_of(model: Decoder, group: int, tokens: list[int], nodes: list[int]) -> np.ndarray:
    """The row after a chain of nodes."""
    runtime = DraftModel(model, context(model), 8, grown_by=Grouped(model, group), keep=False)
    state = runtime.open(sequence(list(tokens)))
    _, rows = runtime.begin([state])
    for number, token in enumerate(nodes):
        assert runtime.room(state, number + 1)
        state.add(number, token)
        rows = runtime.extend([state], [[number + 1]])
    assert rows is not None
    return rows.logits[0].copy()


def test_groups_of_one_are_the_plain_draft(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama", num_hidden_layers=6)
    tokens, nodes = [9, 8, 7], [6, 5]
    assert np.array_equal(rows_of(model, 1, tokens, nodes), alone(model, tokens + nodes))


def test_larger_groups_are_not(tiny: Callable[..., Decoder]) -> None:
    model = tiny("llama", num_hidden_layers=6)
    tokens, nodes = [9, 8, 7], [6, 5]
    assert not np.array_equal(rows_of(model, 4, tokens, nodes), alone(model, tokens + nodes))
    # with two layers there is no middle
    small = tiny("llama")
    assert np.array_equal(rows_of(small, 4, tokens, nodes), alone(small, tokens + nodes))


@pytest.mark.parametrize("calibrate", [True, False])
def test_calibration_wipes_what_was_fuzzy(tiny: Callable[..., Decoder], calibrate: bool) -> None:
    """After a round that was accepted whole the next row is that of an exact draft, or not."""
    model = tiny("llama", num_hidden_layers=6)
    runtime = DraftModel(model, context(model), 8, grown_by=Grouped(model, 4), keep=not calibrate)
    s = sequence([9, 8, 7])
    state = runtime.open(s)
    runtime.begin([state])
    for number, token in enumerate([6, 5, 4]):
        assert runtime.room(state, number + 1)
        state.add(number, token)
        runtime.extend([state], [[number + 1]])
    tree = TokenTree.chain(state.token)
    state.place = range(len(tree))
    s.tokens += [6, 5, 4, 3]
    outcome = Outcome(s, 2, tree, [0, 1, 2, 3], [6, 5, 4, 3], np.empty((0, 61)))
    runtime.settle(state, outcome)
    _, rows = runtime.begin([state])
    assert rows is not None
    assert np.array_equal(rows.logits[0], alone(model, s.tokens)) == calibrate


def test_the_same_as_alone(tiny: Callable[..., Decoder], tmp_path: Path) -> None:
    draft = f"easyspec(path={tiny_draft(tmp_path, layers=4)},k=3,group=2)"
    same_as_alone(tiny_target(tiny), draft, seed=6)


def test_layers_that_do_not_come_apart_are_refused(tiny: Callable[..., Decoder]) -> None:
    model = tiny(
        "gemma2", sliding_window=12, query_pre_attn_scalar=8, attn_logit_softcapping=5.0,
        final_logit_softcapping=9.0, hidden_activation="gelu_pytorch_tanh",
        hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
    )  # fmt: skip
    with pytest.raises(MethodError, match="gemma2"):
        Grouped(model, 2)
