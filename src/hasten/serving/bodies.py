"""Reading request bodies: bounded in bytes, values and depth, and never long on the event loop.

A JSON decoder holds the interpreter's lock while it works, so a body of megabytes would stop the
event loop even from a thread. Most such bodies cannot be served at all, because their text is
longer than what fits into the context; `check_bulk` finds that out in small slices, between which
other threads run.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from hasten.serving.errors import ApiError, invalid

SLICE = 256 << 10
BULKY = 64 << 10
"""Bodies of more bytes are looked through before they are decoded."""
MAX_VALUES = 1 << 20
"""Values in a body: an empty list takes two bytes of JSON and sixty of memory."""
MAX_KEYS = 1 << 16
"""Names in the objects of a body; a name with its value takes some hundred bytes of memory."""

T = TypeVar("T")


def check_bulk(body: bytes | bytearray, longest_text: int) -> None:
    """Refuse a large body that has too many values, or a text that cannot fit.

    Whatever is wrong with the JSON itself is left to the decoder.

    Args:
        longest_text: bytes of UTF-8 that a text may have at most.
    """
    if len(body) <= BULKY:
        return
    values = keys = 0
    inside = False
    least = 0  # bytes that the text stands for which goes on from slice to slice
    at = 0
    while at < len(body):
        part = bytes(body[at : at + SLICE])
        if (len(part) - len(part.rstrip(b"\\"))) % 2:  # the last one escapes what comes next
            part += bytes(body[at + len(part) : at + len(part) + 1])
        # With escapes painted over, every quote left begins or ends a text.
        pieces = part.replace(b"\\\\", b"__").replace(b'\\"', b"__").split(b'"')
        outside = b",".join(pieces[inside::2])
        values += outside.count(b",") - len(pieces[inside::2]) + 1
        values += outside.count(b"[") + outside.count(b"{")
        keys += outside.count(b":")
        if values > MAX_VALUES or keys > MAX_KEYS:
            raise invalid(
                f"the body has more than {MAX_VALUES} values or {MAX_KEYS} names of fields; send "
                "less in a request",
                code="too_many_values",
            )
        texts = pieces[1 - inside :: 2]
        if max(map(len, texts), default=0) + max(least, 0) > longest_text:
            place = 0
            for number, piece in enumerate(pieces):
                if number % 2 != inside:
                    least = _least_bytes(part, piece, place) + (0 if number else least)
                    if least > longest_text:
                        raise too_long(least, longest_text)
                place += len(piece) + 1
        else:
            size = _least_bytes(part, pieces[-1], len(part) - len(pieces[-1]))
            least = size if len(pieces) > 1 else least + size
        inside ^= len(pieces) % 2 == 0
        if not inside:
            least = 0
        at += len(part)


def _least_bytes(part: bytes, piece: bytes, place: int) -> int:
    """Bytes that a piece of a text stands for, at least. ``piece`` is painted over; it stands at
    ``place`` of the part. Pairs of backslashes and \\n have one byte more than what they stand
    for, \\u0041 has up to five."""
    end = place + len(piece)
    escapes = part.count(b"\\", place, end) - part.count(b"\\\\", place, end)
    return len(piece) - escapes - 4 * piece.count(b"\\u")


def too_long(size: int, longest: int) -> ApiError:
    """The refusal of a text that has more bytes than the context has room for."""
    return invalid(
        f"a text of at least {size} bytes is too long: no text of more than {longest} bytes fits "
        "into the context of this model (max_length)",
        code="context_length_exceeded",
    )


class Decoder:
    """JSON to one kind of request, with the fields that the kind does not have.

    The decoder of a kind that forbids other fields runs first, so that a request without any is
    gone through once.
    """

    def __init__(self, kind: type[Any]) -> None:
        exact = msgspec.defstruct(
            kind.__name__, [], bases=(kind,), forbid_unknown_fields=True, kw_only=True
        )
        self._exact = msgspec.json.Decoder(exact)
        self._open = msgspec.json.Decoder(kind)
        self._keys = msgspec.json.Decoder(dict[str, msgspec.Raw])
        self._known = set(kind.__struct_fields__)

    def decode(self, body: bytes | bytearray) -> tuple[Any, dict[str, msgspec.Raw]]:
        """The request, and its other fields as JSON. Raises ApiError (400)."""
        try:
            try:
                return self._exact.decode(body), {}
            except msgspec.ValidationError as error:
                if not str(error).startswith("Object contains unknown field"):
                    raise
            request = self._open.decode(body)
            fields = self._keys.decode(body)
            return request, {k: raw for k, raw in fields.items() if k not in self._known}
        except msgspec.ValidationError as error:
            raise _readable(str(error)) from None
        except RecursionError:
            raise invalid("the body nests too many levels of JSON", code="json_depth") from None
        except (msgspec.DecodeError, UnicodeError, ValueError) as error:
            what = "not UTF-8" if isinstance(error, UnicodeError) else str(error)
            raise invalid(f"the body is no JSON: {what}", code="invalid_json") from None


def _readable(text: str) -> ApiError:
    """msgspec's "Expected `int`, got `str` - at `$.max_tokens`" as a sentence with the field."""
    what, _, path = text.partition(" - at `")
    field = path.rstrip("`").removeprefix("$").removeprefix(".") or None
    words = what[:1].lower() + what[1:]
    for kind, name in _KINDS.items():
        words = words.replace(f"`{kind}`", f"`{name}`").replace(f"{kind} |", f"{name} |")
        words = words.replace(f"| {kind}", f"| {name}")
    words = words.replace("`", "").replace(" | ", " or ")
    return invalid(f"{field}: {words}" if field else f"the body is wrong: {words}", field)


_KINDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "array": "list",
}


def check_depth(name: str, value: Any, most: int) -> None:
    """Refuse JSON of more than ``most`` levels; templates go through it recursively."""
    level, depth = [value], 0
    while level:
        if depth > most:
            raise invalid(
                f"{name} nests more than max_json_depth={most} levels", name, "json_depth"
            )
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level, depth = inner, depth + 1
