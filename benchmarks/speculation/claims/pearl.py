"""PEARL's claim: with draft and target on devices of their own, a step takes the longer of both.

Measured on one processor, and modelled for two such processors. On one, PEARL has the cores split:
the target runs on one thread, the draft on its own, which is what ``--threads 1`` gives a user of
two cores (no option binds the draft's thread to a core). It is held against speculation in turn
with all cores, which is what the user gives up for it, and with one, which is what two executors
have over one of them. The model takes the seconds of a target's and of a draft's pass with all
cores, and the counts of both arms.

Only decoding is timed: a request's first step, which computes its prompt, is not. All arms answer
the same prompts in every round, in changing order; figures are medians over rounds. A turn during
which other processes took more than a little of the processor is repeated.

    hasten widen wide/t05 --preset 0.5b && hasten compress rtn wide/t05 --weights int8 \
        -o wide/t05-int8    # drafts: hasten widen wide/d60 -m reference-draft --preset 60m ...
    python -m benchmarks.speculation.claims.pearl -m wide/t05-int8 --drafts wide/d60-int8
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hasten import LLM, SamplingParams, Stack, _native
from hasten.bench.workloads import workload
from hasten.engine.engine import Engine, EngineConfig

ALL, ONE = "all cores", "one core"
ARMS = {
    f"none, {ALL}": ("none", 2),
    f"none, {ONE}": ("none", 1),
    f"serial, {ALL}": ("model", 2),
    f"serial, {ONE}": ("model", 1),
    "pearl, cores split": ("pearl", 1),
}
"""Drafter and the target's threads. The draft's thread is one more."""
OTHERS = 0.1
"""Cores that other processes may take on average during a turn; ``TRIES`` to find such a time."""
TRIES = 8
SERIAL, PEARL = f"serial, {ALL}", "pearl, cores split"


@dataclass
class Decoding:
    """Sums over the decode steps of some requests; ``seconds`` are of whole steps.

    Attributes:
        passes: of the target, and ``forward`` their seconds.
        draft_passes: of the draft, and ``draft`` the seconds that steps waited for it.
    """

    tokens: int = 0
    seconds: float = 0.0
    passes: int = 0
    forward: float = 0.0
    draft_passes: int = 0
    draft: float = 0.0

    def row(self) -> dict[str, float]:
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "tau": self.tokens / self.passes,
            "target_pass": self.forward / self.passes,
            "draft_passes_a_step": self.draft_passes / self.passes,
            "waited_for_draft": self.draft / self.passes,
        }


def others() -> float:
    """Seconds that processors have worked, but for this process, where the kernel tells (Linux)."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, interrupts, soft = (int(ticks) for ticks in line[1:8])
    worked = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
    return worked - time.process_time()


def decode(
    engine: Engine, prompts: Sequence[list[int]], tokens: int
) -> tuple[Decoding, list[list[int]]]:
    """Greedy answers, one at a time: what decoding them took, and their tokens."""
    found, outputs, stats = Decoding(), [], engine.stats
    runtime = getattr(engine.drafting, "runtime", None)
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for ids in prompts:
        request = engine.add(ids, params)
        while not request.sequences[0].num_output:
            engine.step()  # the prompt, and the first token
        before = stats.tokens, stats.steps, stats.forward_seconds, stats.draft_seconds
        drafted = runtime.passes if runtime else 0
        began = time.perf_counter()
        while not request.finished:
            engine.step()
        found.seconds += time.perf_counter() - began
        found.tokens += stats.tokens - before[0]
        found.passes += stats.steps - before[1]
        found.forward += stats.forward_seconds - before[2]
        found.draft += stats.draft_seconds - before[3]
        found.draft_passes += (runtime.passes if runtime else 0) - drafted
        outputs.append(request.sequences[0].tokens[len(ids) :])
    return found, outputs


def measure(
    model: str = "reference",
    draft: str = "reference-draft",
    name: str = "tasks",
    requests: int = 6,
    tokens: int = 48,
    k: int = 4,
    rounds: int = 3,
) -> dict[str, Any]:
    """All arms with one draft: medians over rounds, and the model for two processors."""
    threads_before = _native.get_num_threads()
    if threads_before < 2:
        raise SystemExit("run it on two cores or more: there is nothing to split")
    llm = LLM(model, max_sequences=1)
    prompts = [llm.tokenizer.encode(str(item.prompt)) for item in workload(name, requests)]
    config = EngineConfig(max_sequences=4)  # room for the pages of all prompts
    engines: dict[str, Engine] = {}
    for drafter in {drafter: None for drafter, _ in ARMS.values()}:
        chosen = "plain" if drafter == "none" else f"draft={drafter}(path={draft},k={k})"
        stack = Stack.parse(chosen)
        engines[drafter] = Engine(llm.engine.model, stack, config, tokenizer=llm.tokenizer)
        decode(engines[drafter], prompts, 2)  # the prompts' pages, the native recordings
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    expected: list[list[int]] = []
    try:
        for number in range(rounds):
            for arm in list(ARMS) if number % 2 else reversed(ARMS):
                drafter, threads = ARMS[arm]
                _native.set_num_threads(threads)
                for _ in range(TRIES):
                    began, taken = time.perf_counter(), others()
                    sums, outputs = decode(engines[drafter], prompts, tokens)
                    if others() - taken < OTHERS * (time.perf_counter() - began):
                        break
                else:
                    raise SystemExit("other processes use the processor; end them, or wait")
                if expected and outputs != expected:
                    raise SystemExit(f"{arm}: the output changed")
                expected = outputs
                found[arm].append(sums.row())
    finally:
        _native.set_num_threads(threads_before)
    weights = {
        "target": llm.engine.model.weight_bytes,
        "draft": engines["model"].drafting.runtime.model.weight_bytes,  # type: ignore[attr-defined]
    }
    return {"weight_bytes": weights, **answer(found)}


def answer(found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Medians of the arms' rounds, PEARL against serial speculation, and the model."""
    arms = {
        arm: {figure: median(row[figure] for row in rows) for figure in rows[0]}
        for arm, rows in found.items()
    }
    against = {
        other: median(
            ours["tokens_per_second"] / theirs["tokens_per_second"]
            for ours, theirs in zip(found[PEARL], found[other], strict=True)
        )
        for other in ARMS
        if other != PEARL
    }
    serial, pearl = arms[SERIAL], arms[PEARL]
    target, passes = serial["target_pass"], serial["draft_passes_a_step"]
    draft = serial["waited_for_draft"] / passes
    modelled = {
        "serial": serial["tau"] / (target + passes * draft),
        "pearl": pearl["tau"] / max(target, pearl["draft_passes_a_step"] * draft),
    }
    return {
        "measured": arms,
        "rounds": {arm: [row["tokens_per_second"] for row in rows] for arm, rows in found.items()},
        "pearl_against": against,
        "modelled_tokens_per_second_on_two_processors": modelled,
        "modelled_pearl_against_serial": modelled["pearl"] / modelled["serial"],
        "draft_pass": draft,
    }


def report(drafts: Mapping[str, dict[str, Any]], experiment: str) -> dict[str, Any]:
    """The claim's answer from what was measured with each draft."""
    shape, figures = {}, []
    for draft, found in drafts.items():
        one = found["pearl_against"][f"serial, {ONE}"]
        whole = found["pearl_against"][SERIAL]
        two = found["modelled_pearl_against_serial"]
        passes = found["measured"][SERIAL]["target_pass"] / found["draft_pass"]
        sizes = [f"{found['weight_bytes'][who] / 1e6:.0f}" for who in ("draft", "target")]
        shape[f"{draft}: faster_than_serial_on_one_core"] = one > 1
        shape[f"{draft}: faster_on_two_processors_by_the_model"] = two > 1
        figures.append(
            f"{draft} ({sizes[0]} MB, the target {sizes[1]}; {passes:.1f} of its passes take as "
            f"long as one of the target): with the cores split {whole:.2f} times serial "
            f"speculation on all cores and {one:.2f} times that on one core; {two:.2f} times "
            "serial on two processors, by the model"
        )
    return {
        "claim": "step time is the longer of draft and target instead of their sum: 1.2 to 1.5 "
        "times serial speculation where acceptance is high; slower where both compete",
        "experiment": experiment,
        "drafts": drafts,
        "shape": shape,
        "because": "; ".join(figures),
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="reference")
    parser.add_argument("--drafts", nargs="+", default=["reference-draft"])
    parser.add_argument("--name", default="tasks", help="of the workload")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = vars(parser.parse_args())
    drafts = given.pop("drafts")
    found = {Path(draft).name: measure(draft=draft, **given) for draft in drafts}
    experiment = (
        f"{given['model']}, k = {given['k']}, {given['requests']} prompts of '{given['name']}', "
        f"{given['tokens']} tokens each, greedy, one at a time, two cores; medians of "
        f"{given['rounds']} interleaved rounds"
    )
    print(json.dumps(report(found, experiment), indent=2))


if __name__ == "__main__":
    main()
