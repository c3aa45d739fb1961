"""EasySpec's claim: layers that attend at once cost little acceptance if the cache is calibrated.

The bundled target drafts for itself, so a plain draft is always right and everything that is lost
is the grouping's doing. Devices are not simulated: the critical path is counted in layers.

    python -m benchmarks.speculation.claims.easyspec --requests 24
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.speculation.claims.request_stream import params_of, run
from hasten import LLM
from hasten.bench.workloads import workload
from hasten.speculation.statistics import DraftStatistics

GROUPS = (1, 2, 4)


def measure(
    model: str = "reference", name: str = "code", requests: int = 24, tokens: int = 64
) -> dict[str, Any]:
    """Acceptance by group size, with and without calibration."""
    prompts = [str(item.prompt) for item in workload(name, requests)]
    params = params_of(requests, tokens, 0.0)
    accepted: dict[str, dict[str, float]] = {}
    layers = 0
    for group in GROUPS:
        for calibrate in ("true", "false"):
            stack = f"draft=easyspec(path={model},group={group},k=4,calibrate={calibrate})"
            llm = LLM(model, stack=stack, max_sequences=8)
            layers = llm.engine.model.config.num_layers
            _, counts = run(llm, prompts, params, at_once=8)
            total = DraftStatistics()
            for each in counts:
                total.add(each)
            by_group = accepted.setdefault(str(group), {})
            by_group["calibrated" if calibrate == "true" else "not"] = round(
                total.alpha_examined or 0.0, 4
            )
    # attention and feed-forward of a layer count one half each; a group attends once
    path = {
        str(group): (2 + (layers - 2) / 2 + -(-(layers - 2) // group) / 2) / layers
        for group in GROUPS
    }
    largest = str(GROUPS[-1])
    shape = {
        "group_of_one_is_exact": accepted["1"]["calibrated"] == 1.0,
        "small_drop_with_calibration": accepted[largest]["calibrated"] >= 0.93,
        "larger_drop_without": accepted[largest]["not"] < accepted[largest]["calibrated"],
    }
    because = []
    if not shape["small_drop_with_calibration"]:
        because.append(
            "with calibration "
            + ", ".join(
                f"groups of {group} lose {1 - by['calibrated']:.1%}"
                for group, by in accepted.items()
                if group != "1"
            )
            + " of the examined candidates"
        )
    if not shape["larger_drop_without"]:
        because.append(f"without it groups of {largest} lose {1 - accepted[largest]['not']:.1%}")
    return {
        "claim": "acceptance drops by at most 7 % with calibration and drifts without it; the "
        "critical path of drafting is up to 1.6 times shorter",
        "experiment": f"{model} drafts for itself, greedy, {requests} prompts of '{name}', "
        f"{tokens} tokens each",
        "alpha_examined": accepted,
        "critical_path_share": {group: round(share, 3) for group, share in path.items()},
        "shape": shape,
        "because": "; ".join(because),
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--name", default="code")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
