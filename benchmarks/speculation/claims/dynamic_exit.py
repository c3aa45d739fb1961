"""DEL's claim: near the best fixed exit and length of a domain, ahead of any one on a mixed stream.

    python -m benchmarks.speculation.claims.dynamic_exit --model FOLDER

The model comes from ``hasten train layerskip``; others have no exits to choose from.
"""

from __future__ import annotations

import argparse
import json
import types
from typing import Any

from benchmarks.speculation.claims.weight_reads import Reads, engine_for, measure_reads
from hasten import LLM
from hasten.bench.workloads import workload

DOMAINS = ("code", "spec-bench")
LENGTHS = (1, 2, 4, 6)


def fixed(llm: LLM, number: int, length: int) -> Any:
    """An engine whose drafts leave at one exit and have one length."""
    engine = engine_for(llm, f"draft=del(k={length})")
    decide = engine.drafting

    def pinned(self: Any, state: Any) -> None:
        state.exit, state.length = number, length

    decide._decide = types.MethodType(pinned, decide)
    decide._learn = lambda *_: None  # no counters, so no confidence either
    decide._states = lambda *_: None
    return engine


def measure(
    model: str, prompts: int = 6, tokens: int = 96, lengths: tuple[int, ...] = LENGTHS
) -> dict[str, Any]:
    """Every fixed setting and DEL over each domain, and over both in turns."""
    llm = LLM(model, max_sequences=1)
    decoder = llm.engine.model
    size = decoder.weight_bytes
    texts = {name: [str(item.prompt) for item in workload(name, prompts)] for name in DOMAINS}

    def speed(found: Reads) -> float:
        return found.tokens * size / found.bytes

    # what the head costs in layers, as reads count it
    head = decoder.output.weight.nbytes  # type: ignore[attr-defined]
    cost = round(head * decoder.config.num_layers / (size - head), 2)
    exits = decoder.config.num_layers - 1
    runs: dict[str, dict[str, Reads]] = {}
    for name, prompts_of in texts.items():
        plain = measure_reads(llm, engine_for(llm, "plain"), prompts_of, tokens)
        runs[name] = {"plain": plain}
        settings = {"del": engine_for(llm, f"draft=del(head={cost})")}
        for number in range(exits):
            for length in lengths:
                settings[f"exit {number + 1}, {length} tokens"] = fixed(llm, number, length)
        for label, engine in settings.items():
            found = runs[name][label] = measure_reads(llm, engine, prompts_of, tokens)
            if found.outputs != plain.outputs:
                raise SystemExit(f"{label} changed the output")
    labels = [label for label in runs[DOMAINS[0]] if label != "del"]
    per_domain = {
        name: {"del": speed(found["del"]), "best": max(labels, key=lambda n: speed(found[n]))}
        for name, found in runs.items()
    }
    for name, facts in per_domain.items():
        facts["best_speed"] = speed(runs[name][facts["best"]])

    def together(label: str) -> float:
        parts = [runs[name][label] for name in DOMAINS]
        return sum(p.tokens for p in parts) * size / sum(p.bytes for p in parts)

    stream = {label: round(together(label), 4) for label in [*labels, "del"]}
    single = max(labels, key=stream.__getitem__)
    return {
        "claim": "within 2-3 % of the best static exit and length of each domain, above any single "
        "static setting over a stream that changes domain",
        "experiment": f"{prompts} prompts a domain, {tokens} greedy tokens, batch 1; speed is "
        "tokens by bytes of weights read, plain decoding = 1",
        "domains": per_domain,
        "stream": {"del": stream["del"], "best single": single, "its speed": stream[single]},
        "tau": {
            name: {n: round(r.tau, 3) for n, r in found.items()} for name, found in runs.items()
        },
        "within_3_percent": all(f["del"] >= 0.97 * f["best_speed"] for f in per_domain.values()),
        "above_any_single": stream["del"] > stream[single],
        "shape_reproduced": all(f["del"] >= 0.97 * f["best_speed"] for f in per_domain.values())
        and stream["del"] > stream[single],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder from hasten train layerskip")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    print(json.dumps(measure(options.model, options.prompts, options.tokens), indent=2))


if __name__ == "__main__":
    main()
