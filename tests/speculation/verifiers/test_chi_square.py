"""The laws of sampled texts from a running engine, with drafts that are drawn.

Marginals of the first three tokens and of their two bigrams are held against the laws that the
model itself gives, computed token by token. A table of whole texts would hide a small bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hasten.decoding.constraints.base import ConstraintState
from hasten.decoding.params import SamplingParams, StructuredOutputs
from hasten.decoding.sampling import Sampler
from hasten.engine.engine import Engine, EngineConfig
from hasten.models.base import Decoder
from hasten.speculation.base import Outcome, StatelessDrafting
from hasten.speculation.drafters.nested import NestedDrafting
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from tests.decoding.chi_square import chi2
from tests.decoding.constraints.characters import in_characters
from tests.speculation.examples import tiny_draft
from tests.speculation.sampling_drafter import SamplingDrafter, card

VOCAB = 8
LETTERS = "abcdefgh"
LENGTH = 3
ROOT = 3
ALPHA = 1e-4
SEEDS = 3

PAIRS = [
    ("chain", "chain"),
    ("chain", "siblings"),
    ("recursive", "chain"),
    ("recursive", "siblings"),
    ("recursive", "groups"),
    ("recursive", "mixed"),
    ("k-seq", "groups"),
    ("k-seq", "sequences"),
    ("k-seq", "siblings"),
    ("gumbel", "siblings"),
    ("sample-match", "sequences"),
]
"""Verifiers with kinds of drafts."""

NESTED = ["chain", "recursive"]
"""Verifiers with drafts that a draft model checked before."""

PROCESSED_PAIRS = [("chain", "chain"), ("recursive", "mixed"), ("k-seq", "sequences")]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Decoder]) -> Decoder:
    return tiny("llama", seed=5, scale=0.3, vocab_size=VOCAB, eos_token_id=None)


Laws = dict[tuple[int, ...], NDArray[np.float32]]


@dataclass(frozen=True)
class Watching(StatelessDrafting):
    """Proposes nothing and notes the raw logits after each text."""

    found: Laws = field(default_factory=dict)

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for seen in outcomes:
            self.found[tuple(seen.sequence.tokens[1 : seen.start + 1])] = seen.logits[0].copy()


Watching.card = card(Watching)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def after(model: Decoder) -> Laws:
    """The model's logits after each text, computed from scratch, without drafts."""
    watching = Watching()
    stack = Stack({**Stack.parse("").methods, "draft": watching})
    engine = Engine(model, stack, EngineConfig(prefix_reuse=False))
    for length in range(LENGTH):
        for head in itertools.product(range(VOCAB), repeat=length):
            engine.add([ROOT, *head], SamplingParams(max_tokens=1, temperature=0))
    while engine.has_work:
        engine.step()
    return watching.found


def constraint(model: Decoder, params: SamplingParams) -> ConstraintState | None:
    """Where an output stands before its first token."""
    engine = in_characters(Engine(model, Stack.parse(""), EngineConfig(max_sequences=1)), LETTERS)
    return engine.constraining.open(params, frozenset())


def constrained_law(model: Decoder, after: Laws, history: bool = True) -> NDArray[np.float64]:
    """The same under `CONSTRAINED`."""
    params, law = CONSTRAINED.resolved({}), np.ones((VOCAB,) * LENGTH)
    for head, row in after.items():
        state = constraint(model, params)
        sampler = Sampler(params, [ROOT], frozenset(), 0, 0, (), state)
        if not law[head].any():
            continue  # no text begins so
        for token in head if history else ():
            sampler.push(token)
        law[head] *= sampler.law(row).reshape((VOCAB,) + (1,) * (LENGTH - len(head) - 1))
    return law


def joint_law(after: Laws, params: SamplingParams, history: bool = True) -> NDArray[np.float64]:
    """The law of the texts, float64 [V, V, V], processed and filtered; ``history`` = as each
    text's own tokens demand."""
    params = params.resolved({})
    law = np.ones((VOCAB,) * LENGTH)
    for head, row in after.items():
        sampler = Sampler(params, [ROOT], frozenset(), 0, 0, bad_words(params))
        for token in head if history else ():
            sampler.push(token)
        law[head] *= sampler.law(row).reshape((VOCAB,) + (1,) * (LENGTH - len(head) - 1))
    return law


def bad_words(params: SamplingParams) -> list[list[int]]:
    return [list(word) for word in params.bad_words if not isinstance(word, str)]


def drawing(verify: str, kind: str, seed: int) -> Stack:
    """A stack with drafts of a kind from laws of their own."""
    drafter = SamplingDrafter(kind, VOCAB, seed)
    return Stack({**Stack.parse(f"verify={verify},control=fixed(k=6)").methods, "draft": drafter})


def sampled(
    model: Decoder, stack: Stack, params: SamplingParams, count: int, seed: int
) -> tuple[NDArray[np.float64], float]:
    """How often each text came, float64 [V, V, V], and the share of accepted candidates."""
    engine = Engine(
        model, stack, EngineConfig(max_sequences=64, max_batch_tokens=512, prefix_reuse=False)
    )
    in_characters(engine, LETTERS)
    counts = np.zeros((VOCAB,) * LENGTH)
    number = 0
    while number < count or engine.has_work:
        while number < count and len(engine.requests) < 64:
            # longer than what is looked at, so that drafts are not cut
            asked = replace(params, max_tokens=9, seed=seed << 40 | number, ignore_eos=True)
            engine.add([ROOT], asked, bad_words=bad_words(asked))
            number += 1
        for delta in engine.step():
            sequence = delta.sequence
            assert sequence.finish_reason is None, sequence.error
            if sequence.num_output >= LENGTH:
                counts[tuple(sequence.tokens[1 : 1 + LENGTH])] += 1
                engine.abort(sequence.request.id)
    assert counts.sum() == count
    return counts, engine.stats.speculation.alpha_examined or 0.0


def p_values(counts: NDArray[np.float64], law: NDArray[np.float64]) -> list[float]:
    """Of each token's marginal and of each bigram."""
    tables = [(0,), (1,), (2,), (0, 1), (1, 2)]
    found = []
    for kept in tables:
        gone = tuple(axis for axis in range(LENGTH) if axis not in kept)
        found.append(chi2(counts.sum(gone).ravel(), law.sum(gone).ravel()))
    return found


PLAIN = SamplingParams(temperature=1)
PROCESSED = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    repetition_penalty=1.4,
    presence_penalty=0.7,
    frequency_penalty=0.5,
    logit_bias={2: 1.0, 6: -0.5},
    bad_words=[[1, 4], [5, 5]],
)
CONSTRAINED = SamplingParams(
    temperature=1,
    structured_outputs=StructuredOutputs(regex="([a-d][efg]|[e-h][a-c]{2}|d)*"),
)
TESTS = 5 * (SEEDS + 1) * (len(PAIRS) + 2 * len(PROCESSED_PAIRS) + len(NESTED))


def hold(
    model: Decoder,
    law: NDArray[np.float64],
    stack: Callable[[int], Stack],
    params: SamplingParams,
    n: int,
) -> NDArray[np.float64]:
    """Each seed by itself, with a stack of its own, and all together. Returns the counts' sum."""
    total = np.zeros((VOCAB,) * LENGTH)
    for seed in range(SEEDS):
        counts, accepted = sampled(model, stack(seed), params, n, seed)
        assert min(p_values(counts, law)) > ALPHA / TESTS, f"seed {seed}"
        assert 0.1 < accepted < 0.95, "candidates are both accepted and rejected"
        total += counts
    assert min(p_values(total, law)) > ALPHA / TESTS
    return total


@pytest.mark.parametrize("pair", PAIRS, ids=", ".join)
def test_the_law_of_sampled_texts(model: Decoder, after: Laws, pair: tuple[str, str]) -> None:
    hold(model, joint_law(after, PLAIN), partial(drawing, *pair), PLAIN, 400)


@pytest.mark.parametrize("pair", PROCESSED_PAIRS, ids=", ".join)
def test_processors_see_the_history_of_each_path(
    model: Decoder, after: Laws, pair: tuple[str, str]
) -> None:
    total = hold(model, joint_law(after, PROCESSED), partial(drawing, *pair), PROCESSED, 400)
    of_the_root = joint_law(after, PROCESSED, history=False)
    possible = total * (of_the_root > 0)
    assert min(p_values(possible, of_the_root)) < ALPHA / TESTS, "the test would not notice"


@pytest.mark.parametrize("pair", PROCESSED_PAIRS, ids=", ".join)
def test_a_constraint_sees_the_history_of_each_path(
    model: Decoder, after: Laws, pair: tuple[str, str]
) -> None:
    law = constrained_law(model, after)
    total = hold(model, law, partial(drawing, *pair), CONSTRAINED, 400)
    of_the_root = constrained_law(model, after, history=False)
    assert min(p_values(total, of_the_root)) < ALPHA / TESTS, "the test would not notice"


@pytest.mark.parametrize(
    ("verify", "kind"),
    [
        ("chain", "likelier"),
        ("recursive", "guess"),
        ("typical", "siblings"),  # it says that it is lossy, and is
    ],
)
def test_a_bias_fails(model: Decoder, after: Laws, verify: str, kind: str) -> None:
    counts, _ = sampled(model, drawing(verify, kind, 0), PLAIN, 400 * SEEDS, 0)
    assert min(p_values(counts, joint_law(after, PLAIN))) < ALPHA / TESTS


def nested(folder: Path, verify: str) -> Stack:
    draft = f"nested(of=token-recycling,path={tiny_draft(folder, VOCAB)},k=4,width=3)"
    return Stack.parse(f"draft={draft},verify={verify},control=fixed(k=6)")


@pytest.mark.parametrize("verify", NESTED)
def test_the_law_of_nested_drafts(model: Decoder, after: Laws, tmp_path: Path, verify: str) -> None:
    hold(model, joint_law(after, PLAIN), lambda seed: nested(tmp_path, verify), PLAIN, 400)


def test_a_candidate_that_the_draft_model_did_not_draw_fails(
    model: Decoder, after: Laws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its law is declared for a token that was chosen."""
    check = NestedDrafting._check

    def wrong(self: NestedDrafting, sequence: Any, tree: TokenTree, *rest: Any) -> Any:
        path, tokens, ended = check(self, sequence, tree, *rest)
        if tree.children(0):
            path, tokens = [0], [tree.token[tree.children(0)[0]]]
            _, _, written, _, laws = rest
            for later in [node for node in laws if node > written]:
                del laws[later]
        return path, tokens, ended

    monkeypatch.setattr(NestedDrafting, "_check", wrong)
    counts, _ = sampled(model, nested(tmp_path, "chain"), PLAIN, 1000 * SEEDS, 0)
    assert min(p_values(counts, joint_law(after, PLAIN))) < ALPHA / TESTS


@pytest.mark.soak
@pytest.mark.parametrize("pair", PAIRS, ids=", ".join)
def test_the_law_of_many_sampled_texts(model: Decoder, after: Laws, pair: tuple[str, str]) -> None:
    """So many, over the seeds, that a bias of 0.01 in a token's law would be seen."""
    hold(model, joint_law(after, PLAIN), partial(drawing, *pair), PLAIN, 20_000)
