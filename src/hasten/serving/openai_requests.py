"""What clients may send: the fields of OpenAI's API and the extras that other engines made common.

Every field that could change the answer is honoured or refused by name. Fields that cannot change
it (`WITHOUT_EFFECT`) are taken and do nothing.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hasten.decoding.params import STRUCTURES, SamplingParams, StructuredOutputs
from hasten.models.tokenizer import Tokenizer
from hasten.serving.bodies import check_depth
from hasten.serving.config import ServeConfig
from hasten.serving.errors import ApiError, invalid, unsupported

Prompts = str | list[str | int | list[int]]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # field: values that ask for nothing (null always does)
    "audio": (),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": ("",),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "hasten": ({},),
    "include_reasoning": (True,),
    "json_schema": (),
    "kv_transfer_params": (),
    "logits_processors": ([],),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "repetition_detection": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "top_n_sigma": (-1, 0),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
    "xtc_probability": (0,),
}
"""Fields that this server cannot honour. Anything but a neutral value is refused."""

WITHOUT_EFFECT = {
    "cache_prompt",
    "dry_allowed_length",
    "dry_base",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "dynatemp_exponent",
    "length_penalty",
    "metadata",
    "mirostat_eta",
    "mirostat_tau",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "spaces_between_special_tokens",
    "store",
    "timings_per_token",
    "user",
    "vllm_xargs",
    "xtc_threshold",
}
"""Fields that never change an answer here: bookkeeping, hints, and parameters of methods that are
off (an active one is refused by its main field)."""


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Usage so far in every chunk."""


class Generation(msgspec.Struct, kw_only=True):
    """Fields that completions and chat share. None and absent mean the same."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    top_k: int | None = None
    """-1 and 0 keep all."""
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    """Keep the last tokens of a prompt; -1 = as many as fit."""
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int | None = None
    """Smaller runs first."""
    request_id: str | None = None
    cache_salt: str | None = None
    """Requests share cached prefixes only with requests of the same salt."""
    response_format: dict[str, Any] | None = None
    """``{"type": "text"}``, ``{"type": "json_object"}`` (perhaps with a ``schema``), or
    ``{"type": "json_schema", "json_schema": {"schema": ...}}``."""
    structured_outputs: dict[str, Any] | None = None
    """One of the fields of `hasten.decoding.params.StructuredOutputs`."""

    def limit(self) -> int | None:
        """Tokens to generate at most, as the client said."""
        return self.max_tokens


class CompletionRequest(Generation, kw_only=True):
    prompt: Prompts
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatRequest(Generation, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None

    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    input: Prompts
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Either ``prompt`` or ``messages``."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages, whose template writes them."""
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


def refuse_unsupported(others: dict[str, msgspec.Raw]) -> list[str]:
    """Go through the fields that a request's type does not have; returns those nobody knows.

    Raises ApiError (400) for one that would change the answer.
    """
    unknown = []
    for name, raw in others.items():
        if name in NEUTRAL:
            try:
                value = msgspec.json.decode(raw)
            except (msgspec.DecodeError, RecursionError):
                raise unsupported(name) from None
            if value is not None and value not in NEUTRAL[name]:
                raise unsupported(name)
        elif name not in WITHOUT_EFFECT:
            unknown.append(name)
    return unknown


def check_tools(request: ChatRequest) -> None:
    """Tools are shown to models whose template takes them, and calls come back as text: forcing
    one is not there as yet."""
    if request.tool_choice not in (None, "none", "auto"):
        raise unsupported("tool_choice", "Leave it out, or send 'auto' or 'none'.")


def structure_field(request: Generation) -> str | None:
    """The name of the field that says what the text must be, if one does."""
    if request.structured_outputs is not None:
        return "structured_outputs"
    free = request.response_format is None or request.response_format.get("type") == "text"
    return None if free else "response_format"


def structured_outputs(request: Generation, config: ServeConfig) -> StructuredOutputs | None:
    """What the text must be. Raises ApiError (400) for what is no schema at sight; the engine
    refuses what does not compile."""
    field = structure_field(request)
    if field is None:
        return None
    if field == "response_format":
        wanted = _format(request.response_format or {})
    elif (request.response_format or {"type": "text"}).get("type") != "text":
        raise invalid("response_format and structured_outputs exclude each other", field)
    else:
        wanted = {k: v for k, v in (request.structured_outputs or {}).items() if v is not None}
    if unknown := wanted.keys() - set(STRUCTURES):
        raise unsupported(field, f"Its fields are {', '.join(STRUCTURES)}, not {min(unknown):.40}.")
    check_depth(field, wanted, config.max_json_depth)
    try:
        return StructuredOutputs(**wanted)
    except (ValueError, TypeError) as error:
        raise invalid(str(error), field) from None


def _format(given: dict[str, Any]) -> dict[str, Any]:
    """``response_format`` as a field of `StructuredOutputs`."""
    kind, schema = given.get("type"), given.get("schema")
    if kind == "json_object":
        return {"json_object": True} if schema is None else {"json": schema}
    if kind != "json_schema":
        raise unsupported("response_format", "Its types are text, json_object and json_schema.")
    about = given.get("json_schema")
    if not isinstance(about, dict) or about.get("schema") is None:
        raise invalid("response_format: json_schema has no schema", "response_format")
    return {"json": about["schema"]}


def cap(name: str, value: int | None, limit_name: str, limit: int) -> None:
    """Refuse a count above its limit, naming both."""
    if value is not None and value > limit:
        shown = value if value < 10**12 else "far more"
        raise invalid(f"{name} is {shown}, above the limit {limit_name}={limit}", name, "limit")


def check_caps(request: Generation, config: ServeConfig) -> None:
    """Limits that keep one request affordable; what they let through is checked in detail by
    `SamplingParams`."""
    cap("n", request.n, "max_n", config.max_n)
    cap("prompt_logprobs", request.prompt_logprobs, "max_logprobs", config.max_logprobs)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    cap("stop", len(stop), "max_stop", config.max_stop)
    cap("stop", max(map(len, stop), default=0), "max_stop_chars", config.max_stop_chars)
    cap("logit_bias", len(request.logit_bias or ()), "max_logit_bias", config.max_logit_bias)
    ids, words = request.stop_token_ids or (), request.bad_words or ()
    cap("stop_token_ids", len(ids), "max_token_lists", config.max_token_lists)
    cap("bad_words", len(words), "max_bad_words", config.max_bad_words)
    for word in request.bad_words or ():
        cap("bad_words", len(word), "max_stop_chars", config.max_stop_chars)
    if isinstance(request, CompletionRequest):
        cap("best_of", request.best_of, "max_best_of", config.max_best_of)
        cap("logprobs", request.logprobs, "max_logprobs", config.max_logprobs)
        if request.best_of is not None and request.best_of < (
            1 if request.n is None else request.n
        ):
            raise invalid("best_of must be at least n", "best_of")
        if request.stream and (request.best_of or 1) > (request.n or 1):
            raise invalid("best_of above n cannot be streamed", "best_of")
    if isinstance(request, ChatRequest):
        cap("top_logprobs", request.top_logprobs, "max_logprobs", config.max_logprobs)
        if request.top_logprobs is not None and not request.logprobs:
            raise invalid("top_logprobs needs logprobs=true", "top_logprobs")
    if request.stream and request.prompt_logprobs is not None:
        raise invalid("prompt_logprobs cannot be streamed", "prompt_logprobs")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options needs stream=true", "stream_options")


def sampling_params(
    request: Generation,
    *,
    n: int,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    structure: StructuredOutputs | None,
    tokenizer: Tokenizer,
) -> SamplingParams:
    """The fields as the engine wants them. Raises ApiError (400) for values it does not take.

    Bad words become tokens here, so that the engine's thread does not have to: a request may have
    a quarter of a million characters of them.
    """
    given = {
        name: value
        for name in (
            "seed",
            "stop",
            "temperature",
            "top_p",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
            "min_p",
            "typical_p",
            "repetition_penalty",
            "min_tokens",
            "ignore_eos",
            "stop_token_ids",
            "skip_special_tokens",
            "allowed_token_ids",
        )
        if (value := getattr(request, name)) is not None
    }
    if request.top_k is not None:
        given["top_k"] = 0 if request.top_k == -1 else request.top_k
    if request.include_stop_str_in_output is not None:
        given["include_stop"] = request.include_stop_str_in_output
    if request.bad_words:
        words = [tokenizer.encode(w, add_special_tokens=False) for w in request.bad_words]
        given["bad_words"] = words
    for name in given.get("logit_bias", ()):
        if not (name.isascii() and name.isdigit() and len(name) < 12):
            raise invalid(f"logit_bias: {name!r:.40} is no token id", "logit_bias")
    try:
        return SamplingParams(
            n=n,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=structure,
            **given,
        )
    except (ValueError, OverflowError) as error:
        raise _named(str(error), given) from None


def _named(message: str, given: dict[str, Any]) -> ApiError:
    names = [*given, "max_tokens", "logprobs", "n"]
    at_fault = next((name for name in names if name in message.split(" is ")[0]), None)
    return invalid(message, at_fault)
