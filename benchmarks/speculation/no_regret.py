"""`control=auto` against no drafts, by kind of text and batch size, in one interleaved run:

    python benchmarks/speculation/no_regret.py -m wide/t05-int8 \
        --stack 'draft=any(of=prompt-lookup|copyspec|model(path=wide/d25-int8,k=10)),control=auto'

Both engines live in one process with the same weights. Each keeps its prompts in the prefix cache,
so rounds time decoding. A round runs every kind at every batch size with both, in changing order;
a ratio is that of the two times of one round, and the interval is Student's over rounds, of the
logarithm. The first round warms up and is not counted, except that `auto` learns in it, as it does
in a server that runs on. `off` is the same engine with ``draft=none``; ``zero`` is the drafter with
``control=fixed(k=0)``: the machinery without a draft.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from hasten.bench.conditions import conditions  # noqa: E402
from hasten.bench.workloads import code, tasks  # noqa: E402
from hasten.decoding.params import SamplingParams  # noqa: E402
from hasten.engine.engine import Engine, EngineConfig  # noqa: E402
from hasten.models.loading import load_model, locate  # noqa: E402
from hasten.models.tokenizer import Tokenizer  # noqa: E402
from hasten.stack import Stack  # noqa: E402

BATCHES = (1, 4, 16, 64)
LEAST = 4
"""Prompts of a run: as many as the batch, at least these."""
STUDENT = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 12: 2.20}
"""Quantile 0.975 by number of rounds."""


def prompts(tokenizer: Tokenizer, count: int, length: int) -> dict[str, list[list[int]]]:
    """Token ids by kind."""
    rng = random.Random(0)
    made: dict[str, list[list[int]]] = {
        "random": [[rng.randrange(300, 4000) for _ in range(length // 2)] for _ in range(count)],
        "code": [tokenizer.encode(item.prompt)[-length:] for item in code(count)],
    }
    kinds = {"chat": "prose", "passages": "prose", "copy": "copy", "json": "JSON"}
    for item in tasks(6 * count, length=length):
        if item.category in kinds:
            made.setdefault(kinds[item.category], []).append(tokenizer.encode(item.prompt))
    return {kind: found[:count] for kind, found in made.items()}


def run(engine: Engine, texts: list[list[int]], batch: int, kind: str, length: int) -> float:
    """Seconds that all texts take, ``batch`` of them at a time."""
    # a random model's most likely text is soon a loop; what is drawn stays random
    temperature = 1.0 if kind == "random" else 0.0
    params = SamplingParams(max_tokens=length, ignore_eos=True, temperature=temperature, seed=1)
    began = time.perf_counter()
    for at in range(0, max(batch, LEAST), batch):
        for text in texts[at : at + batch]:
            engine.add(text, params)
        while engine.has_work:
            engine.step()
    return time.perf_counter() - began


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of ratios, over their logarithms."""
    logs = [math.log(r) for r in ratios]
    half = STUDENT.get(len(logs), 2.1) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean(logs)), math.exp(mean(logs) - half), math.exp(mean(logs) + half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--stack", required=True, help="what is held against no drafts")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt, about")
    parser.add_argument("-o", "--out", type=Path, default=Path("no-regret.md"))
    args = parser.parse_args()
    folder = locate(args.model)
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    config = EngineConfig(
        max_sequences=max(BATCHES), max_length=args.length * 2 + args.tokens, kv_bytes=5 << 29
    )
    chosen = Stack.parse(args.stack)
    zero = Stack.parse({**chosen.methods, "control": "fixed(k=0)"})
    engines = {
        "off": Engine(model, Stack.parse("plain"), config, tokenizer=tokenizer),
        "zero": Engine(model, zero, config, tokenizer=tokenizer),
        "auto": Engine(model, chosen, config, tokenizer=tokenizer),
    }
    texts = prompts(tokenizer, max(BATCHES), args.length)
    ratios: dict[tuple[str, str, int], list[float]] = {}
    for number in range(args.rounds + 1):
        for kind in texts:
            for batch in BATCHES:
                order = [name for name in engines if name != "zero" or batch == 1]
                if number % 2:
                    order.reverse()
                seconds = {
                    name: run(engines[name], texts[kind], batch, kind, args.tokens)
                    for name in order
                }
                if number:
                    for name in order:
                        ratio = seconds["off"] / seconds[name]
                        ratios.setdefault((name, kind, batch), []).append(ratio)
        print(f"round {number} of {args.rounds}", flush=True)
        if number >= 3:
            write(args, ratios, list(texts))


def write(
    args: argparse.Namespace,
    ratios: dict[tuple[str, str, int], list[float]],
    kinds: list[str],
) -> None:
    rounds = len(ratios["auto", kinds[0], BATCHES[0]])
    lines = [
        f"# {args.model}: drafts under `control=auto` against none",
        "",
        f"Speed against the plain engine, mean over {rounds} rounds and the 95 % interval of the "
        f"paired ratios; {args.tokens} tokens behind prompts of about {args.length}, greedy "
        "(random: drawn at temperature 1), end of sequence ignored.",
        "",
        f"| kind | {' | '.join(f'batch {batch}' for batch in BATCHES)} | zero, batch 1 |",
        "|" + "---|" * (len(BATCHES) + 2),
    ]
    data: dict[str, Any] = {}
    for kind in kinds:
        cells = []
        for name, batch in [*(("auto", batch) for batch in BATCHES), ("zero", 1)]:
            middle, low, high = interval(ratios[name, kind, batch])
            cells.append(f"{middle:.3f} ({low:.3f}-{high:.3f})")
            data[f"{name} {kind} {batch}"] = ratios[name, kind, batch]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    facts = conditions()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n\n" + facts.markdown())
    args.out.with_suffix(".json").write_text(
        json.dumps({"conditions": asdict(facts), "ratios": data}, indent=1)
    )


if __name__ == "__main__":
    main()
