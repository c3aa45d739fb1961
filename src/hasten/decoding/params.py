"""What a request may ask of sampling, with the limits that keep one request affordable."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

MAX_LOGPROBS = 100
MAX_STOP = 64
MAX_STOP_CHARS = 1_000
MAX_BIAS = 10_000
MAX_N = 128
MAX_STRUCTURE_CHARS = 32_000
MAX_CHOICES = 10_000

_FROM_MODEL: dict[str, Any] = {
    # field: neutral value, used when neither the request nor the model says otherwise
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True)
class StructuredOutputs:
    """What the text of an output must be; exactly one of these.

    Attributes:
        json: a JSON schema (a mapping, or its text); the output is JSON that it admits. Keywords
            that cannot be enforced are refused.
        json_object: any JSON object.
        regex: a regular expression that the whole output matches (no look-around).
        choice: texts of which the output is one.
        grammar: a context-free grammar, in Lark or in llama.cpp's GBNF notation, which starts
            with ``start`` or ``root``.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if self.json is not None:
            object.__setattr__(self, "json", _json_text(self.json))
        if not isinstance(self.json_object, bool):
            raise ValueError("structured_outputs.json_object is true or false")
        if self.choice is not None:
            if isinstance(self.choice, str):
                raise ValueError("structured_outputs.choice is a list of texts")
            _check("choices in structured_outputs.choice", len(self.choice), 1, MAX_CHOICES)
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [name for name in STRUCTURES if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"structured_outputs is one of {', '.join(STRUCTURES)}; {got} given")
        value = getattr(self, self.kind)
        texts = value if isinstance(value, tuple) else (value,)
        if self.kind == "json_object":
            return
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"structured_outputs.{self.kind} is empty, or no text")
        if sum(map(len, texts)) > MAX_STRUCTURE_CHARS:
            raise ValueError(
                f"structured_outputs.{self.kind} has more than {MAX_STRUCTURE_CHARS} characters"
            )
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise ValueError(f"structured_outputs.{self.kind} is not valid Unicode") from None

    @property
    def kind(self) -> str:
        """Which of the fields is given."""
        return next(name for name in STRUCTURES if getattr(self, name) not in (None, False))


STRUCTURES = ("json", "json_object", "regex", "choice", "grammar")


def _json_text(schema: str | Mapping[str, Any]) -> str:
    """A schema as text with one form, properties in the order in which they are given."""
    if not isinstance(schema, str | Mapping):
        raise ValueError("structured_outputs.json is a JSON schema: an object, or its text")
    try:
        if isinstance(schema, str):
            if len(schema) > MAX_STRUCTURE_CHARS:
                return schema  # it is refused for its length, unread
            schema = json.loads(schema)
        return json.dumps(schema, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"structured_outputs.json is no JSON schema: {reason}") from None


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Fields that are None take the model's ``generation_config.json`` value, else the neutral one.
    Order of application: logit bias, penalties, bans (allowed tokens, bad words, structured
    outputs, minimum length), temperature, top-k, top-p, min-p, typical-p; each filter works on what
    the one before it left, renormalised. ``temperature=0`` is greedy: the largest logit after bias,
    penalties and bans, ties to the lowest id. Log-probabilities that are reported are those of the
    model itself, before all of this.

    Attributes:
        max_tokens: generated tokens at most; 0 = only score the prompt, None = until the context is
            full.
        temperature: 0 = greedy.
        top_k: keep the k likeliest tokens; 0 = all.
        top_p: keep the smallest set of likeliest tokens with this much probability.
        min_p: keep tokens with at least this share of the largest probability.
        typical_p: keep the most typical tokens with this much probability (arXiv:2202.00666).
        repetition_penalty: divide (multiply if negative) the logits of seen tokens (prompt too).
        presence_penalty, frequency_penalty: subtract once, or per occurrence, for generated tokens.
        logit_bias: added to the logits of the given token ids.
        allowed_token_ids: if given, no other token can be chosen.
        bad_words: token sequences that must not be completed (strings are encoded by the API).
        structured_outputs: what the text must be (or a mapping with a field of
            `StructuredOutputs`). The end of sequence is allowed only where the text may end, and
            where nothing else is possible the sequence ends, whatever ``min_tokens`` and
            ``ignore_eos`` say; ``max_tokens`` and stop strings may cut it short.
        min_tokens: no end of sequence and no stop before that many tokens.
        ignore_eos: go on past the end-of-sequence token.
        stop: strings that end the output; not included in it unless ``include_stop``.
        stop_token_ids: tokens that end the output.
        seed: same seed, same text, whatever the load; None = a fresh one.
        n: sequences to generate for the prompt.
        logprobs: likeliest alternatives to report for each token (0 = only the chosen token's).
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.
    """

    max_tokens: int | None = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    structured_outputs: StructuredOutputs | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = _ids("allowed_token_ids", self.allowed_token_ids)
            object.__setattr__(self, "allowed_token_ids", allowed)
        words = [w if isinstance(w, str) else _ids("bad_words", w) for w in self.bad_words]
        object.__setattr__(self, "bad_words", tuple(words))
        object.__setattr__(self, "structured_outputs", _structure(self.structured_outputs))
        keys = _ids("logit_bias", self.logit_bias)
        object.__setattr__(
            self, "logit_bias", dict(zip(keys, self.logit_bias.values(), strict=True))
        )
        _check("max_tokens", self.max_tokens, 0, None, whole=True)
        _check("min_tokens", self.min_tokens, 0, self.max_tokens, whole=True)
        _check("n", self.n, 1, MAX_N, whole=True)
        _check("temperature", self.temperature, 0, 100)
        _check("top_k", self.top_k, 0, None, whole=True)
        for name in ("top_p", "typical_p"):
            _check(name, getattr(self, name), 0, 1, above=True)
        _check("min_p", self.min_p, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, 0, None, above=True)
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), -100, 100)
        for name in ("logprobs", "prompt_logprobs"):
            _check(name, getattr(self, name), 0, MAX_LOGPROBS, whole=True)
        _check("seed", self.seed, -(2**63), 2**64 - 1, whole=True)
        _check("number of stop strings", len(stop), 0, MAX_STOP)
        _check("entries in logit_bias", len(self.logit_bias), 0, MAX_BIAS)
        for text in stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
                raise ValueError(f"a stop string has 1 to {MAX_STOP_CHARS} characters")
        for bias in self.logit_bias.values():
            if not isinstance(bias, int | float) or not math.isfinite(bias):
                raise ValueError(f"logit_bias {bias} is not finite; use bad_words to ban a token")

    def resolved(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Fill what is None from the model's defaults, then from the neutral values."""
        missing = {
            name: defaults.get(name, neutral)
            for name, neutral in _FROM_MODEL.items()
            if getattr(self, name) is None
        }
        return replace(self, **missing) if missing else self


def _structure(given: StructuredOutputs | Mapping[str, Any] | None) -> StructuredOutputs | None:
    if given is None or isinstance(given, StructuredOutputs):
        return given
    try:
        return StructuredOutputs(**given)
    except TypeError as error:  # not a mapping, or of other names
        raise ValueError(
            f"structured_outputs has one of the fields {', '.join(STRUCTURES)}: {error}"
        ) from None


def _ids(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    """Token ids as plain integers. Text of digits counts, since keys of JSON objects are text."""
    try:
        return tuple(int(v) if isinstance(v, str) else operator.index(v) for v in values)
    except (TypeError, ValueError):
        raise ValueError(f"{name} holds something that is no token id: {values!r}") from None


def _check(
    name: str,
    value: float | None,
    low: float,
    high: float | None,
    *,
    above: bool = False,
    whole: bool = False,
) -> None:
    if value is None:
        return
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a {'whole' if whole else 'finite'} number")
    if value < low or (above and value == low) or (high is not None and value > high):
        bound = f"above {low}" if above else f"at least {low}"
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name} is {value}, must be {bound}{upper}")
