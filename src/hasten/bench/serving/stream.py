"""What a streamed answer says and when: server-sent events into a timeline of tokens."""

from __future__ import annotations

from typing import Any

import msgspec

MAX_EVENT = 16 << 20  # bytes; an event is a piece of text, more than this is not one


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    """The part of a completion or chat chunk that is measured."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class StreamBroken(ValueError):
    """A stream that ended with an error, too early, or is no event stream."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Timeline:
    """One streamed answer. ``feed`` takes its bytes, cut anywhere, with the time of each piece.

    An emission is an event that brings tokens or text. How many tokens it brings is known where
    the server sends their ids (``return_token_ids``) or a running usage; otherwise the count is
    one, and the totals come from the final usage.

    Attributes:
        times, counts: when each emission came and how many tokens it brought.
        input_len, output_len: from the usage; None where the server sent none.
    """

    __slots__ = (
        "_buffer",
        "_data",
        "_told",
        "counts",
        "done",
        "finish_reason",
        "input_len",
        "output_len",
        "texts",
        "times",
    )

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []
        self.texts: list[str] = []
        self.finish_reason: str | None = None
        self.input_len: int | None = None
        self.output_len: int | None = None
        self.done = False
        self._told = 0  # tokens that a running usage has told so far
        self._buffer = b""
        self._data: list[bytes] = []

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def tokens(self) -> int:
        """Output tokens: as the usage says, else as counted."""
        return sum(self.counts) if self.output_len is None else self.output_len

    def feed(self, data: bytes, at: float) -> None:
        """Raises ``StreamBroken`` for an error event or for what is no event stream."""
        buffer = self._buffer + data if self._buffer else data
        if len(buffer) > MAX_EVENT:
            raise StreamBroken("bad stream", f"an event of more than {MAX_EVENT >> 20} MiB")
        lines = buffer.split(b"\n")
        self._buffer = lines.pop()
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].lstrip(b" "))
            elif not line and self._data:
                event, self._data = b"\n".join(self._data), []
                self._event(event, at)
            # comments (pings) and other fields carry nothing that is measured

    def close(self) -> None:
        """The answer is complete. Raises ``StreamBroken`` unless the stream was."""
        if not self.done and self.finish_reason is None:
            raise StreamBroken("cut off", "the stream ended without a finish reason or [DONE]")

    def _event(self, event: bytes, at: float) -> None:
        if event == b"[DONE]":
            self.done = True
            return
        try:
            chunk = _decode(event)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StreamBroken("bad stream", f"an event that is no completion: {error}") from None
        if chunk.error is not None:
            raise StreamBroken("stream error", error_text(chunk.error))
        if chunk.usage is not None:
            self.input_len = chunk.usage.prompt_tokens
            self.output_len = chunk.usage.completion_tokens
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        text = choice.text
        if choice.delta is not None:
            delta = choice.delta
            text = delta.content or delta.reasoning_content or delta.reasoning
        if text or choice.token_ids:
            self.times.append(at)
            self.counts.append(self._brought(choice.token_ids, chunk.usage))
            if text:
                self.texts.append(text)
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
            if not self.times:  # its only token has no text
                self.times.append(at)
                self.counts.append(1)

    def _brought(self, ids: list[int] | None, usage: _Usage | None) -> int:
        if ids is not None:
            return len(ids)
        if usage is not None and usage.completion_tokens is not None:
            new, self._told = usage.completion_tokens - self._told, usage.completion_tokens
            return max(new, 1)
        return 1


def error_text(error: Any) -> str:
    """The message of an OpenAI error object, or whatever came in its place."""
    if isinstance(error, dict):
        error = error.get("error", error)
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)[:500]
