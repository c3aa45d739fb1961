"""Claim of Aggressive Decoding: an edit takes about two to three passes a change.

Replayed edits: the output is the input with some tokens changed at random places.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

from benchmarks.speculation.claims.replay import replay
from hasten.models.loading import locate
from hasten.models.tokenizer import Tokenizer
from hasten.speculation.drafters.aggressive import Aggressive, AggressiveDrafting
from hasten.training.corpus import standard_library


def measure(
    model: str = "reference",
    texts: int = 40,
    tokens: int = 300,
    edits: tuple[float, ...] = (0.02, 0.05),
    budget: int = 512,
) -> dict[str, Any]:
    """Passes for each share of changed tokens, beside the number of changes."""
    tokenizer = Tokenizer.load(locate(model))
    sources = [tokenizer.encode(file.text) for file in standard_library()[: 4 * texts]]
    sources = [ids[:tokens] for ids in sources if len(ids) >= tokens][:texts]
    drafting = AggressiveDrafting(Aggressive(k=budget), tokenizer)
    rows = []
    for share in edits:
        rng = random.Random(0)
        passes, changes, seconds = 0, 0, 0.0
        for source in sources:
            changed = [rng.random() < share for _ in source]
            output = [
                (token + rng.randrange(1, tokenizer.vocab_size)) % tokenizer.vocab_size
                if change
                else token
                for token, change in zip(source, changed, strict=True)
            ]
            one = replay(drafting, source, output, budget)
            passes += one.counts.passes
            seconds += one.seconds
            changes += sum(changed)
        written = len(sources) * tokens
        rows.append(
            {
                "changed_share": share,
                "fewer_passes": written / passes,
                "passes_a_change": passes / (changes + len(sources)),
                "draft_microseconds_a_pass": 1e6 * seconds / passes,
            }
        )
    shape = {
        "two to three passes a change, or less": all(row["passes_a_change"] <= 3 for row in rows),
        "7 times fewer passes with the fewest changes": rows[0]["fewer_passes"] >= 7,
    }
    because = ""
    if not all(shape.values()):
        because = "; ".join(
            f"{row['changed_share']:.0%} changed: {row['passes_a_change']:.2f} passes a change, "
            f"{row['fewer_passes']:.1f} times fewer passes"
            for row in rows
        )
    return {
        "claim": "passes drop from T to about 2 to 3 times (changes + 1); 7 to 9 times fewer",
        "experiment": f"{len(sources)} replayed edits of {tokens} tokens, budget {budget}",
        "edits": rows,
        "shape": shape,
        "because": because,
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference", help="whose tokenizer")
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--budget", type=int, default=512, help="candidates a pass")
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
