"""Token Recycling's claims: about two tokens a pass; a hot start, rejected rows, and better than
counts of bigrams.

The same requests, one at a time, for all arms, with the same number of candidates a pass.

    python -m benchmarks.speculation.claims.token_recycling --requests 40
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.speculation.claims.request_stream import params_of, run, tau
from hasten import LLM
from hasten.bench.workloads import workload
from hasten.speculation.base import Outcome
from hasten.speculation.drafters.token_recycling import (
    WIDTH,
    TokenRecycling,
    TokenRecyclingDrafting,
)


class BigramCounts(TokenRecyclingDrafting):
    """The same tree, unrolled from how often one token followed another in the texts so far."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(TokenRecycling(), vocab_size)
        self.counts: defaultdict[int, Counter[int]] = defaultdict(Counter)

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            # with the whole prompt, which the other arms do not read
            known = outcome.sequence.tokens
            start = outcome.start if outcome.start >= outcome.sequence.num_prompt else 0
            for before, token in zip(known[start:], known[start + 1 :], strict=False):
                self.counts[before][token] += 1
                best = sorted(self.counts[before], key=lambda t: (-self.counts[before][t], t))
                row = self.tables[outcome.sequence.tenant][before]
                row[: len(best)] = np.array(best[:WIDTH], np.int32)[: len(row)]


def measure(
    model: str = "reference",
    name: str = "code",
    requests: int = 40,
    tokens: int = 96,
    budget: int = 80,
    temperature: float = 0.8,
) -> dict[str, Any]:
    """Tau of each arm; of the whole method also over the second half, when the table is warm."""
    plain = LLM(model, max_sequences=1)
    prompts = [
        str(item.prompt)
        if item.prompt is not None
        else plain.chat_prompt([{"role": "user", "content": item.turns[0]}])
        for item in workload(name, requests)
    ]
    params = params_of(requests, tokens, temperature)
    expected, _ = run(plain, prompts, params)
    arms = {
        "whole": "token-recycling",
        "cold start": "token-recycling(hot=false)",
        "accepted rows only": "token-recycling(rejected=false)",
        "bigram counts": "token-recycling",
    }
    taus, warm = {}, 0.0
    for arm, draft in arms.items():
        llm = LLM(model, stack=f"draft={draft},control=fixed(k={budget})", max_sequences=1)
        if arm == "bigram counts":
            llm.engine.drafting = BigramCounts(llm.engine.model.config.vocab_size)
        outputs, counts = run(llm, prompts, params)
        if outputs != expected:
            raise SystemExit(f"{arm}: the output changed")
        taus[arm] = tau(counts)
        if arm == "whole":
            warm = tau(counts[len(counts) // 2 :])
    shape = {
        "about_two_when_warm": 1.6 <= warm <= 2.6,
        "hot_beats_cold": taus["whole"] > taus["cold start"],
        "rejected_rows_help": taus["whole"] > taus["accepted rows only"],
        "beats_bigram_counts": taus["whole"] > taus["bigram counts"],
    }
    return {
        "claim": "about 2 tokens a pass on natural text after warm-up; hot start better than "
        "cold, all rows better than accepted ones, better than bigram counts at equal N",
        "experiment": f"{model}, {requests} prompts of '{name}', {tokens} tokens each at "
        f"temperature {temperature}, one at a time, N = {budget}",
        "tau": taus,
        "tau_warm": warm,
        "shape": shape,
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--name", default="code", help="workload: code or spec-bench")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--budget", type=int, default=80, help="candidates a pass")
    parser.add_argument("--temperature", type=float, default=0.8)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
