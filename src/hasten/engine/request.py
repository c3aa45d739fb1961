"""A request, its sequences, and what a step reports about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hasten.cache.manager import Stream
from hasten.decoding.params import SamplingParams
from hasten.decoding.sampling import Sampler
from hasten.decoding.text import TextStream
from hasten.speculation.statistics import DraftStatistics

FinishReason = Literal["stop", "length", "abort", "error"]

Logprobs = tuple[float, list[tuple[int, float]]]
"""(log-probability of the token, its likeliest alternatives as (id, log-probability))."""


@dataclass(slots=True)
class Figures:
    """Times on the engine's clock and counts, of one sequence."""

    arrived: float
    scheduled: float | None = None
    token_times: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    """Prompt positions taken from the prefix cache at first admission."""
    speculation: DraftStatistics = field(default_factory=DraftStatistics)
    preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return self.token_times[0] - self.arrived if self.token_times else None


@dataclass(slots=True, eq=False)
class Sequence:
    """One growing output of a request. ``tokens`` is prompt and output together."""

    request: Request
    index: int
    tokens: list[int]
    stream: Stream
    sampler: Sampler
    figures: Figures
    text: TextStream | None = None
    draft_state: Any = None
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def rank(self) -> tuple[int, int, int]:
        """Place in the line: smaller goes first and is preempted last."""
        return (self.request.priority, self.request.number, self.index)


@dataclass(slots=True, eq=False)
class Request:
    """What was asked.

    Attributes:
        number: order of arrival.
        limit: most tokens (prompt and output) a sequence may have.
        eos: tokens that end a sequence.
        dormant: sequences (``n`` > 1) that wait for the first one to compute the prompt.
        prompt_logprobs: filled as the prompt is computed; None for the first token.
        tenant: shares cached prefixes and draft tables with its own requests only.
        embed: asks for the last hidden state of the prompt; nothing is generated.
    """

    id: str
    number: int
    prompt: list[int]
    params: SamplingParams
    limit: int
    eos: frozenset[int]
    priority: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    dormant: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] | None = None
    embed: bool = False
    tenant: str = ""

    @property
    def finished(self) -> bool:
        return all(s.finish_reason is not None for s in self.sequences)


@dataclass(slots=True)
class Delta:
    """What one step added to one sequence."""

    sequence: Sequence
    tokens: list[int]
    logprobs: list[Logprobs] | None = None
    text: str | None = None
    """New text, for requests whose text the engine follows (stop strings); else None."""
    embedding: list[float] | None = None
    """With the end of a request that asked for one."""
