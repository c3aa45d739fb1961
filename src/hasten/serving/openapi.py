"""What /openapi.json says about bodies, answers and errors.

FastAPI sees none of them: bodies are decoded by msgspec, answers are written as bytes. The bodies
come from the types that decode them; ranges and answers are stated here, and
tests/serving/test_schema_fuzz.py holds the server to every word.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI

from hasten.serving import openai_requests as fields
from hasten.serving.config import ServeConfig
from hasten.serving.prompts import ROLES
from hasten.serving.service import Service

Schema = dict[str, Any]

BODIES = {
    "/v1/completions": fields.CompletionRequest,
    "/v1/chat/completions": fields.ChatRequest,
    "/v1/embeddings": fields.EmbeddingRequest,
    "/tokenize": fields.TokenizeRequest,
    "/detokenize": fields.DetokenizeRequest,
}
PROBES = ("/health", "/ready", "/ping")

_ERRORS = {
    "400": "The request is wrong, above a limit, or asks for what is not supported.",
    "401": "The API key is missing or wrong.",
    "403": "Without a key this server does not answer to the name in the Host header.",
    "404": "No such model.",
    "408": "The body did not come in time.",
    "413": "The body is larger than max_body_bytes.",
    "415": "The body is not declared as JSON.",
    "429": "The queue is full; try again after the seconds in Retry-After.",
    "431": "Too many headers.",
    "500": "The server failed; its log has the request's id.",
    "503": "Loading, shutting down, or the engine has stopped.",
}
_OF_BODIES = ("400", "404", "408", "413", "415", "429", "500")
_ALWAYS = ("401", "403", "431", "503")


def _object(needed: Schema, more: Schema | None = None) -> Schema:
    """An object with these properties; there may be others."""
    return {
        "type": "object",
        "required": list(needed),
        "properties": {**needed, **(more or {})},
    }


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_OPEN: Schema = {"type": "object"}
_TOKENS = _list(_COUNT)
_REASON = {"enum": ["stop", "length", "abort"]}

_ERROR = _object(
    {
        "error": _object(
            {
                "message": _TEXT,
                "type": _TEXT,
                "param": _nullable(_TEXT),
                "code": _nullable(_TEXT),
            }
        )
    }
)
_USAGE = _object(
    {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
    {"prompt_tokens_details": _object({"cached_tokens": _COUNT})},
)
_ANSWER_HEAD = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "system_fingerprint": _TEXT}
_LEGACY_LOGPROBS = _object(
    {
        "tokens": _list(_TEXT),
        "token_logprobs": _list(_nullable(_NUMBER)),
        "top_logprobs": _list(
            _nullable({"type": "object", "additionalProperties": {"type": "number"}})
        ),
        "text_offset": _TOKENS,
    }
)
_TOKEN_LOGPROB = {"token": _TEXT, "logprob": _NUMBER, "bytes": _TOKENS}
_LOGPROBS = _object(
    {"content": _list(_object({**_TOKEN_LOGPROB, "top_logprobs": _list(_object(_TOKEN_LOGPROB))}))}
)
_CARD = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "max_model_len": _COUNT,
    }
)

_ANSWERS: dict[str, Schema] = {
    "/v1/completions": _object(
        {
            **_ANSWER_HEAD,
            "object": {"const": "text_completion"},
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "text": _TEXT,
                        "logprobs": _nullable(_LEGACY_LOGPROBS),
                        "finish_reason": _REASON,
                    },
                    {"token_ids": _TOKENS, "prompt_token_ids": _TOKENS},
                )
            ),
            "usage": _USAGE,
        }
    ),
    "/v1/chat/completions": _object(
        {
            **_ANSWER_HEAD,
            "object": {"const": "chat.completion"},
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "message": _object(
                            {"role": {"const": "assistant"}, "content": _TEXT},
                            {"refusal": {"type": "null"}},
                        ),
                        "logprobs": _nullable(_LOGPROBS),
                        "finish_reason": _REASON,
                    },
                    {"token_ids": _TOKENS},
                )
            ),
            "usage": _USAGE,
        }
    ),
    "/v1/embeddings": _object(
        {
            "object": {"const": "list"},
            "model": _TEXT,
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": _COUNT,
                        "embedding": {"anyOf": [_list(_NUMBER), _TEXT]},
                    }
                )
            ),
            "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
    "/v1/models": _object({"object": {"const": "list"}, "data": _list(_CARD)}),
    "/v1/models/{name}": _CARD,
    "/tokenize": _object(
        {
            "count": _COUNT,
            "max_model_len": _COUNT,
            "tokens": _TOKENS,
            "token_strs": _nullable(_list(_TEXT)),
        }
    ),
    "/detokenize": _object({"prompt": _TEXT}),
    "/tokenizer_info": _object(
        {
            "bos_token": _nullable(_TEXT),
            "eos_token": _nullable(_TEXT),
            "pad_token": _nullable(_TEXT),
            "chat_template": _nullable(_TEXT),
        }
    ),
    "/health": _object({"status": {"const": "ok"}}),
    "/ping": _object({"status": {"const": "ok"}}),
    "/ready": _object({"ready": {"const": True}}),
    "/version": _object({"version": _TEXT}),
    "/hasten/config": _object(
        {"version": _TEXT, "settings": _OPEN, "sources": _OPEN, "effective": _OPEN}
    ),
    "/hasten/stats": _object({"model": _TEXT, "engine": {"type": "boolean"}}),
}
_UNWELL = {
    "/health": _object({"status": {"const": "dead"}, "reason": _TEXT}),
    "/ping": _object({"status": {"const": "dead"}, "reason": _TEXT}),
    "/ready": _object({"ready": {"const": False}, "reason": _TEXT}),
}
"""What probes answer with 503."""


def describe(app: FastAPI, service: Service) -> None:
    """Complete the document that ``app`` makes of its routes."""
    made: Schema = {}
    generate = app.openapi

    def openapi() -> Schema:
        if made:
            return made
        vocabulary = service.engine.facts.vocab_size if service.engine.alive else None
        document = _completed(generate(), service.config, vocabulary, bool(service.keys))
        if vocabulary is not None:  # else the model loads: it will be more exact later
            made.update(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _completed(document: Schema, config: ServeConfig, vocabulary: int | None, keys: bool) -> Schema:
    schemas, components = msgspec.json.schema_components(
        BODIES.values(), ref_template="#/components/schemas/{name}"
    )
    _bound(components, config, vocabulary)
    components["Error"] = _ERROR
    document["components"] = {"schemas": components}
    for path, schema in zip(BODIES, schemas, strict=True):
        document["paths"][path]["post"]["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["responses"] = _responses(path)
    if keys:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "basic": {"type": "http", "scheme": "basic", "description": "The password is the key."},
        }
        document["security"] = [{"bearer": []}, {"basic": []}]
        for path in PROBES:
            document["paths"][path]["get"]["security"] = []
    return document


def _responses(path: str) -> Schema:
    """All answers of a route."""
    if path == "/metrics":
        content: Schema = {"text/plain": {"schema": _TEXT}}
    else:
        content = {"application/json": {"schema": _ANSWERS[path]}}
    if path in ("/v1/completions", "/v1/chat/completions"):
        content["text/event-stream"] = {"schema": {}}  # objects as above, in parts
    found: Schema = {"200": {"description": "Well.", "content": content}}
    statuses: tuple[str, ...] = _ALWAYS if path not in PROBES else ("431",)
    statuses += _OF_BODIES if path in BODIES else ()
    statuses += ("404",) if path == "/v1/models/{name}" else ()
    reference = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status in sorted(statuses):
        found[status] = {"description": _ERRORS[status], "content": reference}
    if path in _UNWELL:
        unwell = {"application/json": {"schema": _UNWELL[path]}}
        found["503"] = {"description": "Not well.", "content": unwell}
    if "429" in found:
        found["429"]["headers"] = {"Retry-After": {"schema": _COUNT}}
    return found


def _bound(components: Schema, config: ServeConfig, vocabulary: int | None) -> None:
    """State the ranges of fields, as far as they depend on nothing else."""
    token = dict(_COUNT) if vocabulary is None else {**_COUNT, "maximum": vocabulary - 1}
    ranges: dict[str, Schema] = {
        "n": {"minimum": 1, "maximum": config.max_n},
        "best_of": {"minimum": 1, "maximum": config.max_best_of},
        "seed": {"minimum": -(2**63), "maximum": 2**64 - 1},
        "max_tokens": {"minimum": 0},
        "max_completion_tokens": {"minimum": 0},
        "min_tokens": {"minimum": 0},
        "temperature": {"minimum": 0, "maximum": 100},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "typical_p": {"exclusiveMinimum": 0, "maximum": 1},
        "min_p": {"minimum": 0, "maximum": 1},
        "top_k": {"minimum": -1},
        "repetition_penalty": {"exclusiveMinimum": 0},
        "presence_penalty": {"minimum": -100, "maximum": 100},
        "frequency_penalty": {"minimum": -100, "maximum": 100},
        "logprobs": {"minimum": 0, "maximum": config.max_logprobs},
        "top_logprobs": {"minimum": 0, "maximum": config.max_logprobs},
        "prompt_logprobs": {"minimum": 0, "maximum": config.max_logprobs},
        "truncate_prompt_tokens": {"minimum": -1, "not": {"const": 0}},
        "allowed_token_ids": {"minItems": 1, "items": token},
        "stop_token_ids": {"items": token, "maxItems": config.max_token_lists},
        "bad_words": {"maxItems": config.max_bad_words},
        "model": {"enum": list(config.names)},
        "messages": {"minItems": 1, "maxItems": config.max_messages},
        "logit_bias": {
            "propertyNames": {"pattern": "^[0-9]{1,11}$"},
            "maxProperties": config.max_logit_bias,
        },
        "encoding_format": {"enum": ["float", "base64"]},
        "response_format": {
            "anyOf": [
                _object({"type": {"enum": ["text", "json_object"]}}),
                _object(
                    {
                        "type": {"const": "json_schema"},
                        "json_schema": _object({"schema": {"anyOf": [_OPEN, _TEXT]}}),
                    }
                ),
            ]
        },
        "structured_outputs": {
            "properties": {
                "json": {"anyOf": [_OPEN, _TEXT, {"type": "null"}]},
                "json_object": {"type": ["boolean", "null"]},
                "regex": {"type": ["string", "null"]},
                "choice": _nullable(_list({"type": "string", "minLength": 1})),
                "grammar": {"type": ["string", "null"]},
            },
            "additionalProperties": False,
            "minProperties": 1,
        },
        "tool_choice": {"enum": ["auto", "none"]},
    }
    text = {"type": "string", "minLength": 1, "maxLength": config.max_stop_chars}
    part = _object({"type": {"enum": ["text", "input_text"]}, "text": _TEXT})
    said = {"role": {"enum": list(ROLES)}, "content": {"anyOf": [_TEXT, _list(part)]}}
    called = {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}}
    message = {"anyOf": [_object(said), _object(called)]}
    for component in components.values():
        for name, schema in component.get("properties", {}).items():
            for option in schema.get("anyOf", [schema]):
                kind = option.get("type")
                if kind in ("null", "boolean"):  # logprobs is a number in one route only
                    continue
                option.update(ranges.get(name, {}))
                if name == "stop":
                    option.update(
                        text if kind == "string" else {"items": text, "maxItems": config.max_stop}
                    )
                elif name == "messages":
                    option["items"] = message
    ids = {"type": "array", "items": token, "minItems": 1}
    prompts = {
        "anyOf": [
            _TEXT,
            {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": config.max_prompts},
            ids,
            {"type": "array", "items": ids, "minItems": 1, "maxItems": config.max_prompts},
        ]
    }
    components["CompletionRequest"]["properties"]["prompt"] = prompts
    components["EmbeddingRequest"]["properties"]["input"] = prompts
    components["EmbeddingRequest"]["properties"]["dimensions"] = {"type": "null"}
    components["DetokenizeRequest"]["properties"]["tokens"] = _list(token)
    _split_tokenize(components)


def _split_tokenize(components: Schema) -> None:
    """A prompt or a conversation, each with its own options."""
    every = components.pop("TokenizeRequest")["properties"]
    for_both = {name: every[name] for name in ("model", "add_special_tokens", "return_token_strs")}
    messages = next(one for one in every["messages"]["anyOf"] if one["type"] == "array")
    options = {name: schema for name, schema in every.items() if name not in ("prompt", "messages")}
    components["TokenizeRequest"] = {
        "anyOf": [_object({"prompt": _TEXT}, for_both), _object({"messages": messages}, options)]
    }
