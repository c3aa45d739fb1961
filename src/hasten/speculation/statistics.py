"""What drafts were worth: one definition for the API, the metrics and every report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.speculation.tree import TokenTree


@dataclass(slots=True)
class DraftStatistics:
    """Counts over target passes that yielded tokens. Sums of two are again such counts.

    A *depth is examined* when the walk through a tree stands at a node that has candidates; it is
    *accepted* when one of them is. Nothing behind the first rejection of a path counts as
    examined, since it was never judged.

    Attributes:
        passes: target passes, and ``tokens`` what they committed, correction or bonus included.
        drafts: passes with candidates.
        drafted: candidates proposed.
        accepted: candidates that became output.
        examined: depths that were examined.
        examined_at: passes whose walk examined depth d + 1, by d; ``accepted_at`` alike.
        proposed_by: candidates by the bit set of drafters that proposed them; ``accepted_by``
            alike. Empty where there is one drafter.
    """

    passes: int = 0
    tokens: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    examined: int = 0
    examined_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    proposed_by: Counter[int] = field(default_factory=Counter)
    accepted_by: Counter[int] = field(default_factory=Counter)

    @property
    def tau(self) -> float | None:
        """Block efficiency: tokens a target pass. 1 without accepted drafts."""
        return self.tokens / self.passes if self.passes else None

    @property
    def alpha_examined(self) -> float | None:
        """Share of the examined depths at which a candidate was accepted."""
        return self.accepted / self.examined if self.examined else None

    @property
    def alpha_drafted(self) -> float | None:
        """Share of the proposed candidates that became output."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def by_depth(self) -> list[float]:
        """P(accepted at depth d + 1 | examined there)."""
        return [a / e for a, e in zip(self.accepted_at, self.examined_at, strict=True)]

    def plain(self, tokens: int) -> None:
        """Count a pass without candidates."""
        self.passes += tokens > 0
        self.tokens += tokens

    def count(self, tree: TokenTree, path: list[int], tokens: int) -> None:
        """Count a verified tree: its accepted nodes (root first) and the tokens that followed.

        A walk that ended at an accepted node because nothing may follow its token (a stop, the
        length limit) did not examine the depth behind it.
        """
        self.plain(tokens)
        candidates = len(tree) - 1 - len(tree.auxiliary)
        if not candidates:
            return
        accepted = len(path) - 1
        self.drafts += 1
        self.drafted += candidates
        self.accepted += accepted
        judged = tokens > accepted and bool(tree.children(path[-1]))
        depths = accepted + judged
        self.examined += depths
        while len(self.examined_at) < depths:
            self.examined_at.append(0)
            self.accepted_at.append(0)
        for depth in range(depths):
            self.examined_at[depth] += 1
            self.accepted_at[depth] += depth < accepted
        if tree.source:
            self.proposed_by.update(
                tree.source[n] for n in range(1, len(tree)) if n not in tree.auxiliary
            )
            self.accepted_by.update(tree.source[n] for n in path[1:])

    def add(self, other: DraftStatistics) -> None:
        """Add the counts of another."""
        for name in ("passes", "tokens", "drafts", "drafted", "accepted", "examined"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("examined_at", "accepted_at"):
            own, more = getattr(self, name), getattr(other, name)
            own.extend([0] * (len(more) - len(own)))
            for depth, count in enumerate(more):
                own[depth] += count
        self.proposed_by.update(other.proposed_by)
        self.accepted_by.update(other.accepted_by)

    def by_source(self, sources: Sequence[str], *, accepted: bool) -> dict[str, int]:
        """Candidates that each drafter proposed, or of these the accepted ones. One that several
        proposed counts for each of them."""
        counts = self.accepted_by if accepted else self.proposed_by
        return {
            name: sum(n for bits, n in counts.items() if bits >> i & 1)
            for i, name in enumerate(sources)
        }

    def to_json(self, sources: Sequence[str] = ()) -> dict[str, Any]:
        """Counts and figures; ``sources`` names the drafters' bits."""
        found: dict[str, Any] = {
            "passes": self.passes,
            "tokens": self.tokens,
            "drafts": self.drafts,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "examined": self.examined,
            "tau": self.tau,
            "alpha_examined": self.alpha_examined,
            "alpha_drafted": self.alpha_drafted,
            "by_depth": self.by_depth,
        }
        if sources:
            found["drafted_by"] = self.by_source(sources, accepted=False)
            found["accepted_by"] = self.by_source(sources, accepted=True)
        return found
