"""Settings of the server: one dataclass, from which the command-line options, the environment
names, the keys of the YAML file and ``/hasten/config`` all derive.

Precedence: command line, then ``HASTEN_*`` environment variables, then the YAML file, then the
defaults below.
"""

from __future__ import annotations

import contextlib
import math
import re
import types
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from hasten.decoding import params

if TYPE_CHECKING:
    from hasten.serving.messages import EngineFacts

MODEL, ENGINE, NETWORK, QUEUE, LIMITS, LOGS = (
    "Model",
    "Engine",
    "Network and keys",
    "Queue and shutdown",
    "Limits of one request",
    "Logs and metrics",
)
"""Groups, in the order in which the help shows them."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ConfigError(ValueError):
    """A setting that is wrong: which, where it was given, and what is expected."""


def _setting(
    default: Any,
    group: str,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
    size: bool = False,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """A field with what the other forms need. ``size``: bytes, may be written as 512M."""
    facts = {
        "group": group,
        "help": help,
        "aliases": aliases,
        "secret": secret,
        "size": size,
        "least": least,
        "most": most,
    }
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class ServeConfig:
    """What ``hasten serve`` can be told. None = derived from the model or the machine."""

    model: str = _setting(
        "reference",
        MODEL,
        "Folder or hub id in Hugging Face layout, a GGUF file, or 'reference' (bundled).",
    )
    served_model_name: tuple[str, ...] = _setting(
        (), MODEL, "Name that clients use for the model; may be given several times."
    )
    stack: str | None = _setting(
        None,
        MODEL,
        "Methods to use, such as 'draft=prompt-lookup(k=8)'; 'hasten methods' lists them.",
    )
    weights: str | None = _setting(
        None, MODEL, "Short for a choice of weights in the stack: int8, int4, bf16."
    )

    max_sequences: int = _setting(
        64, ENGINE, "Sequences that run at the same time.", aliases=("max-num-seqs",), least=1
    )
    max_batch_tokens: int | None = _setting(
        None,
        ENGINE,
        "Rows of one step; longer prompts are computed in chunks.",
        aliases=("max-num-batched-tokens",),
        least=1,
    )
    max_length: int | None = _setting(
        None,
        ENGINE,
        "Longest sequence in tokens, prompt and answer together. Default: what the model was made "
        "for.",
        aliases=("max-model-len",),
        least=1,
    )
    kv_bytes: int | None = _setting(
        None,
        ENGINE,
        "Memory for keys and values, such as 512M or 2G. Default: a quarter of what is free, at "
        "most 2G.",
        size=True,
        least=1,
    )
    prefix_reuse: bool = _setting(
        True,
        ENGINE,
        "Start from the pages of earlier prompts with the same beginning.",
        aliases=("enable-prefix-caching",),
    )
    threads: int | None = _setting(
        None, ENGINE, "CPU threads of the engine. Default: all cores.", least=1
    )

    host: str = _setting(
        "127.0.0.1", NETWORK, "Address to listen on. Any other than loopback needs an API key."
    )
    port: int = _setting(
        8000, NETWORK, "Port to listen on; 0 takes a free one.", least=0, most=65535
    )
    api_key: tuple[str, ...] = _setting(
        (),
        NETWORK,
        "Key that requests must carry; may be given several times. Better in HASTEN_API_KEY or a "
        "file: other users can see command lines.",
        secret=True,
    )
    api_key_file: str | None = _setting(None, NETWORK, "File with one API key a line.")
    allow_no_key: bool = _setting(
        False, NETWORK, "Serve without a key on an address that others can reach."
    )
    allowed_host: tuple[str, ...] = _setting(
        (),
        NETWORK,
        "Name in the Host header that a server on loopback without a key answers to, beside "
        "localhost and addresses; may be given several times.",
    )
    cors_origin: tuple[str, ...] = _setting(
        (),
        NETWORK,
        "Web origin whose pages may call the server; may be given several times. Default: none.",
    )

    max_queued_requests: int | None = _setting(
        None,
        QUEUE,
        "Sequences that may wait for their first token; beyond, requests get 429. Default: four "
        "times max_sequences, at least 256.",
        aliases=("max-num-queued-reqs",),
        least=1,
    )
    max_queued_tokens: int | None = _setting(
        None,
        QUEUE,
        "Prompt tokens that may wait; beyond, requests get 429. Default: four times what the "
        "memory for keys and values holds, at most 1048576, at least one longest prompt.",
        aliases=("max-num-queued-tokens",),
        least=1,
    )
    drain_timeout: float = _setting(
        30.0,
        QUEUE,
        "Seconds that running requests have to finish after SIGTERM or Ctrl-C.",
        aliases=("shutdown-timeout",),
        least=0,
    )

    hang_seconds: float = _setting(
        8.0,
        QUEUE,
        "Seconds without progress of the engine after which /ready says no. More than the longest "
        "step takes.",
        least=1,
    )
    hang_limit: float = _setting(
        300.0,
        QUEUE,
        "Seconds without progress after which a hung engine is ended: waiting requests get 503, "
        "/health says dead, and the server exits with status 1.",
        least=1,
    )

    strict: bool = _setting(False, LIMITS, "Refuse requests that have fields nobody knows.")
    trust_request_chat_template: bool = _setting(
        False, LIMITS, "Let requests bring a chat template of their own (run in a sandbox)."
    )
    max_body_bytes: int = _setting(
        32 << 20, LIMITS, "Size of a request's body.", size=True, least=1024
    )
    max_n: int = _setting(params.MAX_N, LIMITS, "Outputs (n).", least=1, most=params.MAX_N)
    max_best_of: int = _setting(
        16, LIMITS, "Outputs to choose from (best_of).", least=1, most=params.MAX_N
    )
    max_prompts: int = _setting(256, LIMITS, "Prompts or inputs in one request.", least=1)
    max_outputs: int = _setting(
        1024, LIMITS, "Outputs of one request, over all of its prompts.", least=1
    )
    max_logprobs: int = _setting(
        20,
        LIMITS,
        "Alternatives per token (logprobs, top_logprobs, prompt_logprobs).",
        least=0,
        most=params.MAX_LOGPROBS,
    )
    max_stop: int = _setting(16, LIMITS, "Stop strings.", least=0, most=params.MAX_STOP)
    max_stop_chars: int = _setting(
        params.MAX_STOP_CHARS,
        LIMITS,
        "Characters of a stop string.",
        least=1,
        most=params.MAX_STOP_CHARS,
    )
    max_logit_bias: int = _setting(
        1024, LIMITS, "Entries of logit_bias.", least=0, most=params.MAX_BIAS
    )
    max_token_lists: int = _setting(
        4096,
        LIMITS,
        "Entries of stop_token_ids; allowed_token_ids may hold the vocabulary.",
        least=0,
    )
    max_bad_words: int = _setting(
        256, LIMITS, "Entries of bad_words; each is looked at for each token.", least=0
    )
    max_messages: int = _setting(2048, LIMITS, "Messages of a conversation.", least=1)
    max_json_depth: int = _setting(
        64, LIMITS, "Levels of nested JSON in messages, tools and template variables.", least=4
    )
    max_headers: int = _setting(128, LIMITS, "Header lines of a request.", least=16)

    log_format: Literal["text", "json"] = _setting(
        "text", LOGS, "Lines for people or JSON objects."
    )
    request_log: str | None = _setting(
        None, LOGS, "File that gets one JSON line of times and counts per request, never text."
    )
    metrics_compat: Literal["none", "vllm"] = _setting(
        "none", LOGS, "'vllm' also exports the metrics under vLLM's names."
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            _check_range(one, getattr(self, one.name))

    @property
    def names(self) -> tuple[str, ...]:
        """Names that clients may use, the one that answers carry first."""
        return self.served_model_name or (self.model,)

    @property
    def queued_requests(self) -> int:
        return self.max_queued_requests or max(256, 4 * self.max_sequences)

    def queued_tokens(self, facts: EngineFacts) -> int:
        """What ``max_queued_tokens`` means for a model."""
        held = 4 * facts.pages * facts.page_size
        return self.max_queued_tokens or max(min(held, 1 << 20), facts.max_length)

    def keys(self) -> list[str]:
        """All API keys; refuses an address that others reach if there are none."""
        keys = [key for key in self.api_key if key]
        if self.api_key_file is not None:
            try:
                lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeError) as error:
                raise ConfigError(f"api_key_file: cannot read it ({error})") from error
            found = [line.strip() for line in lines if line.strip() and line[0] != "#"]
            if not found:
                raise ConfigError(f"api_key_file: {self.api_key_file} holds no key")
            keys += found
        if not keys and self.host not in LOOPBACK and not self.allow_no_key:
            raise ConfigError(
                f"host {self.host} can be reached by others and there is no API key: set "
                "HASTEN_API_KEY (or --api-key-file), listen on 127.0.0.1, or say --allow-no-key"
            )
        for key in keys:
            if not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("an API key has printable ASCII characters and no spaces")
        return keys

    def public(self) -> dict[str, Any]:
        """All settings as JSON values, secrets masked."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        for one in fields(self):
            if isinstance(values[one.name], tuple):
                values[one.name] = list(values[one.name])
            if one.metadata["secret"] and values[one.name]:
                values[one.name] = ["***"] * len(values[one.name])
        return values


@dataclass(frozen=True)
class Effective:
    """A configuration and where each value came from: command line, environment, file, default."""

    config: ServeConfig
    sources: dict[str, str]

    def lines(self) -> list[str]:
        """The values that are not defaults, one a line."""
        shown = self.config.public()
        return [
            f"{name} = {shown[name]} ({source})"
            for name, source in self.sources.items()
            if source != "default"
        ]


def load(
    given: Mapping[str, Any], environment: Mapping[str, str], file: str | Path | None = None
) -> Effective:
    """Join the four sources.

    Args:
        given: values of the command line by field name; None = not given.
        environment: all environment variables.
        file: the YAML file of the command line; None = ``HASTEN_CONFIG`` if set, else no file.

    Raises:
        ConfigError: one line that names the setting and its place.
    """
    path = file if file is not None else environment.get("HASTEN_CONFIG") or None
    stated = {} if path is None else _read_yaml(Path(path))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for one in fields(ServeConfig):
        name = one.name
        variable = f"HASTEN_{name.upper()}"
        if given.get(name) is not None:
            place, raw, textual = f"--{name.replace('_', '-')}", given[name], False
        elif environment.get(variable, "") != "":
            place, raw, textual = variable, environment[variable], True
        elif name in stated:
            place, raw, textual = f"{name} in {path}", stated[name], False
        else:
            sources[name] = "default"
            continue
        values[name] = _convert(one, raw, place, textual)
        sources[name] = place
    return Effective(ServeConfig(**values), sources)


def parse_size(text: str) -> int:
    """A number of bytes, such as 65536, 512M or 2G."""
    match = re.fullmatch(r"(\d{1,18})([KMGT]?)", text.strip().upper())
    if match is None:
        raise ValueError("is not a size such as 65536, 512M or 2G")
    return int(match[1]) << (10 * " KMGT".index(match[2] or " "))


HINTS = get_type_hints(ServeConfig)
TEXTS = tuple[str, ...]


def kind(one: Field[Any]) -> Any:
    """The type of a field without ``| None``: str, int, float, bool, texts, or a Literal."""
    hint = HINTS[one.name]
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return hint


def _read_yaml(path: Path) -> dict[str, Any]:
    """Settings of a YAML file by field name; keys may have dashes and be aliases."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).replace("\n", " ")
        raise ConfigError(f"config file {path}: {reason}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"config file {path}: expected 'name: value' lines")
    known = {name: one.name for one in fields(ServeConfig) for name in _spellings(one)}
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = known.get(str(key).replace("-", "_"))
        if name is None:
            from difflib import get_close_matches

            near = get_close_matches(str(key).replace("-", "_"), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"config file {path}: no setting is called {str(key)!r:.80}{hint}")
        if name in values:
            raise ConfigError(f"config file {path}: {name} is set twice")
        if value is not None:
            values[name] = value
    return values


def _spellings(one: Field[Any]) -> list[str]:
    return [one.name, *(alias.replace("-", "_") for alias in one.metadata["aliases"])]


def _convert(one: Field[Any], raw: Any, place: str, textual: bool) -> Any:
    """A raw value as the type of its field. ``textual``: it comes from the environment."""
    wanted = kind(one)

    def wrong(what: str) -> ConfigError:
        shown = "" if one.metadata["secret"] else f", found {raw!r:.80}"
        return ConfigError(f"{place}: {what}{shown}")

    if wanted == TEXTS:
        items = raw.split(",") if textual and isinstance(raw, str) else raw
        items = [items] if isinstance(items, str) else items
        if not isinstance(items, list | tuple) or not all(isinstance(i, str) for i in items):
            raise wrong("expected a text or a list of texts")
        if one.metadata["secret"] and not all(item.strip() for item in items):
            raise wrong("is empty")  # a variable that was not set must not open the server
        return tuple(item.strip() for item in items if item.strip())
    if get_origin(wanted) is Literal:
        if raw not in get_args(wanted):
            raise wrong(f"expected one of {', '.join(get_args(wanted))}")
        return raw
    if wanted is bool:
        if isinstance(raw, bool):
            return raw
        words = {"1": True, "true": True, "yes": True, "on": True}
        words |= {"0": False, "false": False, "no": False, "off": False}
        if not textual or raw.strip().lower() not in words:
            raise wrong("expected true or false")
        return words[raw.strip().lower()]
    if wanted is str:
        if not isinstance(raw, str):
            raise wrong("expected a text")
        return raw
    if one.metadata["size"] and isinstance(raw, str):
        try:
            return parse_size(raw)
        except ValueError as error:
            raise wrong(str(error)) from None
    if isinstance(raw, str) and textual:
        with contextlib.suppress(ValueError):
            raw = wanted(raw.strip())
    if isinstance(raw, bool) or not isinstance(raw, (int, float) if wanted is float else int):
        raise wrong("expected a whole number" if wanted is int else "expected a number")
    value = wanted(raw)
    try:
        _check_range(one, value)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    return value


def _check_range(one: Field[Any], value: Any) -> None:
    least, most = one.metadata["least"], one.metadata["most"]
    if value is None or not isinstance(value, int | float) or isinstance(value, bool):
        return
    if not math.isfinite(value) or (least is not None and value < least):
        raise ConfigError(f"{one.name} is {value}, must be at least {least}")
    if most is not None and value > most:
        raise ConfigError(f"{one.name} is {value}, must be at most {most}")
