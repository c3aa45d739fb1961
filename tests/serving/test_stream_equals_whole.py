"""An assembled stream is the whole answer: text, finish reasons, usage, log-probabilities, ids."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from tests.serving.conftest import Live

TEXTS = [
    "def add(a, b):\n    return",
    "日本語のテキスト",
    "naïve café — 🙂🙃",
    "import os\nimport sys\n",
    "x = [1, 2, 3]\nfor",
    "class A:\n    def __init__(self",
]
STOPS = ["\n", "return", " b", "e", ":\n", "self", "🙂", "\ufffd", ", ", "def add"]


def random_request(rng: random.Random, number: int) -> tuple[str, dict[str, Any]]:
    """A route and a body. ``max_tokens`` goes through every small length."""
    body: dict[str, Any] = {
        "max_tokens": number % 16,
        "seed": rng.randrange(1 << 30),
        "temperature": rng.choice([0, 0.7, 1.5, 5]),
        "n": rng.choice([1, 1, 1, 2, 3]),
    }
    if rng.random() < 0.5:
        body["stop"] = rng.sample(STOPS, rng.randint(1, 3))
        body["include_stop_str_in_output"] = rng.random() < 0.3
    if rng.random() < 0.4:  # random tokens: broken characters, special tokens
        body |= {"temperature": 50, "top_k": -1, "skip_special_tokens": rng.random() < 0.5}
    if rng.random() < 0.2:
        body["ignore_eos"] = True
    if rng.random() < 0.2:
        body["return_token_ids"] = True
    if rng.random() < 0.2:
        body["logit_bias"] = {str(rng.randrange(4096)): rng.choice([-100, 5, 100])}
    if rng.random() < 0.2:
        body["min_tokens"] = min(2, body["max_tokens"])
    if rng.random() < 0.5:
        body["prompt"] = rng.choice(TEXTS) if rng.random() < 0.7 else rng.sample(TEXTS, 2)
        if rng.random() < 0.4:
            body["logprobs"] = rng.randrange(4)
        body["echo"] = rng.random() < 0.4
        return "/v1/completions", body
    body["messages"] = [{"role": "user", "content": rng.choice(TEXTS)}]
    if rng.random() < 0.4:
        body |= {"logprobs": True, "top_logprobs": rng.randrange(4)}
    return "/v1/chat/completions", body


def assembled(text: str) -> dict[str, Any]:
    """The whole answer that a stream of events makes up."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for number, data in enumerate(events[:-1]):
        chunk = json.loads(data)
        assert "error" not in chunk, chunk
        if chunk["usage"] is not None:
            assert chunk["choices"] == [] and number == len(events) - 2
            usage = chunk["usage"]
            continue
        (part,) = chunk["choices"]
        choice = choices.setdefault(
            part["index"], {"text": "", "logprobs": None, "finish_reason": None, "token_ids": []}
        )
        assert choice["finish_reason"] is None, "nothing follows the finish reason"
        choice["text"] += part["delta"].get("content", "") if "delta" in part else part["text"]
        choice["finish_reason"] = part["finish_reason"]
        choice["token_ids"] += part.get("token_ids", [])
        for key, values in (part["logprobs"] or {}).items():
            choice["logprobs"] = choice["logprobs"] or {}
            choice["logprobs"].setdefault(key, []).extend(values)
    return {"choices": choices, "usage": usage}


async def compare(live: Live, count: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    seen = {"stop": 0, "length": 0, "broken": 0}
    slots = asyncio.Semaphore(16)

    async def one(client: httpx.AsyncClient, route: str, body: dict[str, Any]) -> None:
        async with slots:
            whole = await client.post(route, json=body)
            streamed = await client.post(
                route, json={**body, "stream": True, "stream_options": {"include_usage": True}}
            )
        assert whole.status_code == streamed.status_code == 200, (body, whole.text, streamed.text)
        expected = whole.json()
        found = assembled(streamed.text)
        assert len(found["choices"]) == len(expected["choices"]), body
        for choice in expected["choices"]:
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            part = found["choices"][choice["index"]]
            assert part["text"] == text, body
            assert part["finish_reason"] == choice["finish_reason"], body
            assert part["token_ids"] == choice.get("token_ids", []), body
            # max_tokens=0 of a chat has no token, so no chunk with log-probabilities
            assert (part["logprobs"] or {"content": []}) == (
                choice["logprobs"] or {"content": []}
            ), body
            seen[choice["finish_reason"]] += 1
            seen["broken"] += "\ufffd" in text
        usage = {k: v for k, v in found["usage"].items() if k != "prompt_tokens_details"}
        assert usage == {
            k: v for k, v in expected["usage"].items() if k != "prompt_tokens_details"
        }, body  # what was cached depends on what ran before

    async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:
        await asyncio.gather(*(one(client, *random_request(rng, i)) for i in range(count)))
    return seen


def test_stream_equals_whole(live: Live) -> None:
    seen = asyncio.run(compare(live, 200, seed=1))
    assert min(seen.values()) > 5, f"the cases do not cover enough: {seen}"


@pytest.mark.soak
def test_stream_equals_whole_at_length(live: Live) -> None:
    asyncio.run(compare(live, 2000, seed=2))
