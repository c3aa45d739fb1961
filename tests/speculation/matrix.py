"""Greedy output under speculation against plain decoding, over any setting of many factors."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.cache.layout import PAGE_SIZE
from hasten.decoding.params import SamplingParams
from hasten.decoding.text import TextStream
from hasten.engine.engine import Engine, EngineConfig
from hasten.methods import Card, cards
from hasten.models.base import Decoder
from hasten.stack import Stack
from tests.decoding.constraints.characters import in_characters
from tests.engine.test_randomized import MODELS
from tests.speculation.examples import HABIT, VOCAB, example

Make = Callable[..., Decoder]
Output = list[tuple[list[int], Any, str]]
"""Per sequence of a request: tokens, log-probabilities, why it ended."""

LENGTH = {1: 64, 4: 20, 12: 8, 32: 4}
"""Tokens of a request, by the number of requests that run together."""

PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1},
    "bias": {"logit_bias": {5: 1.5, 9: -3.0}, "bad_words": [[4], [6, 7]]},
}

CONSTRAINTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "regex": {"regex": "([a-m]{2,5}[ ,.])+"},
    "json": {"json": {"type": "object", "additionalProperties": {"type": "integer"}}},
}

FACTORS: dict[str, list[Any]] = {
    "draft": [card for card in cards("draft") if card.exact != "lossy"],
    "verify": [card for card in cards("verify") if card.exact != "lossy"],
    "control": [card for card in cards("control") if card.exact != "lossy" and not card.needs],
    "together": list(LENGTH),
    "chunk": [0, 5],
    "prefix": ["off", "cold", "hit"],
    "pool": ["roomy", "tiny"],
    "n": [1, 3],
    "processors": list(PENALTIES),
    "constrain": list(CONSTRAINTS),
    "stops": ["none", "id", "string", "end"],
    "logprobs": [None, 2],
    "min_p": [0.0, 0.1],
    "model": ["llama", "mistral"],
    "codec": ["native", "int8"],
}


class Letters:
    """A decoder for stop strings: a letter for each token id."""

    def step(self, token: int) -> str:
        return chr(0x4E00 + token)

    def flush(self) -> str:
        return ""


@dataclass
class Matrix:
    """Runs rows; plain outputs are computed once for each kind of request.

    Attributes:
        seen: what happened in the rows: tokens compared, candidates accepted, places at which all
            candidates were rejected, those of them behind an accepted one ("partly"),
            preemptions, prefix hits.
    """

    tiny: Make
    folder: Path
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._plain: dict[str, list[Output]] = {}

    def prompts(self, model: Decoder, count: int, seed: int) -> list[list[int]]:
        """Texts that hold what the model is about to say, and repeat each other, so that drafters
        have something to find."""
        rng = random.Random(seed)
        phrase = [rng.randrange(2, VOCAB) for _ in range(9)]
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        ((said, _, _),) = self._alone(model, "", params, [phrase], {})[0]
        made = []
        for index in range(count):
            tail = [rng.randrange(2, VOCAB) for _ in range(1 + 3 * (index % 4))]
            made.append((phrase + said)[: 29 + index % 5] + tail + phrase[-5:])
        return made

    def run(self, row: dict[str, Any], tokens: int | None = None, seed: int = 11) -> str | None:
        """What differs from plain decoding, or None; ``seed`` makes the prompts."""
        plain_stack = f"codec={row['codec']}"
        choices = [plain_stack, f"schedule=stall-free(chunk={row['chunk']})"]
        choices += [
            example(card, self.folder, row["model"])
            for card in (row["draft"], row["verify"], row["control"])
        ]
        model = self.tiny(row["model"], habit=HABIT, **MODELS[row["model"]])
        length = tokens or LENGTH[row["together"]]
        params = SamplingParams(
            temperature=0.0,
            max_tokens=length,
            n=row["n"],
            logprobs=row["logprobs"],
            min_p=row["min_p"],
            seed=5,
            ignore_eos=row["stops"] != "end",
            structured_outputs=CONSTRAINTS[row["constrain"]],
            **PENALTIES[row["processors"]],
        )
        prompts = self.prompts(model, row["together"], seed)
        expected, stops = self._expected(model, plain_stack, params, prompts, row["stops"])
        longest = max(map(len, prompts)) + length + 1
        each = -(-longest // PAGE_SIZE) * row["n"]
        blocks = 4 * each * row["together"] if row["pool"] == "roomy" else 2 * each + 1
        stack = Stack.parse(",".join(choices))
        layout = Engine(model, Stack.parse(plain_stack), EngineConfig(max_sequences=1)).cache.layout
        engine = Engine(
            model,
            stack,
            EngineConfig(
                max_sequences=row["together"] * row["n"],
                max_batch_tokens=max(48, row["together"] * row["n"]),
                kv_bytes=blocks * layout.block_bytes(),
                prefix_reuse=row["prefix"] != "off",
                max_length=max(longest, 2 * PAGE_SIZE),
            ),
        )
        in_characters(engine)
        if row["prefix"] == "hit":
            for prompt in prompts:
                engine.add(prompt, SamplingParams(max_tokens=1, temperature=0.0))
            _drain(engine)
        got = _outputs(engine, params, prompts, stops)
        engine.check_ledger()
        drafts = engine.stats.speculation
        self.seen["accepted"] += drafts.accepted
        self.seen["rejected"] += drafts.examined - drafts.accepted
        self.seen["partly"] += sum(drafts.examined_at[1:]) - sum(drafts.accepted_at[1:])
        self.seen["preempted"] += engine.stats.preemptions
        self.seen["hits"] += engine.cache.stats.prefix_hits
        for index, (ours, plain) in enumerate(zip(got, expected, strict=True)):
            self.seen["compared"] += sum(len(tokens) for tokens, _, _ in ours)
            if ours != plain:
                return f"request {index} of {stack}: {ours} instead of {plain}"
        return None

    def _expected(
        self,
        model: Decoder,
        stack: str,
        params: SamplingParams,
        prompts: list[list[int]],
        stops: str,
    ) -> tuple[list[Output], dict[str, Any]]:
        """Plain outputs, and what ends a request early: a token or string of its own output."""
        free = self._alone(model, stack, params, prompts, {})
        if stops in ("none", "end"):  # "end": wherever the model says so, often at once
            return free, {}
        first = free[0][0][0]
        place = min(len(first) // 2, len(first) - 2)
        if stops == "id":
            early: dict[str, Any] = {"stop_token_ids": [first[place]]}
        else:
            early = {"stop": ["".join(map(Letters().step, first[place : place + 2]))]}
        return self._alone(model, stack, params, prompts, early), early

    def _alone(
        self,
        model: Decoder,
        stack: str,
        params: SamplingParams,
        prompts: list[list[int]],
        early: dict[str, Any],
    ) -> list[Output]:
        key = repr((model.config.architecture, stack, params, prompts, early))
        if key not in self._plain:
            config = EngineConfig(max_sequences=params.n, prefix_reuse=False)
            self._plain[key] = [
                _outputs(
                    in_characters(Engine(model, Stack.parse(stack), config)),
                    params,
                    [prompt],
                    early,
                )[0]
                for prompt in prompts
            ]
        return self._plain[key]


def _outputs(
    engine: Engine, params: SamplingParams, prompts: list[list[int]], early: dict[str, Any]
) -> list[Output]:
    from dataclasses import replace

    params = replace(params, **early)
    words = [list(word) for word in params.bad_words if not isinstance(word, str)]
    requests = [
        engine.add(
            prompt,
            params,
            bad_words=words,
            texts=[TextStream(Letters(), params.stop) for _ in range(params.n)]
            if params.stop
            else (),
        )
        for prompt in prompts
    ]
    logprobs = _drain(engine)
    return [
        [
            (s.tokens[len(r.prompt) :], logprobs.get((r.id, s.index)), str(s.finish_reason))
            for s in r.sequences
        ]
        for r in requests
    ]


def _drain(engine: Engine) -> dict[tuple[str, int], Any]:
    found: dict[tuple[str, int], Any] = {}
    while engine.has_work:
        for delta in engine.step():
            assert delta.sequence.error is None, delta.sequence.error
            key = (delta.sequence.request.id, delta.sequence.index)
            if delta.logprobs is not None:
                found.setdefault(key, []).extend(delta.logprobs)
    return found


def name(row: dict[str, Any]) -> str:
    """A row in one line."""
    return " ".join(
        f"{key}={value.name if isinstance(value, Card) else value}" for key, value in row.items()
    )
