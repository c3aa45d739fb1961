"""What clients get: response objects, stream chunks, usage and log-probabilities in OpenAI's forms.

A stream and a whole response are made from the same pieces by the same code, so that the chunks of
a stream always add up to the response.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import msgspec

from hasten.serving.messages import Piece, TokenLogprobs
from hasten.serving.prompts import Prompter

encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
"""A comment: clients skip it, proxies see that the connection lives."""


def event(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"


class Usage:
    """Token counts of a request, as they grow."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self._cached: dict[int, int] = {}

    def take(self, prompt: int, piece: Piece) -> None:
        self.completion_tokens += len(piece.token_ids)
        if piece.figures is not None:  # outputs of one prompt share what was cached for the first
            cached = piece.figures.cached_tokens
            if piece.index == 0:
                self._cached[prompt] = cached

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


class TokenNames:
    """How tokens are written in log-probabilities."""

    def __init__(self, prompter: Prompter, as_ids: bool) -> None:
        self.prompter = prompter
        self.as_ids = as_ids

    def chat(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self.prompter.token_text(token)

    def legacy(self, token: int) -> str:
        """Half a character is written as its bytes, so that different tokens stay different."""
        if self.as_ids:
            return f"token_id:{token}"
        raw = self.prompter.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(
    names: TokenNames, tokens: Sequence[int], entries: Sequence[TokenLogprobs], top: int
) -> list[dict[str, Any]]:
    """The ``content`` list of a chat choice's ``logprobs``."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        raw = names.prompter.bytes_of(token)
        return {"token": names.chat(token), "logprob": logprob, "bytes": list(raw)}

    return [
        {
            **one(token, logprob),
            "top_logprobs": [one(other, value) for other, value in likeliest[:top]],
        }
        for token, (logprob, likeliest) in zip(tokens, entries, strict=True)
    ]


class LegacyLogprobs:
    """The ``logprobs`` object of a completion choice, part after part.

    ``text_offset`` is the place in the choice's text, in characters, at which a token begins; a
    token inside a character has the place of that character. Tokens whose text is not shown
    (special ones, the beginning-of-sequence token) take no room.
    """

    def __init__(self, names: TokenNames, skip_special_tokens: bool) -> None:
        self._names = names
        self._skip = skip_special_tokens
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def part(
        self,
        tokens: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        text: str | None = None,
    ) -> dict[str, Any]:
        """For the next tokens. ``text``: the whole text they make up, if it is known: special
        tokens then take room where they stand in it."""
        found: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        special = self._names.prompter.special
        for token, entry in zip(tokens, entries, strict=True):
            name = self._names.legacy(token)
            found["tokens"].append(name)
            found["text_offset"].append(self._offset)
            hidden = token in special and self._skip
            if text is not None and token in special:
                hidden = not text.startswith(self._names.prompter.token_text(token), self._offset)
            if not hidden:
                self._offset += len(self._decoder.decode(self._names.prompter.bytes_of(token)))
            if entry is None:  # the first token of a prompt follows nothing
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                continue
            logprob, likeliest = entry
            found["token_logprobs"].append(logprob)
            top: dict[str, float] = {}
            for other, value in [*likeliest, (token, logprob)]:
                top.setdefault(self._names.legacy(other), value)
            found["top_logprobs"].append(top)
        return found


def join_logprobs(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Several parts as one."""
    return {key: [item for part in parts for item in part[key]] for key in parts[0]}


def prompt_logprobs(
    names: TokenNames, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None]
) -> list[dict[str, Any] | None]:
    """Log-probabilities of prompt tokens by id, as vLLM writes them."""
    found: list[dict[str, Any] | None] = []
    for token, entry in zip(tokens, entries, strict=True):
        if entry is None:
            found.append(None)
            continue
        logprob, likeliest = entry
        ranked = {
            str(other): {
                "logprob": value,
                "rank": rank,
                "decoded_token": names.prompter.token_text(other),
            }
            for rank, (other, value) in enumerate(likeliest, 1)
        }
        ranked.setdefault(
            str(token),
            {"logprob": logprob, "rank": None, "decoded_token": names.prompter.token_text(token)},
        )
        found.append(ranked)
    return found
