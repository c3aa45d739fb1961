"""PEARL's claim: with draft and target on devices of their own, a step takes the longer of both.

Measured where they share a processor, one thread each, and modelled for two devices from what was
measured: seconds of a target's pass, of a draft's pass, and the counts of both arms.

    python -m benchmarks.speculation.claims.pearl --model WIDE --draft WIDE-DRAFT
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from benchmarks.speculation.claims.request_stream import params_of, run, tau
from hasten import LLM, _native
from hasten.bench.workloads import workload


def measure(
    model: str = "reference",
    draft: str = "reference-draft",
    name: str = "tasks",
    requests: int = 12,
    tokens: int = 64,
    k: int = 4,
) -> dict[str, Any]:
    """Tokens a second of both arms on one processor, and by the model on two devices."""
    _native.set_num_threads(1)
    prompts = [str(item.prompt) for item in workload(name, requests)]
    params = params_of(requests, tokens, 0.0)
    found: dict[str, dict[str, float]] = {}
    outputs: dict[str, Any] = {}
    for arm in ("none", "model", "pearl"):
        choice = "draft=none" if arm == "none" else f"draft={arm}(path={draft},k={k})"
        llm = LLM(model, stack=choice, max_sequences=1)
        run(llm, prompts[:1], params[:1])
        stats = llm.engine.stats
        decode, forward = stats.decode_seconds, stats.decode_steps
        passes = getattr(llm.engine.drafting, "runtime", None)
        before = passes.passes if passes else 0
        began = time.perf_counter()
        outputs[arm], counts = run(llm, prompts, params)
        found[arm] = {
            "tokens_per_second": requests * tokens / (time.perf_counter() - began),
            "tau": tau(counts),
            "target_pass": (stats.decode_seconds - decode) / (stats.decode_steps - forward),
            "draft_passes_a_step": (passes.passes - before) / sum(c.passes for c in counts)
            if passes
            else 0.0,
        }
        if arm == "model":
            found[arm]["draft_pass"] = stats.draft_seconds / max(1, passes.passes if passes else 1)
    if outputs["model"] != outputs["none"] or outputs["pearl"] != outputs["none"]:
        raise SystemExit("the output changed")
    target, pass_ = found["none"]["target_pass"], found["model"]["draft_pass"]
    drafted = found["model"]["draft_passes_a_step"] * pass_
    beside = found["pearl"]["draft_passes_a_step"] * pass_
    two = {
        "serial": found["model"]["tau"] / (found["model"]["target_pass"] + drafted),
        "pearl": found["pearl"]["tau"] / max(found["pearl"]["target_pass"], beside),
    }
    shape = {"faster_on_two_devices": two["pearl"] > two["serial"]}
    return {
        "claim": "step time is the longer of draft and target instead of their sum: 1.2 to 1.5 "
        "times serial speculation where acceptance is high; slower where both compete",
        "experiment": f"{model} with {draft}, k = {k}, {requests} prompts of '{name}', {tokens} "
        "tokens each, greedy, one at a time, one thread each",
        "measured_on_one_processor": found,
        "modelled_tokens_per_second_on_two_devices": two,
        "target_over_draft_pass": target / pass_,
        "shape": shape,
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--draft", default="reference-draft")
    parser.add_argument("--name", default="tasks")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--k", type=int, default=4)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
