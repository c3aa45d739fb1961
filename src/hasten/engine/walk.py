"""One sequence's place in a step: choosing what follows it, under its own history."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.decoding.sampling import NoTokenLeft, Number, top_logprobs, uniform
from hasten.engine.request import Delta, FinishReason, Logprobs, Sequence


@dataclass(slots=True)
class Rows:
    """Logits of a step and what was computed from all rows at once.

    Attributes:
        logits: float32 [n, V].
        best: the largest logit's lowest id, a row.
        lse: log of the sum of exponentials, a row.
        finite: whether the logits of all rows are numbers.
    """

    logits: NDArray[np.float32]
    best: list[int]
    lse: NDArray[np.float32]
    finite: bool

    def logprobs(self, row: int, token: int, k: int) -> Logprobs:
        """Of one token and of the k likeliest, from the raw logits."""
        logits, lse = self.logits[row], self.lse[row]
        return float(logits[token] - lse), top_logprobs(logits, float(lse), k)

    def score_prompt(self, sequence: Sequence, start: int, known: int, first: int) -> None:
        """Fill in the log-probabilities of the prompt tokens that this step's rows predict."""
        request = sequence.request
        assert request.prompt_logprobs is not None
        for offset in range(known):
            predicted = start + offset + 1
            if predicted < len(request.prompt):
                request.prompt_logprobs[predicted] = self.logprobs(
                    first + offset, request.prompt[predicted], request.params.prompt_logprobs or 0
                )


class SequenceWalk:
    """`hasten.speculation.base.Walk` over the rows of a step; fills a `Delta`.

    ``root`` is the row of the tree's root; node i has the row ``root + i``.
    """

    __slots__ = ("delta", "drawn", "greedy", "root", "rows", "sequence")

    def __init__(self, sequence: Sequence, root: int, rows: Rows) -> None:
        self.sequence = sequence
        self.root = root
        self.rows = rows
        self.greedy = sequence.sampler.greedy
        self.drawn = 0  # random numbers taken at the current position
        self.delta = Delta(sequence, [])
        if sequence.request.params.logprobs is not None:
            self.delta.logprobs = []

    def choose(self, node: int) -> int:
        row, sampler = self.root + node, self.sequence.sampler
        if not sampler.plain:
            return sampler.choose(self.rows.logits[row], len(self.sequence.tokens))
        if self.rows.finite or np.isfinite(self.rows.lse[row]):
            return self.rows.best[row]
        raise NoTokenLeft("the model's logits are not numbers")

    def law(self, node: int) -> NDArray[np.float64]:
        return self.sequence.sampler.law(self.rows.logits[self.root + node])

    def ahead(self, node: int, tokens: Seq[int]) -> NDArray[np.float64]:
        with self.sequence.sampler.after(tokens) as later:
            return later.law(self.rows.logits[self.root + node])

    def accept(self, probability: float) -> bool:
        return self._number() < probability

    def draw(self, weights: NDArray[np.float64]) -> int:
        cumulative = np.cumsum(weights)
        place = int(np.searchsorted(cumulative, self._number() * cumulative[-1], side="right"))
        if place == len(cumulative):  # rounding: the last token that has weight
            place = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
        return place

    def _number(self) -> float:
        sampler, index = self.sequence.sampler, self.drawn
        self.drawn += 1
        position = len(self.sequence.tokens)
        return uniform(sampler.seed, sampler.stream, position, Number.VERIFY, index)

    def noise(self) -> NDArray[np.float64]:
        return self.sequence.sampler.gumbel(len(self.sequence.tokens), self.rows.logits.shape[1])

    def emit(self, node: int, token: int) -> bool:
        sequence, delta = self.sequence, self.delta
        if sequence.finish_reason is not None:
            raise AssertionError(f"token {token} was emitted behind the end of the sequence")
        if delta.logprobs is not None:
            k = sequence.request.params.logprobs or 0
            delta.logprobs.append(self.rows.logprobs(self.root + node, token, k))
        sequence.tokens.append(token)
        sequence.sampler.push(token)
        self.drawn = 0
        delta.tokens.append(token)
        sequence.finish_reason = self._why_finished(token)
        return sequence.finish_reason is not None

    def _why_finished(self, token: int) -> FinishReason | None:
        """The end conditions, in order of precedence; follows the text where stops are given."""
        sequence, delta = self.sequence, self.delta
        request = sequence.request
        if sequence.text is not None:  # also the text of a token that ends the sequence
            search = sequence.num_output >= request.params.min_tokens
            delta.text = (delta.text or "") + sequence.text.push((token,), search)
        if token in request.eos or token in request.params.stop_token_ids:
            return "stop"
        if sequence.text is not None and sequence.text.stopped_by is not None:
            return "stop"
        constraint = sequence.sampler.constraint
        if constraint is not None and constraint.is_complete():
            return "stop"
        if len(sequence.tokens) >= request.limit:
            return "length"
        return None
