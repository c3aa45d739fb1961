"""``POST /v1/embeddings``: the last hidden state of each input's last token, of length one."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

from hasten.decoding.params import SamplingParams
from hasten.serving import openai_requests as fields
from hasten.serving.bodies import Decoder, check_bulk
from hasten.serving.errors import invalid
from hasten.serving.exchange import Job
from hasten.serving.messages import Piece
from hasten.serving.openai_responses import encode
from hasten.serving.service import Body, Service

DECODER = Decoder(fields.EmbeddingRequest)


def prepare(service: Service, body: Body) -> Job:
    """Check a body and tokenize its inputs. Raises ApiError."""
    prompter = service.prompter
    check_bulk(body, prompter.longest_text)
    request, others = DECODER.decode(body)
    ignored = fields.refuse_unsupported(others)
    service.check_model(request.model)
    if not service.engine.facts.embeds:
        raise invalid("this model offers no embeddings", "model", "unsupported")
    if request.dimensions is not None:
        raise fields.unsupported("dimensions")
    if request.encoding_format not in (None, "float", "base64"):
        raise invalid("encoding_format: expected float or base64", "encoding_format")
    inputs, _ = prompter.prompts(
        request.input,
        "input",
        add_special_tokens=request.add_special_tokens,
        truncate=request.truncate_prompt_tokens,
        max_tokens=0,
    )

    def writer(id: str, created: int) -> EmbeddingWriter:
        return EmbeddingWriter(service, request, inputs)

    return Job(
        inputs,
        SamplingParams(max_tokens=0),
        writer,
        stream=False,
        prefix="embd",
        request_id=request.request_id,
        cache_salt=request.cache_salt,
        priority=request.priority,
        ignored=ignored,
        embed=True,
    )


class EmbeddingWriter:
    """Collects one vector per input."""

    def __init__(
        self, service: Service, request: fields.EmbeddingRequest, inputs: list[list[int]]
    ) -> None:
        self._base64 = request.encoding_format == "base64"
        self._model = request.model or service.name
        self._tokens = sum(map(len, inputs))
        self._vectors: list[list[float] | None] = [None] * len(inputs)

    def collect(self, prompt: int, piece: Piece) -> None:
        if piece.embedding is not None:
            self._vectors[prompt] = piece.embedding

    def whole(self) -> bytes:
        data = []
        for index, vector in enumerate(self._vectors):
            assert vector is not None, "the engine ended an input without its vector"
            data.append({"object": "embedding", "index": index, "embedding": self._shown(vector)})
        usage = {"prompt_tokens": self._tokens, "total_tokens": self._tokens}
        return encode({"object": "list", "data": data, "model": self._model, "usage": usage})

    def _shown(self, vector: list[float]) -> Any:
        """Scaled to length one; base64 holds little-endian float32."""
        length = math.sqrt(math.fsum(x * x for x in vector)) or 1.0
        unit = [x / length for x in vector]
        if not self._base64:
            return unit
        return base64.b64encode(struct.pack(f"<{len(unit)}f", *unit)).decode()

    def events(self, prompt: int, piece: Piece) -> bytes:
        raise NotImplementedError("embeddings are not streamed")

    def closing(self) -> bytes:
        raise NotImplementedError("embeddings are not streamed")
