"""The registry: cards, lookup, discovery, and the page that is generated from the cards."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hasten import method_tables, methods
from hasten.methods import DOES, NEEDS, SLOTS, Card, MethodError, cards, find, method

ROOT = Path(__file__).parents[1]

NEW_DRAFTER = '''
"""A method as somebody would add it."""

from dataclasses import dataclass

from hasten.methods import method


@method("echo", slot="draft", paper="none", exact="bitwise", does=("proposes-tokens",))
@dataclass(frozen=True)
class Echo:
    """Repeats the last token."""

    times: int = 3
'''


@pytest.fixture
def registry() -> Iterator[None]:
    """Puts the registry back as it was."""
    cards()
    before = dict(methods._CARDS)
    yield
    methods._CARDS.clear()
    methods._CARDS.update(before)
    methods._discover.cache_clear()


def test_every_slot_has_its_plain_choice_first() -> None:
    for slot, (_, plain) in SLOTS.items():
        assert cards(slot)[0].name == plain
        assert find(slot, plain) is cards(slot)[0]


def test_cards_come_in_slot_order_then_by_name() -> None:
    order = list(SLOTS)
    places = [order.index(card.slots[0]) for card in cards()]
    assert places == sorted(places)
    for slot in SLOTS:
        names = [card.name for card in cards(slot)][1:]
        assert names == sorted(names)
    assert len(cards()) == len({(c.slots, c.name) for c in cards()})


@pytest.mark.parametrize("card", cards(), ids=lambda c: f"{c.slots[0]}-{c.name}")
def test_card(card: Card) -> None:
    data = card.to_json()
    assert set(data) == {
        *("name", "slots", "paper", "exact", "training", "needs", "does"),
        *("parameters", "summary", "module", "test"),
    }
    assert data["name"] == card.name and set(data["slots"]) <= SLOTS.keys()
    assert data["exact"] in ("bitwise", "distribution", "lossy")
    assert set(data["needs"]) <= NEEDS.keys() and set(data["does"]) <= DOES.keys()
    assert data["summary"].endswith("."), "the first line of the docstring is a sentence"
    assert importlib.import_module(data["module"])
    assert data["module"].startswith(SLOTS[data["slots"][0]][0] + ".")
    assert (ROOT / data["test"]).is_file(), f"no test at {data['test']}"
    plain = card.cls()  # every parameter has a default
    assert {name: getattr(plain, name) for name in card.parameters} == card.parameters
    assert json.loads(json.dumps(data)) == data
    with pytest.raises((AttributeError, TypeError)):
        plain.anything = 1


def test_card_of_a_known_method() -> None:
    data = find("select", "sink-window").to_json()
    assert data | {"summary": ""} == {
        "name": "sink-window",
        "slots": ["select"],
        "paper": "Efficient Streaming Language Models with Attention Sinks (arXiv:2309.17453)",
        "exact": "lossy",
        "training": "none",
        "needs": ["full-attention-layers"],
        "does": ["limits-view"],
        "parameters": {"sinks": 4, "window": 512},
        "summary": "",
        "module": "hasten.attention.selectors.sink_window",
        "test": "tests/attention/selectors/test_sink_window.py",
    }


@pytest.mark.parametrize(
    ("slot", "name", "words"),
    [
        ("drafts", "none", "unknown slot 'drafts' (did you mean 'draft'?)"),
        ("qqqq", "none", "unknown slot 'qqqq'; slots: weights"),
        ("draft", "prompt-lokup", "(did you mean 'prompt-lookup'?); it has: "),
        ("draft", "qqqq", "slot 'draft' has no method 'qqqq'; it has"),
        ("draft", "sink-window", "'sink-window' fills the slot 'select', not 'draft'"),
    ],
)
def test_lookup_says_what_was_meant(slot: str, name: str, words: str) -> None:
    with pytest.raises(MethodError) as error:
        find(slot, name)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slot": "nowhere"}, "unknown slot 'nowhere'"),
        ({"slot": ("draft", "nowhere")}, "unknown slot 'nowhere'"),
        ({"needs": ("magic",)}, "unknown need 'magic'"),
        ({"does": ("magic",)}, "unknown effect 'magic'"),
        ({"name": "prompt-lookup"}, "that method in hasten.speculation.drafters.prompt_lookup"),
    ],
)
def test_a_wrong_card_is_refused(registry: None, changes: dict[str, Any], words: str) -> None:
    @dataclass(frozen=True)
    class Wrong:
        """Nothing."""

    card = {"name": "wrong", "slot": "draft", "exact": "bitwise", **changes}
    with pytest.raises(MethodError, match=words):
        method(card.pop("name"), **card)(Wrong)


@pytest.mark.parametrize("decorate", [lambda cls: cls, dataclass])
def test_a_method_is_a_frozen_dataclass(registry: None, decorate: Any) -> None:
    class Loose:
        """Nothing."""

    with pytest.raises(MethodError, match="frozen dataclass"):
        method("loose", slot="draft", exact="bitwise")(decorate(Loose))


def test_a_new_method_is_one_new_file(
    registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = importlib.import_module(SLOTS["draft"][0])
    (tmp_path / "echo.py").write_text(NEW_DRAFTER)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    module = f"{package.__name__}.echo"
    with pytest.raises(MethodError, match="no method 'echo'"):
        find("draft", "echo")
    methods._discover.cache_clear()
    try:
        card = find("draft", "echo")
        assert card in cards("draft") and card.parameters == {"times": 3}
        assert card.to_json()["module"] == module
        assert card.to_json()["test"] == "tests/speculation/drafters/test_echo.py"
        assert "`echo`" in method_tables.page()
    finally:
        sys.modules.pop(module, None)
        if hasattr(package, "echo"):
            delattr(package, "echo")


def test_the_page_of_methods_is_up_to_date() -> None:
    written = (ROOT / "docs" / "methods.md").read_text()
    assert written == method_tables.page(), "run: python -m hasten.method_tables"


def test_the_page_tells_what_is_refused() -> None:
    rows = [row for row in method_tables.page().splitlines() if row.startswith("| `select=sink")]
    rows = [row for row in rows if "specdec++" not in row]  # no model gives it what it needs
    assert rows and all("runs, lossy | refused: select=sink-window cannot" in row for row in rows)
