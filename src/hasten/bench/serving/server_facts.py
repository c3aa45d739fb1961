"""What a server says of itself before it is measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hasten.bench.serving.http import HttpClient


@dataclass(frozen=True)
class ServerFacts:
    """From ``/v1/models``: the first model's name, and what else its entry tells.

    ``max_length`` is vLLM's ``max_model_len``; ``vocab_size`` is llama.cpp's ``meta.n_vocab``.
    """

    model: str
    max_length: int | None = None
    vocab_size: int | None = None


async def server_facts(client: HttpClient) -> ServerFacts:
    """Raises ``ValueError`` if the server does not list a model, ``OSError`` if it is not there."""
    response = await client.get("/v1/models")
    if response.status != 200:
        hint = "; give --api-key" if response.status == 401 else "; name the model with --model"
        raise ValueError(f"the server answers /v1/models with status {response.status}{hint}")
    try:
        entry: Any = json.loads(response.body)["data"][0]
        name = entry["id"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise ValueError("the server lists no model at /v1/models; give --model") from None
    meta = entry.get("meta")
    return ServerFacts(
        str(name),
        _count(entry.get("max_model_len")),
        _count(meta.get("n_vocab")) if isinstance(meta, dict) else None,
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
