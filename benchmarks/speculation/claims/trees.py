"""Trees of a draft model at equal rows: DySpec's, RSD's and SpecTr's claims.

Sampled requests, with the verifier that each kind of tree is for. Tau at N candidates a pass, and
the share of examined depths at which one was accepted.

    python -m benchmarks.speculation.claims.trees --requests 24
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.speculation.claims.request_stream import params_of, run, tau
from hasten import LLM
from hasten.bench.workloads import workload
from hasten.speculation.statistics import DraftStatistics

SIZES = ((6, 3, 2), (12, 4, 3), (20, 5, 4))
"""(candidates, depth, width); chains take the depth alone, trees all candidates."""


def arms(candidates: int, depth: int, width: int) -> dict[str, str]:
    """Stacks by name."""
    trees = f"width={width},depth={depth}"
    return {
        "chain": f"draft=model(k={depth}),verify=chain",
        "independent, recursive": f"draft=rsd(tree=independent,{trees}),verify=recursive",
        "independent, K-SEQ": f"draft=rsd(tree=independent,{trees}),verify=k-seq",
        "RSD-C": f"draft=rsd(tree=constant,{trees}),verify=recursive",
        "RSD-S": f"draft=rsd(tree=beam,{trees}),verify=recursive",
        "DySpec": f"draft=dyspec(n={candidates},depth={candidates}),verify=recursive",
    }


def measure(
    model: str = "reference",
    name: str = "code",
    requests: int = 24,
    tokens: int = 64,
    temperature: float = 0.8,
) -> dict[str, Any]:
    """Tau of each kind of tree at each size."""
    prompts = [str(item.prompt) for item in workload(name, requests)]
    params = params_of(requests, tokens, temperature)
    taus: dict[str, dict[str, float]] = {}
    accepted: dict[str, dict[str, float]] = {}
    for candidates, depth, width in SIZES:
        size = str(candidates)
        taus[size], accepted[size] = {}, {}
        for arm, stack in arms(candidates, depth, width).items():
            control = f"control=fixed(k={candidates})"
            llm = LLM(model, stack=f"{stack},{control}", max_sequences=8)
            _, counts = run(llm, prompts, params, at_once=8)
            taus[size][arm] = tau(counts)
            total = DraftStatistics()
            for each in counts:
                total.add(each)
            accepted[size][arm] = round(total.by_depth[0], 4)
    mean = {arm: sum(by_arm[arm] for by_arm in taus.values()) / len(taus) for arm in taus["6"]}
    shape = {
        "rsd_s_at_least_rsd_c": mean["RSD-S"] >= mean["RSD-C"],
        "rsd_c_at_least_independent": mean["RSD-C"] >= mean["independent, recursive"],
        "trees_beat_the_chain": mean["RSD-C"] > mean["chain"],
        "k_seq_at_least_recursive_of_independent_draws": mean["independent, K-SEQ"]
        >= mean["independent, recursive"],
        "dyspec_best": mean["DySpec"] >= max(mean.values()),
    }
    because = []
    if not shape["dyspec_best"]:
        pairs = (
            f"{by_arm['DySpec']:.2f} against {max(by_arm.values()):.2f} at {size}"
            for size, by_arm in taus.items()
        )
        because.append(f"DySpec's tau is below the best tree's: {', '.join(pairs)} candidates")
    if not all(came for part, came in shape.items() if part != "dyspec_best"):
        means = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
        because.append(f"mean tau over the sizes: {means}")
    return {
        "claim": "at equal rows RSD-S >= RSD-C >= SpecTr and SpecInfer >= chain (RSD); K-SEQ "
        "accepts more than recursive rejection of independent draws (SpecTr); a tree that grows "
        "by value beats fixed ones (DySpec)",
        "experiment": f"{model} with reference-draft, {requests} prompts of '{name}', {tokens} "
        f"tokens each at temperature {temperature}",
        "tau": taus,
        "accepted_at_depth_1": accepted,
        "mean_tau": {arm: round(value, 4) for arm, value in mean.items()},
        "shape": shape,
        "because": "; ".join(because),
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--name", default="code", help="workload with one prompt an item")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
