"""What the HTTP process and the engine process say to each other, as msgpack.

The HTTP process turns text into token ids and never imports torch; the engine process runs the
model and turns new tokens into text. Neither waits for the other: requests go one way as they
come, and after each step one `Step` comes back with everything that the step added.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from hasten.decoding.params import SamplingParams

TokenLogprobs = tuple[float, list[tuple[int, float]]]
"""(log-probability of the token, its likeliest alternatives as (id, log-probability))."""


class Submit(msgspec.Struct, tag="submit"):
    """Run a request. The id is unique among those in flight; it was chosen by the HTTP process."""

    id: str
    prompt: list[int]
    params: SamplingParams
    tenant: str = ""
    priority: int = 0
    embed: bool = False
    """Give the last hidden state of the prompt instead of new tokens."""


class Abort(msgspec.Struct, tag="abort"):
    """Nobody waits for the request any more. An unknown id is normal: it may just have ended."""

    id: str


class Ping(msgspec.Struct, tag="ping"):
    """Answer with a `Step` between two steps. Sent every second: the answer is forward progress."""

    number: int


class Stop(msgspec.Struct, tag="stop"):
    """Give everything back and exit."""


Command = Submit | Abort | Ping | Stop


class EngineFacts(msgspec.Struct, tag="facts"):
    """The first message of an engine: it has loaded its model."""

    model: str
    architecture: str
    folder: str
    stack: str
    parameters: int
    weight_bytes: int
    vocab_size: int
    max_length: int
    """Positions of the longest sequence, prompt and output together."""
    max_sequences: int
    max_batch_tokens: int
    page_size: int
    pages: int
    kv_bytes: int
    threads: int
    isa: str
    load_seconds: float
    embeds: bool
    """Whether the model offers embeddings."""


class OutputFigures(msgspec.Struct):
    """Counts and times of one finished output; times are `time.monotonic` seconds, which all
    processes of a machine share."""

    arrived: float
    """At the engine; the HTTP process keeps its own time of arrival."""
    scheduled: float | None
    first_token: float | None
    last_token: float | None
    cached_tokens: int
    steps: int
    """Target passes that yielded tokens: tokens / steps is the block efficiency tau."""
    drafted: int
    accepted: int
    preemptions: int


class Piece(msgspec.Struct):
    """What one step added to one output of a request: the unit of streaming.

    The texts of all pieces of an output concatenate to exactly its final text. The piece with a
    ``finish_reason`` is the last of its output.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    error: str | None = None
    figures: OutputFigures | None = None
    """With the last piece of an output."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """With the last piece of output 0, if they were asked for."""
    embedding: list[float] | None = None


class Refused(msgspec.Struct):
    """A request that can never run (or that the engine failed to take); the text says why."""

    request_id: str
    message: str
    client_error: bool = True
    """False: the fault is ours, not the request's."""


class Snapshot(msgspec.Struct):
    """The engine between two steps: gauges, and counters since its start."""

    time: float
    """`time.monotonic` seconds."""
    running: int
    """Sequences that hold pages."""
    waiting: int
    pages_used: int
    """Of the layer group that has fewest left; cached pages that nobody uses count as free."""
    pages: int
    cached_pages: int
    """Pages without a user whose content may still be reused."""
    steps: int
    rows: int
    tokens: int
    passes: int
    step_seconds: float
    forward_seconds: float
    drafted: int
    accepted: int
    preemptions: int
    finished: int
    leaked_pages: int
    """Pages that the ledger had to heal; anything but zero is a defect."""
    rss_bytes: int
    drafts: int = 0
    """Times a sequence had drafted tokens to verify."""
    draft_seconds: float = 0.0
    examined_at: list[int] = []
    """Times that a draft's depth 1, 2, ... was judged; ``accepted_at``: and had the token."""
    accepted_at: list[int] = []
    drafted_by: dict[str, int] = {}
    """By drafter, where a stack has several; ``accepted_by`` alike."""
    accepted_by: dict[str, int] = {}


class Step(msgspec.Struct, tag="step"):
    """What happened since the last message."""

    snapshot: Snapshot
    pieces: list[Piece] = []
    refused: list[Refused] = []
    answers: int | None = None
    """The last `Ping` that was seen, if any since the last message."""


class Failed(msgspec.Struct, tag="failed"):
    """The engine cannot start, or ends; the last message before it exits."""

    message: str


Report = EngineFacts | Step | Failed
