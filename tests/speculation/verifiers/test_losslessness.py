"""Every verifier against every way in which trees come about: exact laws, no noise."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from hasten.methods import cards
from hasten.speculation.tree import TokenTree
from hasten.speculation.verifiers.chain import Chain
from hasten.speculation.verifiers.recursive import Recursive
from tests.speculation.verifiers.harness import (
    DEPTH,
    RULES,
    Branches,
    Draft,
    Markov,
    Verify,
    draw_siblings,
    first_token,
    siblings,
    step_law,
    total_variation,
)

VERIFIERS = {card.name: card.cls() for card in cards("verify") if card.name != "scripted"}
LOSSLESS = [card.name for card in cards("verify") if card.exact != "lossy"]
LARGE = {"groups 2, 2", "sequences 3 x 2", "mixed 2, 1, 1"}
SMALL = {"chosen", "chain of 2", "siblings 3", "groups 3"}


def vocabularies(rule: str) -> tuple[int, ...]:
    """Sizes for which the outcomes can be counted."""
    return (3,) if rule in LARGE else (3, 5) if rule in SMALL else (4,)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("rule", RULES)
def test_the_law_of_the_output_is_the_targets(name: str, rule: str) -> None:
    for vocab in vocabularies(rule):
        rng = random.Random(f"{rule} {vocab}")
        draft = RULES[rule](Markov(vocab, 100 + vocab), rng)
        history = [rng.randrange(vocab), rng.randrange(vocab)]
        verify = VERIFIERS[name].verify
        assert total_variation(verify, draft, Markov(vocab, vocab), history) < 1e-12


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("rule", sorted(RULES.keys() - LARGE))
def test_a_target_that_drafts_for_itself_and_one_that_shares_no_token(name: str, rule: str) -> None:
    """The ends of the scale: no residual has weight, and no candidate is possible."""
    rng = random.Random(rule)
    target = Markov(3, 1)  # laws that are the same
    draft = RULES[rule](target, rng)
    assert total_variation(VERIFIERS[name].verify, draft, target, [0, 1]) < 1e-12
    target, other = Markov.constant([0.6, 0.4, 0.0, 0.0]), Markov.constant([0.0, 0.0, 0.7, 0.3])
    draft = RULES[rule](other, rng)
    assert total_variation(VERIFIERS[name].verify, draft, target, [0, 1]) < 1e-12


@pytest.mark.parametrize("greedy", [True, False], ids=["temperature 0", "one token left"])
@pytest.mark.parametrize("name", VERIFIERS)
@pytest.mark.parametrize("rule", RULES)
def test_greedy_output_is_the_argmax_path(name: str, rule: str, greedy: bool) -> None:
    """Lossy verifiers, too."""
    rng = random.Random(rule)
    target, draft = Markov.certain(3, 7), RULES[rule](Markov(3, 8), rng)
    best = [0, 1]
    for _ in range(DEPTH):
        best.append(int(target.law(best).argmax()))
    law = step_law(VERIFIERS[name].verify, draft, target, best[:2], greedy)
    assert all(list(out) == best[2 : 2 + len(out)] for out, weight in law.items() if weight)
    assert max(map(len, law)) > 1 or rule == "chosen", "no tree held the path"


# ---- planted biases: the harness must see them, and see exactly what they do --------------------

P1, Q1 = [0.5, 0.3, 0.15, 0.05], [0.1, 0.3, 0.2, 0.4]
P2, Q2 = [0.4, 0.35, 0.2, 0.05], [0.3, 0.1, 0.2, 0.4]
P3, Q3 = [0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.5, 0.3]
MIDDLE = [0.4, 0.3, 0.2, 0.1]


def children_of(*tokens: int, law: list[float] | None = None) -> Draft:
    """Chosen children of the root; with a law, they pretend to be drawn."""

    def draft(history: list[int], _: Branches) -> TokenTree:
        laws = {} if law is None else {0: np.array(law)}
        return TokenTree([history[-1], *tokens], [-1] + [0] * len(tokens), law=laws)

    return draft


def redraw_for_each_path(tree: TokenTree, walk: Any) -> list[int]:
    """A draw for every candidate, and a fresh one when none of them matched."""
    for child in tree.children(0):
        if walk.choose(0) == tree.token[child]:
            walk.emit(0, tree.token[child])
            walk.emit(child, walk.choose(child))
            return [0, child]
    walk.emit(0, walk.choose(0))
    return [0]


def recursive_without_scaling(tree: TokenTree, walk: Any) -> list[int]:
    """Siblings drawn without replacement, all weighed by the law of the first."""
    p, q = walk.law(0), tree.law[0]
    for child in tree.children(0):
        token = tree.token[child]
        if walk.accept(p[token] / q[token]):
            walk.emit(0, token)
            walk.emit(child, walk.choose(child))
            return [0, child]
        p = np.maximum(p - q, 0)
        p = p / p.sum()
    walk.emit(0, walk.draw(p))
    return [0]


def middle_resamples_from_its_own_law(history: list[int], run: Branches) -> TokenTree:
    """Speculates within the draft: what was rejected is drawn from the middle model's law, not
    from what is left of it, and that law is declared."""
    middle, tiny = np.array(MIDDLE), np.array(Q1)
    token = run.pick(tiny)
    kept = min(1.0, middle[token] / tiny[token])
    if not run.pick([1 - kept, kept]):
        token = run.pick(middle)
    return TokenTree([history[-1], token], [-1, 0], law={0: middle})


def drop_the_unlikely(history: list[int], run: Branches) -> TokenTree:
    law = np.array(Q1)
    token = run.pick(law)
    if law[token] < 0.25:
        return TokenTree.root(history[-1])
    return TokenTree([history[-1], token], [-1, 0], law={0: law})


def keep_the_likelier(history: list[int], run: Branches) -> TokenTree:
    law = np.array(Q2)
    token = max(draw_siblings(law, 2, run), key=law.__getitem__)
    return TokenTree([history[-1], token], [-1, 0], law={0: law})


@pytest.mark.parametrize(
    ("verify", "draft", "target", "law", "distance"),
    [
        (redraw_for_each_path, children_of(0, 1), P1, (0.675, 0.255, 0.0525, 0.0175), 0.175),
        (redraw_for_each_path, children_of(2), P1, (0.425, 0.255, 0.2775, 0.0425), 0.1275),
        (
            Chain().verify,
            middle_resamples_from_its_own_law,
            P1,
            (0.35, 0.39, 0.195, 0.065),
            0.15,
        ),
        (
            recursive_without_scaling,
            siblings(Markov.constant(Q2), [2]),
            P2,
            (7 / 15, 17 / 60, 0.2, 0.05),
            1 / 15,
        ),
        (
            recursive_without_scaling,
            siblings(Markov.constant(Q3), [3]),
            P3,
            (0.35, 0.35, 0.2, 0.1),
            0.05,
        ),
        (Chain().verify, drop_the_unlikely, P1, (0.5, 0.39, 0.045, 0.065), 0.105),
        (Chain().verify, keep_the_likelier, P2, (0.4159, 0.4474, 0.0472, 0.0895), 0.153),
        (Recursive().verify, keep_the_likelier, P2, (0.4159, 0.4474, 0.0472, 0.0895), 0.153),
        (Chain().verify, children_of(3, law=Q2), P2, (0.25, 0.625, 0, 0.125), 0.35),
        (Chain().verify, children_of(0, law=Q2), P2, (1, 0, 0, 0), 0.6),
    ],
    ids=[
        "a draw for each path",
        "a fresh draw after a miss",
        "middle model resamples from its own law",
        "siblings weighed by the first one's law",
        "three siblings weighed by the first one's law",
        "drawn candidate dropped for its probability",
        "the likelier of two draws kept",
        "the likelier of two draws kept, recursive",
        "chosen candidate weighed as drawn",
        "likely chosen candidate weighed as drawn",
    ],
)
def test_a_planted_bias_is_noticed(
    verify: Verify, draft: Draft, target: list[float], law: tuple[float, ...], distance: float
) -> None:
    """Mistakes that were seen elsewhere, with the laws that they lead to."""
    model, history = Markov.constant(target), [0, 0]
    found = first_token(verify, draft, model, history)
    assert np.abs(found - law).max() < 5e-5
    assert abs(np.abs(found - target).sum() / 2 - distance) < 5e-4
    assert total_variation(verify, draft, model, history) > 0.04
