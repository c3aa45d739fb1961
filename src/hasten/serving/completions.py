"""``POST /v1/completions``: prompts as text or token ids, with legacy log-probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hasten.serving import openai_requests as fields
from hasten.serving.bodies import Decoder, check_bulk
from hasten.serving.exchange import Job
from hasten.serving.messages import Piece, TokenLogprobs
from hasten.serving.openai_responses import (
    LegacyLogprobs,
    TokenNames,
    Usage,
    encode,
    event,
    join_logprobs,
    prompt_logprobs,
)
from hasten.serving.service import Body, Service

DEFAULT_TOKENS = 16
"""``max_tokens`` of a completion that does not say, as in OpenAI's API."""

DECODER = Decoder(fields.CompletionRequest)


def prepare(service: Service, body: Body) -> Job:
    """Check a body and tokenize its prompts. Raises ApiError."""
    prompter, config = service.prompter, service.config
    check_bulk(body, prompter.longest_text)
    request, others = DECODER.decode(body)
    ignored = fields.refuse_unsupported(others)
    service.check_model(request.model)
    fields.check_caps(request, config)
    max_tokens = DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
    n = 1 if request.n is None else request.n
    best_of = n if request.best_of is None else request.best_of
    scored = request.logprobs if request.echo else None
    wanted = [k for k in (scored, request.prompt_logprobs) if k is not None]
    params = fields.sampling_params(
        request,
        n=best_of,
        max_tokens=max_tokens,
        logprobs=0 if request.logprobs is None and best_of > n else request.logprobs,
        prompt_logprobs=max(wanted, default=None),
        structure=fields.structured_outputs(request, config),
        tokenizer=prompter.tokenizer,
    )
    prompts, texts = prompter.prompts(
        request.prompt,
        "prompt",
        add_special_tokens=request.add_special_tokens,
        truncate=request.truncate_prompt_tokens,
        max_tokens=max_tokens,
    )
    fields.cap("prompts x n", len(prompts) * best_of, "max_outputs", config.max_outputs)
    if request.echo:
        skip = request.skip_special_tokens is not False
        texts = [
            prompter.decode(ids, skip) if text is None else text
            for ids, text in zip(prompts, texts, strict=True)
        ]

    def writer(id: str, created: int) -> CompletionWriter:
        return CompletionWriter(service, request, prompts, texts, n, best_of, id, created)

    return Job(
        prompts,
        params,
        writer,
        stream=bool(request.stream),
        prefix="cmpl",
        request_id=request.request_id,
        cache_salt=request.cache_salt,
        priority=request.priority,
        ignored=ignored,
        structure=fields.structure_field(request),
    )


@dataclass
class _Choice:
    """What a choice is made of, so far."""

    legacy: LegacyLogprobs
    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    begun: bool = False
    total: float = 0.0
    """Sum of the tokens' log-probabilities, if they were asked for."""


class CompletionWriter:
    """Answers of all choices of a request. Choice ``prompt * n + index`` belongs to a prompt."""

    def __init__(
        self,
        service: Service,
        request: fields.CompletionRequest,
        prompts: list[list[int]],
        texts: list[str | None],
        n: int,
        best_of: int,
        id: str,
        created: int,
    ) -> None:
        self._request = request
        self._prompts = prompts
        self._texts = texts
        self._n = n
        self._best_of = best_of
        self._names = TokenNames(service.prompter, bool(request.return_tokens_as_token_ids))
        self._usage = Usage(sum(map(len, prompts)))
        self._head = {
            "id": id,
            "object": "text_completion",
            "created": created,
            "model": request.model or service.name,
            "system_fingerprint": service.fingerprint,
        }
        skip = request.skip_special_tokens is not False
        self._choices = [
            _Choice(LegacyLogprobs(self._names, skip)) for _ in range(len(prompts) * best_of)
        ]
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        self._held: dict[int, list[Piece]] = {}
        """By prompt: pieces that wait for the log-probabilities of the echo before them."""
        options = request.stream_options or fields.StreamOptions()
        self._usage_at_end = bool(options.include_usage)
        self._usage_always = self._usage_at_end and bool(options.continuous_usage_stats)
        self._scored = bool(request.echo) and request.logprobs is not None
        self._opened = False

    # ---- streams ------------------------------------------------------------------------------

    def events(self, prompt: int, piece: Piece) -> bytes:
        """Events of one piece, after those of the echo."""
        self._usage.take(prompt, piece)
        out = b""
        if not self._opened:
            self._opened = True
            if self._request.echo and not self._scored:
                out = b"".join(
                    self._event(number, self._echo(number)) for number in range(len(self._choices))
                )
        if not self._scored or prompt in self._prompt_logprobs:
            return out + self._piece_events(prompt, piece)
        held = self._held.setdefault(prompt, [])
        held.append(piece)
        if piece.prompt_logprobs is None:
            return out
        self._prompt_logprobs[prompt] = piece.prompt_logprobs
        for number in range(prompt * self._n, (prompt + 1) * self._n):
            out += self._event(number, self._echo(number))
        return out + b"".join(self._piece_events(prompt, one) for one in held)

    def closing(self) -> bytes:
        if not self._usage_at_end:
            return b""
        return event(encode({**self._head, "choices": [], "usage": self._usage.as_json()}))

    def _piece_events(self, prompt: int, piece: Piece) -> bytes:
        number = prompt * self._n + piece.index
        choice = self._choices[number]
        delta = self._delta(choice, piece)
        if self._request.return_token_ids and not choice.begun:
            delta["prompt_token_ids"] = self._prompts[prompt]
        choice.begun = True
        silent = not (piece.text or piece.finish_reason or delta["logprobs"])
        if silent and not (self._request.return_token_ids or self._usage_always):
            return b""
        return self._event(number, delta)

    def _event(self, number: int, delta: dict[str, Any]) -> bytes:
        chunk = {**self._head, "choices": [{"index": number, **delta}]}
        if self._usage_at_end:
            chunk["usage"] = self._usage.as_json() if self._usage_always else None
        return event(encode(chunk))

    def _echo(self, number: int) -> dict[str, Any]:
        """The prompt as the first part of a choice."""
        prompt = number // (len(self._choices) // len(self._prompts))
        text = self._texts[prompt] or ""
        part: dict[str, Any] = {"text": text, "logprobs": None, "finish_reason": None}
        if self._scored:
            ids = self._prompts[prompt]
            k = self._request.logprobs or 0
            entries = [
                None if entry is None else (entry[0], entry[1][:k])
                for entry in self._prompt_logprobs[prompt]
            ]
            part["logprobs"] = self._choices[number].legacy.part(ids, entries, text)
        return part

    def _delta(self, choice: _Choice, piece: Piece) -> dict[str, Any]:
        """What a piece adds to its choice."""
        delta: dict[str, Any] = {
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }
        if self._request.logprobs is not None and (piece.token_ids or piece.finish_reason):
            delta["logprobs"] = choice.legacy.part(piece.token_ids, piece.logprobs or [])
        if self._request.return_token_ids:
            delta["token_ids"] = piece.token_ids
        return delta

    # ---- whole answers ------------------------------------------------------------------------

    def collect(self, prompt: int, piece: Piece) -> None:
        self._usage.take(prompt, piece)
        choice = self._choices[prompt * self._best_of + piece.index]
        choice.texts.append(piece.text)
        choice.tokens += piece.token_ids
        choice.total += sum(logprob for logprob, _ in piece.logprobs or ())
        if piece.finish_reason is not None:
            choice.finish_reason = piece.finish_reason
        if piece.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = piece.prompt_logprobs
        if self._request.logprobs is not None:
            choice.logprobs.append({"tokens": piece.token_ids, "entries": piece.logprobs or []})

    def whole(self) -> bytes:
        choices: list[dict[str, Any]] = []
        for prompt in range(len(self._prompts)):
            numbers = range(prompt * self._best_of, (prompt + 1) * self._best_of)
            best = sorted(numbers, key=self._mean_logprob, reverse=True)[: self._n]
            kept = list(numbers) if self._best_of == self._n else best
            for number in kept:
                choices.append({"index": len(choices), **self._choice(prompt, number)})
        return encode({**self._head, "choices": choices, "usage": self._usage.as_json()})

    def _choice(self, prompt: int, number: int) -> dict[str, Any]:
        request, choice = self._request, self._choices[number]
        text, parts = "".join(choice.texts), []
        if request.echo:
            echo = self._echo(number)
            text = echo["text"] + text
            parts = [echo["logprobs"]] if self._scored else []
        for part in choice.logprobs:
            parts.append(choice.legacy.part(part["tokens"], part["entries"]))
        whole: dict[str, Any] = {
            "text": text,
            "logprobs": join_logprobs(parts) if parts else None,
            "finish_reason": choice.finish_reason,
        }
        if request.prompt_logprobs is not None:
            k = request.prompt_logprobs
            entries = [e and (e[0], e[1][:k]) for e in self._prompt_logprobs[prompt]]
            whole["prompt_logprobs"] = prompt_logprobs(self._names, self._prompts[prompt], entries)
        if request.return_token_ids:
            whole["token_ids"] = choice.tokens
            whole["prompt_token_ids"] = self._prompts[prompt]
        return whole

    def _mean_logprob(self, number: int) -> float:
        choice = self._choices[number]
        return choice.total / len(choice.tokens) if choice.tokens else -math.inf
