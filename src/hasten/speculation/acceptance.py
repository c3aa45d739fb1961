"""What candidates are worth: estimates that follow one text and borrow from others.

A budget is cut into *rungs*. For each rung a `Curve` keeps how many candidates a proposal had
there and how many of them became output. Those are plain means over proposals, with nothing to
censor: a chain that broke early gained nothing on the later rungs, whether they were tried or not.
They hold for trees as they do for chains. Old proposals fade.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten.speculation.tree import TokenTree

RUNGS = (1, 2, 4, 8, 15, 31, 63)
"""Budgets that are weighed against each other. The root's row comes with them, and passes often
grow dearer beyond a power of two."""
WIDTHS = tuple(b - a for a, b in zip((0, *RUNGS), RUNGS, strict=False))

OPTIMISM = 0.7
"""Worth of the first candidate before anything was seen."""
ONWARD = 0.9
"""Worth of a candidate beyond what was tried, against the last one that was."""
GUESS = 3.0
"""Proposals that optimism weighs as much as."""
UNTRIED = 0.8
"""What is kept of a rung each time that everything before it was accepted and it was not tried.
Bad luck would otherwise be remembered for good, as nothing is tried that seems worthless."""
PRIOR = 2.0
"""Proposals that a tenant's other texts weigh as much as, however many there were."""


@dataclass(slots=True)
class Curve:
    """Faded sums over proposals, by rung.

    Attributes:
        keep: what is left of the old with each new proposal.
        seen: proposals that say something about the rung.
        gain: candidates of the rung that became output.
        rows: candidates of the rung.
        asked: how often a proposal was asked for, and ``given`` how often there was one.
    """

    keep: float
    seen: list[float] = field(default_factory=lambda: [0.0] * len(RUNGS))
    gain: list[float] = field(default_factory=lambda: [0.0] * len(RUNGS))
    rows: list[float] = field(default_factory=lambda: [0.0] * len(RUNGS))
    asked: float = 0.0
    given: float = 0.0

    def observe(self, budget: int, candidates: int, accepted: Sequence[int]) -> None:
        """Count a proposal.

        Args:
            budget: candidates it might have had.
            candidates: that it had. If fewer, it would have had no more for a larger budget.
            accepted: the nodes that became output, ascending (node 0 is none).
        """
        keep, seen, gain, rows = self.keep, self.seen, self.gain, self.rows
        self.asked = self.asked * keep + 1
        if not candidates:
            self.given *= keep
            return
        self.given = self.given * keep + 1
        hits, first = len(accepted), 0
        chain = not hits or accepted[-1] == hits
        for r, rung in enumerate(RUNGS):
            if rung > budget and candidates == budget:  # more was not asked for: nobody knows
                if hits == candidates:  # but more might have been accepted
                    seen[r] *= UNTRIED
                    gain[r] *= UNTRIED
                    rows[r] *= UNTRIED
                break
            width = rung - first
            got = hits - first if chain else sum(first < node <= rung for node in accepted)
            more = candidates - first
            seen[r] = seen[r] * keep + 1
            gain[r] = gain[r] * keep + (0 if got < 0 else width if got > width else got)
            rows[r] = rows[r] * keep + (0 if more < 0 else width if more > width else more)
            first = rung


Worth = list[tuple[float, float, int]]
"""Steps of growing budgets, each worth less a row than the one before: (rows, gain, budget)."""


def presence(own: Curve, shared: Curve) -> float:
    """Chance that a proposal has any candidates."""
    rate = (shared.given + GUESS) / (shared.asked + GUESS)
    return (own.given + PRIOR * rate) / (own.asked + PRIOR)


def worth(own: Curve, shared: Curve, most: int, trust: float = 1.0) -> Worth:
    """What proposals with budgets up to ``most`` are expected to bring, as the upper hull of the
    curve.

    ``own`` leans on ``shared`` where it has seen little, and that on optimism: what was never
    tried is worth trying. What it has seen weighs by ``trust``.
    """
    found: Worth = []
    density, bound = OPTIMISM / ONWARD, 1.0
    for r, rung in enumerate(RUNGS):
        if rung > most:
            break
        width, weight = WIDTHS[r], shared.seen[r] + GUESS
        gain = (shared.gain[r] + GUESS * width * density * ONWARD) / weight
        rows = (shared.rows[r] + GUESS * width) / weight
        if gain > rows * bound:  # other texts' luck says little where this one has none
            gain = rows * bound
        weight = trust * own.seen[r] + PRIOR
        gain = (trust * own.gain[r] + PRIOR * gain) / weight
        rows = (trust * own.rows[r] + PRIOR * rows) / weight
        density = bound = gain / rows
        while found and found[-1][1] * rows < gain * found[-1][0]:  # the hull stays concave
            rows += found[-1][0]
            gain += found[-1][1]
            found.pop()
        found.append((rows, gain, rung))
    return found


@dataclass(slots=True)
class Trial:
    """A proposal that is held against the text as it comes, without being verified."""

    state: int
    budget: int
    tree: TokenTree
    length: int
    """Tokens of the sequence that were looked at."""
    accepted: list[int] = field(default_factory=list)

    def advance(self, tokens: list[int]) -> bool:
        """Follow the new tokens; True when it is decided."""
        tree = self.tree
        node = self.accepted[-1] if self.accepted else 0
        while self.length < len(tokens):
            children = tree.children(node)
            token = tokens[self.length]
            found = next((c for c in children if tree.token[c] == token), None)
            if found is None:
                return True
            self.accepted.append(found)
            node, self.length = found, self.length + 1
        return not tree.children(node)
