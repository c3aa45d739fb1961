"""Chat templates: the Jinja programs of checkpoints, rendered inside limits.

A template is code from a stranger. It runs in Jinja's immutable sandbox on plain JSON data, and it
may run for `MAX_SECONDS`, write `MAX_CHARS` and build values of `MAX_BUILT` characters on the way.
What a template may call follows the conventions of Hugging Face's templates
(https://huggingface.co/docs/transformers/chat_templating).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from string import Formatter
from threading import local
from time import perf_counter
from types import FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

MAX_SECONDS = 2.0
MAX_CHARS = 8 << 20
MAX_BUILT = 256 << 20
LONG_WIDTH = re.compile(r"\d{5}")
STAR_WIDTH = re.compile(r"%[-#0 +]*\d*\.?\*")
PADDING = {
    "center": "",
    "expandtabs": "\t",
    "indent": "\n",
    "ljust": "",
    "rjust": "",
    "tojson": "",
    "truncate": "",
    "wordwrap": "",
    "zfill": "",
}
"""Methods and filters that take a width, and in front of what they repeat it."""

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """A template that is wrong, refuses the conversation, or exceeds its limits."""


class _TooMuch(Exception):
    """A limit was reached while rendering."""


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja text.
        special_tokens: names and texts that templates expect, such as ``bos_token``.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.special_tokens = dict(special_tokens or {})
        environment = _Environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise ChatTemplateError(f"the model's chat template is invalid: {error}") from error
        self.takes_parts = any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))
        """Whether the template itself goes through the parts of a message's content."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the text that the model was trained on.

        A message's content is a string or a list of parts; a list of text parts becomes one
        string for templates that know strings only. ``variables`` reach the template as they are
        (``enable_thinking`` and the like).
        """
        known = {
            "documents": None,
            **self.special_tokens,
            **_plain(variables),
            "messages": [self._message(_plain(message)) for message in messages],
            "tools": None if tools is None else _plain(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _bounded(self._template, known)
        except _TooMuch as error:
            raise ChatTemplateError(f"the model's chat template {error}") from error
        except SecurityError as error:
            raise ChatTemplateError(
                f"the model's chat template tried something forbidden: {error}"
            ) from error
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refused: {error}") from error
        except (
            ArithmeticError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:
            raise ChatTemplateError(
                f"the model's chat template failed: {type(error).__name__}: {error}"
            ) from error

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(message, dict) or "role" not in message:
            raise ChatTemplateError(f"a message needs a role, found {message!r}")
        content = message.get("content")
        if not isinstance(content, list):
            return message
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ChatTemplateError(f"content parts must be text, found {kind!r}")
        if self.takes_parts:
            return message
        return {**message, "content": "\n".join(part["text"] for part in content)}


def _is_content(node: nodes.Node) -> bool:
    """Whether an expression is ``<something>.content``, ``[...]['content']`` or ``content``."""
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name == "content"


def _plain(value: Any) -> Any:
    """A copy made of exact JSON types: objects with methods of their own stay outside."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise ChatTemplateError(f"messages and tools are JSON values, found a {type(value).__name__}")


def _bounded(template: jinja2.Template, known: dict[str, Any]) -> str:
    """Render, stopping at the limits.

    Loops need not write anything, so the clock is read by a trace function, which Python calls
    at each line of the compiled template.
    """
    deadline = perf_counter() + MAX_SECONDS

    def watch(frame: FrameType, event: str, argument: object) -> Any:
        if perf_counter() > deadline:
            raise _TooMuch(f"ran for more than {MAX_SECONDS:g} seconds")
        return watch if frame.f_code.co_filename == "<template>" else None

    pieces: list[str] = []
    _spent.built = written = 0
    before = sys.gettrace()
    sys.settrace(watch)
    try:
        for piece in template.generate(known):
            written += len(piece)
            if written > MAX_CHARS:
                raise _TooMuch(f"wrote more than {MAX_CHARS} characters")
            pieces.append(piece)
    finally:
        sys.settrace(before)
    return "".join(pieces)


class _Spent(local):
    """What the template that this thread renders has built so far."""

    built = 0


_spent = _Spent()


def _check(length: int) -> None:
    """Called with the length of each value that a template builds, before it is built if that
    can be known."""
    _spent.built += length
    if length > MAX_CHARS:
        raise _TooMuch(f"built a value longer than {MAX_CHARS}")
    if _spent.built > MAX_BUILT:
        raise _TooMuch(f"built more than {MAX_BUILT} characters on the way")


def _size(value: Any) -> int:
    """Length in characters; an item of a list takes at least the memory of many."""
    if isinstance(value, str):
        return len(value)
    return 16 * len(value) if isinstance(value, list | tuple) else 0


def _check_digits(left: Any, right: Any) -> None:
    """Bound a product of integers; a chain of squares would grow without end."""
    both = isinstance(left, int) and isinstance(right, int)
    if both and left.bit_length() + right.bit_length() > 4096:
        raise _TooMuch("computed an integer of more than 4096 bits")


def _check_built(name: str, text: str, values: tuple[Any, ...]) -> None:
    """Bound what a string method or filter of that name will make of ``text``."""
    if name in ("%", "format", "format_map"):
        _check_format(name, text, values)
    if name in PADDING:
        times = text.count(PADDING[name]) + 1 if PADDING[name] else 1
        _check(max((value for value in values if isinstance(value, int)), default=0) * times)
    if name == "replace" and len(values) >= 2 and isinstance(values[0], str):
        _check(text.count(values[0]) * _size(values[1]))


def _check_format(name: str, text: str, values: tuple[Any, ...]) -> None:
    """Bound a format string: widths are short, and stand in it where they can be seen."""
    if LONG_WIDTH.search(text):
        raise _TooMuch("formatted a value to more than 9999 places")
    if name == "%":
        fields, hidden = text.count("%"), STAR_WIDTH.search(text) is not None
    else:
        specs = [spec for _, _, spec, _ in Formatter().parse(text) if spec is not None]
        fields, hidden = len(specs), any("{" in spec for spec in specs)
    if hidden:
        raise _TooMuch("formatted a value to a width that is itself a value")
    _check(sum(map(int, re.findall(r"\d+", text))))
    _check(fields * max(map(_size, values), default=0))


def _joined(separator: str, values: Iterable[Any]) -> str:
    """``separator.join(values)``, stopped as soon as it grows too long."""
    texts: list[str] = []
    length = 0
    for value in values:
        texts.append(str(value))
        length += len(texts[-1]) + len(separator)
        if length > MAX_CHARS:
            break
    _check(length)
    return separator.join(texts)


def _join(values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        raise ChatTemplateError("join(attribute=...) is not available in chat templates")
    return _joined(str(d), values)


def _checked(filter_: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The filter, checked before and after."""
    kind = "%" if name == "format" else name  # the filter formats as the operator does
    leading = 1 if hasattr(filter_, "jinja_pass_arg") else 0  # a context comes before the value

    @wraps(filter_)
    def checked(*args: Any, **kwargs: Any) -> Any:
        value, *rest = args[leading:]
        _check_built(kind, value if isinstance(value, str) else "", (*rest, *kwargs.values()))
        result = filter_(*args, **kwargs)
        _check(_size(result))
        return result

    return checked


class _CodeGenerator(CodeGenerator):
    """Sends ``a ~ b`` and slices through the environment, so that they are bounded too."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if isinstance(node.arg, nodes.Slice):
            self.write("environment.checked(")
            super().visit_Getitem(node, frame)
            self.write(")")
        else:
            super().visit_Getitem(node, frame)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with the names that Hugging Face's templates expect.

    Whatever can build a long string or list (operators, filters, string methods, blocks) is
    checked, so that one value and all values of a rendering together stay within the limits.
    """

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # folding constants would compute before any limit holds
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        for name in ("batch", "filesizeformat", "pprint", "slice", "urlize", "xmlattr"):
            del self.filters[name]  # no chat template needs them; they can bloat
        for name in ("cycler", "joiner", "lipsum"):
            del self.globals[name]
        self.filters["tojson"] = _tojson
        self.filters["join"] = _join
        self.filters = {name: _checked(one, name) for name, one in self.filters.items()}
        self.globals["dict"] = _dict
        self.globals["namespace"] = _Names
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Joins the pieces of blocks, macros and ``~``."""
        return _joined("", pieces)

    @staticmethod
    def checked(value: Any) -> Any:
        _check(_size(value))
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _check(_size(left) + _size(right))
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    _check(_size(many) * max(times, 0))
            _check_digits(left, right)
        elif operator == "**":
            if not isinstance(right, int | float) or abs(right) > 64:
                raise _TooMuch("raised a number to a power beyond 64")
            _check_digits(left, left)
        elif isinstance(left, str):
            _check_built("%", left, right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if not isinstance(owner, str):
            return super().call(context, obj, *args, **kwargs)
        name = getattr(method, "__name__", "")
        if name == "join" and len(args) == 1 and not kwargs:
            return _joined(owner, args[0])
        _check_built(name, owner, (*args, *kwargs.values()))
        return self.checked(super().call(context, obj, *args, **kwargs))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter would escape HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Names(Namespace):
    """``namespace(...)`` that keeps no name with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that a template may use the name ``self``
        names = dict(*rest, **kwargs)
        for name in names:
            _check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks text for training; rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
