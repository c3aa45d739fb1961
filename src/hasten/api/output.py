"""What callers get back."""

from __future__ import annotations

from dataclasses import dataclass, field

from hasten.engine.request import Figures, FinishReason, Logprobs


@dataclass(slots=True)
class Piece:
    """What one step added to one output of a request: the unit of streaming.

    The texts of all pieces of an output concatenate to exactly its final text.

    Attributes:
        figures: with the last piece of an output.
        prompt_logprobs: with the last piece of output 0, if they were asked for.
        embedding: float32 values of the last hidden state, for a request that asked for it.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    figures: Figures | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    embedding: list[float] | None = None


@dataclass(slots=True)
class Completion:
    """One finished output. ``figures`` holds times, cached tokens and draft counts."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    figures: Figures
    logprobs: list[Logprobs] | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """All outputs of one prompt (``n`` of them)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] | None = None

    @property
    def text(self) -> str:
        """Text of the first output."""
        return self.outputs[0].text


@dataclass(slots=True)
class Score:
    """How likely a model finds a text.

    Attributes:
        token_ids: the scored tokens (those after the context, if one was given).
        logprobs: natural log-probability of each.
        greedy: whether each token is the model's likeliest one.
    """

    token_ids: list[int]
    logprobs: list[float]
    greedy: list[bool]

    @property
    def total(self) -> float:
        return sum(self.logprobs)
