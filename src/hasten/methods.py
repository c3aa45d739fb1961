"""The registry of methods: cards, slots, and how a method's file is found.

A method is a frozen dataclass whose fields are its parameters; the ``method`` decorator is its
card. Putting a file into a slot's folder is all it takes to add one: the registry imports every
module of every slot folder when the first lookup happens.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Exactness = Literal["bitwise", "distribution", "lossy"]

SLOTS: dict[str, tuple[str, str]] = {
    # slot: (folder whose modules are its methods, plain choice)
    "weights": ("hasten.weights", "checkpoint"),
    "codec": ("hasten.cache.codecs", "native"),
    "select": ("hasten.attention.selectors", "all"),
    "draft": ("hasten.speculation.drafters", "none"),
    "verify": ("hasten.speculation.verifiers", "sample-match"),
    "control": ("hasten.speculation.controllers", "fixed"),
    "constrain": ("hasten.decoding.constraints", "grammar"),
    "schedule": ("hasten.scheduling", "stall-free"),
}

NEEDS: dict[str, str] = {
    # what a method may ask for: how the refusal explains it
    "token-history": "the tokens of a sequence so far",
    "spare-slots": "room in the page pool for candidate rows",
    "full-attention-layers": "at least one layer that attends to all positions",
    "draft-hidden-states": "a drafter that runs a draft model, such as draft=model",
}
"""Needs that exist, each with the words a refusal uses. The engine provides the first two to
every stack; the model provides others (``Decoder.config.provides``), and so do methods of the
stack (``OFFERS``)."""

DOES: dict[str, str] = {
    "runs-draft-model": "runs a second model whose hidden states a controller may read",
    "tells-root-law": "tells what its draft model expects after the root",
    "weighs-draft-laws": "accepts by the probabilities from which candidates were drawn",
    "drafts-from-text": "proposes from tokens alone: asking it without verifying does no harm",
    "grades-proposals": "tells how good its next proposal is before it is asked for it",
    "proposes-tokens": "adds candidate rows that are verified",
    "accepts-tokens": "decides which candidates become output",
    "limits-view": "hides positions from attention",
    "changes-values": "stores keys and values in another form than they were computed",
    "changes-weights": "computes with other weights than the checkpoint's",
    "limits-tokens": "keeps the output to what a request says its text must be",
    "orders-work": "decides who gets how many tokens in a step",
    "sets-budgets": "decides how many candidates a request may have",
    "only-measures": "is an instrument: it shows what others could bring, and serves nobody",
}

OFFERS = {"runs-draft-model": "draft-hidden-states"}
"""What a method that does one thing provides to the other methods of its stack."""

ENGINE_PROVIDES = frozenset({"token-history", "spare-slots"})


class MethodError(ValueError):
    """A stack names something that does not exist or cannot be combined; the text says why."""


@dataclass(frozen=True)
class Card:
    """What a method declares about itself. Checks, tables and test matrices read only this."""

    name: str
    slots: tuple[str, ...]
    cls: type
    paper: str
    exact: Exactness
    training: str
    needs: frozenset[str]
    does: frozenset[str]

    @property
    def summary(self) -> str:
        return (self.cls.__doc__ or "").strip().split("\n", 1)[0]

    @property
    def parameters(self) -> dict[str, Any]:
        return {f.name: f.default for f in dataclasses.fields(self.cls)}

    def to_json(self) -> dict[str, Any]:
        """The object that ``hasten methods --json`` prints."""
        return {
            "name": self.name,
            "slots": list(self.slots),
            "paper": self.paper,
            "exact": self.exact,
            "training": self.training,
            "needs": sorted(self.needs),
            "does": sorted(self.does),
            "parameters": {
                name: written(value) if is_method(value) or isinstance(value, tuple) else value
                for name, value in self.parameters.items()
            },
            "summary": self.summary,
            "module": self.cls.__module__,
            "test": test_path(self.cls.__module__),
        }


def is_method(value: Any) -> bool:
    """Whether a value is a method with its parameters set."""
    return isinstance(getattr(value, "card", None), Card)


def written(value: Any) -> str:
    """A method or the value of a parameter as a stack writes it: ``name(parameter=value)``.

    Parameters that have their default are left out; several methods stand with ``|`` between.
    """
    if isinstance(value, tuple):
        return "|".join(map(written, value))
    if not is_method(value):
        return str(value).lower() if isinstance(value, bool) else str(value)
    changed = [
        f"{f.name}={written(getattr(value, f.name))}"
        for f in dataclasses.fields(value)
        if getattr(value, f.name) != f.default
    ]
    name: str = value.card.name
    return f"{name}({','.join(changed)})" if changed else name


def parts(chosen: Any) -> list[Any]:
    """A method and all methods among its parameters, at any depth."""
    found = [chosen]
    for field in dataclasses.fields(chosen):
        value = getattr(chosen, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if is_method(part):
                found += parts(part)
    return found


def test_path(module: str) -> str:
    """Where the test of a method's module lies: tests/ mirrors the package."""
    *folders, name = module.split(".")[1:]
    return "/".join(["tests", *folders, f"test_{name}.py"])


_CARDS: dict[tuple[str, str], Card] = {}  # (slot, name) -> card


def method(
    name: str,
    *,
    slot: str | tuple[str, ...],
    paper: str = "",
    exact: Exactness,
    training: str = "none",
    needs: Iterable[str] = (),
    does: Iterable[str] = (),
) -> Callable[[type], type]:
    """Register a frozen dataclass as a method. Raises ``MethodError`` on unknown words."""
    slots = (slot,) if isinstance(slot, str) else slot

    def register(cls: type) -> type:
        if not (dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise MethodError(f"{cls.__qualname__} must be a frozen dataclass")
        card = Card(name, slots, cls, paper, exact, training, frozenset(needs), frozenset(does))
        for word in card.needs - NEEDS.keys():
            raise MethodError(f"{name}: unknown need '{word}'; known: {', '.join(NEEDS)}")
        for word in card.does - DOES.keys():
            raise MethodError(f"{name}: unknown effect '{word}'; known: {', '.join(DOES)}")
        for s in slots:
            if s not in SLOTS:
                raise MethodError(f"{name}: unknown slot '{s}'; slots: {', '.join(SLOTS)}")
            other = _CARDS.get((s, name), card).cls.__module__
            if other != cls.__module__:
                raise MethodError(f"{name}: the slot '{s}' has that method in {other} already")
            _CARDS[s, name] = card
        cls.card = card  # type: ignore[attr-defined]
        return cls

    return register


@cache
def _discover() -> None:
    for folder, _ in SLOTS.values():
        package = importlib.import_module(folder)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{folder}.{module.name}")


def cards(slot: str | None = None) -> list[Card]:
    """All cards, in the order of the slots and then by name; the plain choice comes first."""
    _discover()
    order = list(SLOTS)
    found = [(s, card) for (s, _), card in _CARDS.items() if slot in (None, s)]
    found.sort(key=lambda x: (order.index(x[0]), x[1].name != SLOTS[x[0]][1], x[1].name))
    return list(dict.fromkeys(card for _, card in found))


def find(slot: str, name: str) -> Card:
    """The card of a method, or a ``MethodError`` that says what was probably meant."""
    _discover()
    if slot not in SLOTS:
        raise MethodError(
            f"unknown slot '{slot}'{_suggest(slot, SLOTS)}; slots: {', '.join(SLOTS)}"
        )
    card = _CARDS.get((slot, name))
    if card is None:
        elsewhere = [s for s, n in _CARDS if n == name]
        if elsewhere:
            raise MethodError(f"'{name}' fills the slot '{elsewhere[0]}', not '{slot}'")
        names = [n for s, n in _CARDS if s == slot]
        raise MethodError(
            f"slot '{slot}' has no method '{name}'{_suggest(name, names)}; "
            f"it has: {', '.join(sorted(names))}"
        )
    return card


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean '{close[0]}'?)" if close else ""
