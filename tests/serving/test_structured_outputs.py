"""``response_format`` and ``structured_outputs``: what comes back, and what is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.serving.live import Live
from tests.serving.test_requests import CHAT, COMPLETION, post, refused

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ada", "grace"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
FIELDS: dict[str, dict[str, Any]] = {
    "json_schema": {"response_format": NAMED},
    "json_object with a schema": {"response_format": {"type": "json_object", "schema": SCHEMA}},
    "json": {"structured_outputs": {"json": SCHEMA}, "response_format": {"type": "text"}},
    "json as text": {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}},
}
ROUTES = (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT))


def text(choice: dict[str, Any]) -> str:
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize("name", FIELDS)
def test_answers_follow_the_schema(live: Live, name: str) -> None:
    for route, body in ROUTES:
        asked = {**body, **FIELDS[name], "max_tokens": 200, "temperature": 1, "n": 3, "seed": 1}
        for choice in post(live, route, asked)["choices"]:
            assert choice["finish_reason"] == "stop"
            value = json.loads(text(choice))
            assert value.keys() == {"name", "age"} and value["name"] in ("ada", "grace")
            assert type(value["age"]) is int and 0 <= value["age"] <= 99


def test_other_structures(live: Live) -> None:
    for structure, pattern in (
        ({"regex": "[a-f]{3}-[0-9]{1,5}!"}, "[a-f]{3}-[0-9]{1,5}!"),
        ({"choice": ["left", "right"]}, "left|right"),
        ({"grammar": 'root ::= "(" ("x" | "y") ")"'}, r"\([xy]\)"),
    ):
        for route, body in ROUTES:
            asked = {**body, "structured_outputs": structure, "max_tokens": 100}
            asked |= {"temperature": 1, "seed": 3}
            (choice,) = post(live, route, asked)["choices"]
            assert re.fullmatch(pattern, text(choice))
    asked = {**CHAT, "response_format": {"type": "json_object"}, "max_tokens": 12}
    (choice,) = post(live, "/v1/chat/completions", asked)["choices"]
    assert text(choice).lstrip().startswith("{")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"response_format": {}}, "Its types are"),
        ({"response_format": {"type": "xml"}}, "Its types are"),
        ({"response_format": {"type": "json_schema"}}, "no schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "no schema"),
        ({"response_format": {"type": "json_object", "schema": {"type": "strin"}}}, "strin"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "Unimplemented keys",
        ),
        ({"structured_outputs": {}}, "none given"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"structured_outputs": {"regex": "("}}, "unclosed group"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "json_object and regex"),
        ({"structured_outputs": {"regex": "a"}, "response_format": NAMED}, "exclude each other"),
        ({"structured_outputs": {"grammar": "root ::= nothing"}}, "nothing"),
        ({"structured_outputs": "json"}, "structured_outputs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_named(
    live: Live, fields: dict[str, Any], reason: str, stream: bool
) -> None:
    field = "structured_outputs" if "structured_outputs" in fields else "response_format"
    for route, body in ROUTES:
        error = refused(live, route, {**body, **fields, "stream": stream})
        assert reason in error["message"] and error["param"] == field
        assert error["type"] == "invalid_request_error"


def test_what_leaves_nothing_to_choose_is_the_requests_fault(live: Live) -> None:
    asked = {**COMPLETION, "structured_outputs": {"regex": "abc"}, "allowed_token_ids": [0]}
    assert refused(live, "/v1/completions", asked)["code"] == "no_token_left"
