"""Kangaroo's claim: the confidence at which drafts stop has a best value strictly inside (0, 1).

Without a stop (eta = 0) a pass yields the most tokens but drafts the most in vain; with a stop at
every doubt (eta = 1) a draft has one token. In between, fewer steps are wasted for little yield.

    python -m benchmarks.speculation.claims.kangaroo --head adapter.safetensors

The adapter comes from ``hasten train kangaroo``.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.speculation.claims.weight_reads import engine_for, measure_reads
from hasten import LLM
from hasten.bench.workloads import workload

ETAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def measure(
    head: str, model: str = "reference", name: str = "code", prompts: int = 8, tokens: int = 96
) -> dict[str, Any]:
    """Sweep eta over the prompts of a workload."""
    llm = LLM(model, max_sequences=1)
    texts = [str(item.prompt) for item in workload(name, prompts)]
    model_bytes = llm.engine.model.weight_bytes
    plain = measure_reads(llm, engine_for(llm, "plain"), texts, tokens)
    rows = {}
    for eta in ETAS:
        engine = engine_for(llm, f"draft=kangaroo(head={head},eta={eta})")
        found = measure_reads(llm, engine, texts, tokens)
        if found.outputs != plain.outputs:
            raise SystemExit(f"eta={eta} changed the output")
        rows[eta] = found.row(model_bytes)
    best = max(ETAS, key=lambda eta: float(rows[eta]["tokens_per_read"]))
    return {
        "claim": "an interior confidence threshold beats both ends: fewer tokens a pass than "
        "without a stop, fewer wasted drafts, more speed",
        "experiment": f"{model}, {prompts} prompts of '{name}', {tokens} greedy tokens, batch 1; "
        "speed is tokens by bytes of weights read, plain decoding = 1",
        "etas": {str(eta): row for eta, row in rows.items()},
        "best_eta": best,
        "shape_reproduced": bool(
            0 < best < 1
            and rows[best]["tau"] <= rows[0.0]["tau"]
            and rows[best]["wasted_per_token"] < rows[0.0]["wasted_per_token"]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", required=True, help="adapter from hasten train kangaroo")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--workload", default="code", help="code or spec-bench")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    found = measure(options.head, options.model, options.workload, options.prompts, options.tokens)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
