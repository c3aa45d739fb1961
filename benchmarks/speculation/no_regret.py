"""`control=auto` against no drafts, by kind of text and batch size, step beside step:

    python benchmarks/speculation/no_regret.py -m wide/t05-int8 \
        --stack 'draft=any(of=prompt-lookup|copyspec|model(path=wide/d25-int8,k=10)),control=auto'

Both engines live in one process, with the same weights, and hold the same batch of requests. While
either has work, one runs a step and then the other, in changing order, and the seconds of each are
summed: the machine may slow down as it likes, the ratio of the two sums does not follow. No step of
one engine falls into a time that the other takes of itself, since what engines and controllers time
lies within a step. That both give the same tokens is checked.

Prompts come from the prefix cache, but for one row each, so what is timed is decoding. Each round
has every kind at every batch size, small batches with several groups of prompts; a group is a pair
of times, and the interval is Student's over the logarithms of the pairs' ratios. The first round
fills the caches and is not counted, except that ``auto`` learns in it, as it does in a server that
runs on. What it learns of texts it keeps for each tenant, and each kind of text is one here, as
the requests of one application are; with ``--mixed`` all of them are one tenant's, so that texts
without anything to gain stand among those with much.

What the engines hold is frozen before anything is timed, as the server does it, so that Python's
garbage collector does not look through it in a step of either. All pages are written to before, as
those of a server that ran for a while are: new memory costs a tenth of a step at batch 16, and the
plain engine, which takes part in every pair, would come to its end sooner.

``off`` is the same engine with ``draft=none``; ``zero`` is the drafter with ``control=fixed(k=0)``:
the machinery without a draft. ``again`` is a second ``off``: what it differs by from the first is
the place of its pages in memory, and not the drafts. Both are measured in every other round. A
second table says what a step spends in that machinery, by timers around its parts; what a step of
``off`` spends there is subtracted.

What ``auto`` pays for trying drafts out is paid early in a text. ``--tokens 192 --batches 16`` in a
run of its own says what is left of it when texts are longer.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from hasten.bench.conditions import conditions  # noqa: E402
from hasten.bench.workloads import code, tasks  # noqa: E402
from hasten.cache.layout import PAGE_SIZE  # noqa: E402
from hasten.decoding.params import SamplingParams  # noqa: E402
from hasten.engine.engine import Engine, EngineConfig  # noqa: E402
from hasten.models.base import Decoder  # noqa: E402
from hasten.models.loading import load_model, locate  # noqa: E402
from hasten.models.tokenizer import Tokenizer  # noqa: E402
from hasten.stack import Stack  # noqa: E402

KINDS = {"copy": "copy", "passages": "prose", "chat": "prose", "json": "JSON"}
"""Generated tasks, by the kind of text that they are counted as."""
TEXTS = 64
"""Different prompts of a kind; the batches of all rounds are taken from them."""
LEAST = 2
"""Prompts of a kind in a round: as many as the batch, at least these."""
KV_BYTES = 5 << 30
"""Of pages, for the prompts of all kinds and what a round writes beside them: were a prompt
computed again by one engine and not by the other, that would be all that is seen; it is refused.
Engines that only answer one kind have a quarter."""
LOOKUP = "draft=prompt-lookup"
"""The stack whose machinery is looked at beside that of ``--stack``."""
PARTS = ("plan", "propose", "drafter learns", "controller learns", "step")
"""What speculation adds to a step: ``step`` is what the step itself has to do for it."""
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
STUDENT |= {11: 2.20, 14: 2.14, 19: 2.09, 29: 2.05, 59: 2.00}
"""Quantile 0.975 by degrees of freedom."""


class Timed:
    """An engine with timers around what it calls for speculation.

    Attributes:
        seconds: by part, since ``reset``; time in an inner part is not counted in the outer one.
        steps: since then, and ``step_seconds`` what they took.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0
        self.step_seconds = 0.0
        self._inner = 0.0
        calls: dict[str, tuple[object, Sequence[str]]] = {
            "plan": (engine.control, ["plan"]),
            "propose": (engine.drafting, ["propose"]),
            "drafter learns": (engine.drafting, ["open", "absorb", "observe", "close"]),
            "controller learns": (engine.control, ["observe", "close"]),
            "step": (engine, ["_draft", "_build", "_chunks", "_verify_and_commit"]),
        }
        for part, (owner, names) in calls.items():
            for name in names:
                # drafters and controllers without state are their own frozen method
                object.__setattr__(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            outer, self._inner = self._inner, 0.0
            began = time.perf_counter()
            try:
                return call(*args)
            finally:
                took = time.perf_counter() - began
                self.seconds[part] += took - self._inner
                self._inner = outer + took

        return timed

    def step(self) -> float:
        """One step; its seconds."""
        began = time.perf_counter()
        self.engine.step()
        took = time.perf_counter() - began
        self.steps += 1
        self.step_seconds += took
        return took

    def reset(self) -> None:
        self.seconds.clear()
        self.steps, self.step_seconds = 0, 0.0


@dataclass
class Pairs:
    """What pairs of runs of the same requests showed, each list with an entry a pair.

    Attributes:
        off, seconds: what they took without and with.
        drafted: candidates a token of output; ``accepted`` alike.
        parts: by part, the share of a step's time that a step of ``off`` does not spend on it.
    """

    off: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    @property
    def ratios(self) -> list[float]:
        """Speed against ``off``."""
        return [off / took for off, took in zip(self.off, self.seconds, strict=True)]

    def run(
        self,
        off: Timed,
        other: Timed,
        texts: list[list[int]],
        kind: str,
        tokens: int,
        tenant: str,
    ) -> None:
        """Add a pair: both engines answer the texts, all of them at a time."""
        both = (off, other)
        requests: tuple[list[Any], list[Any]] = ([], [])
        seconds = [0.0, 0.0]
        # a random model's most likely text is soon a loop; what is drawn stays random
        temperature = 1.0 if kind == "random" else 0.0
        counts = other.engine.stats.speculation
        drafted, accepted = counts.drafted, counts.accepted
        off.reset()
        other.reset()
        for number, text in enumerate(texts):
            params = SamplingParams(
                max_tokens=tokens, ignore_eos=True, temperature=temperature, seed=number
            )
            for at, timed in enumerate(both):
                began = time.perf_counter()
                requests[at].append(timed.engine.add(text, params, tenant=tenant))
                seconds[at] += time.perf_counter() - began
        turn = 0
        while off.engine.has_work or other.engine.has_work:
            for at in (turn % 2, 1 - turn % 2):
                if both[at].engine.has_work:
                    seconds[at] += both[at].step()
            turn += 1
        ours, theirs = ([r.sequences[0].tokens for r in own] for own in requests)
        if ours != theirs or any(
            len(out) != len(text) + tokens for out, text in zip(ours, texts, strict=True)
        ):
            raise SystemExit(f"{kind}, batch {len(texts)}: the two engines did not do equal work")
        sequences = [r.sequences[0] for own in requests for r in own]
        if any(s.figures.cached_tokens != s.num_prompt - 1 for s in sequences):
            raise SystemExit(f"{kind}, batch {len(texts)}: prompts left the cache; raise kv_bytes")
        written = len(texts) * tokens
        self.off.append(seconds[0])
        self.seconds.append(seconds[1])
        self.drafted.append((counts.drafted - drafted) / written)
        self.accepted.append((counts.accepted - accepted) / written)
        for part in PARTS:
            own, plain = other.seconds[part], off.seconds[part] / off.steps
            self.parts[part].append((own - plain * other.steps) / other.step_seconds)


def prompts(tokenizer: Tokenizer, length: int) -> dict[str, list[list[int]]]:
    """Token ids by kind, of about ``length`` tokens: whole pages and one token more, which is what
    a prefix hit leaves to compute."""
    rng = random.Random(0)
    pages = length // PAGE_SIZE * PAGE_SIZE
    made: dict[str, list[list[int]]] = {
        "random": [[rng.randrange(300, 4000) for _ in range(pages + 1)] for _ in range(TEXTS)],
    }
    whole = [tokenizer.encode(item.prompt) for item in code(2 * TEXTS)]
    made["code"] = [ids[-pages - 1 :] for ids in whole if len(ids) > pages]
    for item in tasks(120 * TEXTS, length=length):
        if item.category in KINDS:
            ids = tokenizer.encode(item.prompt)
            if len(ids) % PAGE_SIZE == 1 and len(ids) < 2 * length:
                made.setdefault(KINDS[item.category], []).append(ids)
    if few := [kind for kind, found in made.items() if len(found) < TEXTS]:
        raise SystemExit(f"fewer than {TEXTS} prompts of {', '.join(few)}; take another --length")
    return {kind: found[:TEXTS] for kind, found in made.items()}


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of ratios, over their logarithms."""
    logs = [math.log(r) for r in ratios]
    freedom = len(logs) - 1
    quantile = STUDENT[max(known for known in STUDENT if known <= freedom)]
    half = quantile * stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean(logs)), math.exp(mean(logs) - half), math.exp(mean(logs) + half)


@dataclass
class Comparison:
    """Engines that share a model, and what was measured of them.

    Attributes:
        pairs: by engine, kind and batch size.
        lookup: by the controller, ``auto`` or ``zero``, and batch size: `LOOKUP` on random text.
    """

    model: Decoder
    tokenizer: Tokenizer
    stack: Stack
    batches: Sequence[int]
    tokens: int
    length: int
    mixed: bool = False
    kv_bytes: int = KV_BYTES
    pairs: dict[tuple[str, str, int], Pairs] = field(default_factory=dict)
    lookup: dict[tuple[str, int], Pairs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.texts = prompts(self.tokenizer, self.length)
        plain = Stack.parse("plain")
        self.engines = {
            "off": self._engine(plain, self.kv_bytes),
            "auto": self.under("auto", self.stack, self.kv_bytes),
            "zero": self.under("fixed(k=0)", self.stack, self.kv_bytes // 4),
            "again": self._engine(plain, self.kv_bytes // 4),
        }

    def under(self, control: str, stack: Stack, kv_bytes: int) -> Timed:
        """An engine with the drafter of a stack."""
        own = deepcopy(dict(stack.methods))  # engines may share nothing that timers are set on
        return self._engine(Stack.parse({**own, "control": control}), kv_bytes)

    def _engine(self, stack: Stack, kv_bytes: int) -> Timed:
        config = EngineConfig(
            max_sequences=TEXTS,  # of all batch sizes, and of what there are pages for
            max_length=min(2048, self.model.config.max_positions),
            kv_bytes=kv_bytes,
        )
        engine = Engine(self.model, stack, config, tokenizer=self.tokenizer)
        storage = engine.runner.storage
        for pages in (*storage.k, *storage.v):
            pages.zero_()  # else what is used for the first time costs a tenth of a step more
        return Timed(engine)

    def fill(self, timed: Timed, kinds: Iterable[str]) -> None:
        """Have an engine compute all prompts of some kinds."""
        for kind in kinds:
            for text in self.texts[kind]:
                params = SamplingParams(max_tokens=1, temperature=0.0)
                timed.engine.add(text, params, tenant=self.tenant(kind))
            while timed.engine.has_work:
                timed.engine.step()

    def tenant(self, kind: str) -> str:
        return "" if self.mixed else kind

    def round(self, number: int) -> None:
        """All kinds and batch sizes once; number 0 is not counted."""
        if not number:
            for name, timed in self.engines.items():
                self.fill(timed, self.texts if name in ("off", "auto") else ["random"])
            gc.collect()
            gc.freeze()
        measured = [("auto", kind) for kind in self.texts]
        if number % 2:
            measured += [("zero", "random"), ("again", "random")]
        for name, kind in measured:
            for batch in self.batches:
                groups = max(1, LEAST // batch)
                for group in range(groups if number else 1):
                    at = (number * groups + group) * batch % TEXTS
                    pairs = self.pairs.setdefault((name, kind, batch), Pairs())
                    texts = self.texts[kind][at : at + batch]
                    engines = self.engines["off"], self.engines[name]
                    pairs.run(*engines, texts, kind, self.tokens, self.tenant(kind))
        if not number:
            self.pairs.clear()

    def look_up(self) -> None:
        """The machinery of a drafter that costs next to nothing itself."""
        texts = self.texts["random"]
        controls = {"auto": "auto", "zero": "fixed(k=0)"}
        for name, control in controls.items():
            timed = self.under(control, Stack.parse(LOOKUP), self.kv_bytes // 4)
            self.fill(timed, ["random"])
            for batch in self.batches:
                pairs = self.lookup[name, batch] = Pairs()
                engines, tenant = (self.engines["off"], timed), self.tenant("random")
                pairs.run(*engines, texts[:batch], "random", self.tokens, tenant)

    def report(self) -> str:
        """Both tables."""
        batches = " | ".join(f"batch {batch}" for batch in self.batches)
        counts = {batch: len(self.pairs["auto", "random", batch].off) for batch in self.batches}
        lines = [
            "Speed against the plain engine, mean and 95 % interval of the ratios of pairs ("
            + ", ".join(f"{count} at batch {batch}" for batch, count in counts.items())
            + f"), a step of one engine beside a step of the other; {self.tokens} tokens behind "
            f"prompts of about {self.length}, greedy (random: drawn at temperature 1), end of "
            "sequence ignored; "
            + ("all texts are one tenant's. " if self.mixed else "each kind is a tenant's. ")
            + "*zero*: the same drafter with a budget of 0, on random text; *again*: a second "
            "engine without drafts beside the first; both with half as many pairs.",
            "",
            f"| kind | {batches} |",
            "|" + "---|" * (len(self.batches) + 1),
        ]
        rows = [(kind, "auto", kind) for kind in self.texts] + [("*zero*", "zero", "random")]
        rows.append(("*again*", "again", "random"))
        for title, name, kind in rows:
            cells = []
            for batch in self.batches:
                middle, low, high = interval(self.pairs[name, kind, batch].ratios)
                cells.append(f"{middle:.3f} ({low:.3f}-{high:.3f})")
            lines.append(f"| {title} | {' | '.join(cells)} |")
        lines += [
            "",
            "What the machinery takes of a step, % of its time, where drafts bring little (random "
            "text) or nothing is asked (k = 0). *Step*: what the step itself does for candidates, "
            "the verification of those that there are included; *drafted*: candidates a token.",
            "",
            f"| stack | batch | {' | '.join(PARTS)} | all | drafted | accepted |",
            "|" + "---|" * (len(PARTS) + 5),
        ]
        drafts = {"--stack": self.stack["draft"].card.name, LOOKUP: "prompt-lookup"}
        for which, draft in drafts.items():
            for name in ("zero", "auto"):
                for batch in self.batches:
                    pairs = (
                        self.lookup[name, batch]
                        if which == LOOKUP
                        else self.pairs[name, "random", batch]
                    )
                    shares = [100 * mean(pairs.parts[part]) for part in PARTS]
                    figures = " | ".join(f"{share:.2f}" for share in [*shares, sum(shares)])
                    lines.append(
                        f"| `{draft}`, {'`auto`' if name == 'auto' else 'k = 0'} | {batch} "
                        f"| {figures} | {mean(pairs.drafted):.3f} | {mean(pairs.accepted):.3f} |"
                    )
        return "\n".join(lines) + "\n"

    def data(self) -> dict[str, Any]:
        """Every pair."""
        found = {
            f"{name} {kind} {batch}": asdict(p) for (name, kind, batch), p in self.pairs.items()
        }
        for (name, batch), pairs in self.lookup.items():
            found[f"{LOOKUP} {name} {batch}"] = asdict(pairs)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--stack", required=True, help="the drafter that is held against none")
    parser.add_argument("--rounds", type=int, default=4, help="at least 3")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--length", type=int, default=96, help="tokens of a prompt, about")
    parser.add_argument("--mixed", action="store_true", help="one tenant for all kinds of text")
    parser.add_argument("-o", "--out", type=Path, default=Path("no-regret.md"))
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error("--rounds: an interval needs two pairs, and every other round has all")
    if any(batch < 1 or TEXTS % batch for batch in args.batches):
        parser.error(f"--batches: divisors of {TEXTS}")
    folder = locate(args.model)
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    stack = Stack.parse(args.stack)
    found = Comparison(
        model, tokenizer, stack, args.batches, args.tokens, args.length, mixed=args.mixed
    )
    began = time.perf_counter()
    for number in range(args.rounds + 1):
        found.round(number)
        print(f"round {number} of {args.rounds}, {time.perf_counter() - began:.0f} s", flush=True)
    found.look_up()
    facts = conditions()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    title = f"# {args.model}: drafts under `control=auto` against none"
    args.out.write_text(f"{title}\n\n{found.report()}\n{facts.markdown()}")
    args.out.with_suffix(".json").write_text(
        json.dumps({"conditions": asdict(facts), "pairs": found.data()}, indent=1)
    )


if __name__ == "__main__":
    main()
