"""A tree fitted to measured accuracies against the tree that Token Recycling ships, at equal N.

Accuracies are measured while the model completes functions of files that it was trained on; the
trees are compared on files that it never saw. The same requests, one at a time, for both trees.

    python -m benchmarks.speculation.claims.tree_calibration --requests 40
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speculation.claims.request_stream import params_of, run, tau
from hasten import LLM, SamplingParams
from hasten.bench.workloads import workload
from hasten.speculation.calibration import best_tree, expected_gain, save_tree
from hasten.speculation.drafters.token_recycling import TEMPLATE
from hasten.training.acceptance_head import functions
from hasten.training.tree import measure_ranks

BUDGETS = (8, 24, 80)
DEPTH = 8


def measure(
    model: str = "reference",
    prompts: int = 128,
    requests: int = 40,
    tokens: int = 96,
    temperature: float = 0.8,
) -> dict[str, Any]:
    """Tau of both trees at each budget, and what the measured accuracies promised."""
    llm = LLM(
        model,
        stack=f"draft=token-recycling,control=fixed(k={max(BUDGETS)})",
        max_sequences=1,  # as the requests that are compared
    )
    written = SamplingParams(max_tokens=tokens, temperature=temperature, ignore_eos=True)
    texts = [str(item.prompt) for item in workload("code", requests)]
    known = [text for text in functions(prompts) if text not in texts]
    counts = measure_ranks(llm, known, written, DEPTH)
    tree = best_tree(counts.accuracy, max(BUDGETS))
    params = params_of(requests, tokens, temperature)
    expected, _ = run(LLM(model, max_sequences=1), texts, params)
    taus: dict[str, dict[str, float]] = {}
    promised: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tree.json"
        save_tree(file, "token-recycling", tree, counts)
        for budget in BUDGETS:
            taus[str(budget)], promised[str(budget)] = {}, {}
            arms = {
                "default": ("token-recycling", TEMPLATE),
                "calibrated": (f"token-recycling(tree={file})", tuple(tree)),
            }
            for arm, (draft, nodes) in arms.items():
                stack = f"draft={draft},control=fixed(k={budget})"
                outputs, found = run(LLM(model, stack=stack, max_sequences=1), texts, params)
                if outputs != expected:
                    raise SystemExit(f"{arm}: the output changed")
                taus[str(budget)][arm] = tau(found)
                gain = expected_gain(counts.accuracy, nodes[:budget])
                promised[str(budget)][arm] = round(1 + gain, 4)
    shape = {
        f"better_at_{budget}": taus[str(budget)]["calibrated"] > taus[str(budget)]["default"]
        for budget in BUDGETS
    }
    because = ""
    if not all(shape.values()):
        because = "tau with the calibrated tree against the hand-made one: " + ", ".join(
            f"{row['calibrated']:.2f} against {row['default']:.2f} at {n}"
            for n, row in taus.items()
        )
    return {
        "claim": "a tree grown by measured path products accepts more than a hand-made tree of "
        "as many nodes (Medusa; here for Token Recycling)",
        "experiment": f"{model}, accuracies from {len(known)} functions of known files, then "
        f"{requests} prompts of 'code' from others, {tokens} tokens each at temperature "
        f"{temperature}, one at a time, N = {', '.join(map(str, BUDGETS))}",
        "places_measured": counts.reached.tolist(),
        "tau": taus,
        "tau_promised": promised,
        "shape": shape,
        "because": because,
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--prompts", type=int, default=128, help="to measure accuracies with")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.8)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
