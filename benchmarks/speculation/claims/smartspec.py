"""SmartSpec's claim: the length with the best goodput follows the best fixed one at every load.

The engine, its scheduler and the controllers are the real ones; what a pass takes is a formula on a
virtual clock, and candidates are accepted by lot, so the result depends on no machine. A pass
takes the longer of reading the weights and computing its rows. ``auto`` runs beside it.

    python -m benchmarks.speculation.claims.smartspec
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import Shape, write
from hasten import SamplingParams, Stack
from hasten.engine.batch import Batch
from hasten.engine.clock import VirtualClock
from hasten.engine.engine import Engine, EngineConfig
from hasten.engine.executor import Begun, Handle, InlineExecutor
from hasten.models.base import Decoder
from hasten.models.loading import load_model
from hasten.speculation.base import Controlling, Draftable, Drafting, Load, StatelessDrafting
from hasten.speculation.tree import TokenTree

MODEL = Shape("llama", 64, 1, 1, 1, 64, 4096, 1e4)
"""As small as a model gets: only the lots of the verifier matter."""
READ = 20e-3
"""Seconds that a pass takes to read the weights; ``ROW`` those to compute one row. 50 rows take as
long as the weights: below that candidates are free, above each costs."""
ROW = 0.4e-3
DRAFT = READ / 20
"""Seconds that a round of drafts takes for each depth."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
ACCEPTANCES = (0.4, 0.8)
LENGTHS = (1, 2, 4, 8)
RATES = (1, 4, 8, 16, 24, 30)
"""Requests a second. Plain decoding is full at 31 of them, of 16 tokens and 64 new ones."""
CONTROLS = ("smartspec", "smartspec(every=1)", "auto")
PROMPT = 16
FIXED = tuple(f"k={k}" for k in LENGTHS)
PARTS = {
    "plain decoding's speed at every batch": 0.95,
    "the best fixed speed at every batch": 0.9,
    "plain decoding's pace at every rate": 0.95,
    "the best fixed pace at every rate": 0.9,
    "the best fixed speed after a bad stretch": 0.9,
}
"""What is compared, and the share that must be reached; pace is the inverse of latency."""
RHYTHM = 20


def pass_seconds(rows: int) -> float:
    return max(READ, rows * ROW)


class Timed(InlineExecutor):
    """Runs batches, and says that they took what the formula says."""

    clock: VirtualClock

    def submit(
        self,
        batch: Batch,
        copies: Sequence[tuple[int, int, int]] = (),
        capture: Collection[int] = (),
        begun: Sequence[Begun] = (),
    ) -> Handle:
        handle = super().submit(batch, copies, capture, begun)
        seconds = handle.result().seconds = pass_seconds(batch.num_rows)
        self.clock.advance(seconds)
        return handle


class Priced(StatelessDrafting):
    """A drafter that takes time for each depth."""

    def __init__(self, of: Drafting, clock: VirtualClock) -> None:
        self.of, self.clock = of, clock

    def propose(self, sequences: Sequence[Draftable], budgets: Sequence[int]) -> list[TokenTree]:
        trees = self.of.propose(sequences, budgets)
        self.clock.advance(DRAFT * max(tree.depth[-1] for tree in trees))
        return trees


class Noted:
    """A controller whose plans are kept."""

    def __init__(self, of: Controlling) -> None:
        self.of = of
        self.should_stop, self.observe, self.close = of.should_stop, of.observe, of.close
        self.plans: list[list[int]] = []

    def plan(self, sequences: Sequence[Draftable], load: Load) -> list[int]:
        self.plans.append(self.of.plan(sequences, load))
        return self.plans[-1]


class Replay(Engine):
    """An engine on a virtual clock."""

    clock: VirtualClock
    control: Controlling
    drafting: Drafting

    def __init__(self, model: Decoder, control: str, acceptance: float, most: int) -> None:
        stack = f"draft=scripted(k={most}),verify=scripted(alpha={acceptance})"
        if control == "off":
            stack = "plain"
        elif control.startswith("k="):
            stack += f",control=fixed({control})"
        else:
            stack += f",control={control}"
        config = EngineConfig(max_sequences=BATCHES[-1], prefix_reuse=False)
        super().__init__(model, Stack.parse(stack), config, clock=VirtualClock())
        self.executor = Timed(self.runner)
        self.executor.clock = self.clock
        self.drafting = Priced(self.drafting, self.clock)
        if hasattr(self.control, "clock"):  # thinking takes no time here
            self.control.clock = self.clock.now
        self.noted = self.control = Noted(self.control)

    def _time_step(self, rows: int, context: int) -> float:
        if rows > self.config.max_batch_tokens:
            raise ValueError(f"{rows} rows do not fit")
        return pass_seconds(rows)

    def ask(self, number: int, tokens: int) -> Any:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, seed=number, ignore_eos=True)
        return self.add([2 + number % 50] * PROMPT, params)

    def run(self, steps: int) -> float:
        """Tokens a second over so many steps of texts that do not end."""
        began, had = self.clock.now(), self.tokens
        for _ in range(steps):
            if any(delta.sequence.finish_reason for delta in self.step()):
                raise SystemExit("a text grew as long as the model allows; take fewer steps")
        return (self.tokens - had) / (self.clock.now() - began)

    @property
    def tokens(self) -> int:
        return sum(s.num_output for s in self.running)


def closed(make: Callable[[str, float], Replay], steps: int) -> dict[str, Any]:
    """Tokens a second by acceptance, batch and rule, once the rules have settled."""
    found: dict[str, Any] = {}
    for acceptance in ACCEPTANCES:
        for batch in BATCHES:
            row = found.setdefault(str(acceptance), {})[str(batch)] = {}
            for control in ("off", *FIXED, *CONTROLS):
                engine = make(control, acceptance)
                for number in range(batch):
                    engine.ask(number, engine.max_length)
                engine.run(steps // 2)
                row[control] = round(engine.run(steps), 1)
    return found


def open_loop(make: Callable[[str, float], Replay], requests: int, tokens: int) -> dict[str, Any]:
    """Mean seconds of a request by rate of arrivals and rule, at the higher acceptance."""
    found: dict[str, Any] = {}
    for rate in RATES:
        row = found[str(rate)] = {}
        for control in ("off", *FIXED, *CONTROLS):
            engine, rng, seconds = make(control, ACCEPTANCES[-1]), random.Random(rate), 0.0
            arrivals = [0.0]
            while len(arrivals) < requests:
                arrivals.append(arrivals[-1] + rng.expovariate(rate))
            due, begun = list(enumerate(arrivals)), dict[str, float]()
            while due or engine.has_work:
                if not engine.has_work:
                    engine.clock.advance(max(0.0, due[0][1] - engine.clock.now()))
                while due and due[0][1] <= engine.clock.now():
                    number, at = due.pop(0)
                    begun[engine.ask(number, tokens).id] = at
                for delta in engine.step():
                    if delta.sequence.finish_reason is not None:
                        seconds += engine.clock.now() - begun[delta.sequence.request.id]
            row[control] = round(seconds / requests, 4)
    return found


def turn(make: Callable[[str, float], Replay], steps: int) -> dict[str, Any]:
    """Nothing is accepted for a while, then nearly everything: how long until drafts are back."""
    found: dict[str, Any] = {}
    for control in ("off", *FIXED, *CONTROLS):
        engine = make(control, 0.0)
        for number in range(4):
            engine.ask(number, engine.max_length)
        engine.run(steps)
        plans, had = engine.noted.plans, engine.clock.now()
        row = found[control] = {}
        if control in CONTROLS:
            row["candidates_in_the_bad_stretch"] = sum(map(sum, plans))
        if control != "off":
            object.__setattr__(engine.stack["verify"], "alpha", 0.9)  # methods are frozen
        if control in CONTROLS:
            began = len(plans)
            while len(plans) < began + steps and min(plans[-1]) < 2:
                engine.run(1)
            row["steps_until_two_candidates"] = len(plans) - began
            row["seconds_until_two_candidates"] = round(engine.clock.now() - had, 2)
        row["tokens_per_second_afterwards"] = round(engine.run(steps // 4), 1)
        if control == "smartspec":
            row["one_length_for_all"] = all(len(set(plan)) == 1 for plan in plans)
            # a probe of one candidate lasts a step; all else may only change when it is due
            row["changes"] = [
                at
                for at, ((old, *_), (new, *_)) in enumerate(pairwise(plans), 1)
                if new != old and 1 not in (old, new)
            ]
    return found


def worst(
    control: str, by_batch: dict[str, Any], by_rate: dict[str, Any], turned: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """For each of ``PARTS`` the lowest share that a controller reaches, and where."""
    speeds, latencies = {}, {}
    for acceptance, batches in by_batch.items():
        for batch, row in batches.items():
            speeds[f" at acceptance {acceptance} and batch {batch}"] = row
    for rate, row in by_rate.items():
        latencies[f" at {rate} requests a second"] = {name: 1 / row[name] for name in row}
    after = {name: row["tokens_per_second_afterwards"] for name, row in turned.items()}
    everything = ("off", *FIXED)
    compared = zip(
        PARTS,
        (speeds, speeds, latencies, latencies, {"": after}),
        (("off",), everything, ("off",), everything, everything),
        strict=True,
    )
    found: dict[str, dict[str, Any]] = {}
    for part, rows, against in compared:
        shares = {at: row[control] / max(row[n] for n in against) for at, row in rows.items()}
        at = min(shares, key=shares.__getitem__)
        found[part] = {"share": round(shares[at], 4), "at": at}
    return found


def measure(steps: int = 240, requests: int = 300, tokens: int = 64) -> dict[str, Any]:
    """The three experiments, and which parts of the claim they show."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "model", MODEL)
        model = load_model(Path(folder) / "model", progress=False)

        def make(control: str, acceptance: float) -> Replay:
            return Replay(model, control, acceptance, LENGTHS[-1])

        by_batch = closed(make, steps)
        by_rate = open_loop(make, requests, tokens)
        turned = turn(make, 5 * steps)
    summary = {control: worst(control, by_batch, by_rate, turned) for control in CONTROLS}
    shape = {
        "fixed lengths help a lone request": all(
            max(batches["1"][k] for k in FIXED) > batches["1"]["off"]
            for batches in by_batch.values()
        ),
        "fixed lengths hurt a full batch": all(
            batches[str(BATCHES[-1])][k] < batches[str(BATCHES[-1])]["off"]
            for batches in by_batch.values()
            for k in FIXED
        ),
    }
    because = []
    for control in ("smartspec", "auto"):
        facts = summary[control]
        for part, least in PARTS.items():
            came = facts[part]["share"] >= least
            shape[f"{control}: {least:.0%} of {part}"] = came
            if not came:
                what = part.partition(" at every")[0] + facts[part]["at"]
                because.append(f"{control} has {facts[part]['share']:.0%} of {what}")
                if control == "smartspec":
                    each = summary["smartspec(every=1)"][part]["share"]
                    because[-1] += f" ({each:.0%} when it decides every step)"
    rhythm = turned["smartspec"]
    shape["smartspec: one length for all, changed every 20 steps"] = rhythm[
        "one_length_for_all"
    ] and all(at % RHYTHM == 0 for at in rhythm["changes"])
    return {
        "claim": "fixed lengths help at low and hurt at high request rates; the length of highest "
        "goodput is never more than 3 to 5 % worse than none and near the best at low load",
        "experiment": f"the engine on a virtual clock: {1e3 * READ:g} ms a pass up to "
        f"{READ / ROW:g} rows, {1e3 * ROW:g} ms a row beyond, {1e3 * DRAFT:g} ms a draft token; "
        f"acceptance {' and '.join(map(str, ACCEPTANCES))} by lot, batches of {BATCHES[0]} to "
        f"{BATCHES[-1]}, Poisson arrivals of {RATES[0]} to {RATES[-1]} requests a second of "
        f"{tokens} tokens; parts named auto are of our own controller and not of the claim",
        "tokens_per_second": by_batch,
        "latency_seconds": by_rate,
        "turn": turned,
        "worst": summary,
        "shape": shape,
        "because": "; ".join(because),
        "shape_reproduced": all(
            came for part, came in shape.items() if not part.startswith("auto")
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=240, help="that are measured, once settled")
    parser.add_argument("--requests", type=int, default=300, help="at each rate")
    parser.add_argument("--tokens", type=int, default=64, help="of a request")
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
