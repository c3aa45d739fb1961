"""Accept a candidate exactly when it is the target's likeliest token; nothing is ever sampled."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.decoding.params import SamplingParams
from hasten.methods import method
from hasten.speculation.base import Walk
from hasten.speculation.tree import TokenTree
from hasten.speculation.verification import descend, match


@method("greedy", slot="verify", exact="bitwise", does=("accepts-tokens",))
@dataclass(frozen=True)
class Greedy:
    """The child that carries the target's likeliest token is accepted; sampling is refused.

    `sample-match` does the same under temperature 0. This one is for stacks whose numbers mean
    something under greedy decoding only: a request that samples (the default of many models) gets
    an error instead of another experiment. Ties go to the lowest token id.
    """

    def refuses(self, params: SamplingParams) -> str | None:
        if params.temperature == 0:
            return None
        return (
            f"verify=greedy takes the likeliest token only, but the temperature is "
            f"{params.temperature}; ask for temperature 0, or run with verify=sample-match"
        )

    def verify(self, tree: TokenTree, walk: Walk) -> list[int]:
        return descend(tree, walk, match)
