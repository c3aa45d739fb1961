"""``POST /v1/chat/completions``: conversations through the model's chat template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hasten.serving import openai_requests as fields
from hasten.serving.bodies import Decoder, check_bulk
from hasten.serving.exchange import Job
from hasten.serving.messages import Piece, TokenLogprobs
from hasten.serving.openai_responses import (
    TokenNames,
    Usage,
    chat_logprobs,
    encode,
    event,
    prompt_logprobs,
)
from hasten.serving.service import Body, Service

DECODER = Decoder(fields.ChatRequest)


def prepare(service: Service, body: Body) -> Job:
    """Check a body, render its conversation and tokenize it. Raises ApiError."""
    prompter, config = service.prompter, service.config
    check_bulk(body, prompter.longest_text)
    request, others = DECODER.decode(body)
    ignored = fields.refuse_unsupported(others)
    service.check_model(request.model)
    fields.check_tools(request)
    fields.check_caps(request, config)
    if request.echo:
        raise fields.unsupported("echo")
    n = 1 if request.n is None else request.n
    max_tokens = request.limit()
    params = fields.sampling_params(
        request,
        n=n,
        max_tokens=max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        structure=fields.structured_outputs(request, config),
        tokenizer=prompter.tokenizer,
    )
    if request.reasoning_effort is not None and not prompter.takes("reasoning_effort", request):
        ignored.append("reasoning_effort")  # clients send it to all models
    ids = prompter.fit(
        prompter.conversation(request), "messages", request.truncate_prompt_tokens, max_tokens
    )

    def writer(id: str, created: int) -> ChatWriter:
        return ChatWriter(service, request, ids, n, id, created)

    return Job(
        [ids],
        params,
        writer,
        stream=bool(request.stream),
        prefix="chatcmpl",
        request_id=request.request_id,
        cache_salt=request.cache_salt,
        priority=request.priority,
        ignored=ignored,
        structure=fields.structure_field(request),
    )


@dataclass
class _Choice:
    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


class ChatWriter:
    """Answers of the ``n`` choices of a conversation."""

    def __init__(
        self,
        service: Service,
        request: fields.ChatRequest,
        prompt: list[int],
        n: int,
        id: str,
        created: int,
    ) -> None:
        self._request = request
        self._prompt = prompt
        self._names = TokenNames(service.prompter, bool(request.return_tokens_as_token_ids))
        self._usage = Usage(len(prompt))
        self._head = {
            "id": id,
            "created": created,
            "model": request.model or service.name,
            "system_fingerprint": service.fingerprint,
        }
        self._choices = [_Choice() for _ in range(n)]
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        options = request.stream_options or fields.StreamOptions()
        self._usage_at_end = bool(options.include_usage)
        self._usage_always = self._usage_at_end and bool(options.continuous_usage_stats)
        self._opened = False

    # ---- streams ------------------------------------------------------------------------------

    def events(self, prompt: int, piece: Piece) -> bytes:
        """Events of one piece: the role of each choice first, the finish reason by itself."""
        self._usage.take(prompt, piece)
        out = []
        if not self._opened:
            self._opened = True
            for index in range(len(self._choices)):
                first: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}}
                if self._request.return_token_ids:
                    first["prompt_token_ids"] = self._prompt
                out.append(self._event(index, first))
        logprobs = self._logprobs(piece)
        ids = self._request.return_token_ids and piece.token_ids
        if piece.text or logprobs or ids or (self._usage_always and piece.token_ids):
            part: dict[str, Any] = {"delta": {"content": piece.text}}
            if self._request.logprobs:
                part["logprobs"] = {"content": logprobs}
            if ids:
                part["token_ids"] = piece.token_ids
            out.append(self._event(piece.index, part))
        if piece.finish_reason is not None:
            out.append(self._event(piece.index, {"delta": {}}, piece.finish_reason))
        return b"".join(out)

    def closing(self) -> bytes:
        if not self._usage_at_end:
            return b""
        return event(encode({**self._chunk(), "choices": [], "usage": self._usage.as_json()}))

    def _event(self, index: int, part: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": index, "logprobs": None, **part, "finish_reason": finish_reason}
        chunk = {**self._chunk(), "choices": [choice]}
        if self._usage_at_end:
            chunk["usage"] = self._usage.as_json() if self._usage_always else None
        return event(encode(chunk))

    def _chunk(self) -> dict[str, Any]:
        return {"object": "chat.completion.chunk", **self._head}

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        if not self._request.logprobs:
            return []
        top = self._request.top_logprobs or 0
        return chat_logprobs(self._names, piece.token_ids, piece.logprobs or [], top)

    # ---- whole answers ------------------------------------------------------------------------

    def collect(self, prompt: int, piece: Piece) -> None:
        self._usage.take(prompt, piece)
        choice = self._choices[piece.index]
        choice.texts.append(piece.text)
        choice.tokens += piece.token_ids
        choice.logprobs += self._logprobs(piece)
        if piece.finish_reason is not None:
            choice.finish_reason = piece.finish_reason
        if piece.prompt_logprobs is not None:
            self._prompt_logprobs = piece.prompt_logprobs

    def whole(self) -> bytes:
        choices = []
        for index, choice in enumerate(self._choices):
            message = {"role": "assistant", "content": "".join(choice.texts), "refusal": None}
            shown: dict[str, Any] = {
                "index": index,
                "message": message,
                "logprobs": {"content": choice.logprobs} if self._request.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            if self._request.return_token_ids:
                shown["token_ids"] = choice.tokens
            choices.append(shown)
        answer: dict[str, Any] = {
            "object": "chat.completion",
            **self._head,
            "choices": choices,
            "usage": self._usage.as_json(),
        }
        if self._prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(
                self._names, self._prompt, self._prompt_logprobs
            )
        if self._request.return_token_ids:
            answer["prompt_token_ids"] = self._prompt
        return encode(answer)
