"""The portfolio: who proposes, who learns, and what drafters are told of others' drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.methods import MethodError
from hasten.models.base import Decoder
from hasten.speculation.base import Outcome, StatelessDrafting
from hasten.speculation.drafters.any import Portfolio
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack


@dataclass
class Says(StatelessDrafting):
    """Proposes always the same tokens; keeps what it is told."""

    words: list[int]
    told: list[Outcome] = field(default_factory=list)
    closed: int = 0

    def open(self, sequence: Any) -> list[int]:
        return [len(self.words)]

    def propose(self, sequences: Sequence[Any], budgets: Sequence[int]) -> list[TokenTree]:
        assert all(s.draft_state == [len(self.words)] for s in sequences)
        return [
            TokenTree.chain([s.tokens[-1], *self.words[:b]])
            for s, b in zip(sequences, budgets, strict=True)
        ]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        self.told += outcomes

    def close(self, sequence: Any) -> None:
        self.closed += 1


def portfolio(*words: list[int]) -> tuple[Portfolio, list[Says], Any]:
    parts = [Says(w) for w in words]
    found = Portfolio(parts, [f"part {i}" for i in range(len(parts))])
    sequence = SimpleNamespace(tokens=[7], tenant="", num_prompt=1, draft_state=None)
    sequence.draft_state = found.open(sequence)
    return found, parts, sequence


def outcome(sequence: Any, tree: TokenTree) -> Outcome:
    logits = np.zeros((len(tree), 4), np.float32)
    return Outcome(sequence, 0, tree, [0, 1][: len(tree)], [1], logits)


def test_the_first_that_proposes() -> None:
    both, _, sequence = portfolio([], [1, 2, 3], [4])
    (tree,) = both.propose([sequence], [2])
    assert (tree.token, tree.source) == ([7, 1, 2], [0, 2, 2])
    assert both.sources == ["part 0", "part 1", "part 2"]
    assert both.propose([sequence], [0])[0].token == [7]


def test_the_assigned_ones_in_their_order() -> None:
    both, _, sequence = portfolio([1], [2, 3, 4], [])
    both.assign(sequence, [(1, 5)])
    assert both.propose([sequence], [5])[0].token == [7, 2, 3, 4]
    both.assign(sequence, [(2, 5)])
    assert both.propose([sequence], [5])[0].token == [7]
    both.take_turns()
    both.assign(sequence, [(2, 5), (1, 2), (0, 5)])
    assert both.propose([sequence], [5])[0].token == [7, 2, 3]  # its own budget
    assert both.propose([sequence], [1])[0].token == [7, 2]
    assert both.take_turns() == {id(sequence): [2, 1]}
    assert both.take_turns() == {}


def test_sequences_with_other_orders_together() -> None:
    both, _, first = portfolio([1], [2], [])
    second, third = (SimpleNamespace(tokens=[8], tenant="", num_prompt=1) for _ in range(2))
    for sequence, shares in ((first, [(2, 1), (0, 1)]), (second, [(1, 1)]), (third, None)):
        if sequence is not first:
            sequence.draft_state = both.open(sequence)
        if shares is not None:
            both.assign(sequence, shares)
    trees = both.propose([first, second, third], [1, 1, 1])
    assert [tree.token for tree in trees] == [[7, 1], [8, 2], [8, 1]]


def test_everybody_learns_and_nobody_takes_a_foreign_tree_for_its_own() -> None:
    both, parts, sequence = portfolio([1], [2], [3])
    both.ask(2, [sequence], [1])  # a proposal that is not verified
    both.assign(sequence, [(0, 1)])
    (tree,) = both.propose([sequence], [1])
    both.observe([outcome(sequence, tree)])
    own, other, asked = (part.told[0] for part in parts)
    assert own.tree is tree and other.tree is tree
    assert asked.tree.token == [7] and asked.path == [0] and len(asked.logits) == 1
    assert asked.tokens == own.tokens
    assert [o.sequence.draft_state for o in (own, other, asked)] == [[1], [1], [1]]
    both.propose([sequence], [1])
    both.observe([outcome(sequence, tree)])
    assert parts[2].told[1].tree is tree  # what was asked before is settled


def test_close_reaches_all() -> None:
    both, parts, sequence = portfolio([1], [2])
    both.close(sequence)
    assert [part.closed for part in parts] == [1, 1]


def test_one_drafter_is_no_choice() -> None:
    with pytest.raises(MethodError, match="at least two drafters"):
        Stack.parse("draft=any(of=prompt-lookup)")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("control", ["fixed", "auto", "smartspec"])
def test_with_a_draft_model_on_the_reference_model(temperature: float, control: str) -> None:
    from hasten import LLM

    texts = ["def add(a, b):", "for i in range(10):\n", "import os\nimport os.path\nimport "]
    params = SamplingParams(max_tokens=48, temperature=temperature, seed=3, n=2)
    stack = f"draft=any(of=prompt-lookup|model),control={control}"
    found = []
    for choice in (None, stack):
        llm = LLM("reference", stack=choice, max_sequences=4, max_length=256)
        found.append([[o.text for o in llm.generate(texts, params)] for _ in range(2)])
        llm.engine.check_ledger()
    assert found[0] == found[1]
    if control == "fixed":  # the others draft where the machine's times make it pay
        assert llm.engine.stats.speculation.accepted > 0


def test_preemption_and_forks(tiny: Callable[..., Decoder]) -> None:
    model = tiny()
    found = []
    for stack in ("", "draft=any(of=prompt-lookup(max_ngram=1)|prompt-lookup(k=2))"):
        probe = Engine(model, Stack.parse(), EngineConfig(max_sequences=1))
        room = 9 * probe.cache.layout.block_bytes()
        config = EngineConfig(max_sequences=4, max_batch_tokens=16, kv_bytes=room)
        engine = Engine(model, Stack.parse(stack), config)
        params = SamplingParams(max_tokens=30, temperature=0.0, n=2, ignore_eos=True)
        requests = [engine.add([1, 2, 3, 1, 2 + i], params) for i in range(4)]
        while engine.has_work:
            engine.step()
        engine.check_ledger()
        found.append([s.tokens for r in requests for s in r.sequences])
    assert found[0] == found[1]
