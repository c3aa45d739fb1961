"""Tables generated from the cards: the list of methods and who runs with whom.

``python -m hasten.method_tables`` writes ``docs/methods.md``; a test fails when it is stale.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from hasten.methods import DOES, NEEDS, SLOTS, MethodError, cards
from hasten.stack import Stack

MODELS: dict[str, frozenset[str]] = {
    # kinds of models by what they provide beyond the engine
    "full attention in some layer": frozenset({"full-attention-layers"}),
    "sliding windows only": frozenset(),
}


def methods_table() -> str:
    """All methods as a Markdown table."""
    heads = ("slot", "method", "parameters", "exact", "training", "what it does", "source")
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for card in cards():
        parameters = ", ".join(f"`{k}={v}`" for k, v in card.to_json()["parameters"].items())
        parameters = parameters.replace("|", "\\|")
        rows.append(
            f"| {', '.join(card.slots)} | `{card.name}` | {parameters} | {card.exact} "
            f"| {card.training} | {card.summary} | {card.paper} |"
        )
    return "\n".join(rows)


def compatibility_table() -> str:
    """Pairs of methods of different slots, as Markdown: the promise of the pair, or why not."""
    shown = [c for c in cards() if c.name != SLOTS[c.slots[0]][1]] or cards()
    rows = ["| stack | " + " | ".join(MODELS) + " |", "|" + "---|" * (len(MODELS) + 1)]
    singles = [(c,) for c in shown]
    pairs = [(a, b) for a, b in combinations(shown, 2) if not set(a.slots) & set(b.slots)]
    for chosen in [*singles, *pairs]:
        text = ",".join(f"{c.slots[0]}={c.name}" for c in chosen)
        rows.append(
            f"| `{text}` | " + " | ".join(_verdict(text, p) for p in MODELS.values()) + " |"
        )
    return "\n".join(rows)


def _verdict(text: str, provides: frozenset[str]) -> str:
    try:
        stack = Stack.parse(text)
        stack.check(provides)
    except MethodError as error:
        return f"refused: {error}"
    return f"runs, {stack.exact}"


def page() -> str:
    """The text of docs/methods.md."""
    words = "\n".join(f"- `{k}`: {v}" for k, v in NEEDS.items())
    effects = "\n".join(f"- `{k}`: {v}" for k, v in DOES.items())
    return f"""# Methods

Generated from the methods' own cards by `python -m hasten.method_tables`; do not edit.

{methods_table()}

"exact" is against the stack's baseline: what defines the computed function stays (weights,
stored values, what attention sees), every other slot takes its plain choice, the first of its
rows. *bitwise* = the same bits under greedy decoding and under a seed, *distribution* = the
same law of the output, *lossy* = another function, whose quality has to be measured. A cast
(`dtype=bfloat16`) defines another function too; bitwise then means that nothing on top of it
changes a bit.

## Who runs with whom

Each method that is not a plain choice, alone and in pairs, by what the model offers:

{compatibility_table()}

## Words of the cards

Needs:

{words}

Effects:

{effects}
"""


if __name__ == "__main__":
    target = Path(__file__).parents[2] / "docs" / "methods.md"
    target.write_text(page())
    print(f"wrote {target}")
