"""Fields of requests: honoured, refused by name, or named as ignored; and the smaller routes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from hasten.models.tokenizer import Tokenizer
from hasten.serving.openai_requests import NEUTRAL, WITHOUT_EFFECT
from tests.serving.conftest import Live

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"messages": HELLO, "max_tokens": 4}
COMPLETION = {"prompt": "def add(a, b):", "max_tokens": 4}


@pytest.fixture(scope="module")
def tokenizer(live: Live) -> Tokenizer:
    return live.service.prompter.tokenizer


def post(live: Live, route: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    answer = live.http.post(route, json=body)
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def complete(live: Live, **fields: Any) -> dict[str, Any]:
    return dict(post(live, "/v1/completions", {**COMPLETION, **fields})["choices"][0])


def refused(live: Live, route: str, body: dict[str, Any]) -> dict[str, Any]:
    return dict(post(live, route, body, 400)["error"])


@pytest.mark.parametrize("field", sorted(NEUTRAL))
def test_what_cannot_be_honoured_is_refused_by_name(live: Live, field: str) -> None:
    for route, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        error = refused(live, route, {**body, field: {"a": 1}})
        assert error["param"] == field and error["code"] == "unsupported"
        assert "not supported as yet" in error["message"]
        for neutral in (None, *NEUTRAL[field]):
            answer = live.http.post(route, json={**body, field: neutral})
            assert answer.status_code == 200
            assert "x-hasten-ignored" not in answer.headers


def test_other_unsupported_values(live: Live) -> None:
    for fields, param in (
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"echo": True}, "echo"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"messages": []}, "messages"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ):
        assert refused(live, "/v1/chat/completions", {**CHAT, **fields})["param"] == param
    assert post(live, "/v1/chat/completions", {**CHAT, "tool_choice": "none"})
    assert post(live, "/v1/chat/completions", {**CHAT, "response_format": {"type": "text"}})


def test_unknown_fields_are_named_or_refused(live: Live, serve: Callable[..., Live]) -> None:
    effectless = dict.fromkeys(WITHOUT_EFFECT, 1)
    answer = live.http.post(
        "/v1/completions", json={**COMPLETION, **effectless, "zip": 1, "zap": {}}
    )
    assert answer.status_code == 200
    assert answer.headers["x-hasten-ignored"] == "zip, zap"
    assert answer.json()["choices"][0]["text"] == complete(live)["text"]
    strict = serve(strict=True)
    assert post(strict, "/v1/completions", {**COMPLETION, **effectless})
    error = refused(strict, "/v1/completions", {**COMPLETION, "zip": 1})
    assert error["param"] == "zip" and error["code"] == "unknown_field"


def test_fields_reach_the_engine(live: Live, tokenizer: Tokenizer) -> None:
    plain = complete(live, max_tokens=8, return_token_ids=True)
    assert tokenizer.decode(plain["token_ids"]) == plain["text"].replace("def add(a, b):", "")
    assert plain["prompt_token_ids"] == tokenizer.encode(COMPLETION["prompt"])
    first, second = plain["token_ids"][:2]
    assert complete(live, top_k=0)["text"] == complete(live, top_k=-1)["text"]
    assert complete(live, logit_bias={str(first): -100})["text"] != plain["text"][:4]
    ids = complete(live, allowed_token_ids=[second], return_token_ids=True)["token_ids"]
    assert set(ids) == {second}
    stopped = complete(live, stop_token_ids=[first], return_token_ids=True)
    assert stopped["finish_reason"] == "stop" and stopped["token_ids"] == [first]
    stop = plain["text"][2:4]
    assert stop not in complete(live, stop=stop, max_tokens=8)["text"]
    kept = complete(live, stop=stop, include_stop_str_in_output=True, max_tokens=8)
    assert kept["text"].endswith(stop) and kept["finish_reason"] == "stop"
    banned = complete(live, bad_words=[tokenizer.token_text(first)], return_token_ids=True)
    assert first not in banned["token_ids"]
    seeded = {"temperature": 3, "seed": 5, "max_tokens": 12}
    assert complete(live, **seeded)["text"] == complete(live, **seeded)["text"]
    assert complete(live, repetition_penalty=5.0, max_tokens=12)["text"] != plain["text"]
    scored = complete(live, prompt_logprobs=2)["prompt_logprobs"]
    assert scored[0] is None and len(scored) == len(plain["prompt_token_ids"])
    assert str(plain["prompt_token_ids"][1]) in scored[1]
    named = complete(live, logprobs=1, return_tokens_as_token_ids=True)["logprobs"]
    assert named["tokens"][0] == f"token_id:{first}"


def test_truncation(live: Live, tokenizer: Tokenizer) -> None:
    long = "1 2 3 4 5 6 7 8 9 " * 60
    assert refused(live, "/v1/completions", {"prompt": long})["code"] == "context_length_exceeded"
    ids = tokenizer.encode(long)
    for keep, expected in ((7, ids[-7:]), (-1, ids[-(512 - 4) :])):
        cut = complete(live, prompt=long, truncate_prompt_tokens=keep, return_token_ids=True)
        assert cut["prompt_token_ids"] == expected
    refused(live, "/v1/completions", {"prompt": "x", "truncate_prompt_tokens": 0})
    assert complete(live, prompt=long, truncate_prompt_tokens=3, echo=True, max_tokens=0)[
        "text"
    ] == tokenizer.decode(ids[-3:])


def test_defaults_of_length(live: Live) -> None:
    answer = post(live, "/v1/completions", {"prompt": "x", "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 16
    answer = post(live, "/v1/chat/completions", {"messages": HELLO, "ignore_eos": True})
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


def test_continue_final_message(live: Live, tokenizer: Tokenizer) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The answer is "}]
    body = {"messages": messages, "continue_final_message": True}
    ids = post(live, "/tokenize", body)["tokens"]
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith("<|assistant|>The answer is ")
    closed = post(live, "/tokenize", {"messages": messages, "add_generation_prompt": False})
    assert tokenizer.decode(closed["tokens"], False).endswith("The answer is<|end|>")
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert post(live, "/tokenize", {"messages": parts}) == post(
        live, "/tokenize", {"messages": HELLO}
    )


def test_template_of_a_request(serve: Callable[..., Live]) -> None:
    live = serve(trust_request_chat_template=True)
    body = {"messages": HELLO, "chat_template": "{{ word }}{{ messages[0].content }}"}
    found = post(live, "/tokenize", {**body, "chat_template_kwargs": {"word": "oh "}})
    assert post(live, "/detokenize", {"tokens": found["tokens"]})["prompt"] == "oh hello"
    for wrong in ("{{", "{{ messages[0].__class__ }}{{ ''.__class__.__mro__ }}"):
        assert refused(live, "/v1/chat/completions", {**CHAT, "chat_template": wrong})


def test_tokenize_and_back(live: Live, tokenizer: Tokenizer) -> None:
    text = "naïve 日本 🙂"
    found = post(live, "/tokenize", {"prompt": text, "return_token_strs": True})
    assert found["tokens"] == tokenizer.encode(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    bare = post(live, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    assert post(live, "/detokenize", {"tokens": bare})["prompt"] == text
    refused(live, "/tokenize", {})
    refused(live, "/tokenize", {"prompt": "x", "messages": HELLO})
    refused(live, "/detokenize", {"tokens": [10**6]})
    refused(live, "/detokenize", {"tokens": [-1]})


def test_request_ids(live: Live) -> None:
    answer = live.http.get("/health", headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    for bad in ("x" * 129, "a\tb", ""):
        found = live.http.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert found != bad and found.startswith("req-")
    same = {**COMPLETION, "request_id": "mine"}
    assert post(live, "/v1/completions", same)["id"] == "cmpl-mine"
    assert (
        post(live, "/v1/chat/completions", {**CHAT, "request_id": "a\nb"})["id"] != "chatcmpl-a\nb"
    )


ALL = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize")
WRONG: list[tuple[str, tuple[str, ...]]] = [
    *((body, ALL) for body in ("", "[]", "null", "{", "5", "{}", '{"model": 5}', "{} x")),
    *(
        (f'{{"prompt": {prompt}}}', ("/v1/completions",))
        for prompt in ("5", "[]", "[[]]", '["a", 1]', "[true]", "[99999]", "[-1]", '[["a"]]', "{}")
    ),
    *(
        (f'{{"prompt": "x", "{field}": {value}}}', ("/v1/completions",))
        for field, value in (
            ("n", 0),
            ("n", '"1"'),
            ("best_of", 0),
            ("logit_bias", "[]"),
            ("logprobs", -1),
            ("temperature", "1e999"),
            ("top_k", -2),
            ("seed", 2**64),
            ("stop", '""'),
            ("bad_words", '[""]'),
            ("allowed_token_ids", "[]"),
            ("stop_token_ids", "[99999]"),
            ("priority", "1.5"),
        )
    ),
]


@pytest.mark.parametrize(("body", "routes"), WRONG)
def test_wrong_bodies_are_400_with_a_sentence(
    live: Live, body: str, routes: tuple[str, ...]
) -> None:
    for route in routes:
        answer = live.http.post(route, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.json()["error"]["message"]


def test_routes_that_are_not_there(live: Live) -> None:
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405)):
        answer = live.http.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_served_names(serve: Callable[..., Live]) -> None:
    live = serve(served_model_name=("big", "small"))
    assert [m["id"] for m in live.http.get("/v1/models").json()["data"]] == ["big", "small"]
    assert post(live, "/v1/completions", {**COMPLETION, "model": "small"})["model"] == "small"
    assert post(live, "/v1/completions", COMPLETION)["model"] == "big"
    post(live, "/v1/completions", {**COMPLETION, "model": "reference"}, 404)


def test_usage_in_every_chunk(live: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**CHAT, "stream": True, "stream_options": options}
    text = live.http.post("/v1/chat/completions", json=body).text
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line and "[DONE]" not in line]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 4


def test_fields_that_the_template_does_not_read_are_told(live: Live) -> None:
    answer = live.http.post("/v1/chat/completions", json={**CHAT, "reasoning_effort": "low"})
    assert answer.status_code == 200
    assert answer.headers["x-hasten-ignored"] == "reasoning_effort"
    error = refused(live, "/v1/chat/completions", {**CHAT, "documents": [{"text": "x"}]})
    assert error["param"] == "documents" and error["code"] == "unsupported"
