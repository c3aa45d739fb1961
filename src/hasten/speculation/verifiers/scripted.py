"""Acceptance by lot, to measure what drafts of a given quality would bring."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.decoding.params import SamplingParams
from hasten.methods import method
from hasten.speculation.base import Walk
from hasten.speculation.tree import TokenTree


@method("scripted", slot="verify", exact="lossy", does=("accepts-tokens", "only-measures"))
@dataclass(frozen=True)
class ScriptedVerify:
    """Accepts each candidate with probability ``alpha``, whatever it says: for measurements.

    The lots depend on seed, sequence and position only, so runs repeat. The output is meaningless;
    take random weights of the shape in question, and ``draft=scripted``.
    """

    alpha: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: a probability lies between 0 and 1")

    def refuses(self, params: SamplingParams) -> str | None:
        if params.structured_outputs is not None:
            return "verify=scripted accepts what structured_outputs forbid; choose another verifier"
        return None

    def verify(self, tree: TokenTree, walk: Walk) -> list[int]:
        path = [0]
        while True:
            node = path[-1]
            child = next((c for c in tree.children(node) if walk.accept(self.alpha)), None)
            if child is None:
                walk.emit(node, walk.choose(node))
                return path
            path.append(child)
            if walk.emit(node, tree.token[child]):
                return path
