"""Claim of CopySpec: conversations that repeat themselves need a fraction of the passes.

Replayed chats: an answer of code, then the same with small changes, several times. The changes
are random tokens at random places, so that nothing but the copy can be known beforehand.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

from benchmarks.speculation.claims.replay import replay
from hasten.models.loading import locate
from hasten.models.tokenizer import Tokenizer
from hasten.speculation.drafters.copyspec import CopySpec
from hasten.speculation.statistics import DraftStatistics
from hasten.training.corpus import standard_library


def measure(
    model: str = "reference",
    chats: int = 40,
    turns: int = 4,
    tokens: int = 300,
    edits: float = 0.03,
    budget: int = 16,
) -> dict[str, Any]:
    """Copy rate and tokens a pass in each turn, for the method's defaults."""
    tokenizer = Tokenizer.load(locate(model))
    rng = random.Random(0)
    texts = [tokenizer.encode(file.text) for file in standard_library()[: 4 * chats]]
    answers = [ids[:tokens] for ids in texts if len(ids) >= tokens][:chats]
    drafter = CopySpec()
    found = [DraftStatistics() for _ in range(turns)]
    seconds = 0.0
    for answer in answers:
        history, said = tokenizer.encode("Write it.\n"), list(answer)
        for turn in found:
            one = replay(drafter, history, said, budget)
            turn.add(one.counts)
            seconds += one.seconds
            history = history + said + tokenizer.encode("\nThe same with small changes.\n")
            said = [
                rng.randrange(tokenizer.vocab_size) if rng.random() < edits else token
                for token in said
            ]
    taus = [turn.tau or 0.0 for turn in found]
    copied = [turn.accepted / turn.tokens for turn in found]
    shape = {
        "first turn costs nothing (tau >= 1)": taus[0] >= 1,
        "later turns copy more than half": min(copied[1:]) > 0.5,
        "later turns need at most half of the passes": min(taus[1:]) >= 2,
    }
    return {
        "claim": "turn 2 and later: copy rate above 50 %, 2 to 3 times fewer passes; the first "
        "turn about 1.0",
        "experiment": f"{len(answers)} replayed chats of {turns} turns, {tokens} tokens of Python "
        f"each, {edits:.0%} of the tokens changed from turn to turn, budget {budget}",
        "tau_by_turn": taus,
        "copied_share_by_turn": copied,
        "draft_microseconds_a_pass": 1e6 * seconds / sum(turn.passes for turn in found),
        "shape": shape,
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference", help="whose tokenizer")
    parser.add_argument("--chats", type=int, default=40)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=300, help="of an answer")
    parser.add_argument("--edits", type=float, default=0.03, help="share of changed tokens")
    parser.add_argument("--budget", type=int, default=16, help="candidates a pass")
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
