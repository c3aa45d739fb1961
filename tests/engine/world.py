"""An engine under a small pool together with what every request should have given alone."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hasten.decoding.params import SamplingParams
from hasten.engine.engine import Engine, EngineConfig
from hasten.engine.request import Request, Sequence
from hasten.methods import Card
from hasten.models.base import Decoder
from hasten.speculation.base import Outcome as Observed
from hasten.speculation.base import StatelessDrafting
from hasten.speculation.statistics import DraftStatistics
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack

Outcome = list[tuple[list[int], Any, str]]
"""Per sequence: generated tokens, log-probabilities, reason of the end."""


@dataclass(frozen=True)
class Scripted(StatelessDrafting):
    """Drafts by script: the true continuation, wrong tokens, the one and then the other, random
    tokens, or branching mixtures.

    ``truth`` is filled with what each request gives alone, so that a draft can be right.
    """

    kind: str
    vocab: int
    truth: dict[str, Outcome] = field(default_factory=dict)
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def propose(self, sequences: list[Sequence], budgets: list[int]) -> list[TokenTree]:
        return [self._tree(s, b) for s, b in zip(sequences, budgets, strict=True)]

    def _tree(self, sequence: Sequence, budget: int) -> TokenTree:
        kind = self.kind
        if kind == "mixed":
            kind = self.rng.choice(["right", "wrong", "turning", "random", "branching", "none"])
        known = self.truth.get(sequence.request.id)
        right = known[sequence.index][0][sequence.num_output :] if known else []
        root = sequence.tokens[-1]
        if kind == "none" or budget == 0:
            return TokenTree.root(root)
        if kind == "right":
            return TokenTree.chain([root, *right[:budget]])
        if kind in ("wrong", "turning"):
            turn = 0 if kind == "wrong" else self.rng.randint(1, budget)
            wrong = [(t + 1) % self.vocab for t in right[turn:budget]]
            return TokenTree.chain([root, *right[:turn], *wrong] if right else [root, 0])
        if kind == "random":
            length = self.rng.randint(1, budget)
            return TokenTree.chain([root, *(self._any() for _ in range(length))])
        return self._branching(root, right, budget)

    def _branching(self, root: int, right: list[int], budget: int) -> TokenTree:
        """Random tree, sorted by depth, that may hold the true path among other branches."""
        nodes = [(0, -1, root)]  # (depth, parent's place, token)
        on_path = 0  # the place of the deepest node of the true path
        for _ in range(self.rng.randint(1, budget)):
            extend = self.rng.random() < 0.5 and nodes[on_path][0] < len(right)
            parent = on_path if extend else self.rng.randrange(len(nodes))
            depth = nodes[parent][0] + 1
            token = right[depth - 1] if extend else self._any()
            nodes.append((depth, parent, token))
            if extend:
                on_path = len(nodes) - 1
        order = sorted(range(len(nodes)), key=lambda i: nodes[i][0])
        place = {old: new for new, old in enumerate(order)}
        parents = [place.get(nodes[i][1], -1) for i in order]
        return TokenTree([nodes[i][2] for i in order], parents)

    def _any(self) -> int:
        return self.rng.randrange(self.vocab)

    def observe(self, outcomes: Iterable[Observed]) -> None:
        for seen in outcomes:
            tokens = seen.sequence.tokens
            assert seen.path == sorted(seen.path) and len(seen.logits) == len(seen.tree)
            assert tokens[seen.start :] == [seen.tree.token[0], *seen.tokens]
            accepted = [seen.tree.token[node] for node in seen.path[1:]]
            assert seen.tokens[: len(accepted)] == accepted


Scripted.card = Card(  # type: ignore[attr-defined]  # unregistered: this is no method for users
    "scripted",
    ("draft",),
    Scripted,
    "",
    "bitwise",
    "none",
    frozenset({"token-history", "spare-slots"}),
    frozenset({"proposes-tokens", "drafts-from-text"}),
)


class World:
    """The engine under test, and a roomy plain engine that runs each request alone."""

    def __init__(
        self,
        model: Decoder,
        *,
        drafts: str | None = "mixed",
        choices: str = "",
        blocks: int = 14,
        max_sequences: int = 4,
        budget: int = 24,
        seed: int = 0,
    ) -> None:
        self.model = model
        vocab = model.config.vocab_size
        plain = stack = Stack.parse(choices)
        self.drafter = Scripted(drafts or "none", vocab, rng=random.Random(seed))
        if drafts is not None:  # else the stack's own drafter
            stack = Stack({**plain.methods, "draft": self.drafter})
        probe = Engine(model, plain, EngineConfig(max_sequences=1))
        bytes_per_block = probe.cache.layout.block_bytes()
        self.engine = Engine(
            model,
            stack,
            EngineConfig(
                max_sequences=max_sequences,
                max_batch_tokens=budget,
                kv_bytes=blocks * bytes_per_block,
            ),
        )
        self.solo = Engine(
            model,
            # without drafts every verifier is exact, but seeds may give another text with another
            Stack({**plain.baseline().methods, "verify": plain["verify"]}),
            EngineConfig(max_sequences=8, max_batch_tokens=256, prefix_reuse=False),
        )
        runner = self.solo.executor.runner  # type: ignore[attr-defined]
        runner.recorder.refused = "recorded steps are held against these"
        self.requests: dict[str, Request] = {}
        self.prompt_logprobs: dict[str, Any] = {}
        self.logprobs: dict[tuple[str, int], list[Any]] = {}
        self.ended: set[tuple[str, int]] = set()
        self.aborted: set[str] = set()
        self.checked = 0

    def add(self, prompt: list[int], params: SamplingParams, **options: Any) -> str:
        expected, prompt_logprobs = self._alone(prompt, params)
        request = self.engine.add(prompt, params, bad_words=_words(params), **options)
        self.drafter.truth[request.id] = expected
        self.requests[request.id] = request
        self.prompt_logprobs[request.id] = prompt_logprobs
        return request.id

    def _alone(self, prompt: list[int], params: SamplingParams) -> tuple[Outcome, Any]:
        request = self.solo.add(prompt, params, bad_words=_words(params))
        logprobs: dict[int, list[Any]] = {i: [] for i in range(params.n)}
        limit = self.engine.max_length  # the small pool may end a sequence earlier
        request.limit = min(request.limit, limit)
        while not request.finished:
            for delta in self.solo.step():
                logprobs[delta.sequence.index] += delta.logprobs or []
        outcome = [
            (s.tokens[len(prompt) :], logprobs[s.index], str(s.finish_reason))
            for s in request.sequences
        ]
        return outcome, request.prompt_logprobs

    def step(self) -> None:
        for delta in self.engine.step():
            key = (delta.sequence.request.id, delta.sequence.index)
            assert key not in self.ended, "a finished sequence went on"
            self.logprobs.setdefault(key, []).extend(delta.logprobs or [])
            if delta.sequence.finish_reason is not None:
                assert delta.tokens, "a step too many: the end is known with the last token"
                self.ended.add(key)
                self._check(delta.sequence)
        self.engine.check_ledger()

    def abort(self, request_id: str) -> None:
        self.aborted.add(request_id)
        for delta in self.engine.abort(request_id):
            assert delta.sequence.finish_reason == "abort"
            self.ended.add((request_id, delta.sequence.index))
        self.engine.check_ledger()

    def _check(self, sequence: Sequence) -> None:
        request = sequence.request
        tokens, logprobs, reason = self.drafter.truth[request.id][sequence.index]
        got = sequence.tokens[len(request.prompt) :]
        assert got == tokens, f"{request.id}/{sequence.index}: {got} != alone {tokens}"
        assert sequence.finish_reason == reason
        assert self.logprobs.get((request.id, sequence.index), []) == logprobs, "log-probabilities"
        assert request.prompt_logprobs == self.prompt_logprobs[request.id], "prompt"
        self.checked += 1

    def drain(self) -> None:
        """Run to the end; every sequence must have finished, no page may be held, and the engine
        has counted what its sequences have."""
        for _ in range(20_000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, "the engine does not come to an end"
        total = DraftStatistics()
        for request in self.requests.values():
            for sequence in request.sequences:
                assert (request.id, sequence.index) in self.ended
                counted = sequence.figures.speculation
                assert counted.tokens == sequence.num_output
                total.add(counted)
        assert total == self.engine.stats.speculation
        for pool in self.engine.cache.pools:
            assert pool.num_held == 0


def _words(params: SamplingParams) -> list[list[int]]:
    """Bad words are token ids here: there is no tokenizer to turn strings into them."""
    return [list(word) for word in params.bad_words if not isinstance(word, str)]


def prompt_of(rng: random.Random, vocab: int, tail: int) -> list[int]:
    """Some of a few fixed blocks in any order, then ``tail`` random tokens.

    The same block after different beginnings must not be mistaken for a shared prefix.
    """
    fixed = random.Random(7)
    blocks = [[fixed.randrange(2, vocab) for _ in range(16)] for _ in range(3)]
    head = [t for _ in range(rng.randrange(4)) for t in rng.choice(blocks)]
    return head[: rng.choice([len(head), 33])] + [rng.randrange(2, vocab) for _ in range(tail)]


def params_of(rng: random.Random, vocab: int) -> SamplingParams:
    """Sampling parameters of every kind, seeded so that a request alone gives the same."""
    kind = rng.randrange(8)
    base: dict[str, Any] = {
        "max_tokens": rng.choice([1, 2, 5, 12, 30]),
        "seed": rng.randrange(1000),
        "n": rng.choice([1, 1, 1, 3]),
        "logprobs": rng.choice([None, 0, 3]),
        "prompt_logprobs": rng.choice([None, None, None, 2]),
        "temperature": 0.0,
    }
    if kind >= 3:
        base["temperature"] = rng.choice([0.5, 1.0, 1.7])
    if kind == 4:
        base |= {"top_k": 7, "top_p": 0.9}
    if kind == 5:
        base |= {"min_p": 0.05, "typical_p": 0.9}
    if kind in (2, 6):
        base |= {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    if kind == 7:
        base |= {
            "logit_bias": {5: 2.0, 9: -3.0},
            "bad_words": [[4], [6, 7]],
            "min_tokens": min(3, base["max_tokens"]),
        }
    if kind == 1:
        base |= {"allowed_token_ids": list(range(2, vocab, 3)), "ignore_eos": True}
    return SamplingParams(**base)
