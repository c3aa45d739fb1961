"""A stack: one choice for each slot, in one notation everywhere.

``draft=prompt-lookup(k=8),select=sink-window`` is written the same way on the command line, in
Python, in YAML (a mapping of slot to choice) and in reports. A parameter may be a method itself,
or several of them: ``draft=fuse(of=copyspec(g=5)|prompt-lookup)``.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hasten.methods import (
    ENGINE_PROVIDES,
    NEEDS,
    OFFERS,
    SLOTS,
    Card,
    Exactness,
    MethodError,
    cards,
    find,
    is_method,
    parts,
    written,
)

_CHOICE = re.compile(r"\s*([A-Za-z0-9_.+-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)
_ORDER: tuple[Exactness, ...] = ("bitwise", "distribution", "lossy")


@dataclass(frozen=True)
class Stack:
    """The method of every slot. Build one with ``Stack.parse`` (text, mapping, or a stack)."""

    methods: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str | Mapping[str, Any] | Stack | None = None) -> Stack:
        """Read a stack and fill the remaining slots with their plain choice.

        Raises:
            MethodError: unknown slot, method or parameter, a slot given twice, a bad value.
        """
        if isinstance(text, Stack):
            return text
        if isinstance(text, Mapping):
            pairs = [(str(slot), choice) for slot, choice in text.items()]
        else:
            choices = _split(text or "")
            pairs = [_split_pair(part) for part in choices if part.strip() != "plain"]
        methods: dict[str, Any] = {}
        for slot, choice in pairs:
            built = choice if is_method(choice) else _build(slot, str(choice))
            for filled in built.card.slots:
                if methods.get(filled, built) is not built:
                    raise MethodError(f"slot '{filled}' is filled twice")
                methods[filled] = built
            if slot not in built.card.slots:
                raise MethodError(f"'{built.card.name}' does not fill the slot '{slot}'")
        for slot, (_, plain) in SLOTS.items():
            if slot not in methods:
                methods[slot] = find(slot, plain).cls()
        return cls({slot: methods[slot] for slot in SLOTS})

    def __getitem__(self, slot: str) -> Any:
        return self.methods[slot]

    def __str__(self) -> str:
        """Canonical text: choices and parameters that are not the plain ones, in slot order."""
        choices = []
        for slot, chosen in self.methods.items():
            text = written(chosen)
            if text == SLOTS[slot][1]:
                continue
            if slot != chosen.card.slots[0]:
                continue  # one method in several slots is written once
            choices.append(f"{slot}={text}")
        return ",".join(choices) or "plain"

    @property
    def cards(self) -> list[Card]:
        """Of all methods, those that are parameters of others included."""
        return [part.card for chosen in self.methods.values() for part in parts(chosen)]

    @property
    def exact(self) -> Exactness:
        """The weakest promise among the methods: what the whole stack promises."""
        return max((card.exact for card in self.cards), key=_ORDER.index)

    def baseline(self) -> Stack:
        """What this stack's exactness is measured against.

        Methods that define the function that is computed (weights, stored values, what attention
        sees, which texts are allowed) stay; every other slot goes back to its plain choice. A stack
        that promises "bitwise" has, under greedy decoding, the same output as its baseline, bit for
        bit.
        """
        defining = {"changes-weights", "changes-values", "limits-view", "limits-tokens"}
        return Stack.parse({s: m for s, m in self.methods.items() if m.card.does & defining})

    def check(self, provides: Iterable[str], model: str = "this model") -> None:
        """Refuse what cannot run, with the reason.

        Args:
            provides: what the model offers beyond the engine (``ModelConfig.provides``).

        Raises:
            MethodError: a method needs something that neither engine nor model provides.
        """
        missing = missing_needs(self.cards, provides)
        if missing:
            card, need = missing[0]
            raise MethodError(
                f"{card.slots[0]}={card.name} cannot run on {model}: it needs {NEEDS[need]} "
                f"('{need}'); choose another method for the slot '{card.slots[0]}' "
                f"({', '.join(c.name for c in cards(card.slots[0]) if need not in c.needs)})"
            )


def with_weights(stack: str | None, weights: str | None) -> str | None:
    """A stack's text with a choice for the slot `weights`, which may be short: ``bf16``."""
    if weights is None:
        return stack
    short = {"bf16": "checkpoint(dtype=bfloat16)"}
    chosen = f"weights={short.get(weights.strip(), weights)}"
    return f"{stack},{chosen}" if stack else chosen


def missing_needs(chosen: Iterable[Card], provides: Iterable[str]) -> list[tuple[Card, str]]:
    """The (card, need) pairs that neither the engine nor ``provides`` satisfies."""
    chosen = list(chosen)
    effects = {effect for card in chosen for effect in card.does}
    offered = ENGINE_PROVIDES | set(provides) | {OFFERS[e] for e in effects & OFFERS.keys()}
    return [(card, need) for card in chosen for need in sorted(card.needs - offered)]


def _split(text: str, at: str = ",") -> list[str]:
    """Split at a character outside parentheses. Nothing between two commas is left out."""
    found, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth < 0:
            break
        if char == at and depth == 0:
            found.append(text[start:i])
            start = i + 1
    if depth != 0:
        raise MethodError(f"unbalanced parentheses in '{text}'")
    found.append(text[start:])
    return [part for part in found if part.strip() or at != ","]


def _split_pair(part: str) -> tuple[str, str]:
    slot, equals, choice = part.partition("=")
    if not equals or "(" in slot:
        raise MethodError(
            f"'{part.strip()}' is not slot=method; write for example draft=prompt-lookup(k=8)"
        )
    return slot.strip(), choice


def _build(slot: str, choice: str) -> Any:
    match = _CHOICE.fullmatch(choice)
    if match is None:
        raise MethodError(f"cannot read '{choice.strip()}'; write name or name(parameter=value)")
    name, inside = match[1], match[2] or ""
    card = find(slot, name)
    fields = {f.name: f for f in dataclasses.fields(card.cls)}
    types_ = typing.get_type_hints(card.cls)
    values: dict[str, Any] = {}
    for part in _split(inside):
        key, equals, raw = (x.strip() for x in part.partition("="))
        if not equals or key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise MethodError(
                f"{name} has no parameter '{key}'{hint}; it has: {', '.join(fields) or 'none'}"
            )
        if key in values:
            raise MethodError(f"{name}: the parameter '{key}' is given twice")
        values[key] = _read(raw, types_[key], f"{name}({key})")
    try:
        return card.cls(**values)
    except (ValueError, TypeError) as error:
        raise MethodError(f"{slot}={name}: {error}") from None


def _read(raw: str, kind: Any, where: str) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if raw.lower() in ("none", "null") and type(None) in options:
        return None
    from hasten.speculation.base import Drafter  # imports torch, as any method does

    if Drafter in options:
        return _part(raw, "draft", where)
    if tuple[Drafter, ...] in options:
        return tuple(_part(one, "draft", where) for one in _split(raw, "|"))
    try:
        if bool in options:
            return {"true": True, "false": False}[raw.lower()]
        if int in options:
            return int(raw)
        if float in options:
            return float(raw)
    except (KeyError, ValueError):
        expected = next(t.__name__ for t in (bool, int, float) if t in options)
        raise MethodError(f"{where} is '{raw}', expected {expected}") from None
    return raw


def _part(choice: str, slot: str, where: str) -> Any:
    """A method that is a parameter. ``where`` names the parameter."""
    try:
        built = _build(slot, choice)
    except MethodError as error:
        raise MethodError(f"{where}: {error}") from None
    if len(built.card.slots) > 1:
        raise MethodError(
            f"{where}: '{built.card.name}' fills several slots ({', '.join(built.card.slots)}) "
            "and cannot be a part of another method"
        )
    return built
