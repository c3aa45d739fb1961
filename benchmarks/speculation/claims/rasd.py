"""Claim of RASD: joined with what is retrieved, a draft tree is worth more than either alone.

Replayed streams of code, documents that are quoted, and questions; the datastore holds other code.
All arms verify the same number of candidates.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speculation.claims.replay import replay
from hasten import LLM
from hasten.models.loading import locate
from hasten.models.tokenizer import Tokenizer
from hasten.speculation.datastore import build
from hasten.speculation.statistics import DraftStatistics
from hasten.training.corpus import standard_library

STREAMS = ("code", "quotations", "prose")
Stream = list[tuple[list[int], list[int]]]
"""Prompts and the outputs that are replayed after them."""


def streams(tokenizer: Tokenizer, count: int, tokens: int, folder: Path) -> dict[str, Stream]:
    """The streams by name; the datastore's texts, which are none of theirs, go to ``folder``."""
    rng = random.Random(0)
    files = standard_library()
    rng.shuffle(files)
    texts = [tokenizer.encode(file.text) for file in files[:count]]
    for number, file in enumerate(files[count : 20 * count]):
        (folder / f"{number}.txt").write_text(file.text)
    code = [(ids[:50], ids[50 : 50 + tokens]) for ids in texts if len(ids) > 50]
    quoted = []
    for ids in texts:
        parts = [ids[i : i + 40] for i in range(0, min(len(ids), 600), 40)]
        answer = [t for part in rng.sample(parts, len(parts)) for t in part]
        quoted.append((ids[:600], answer[:tokens]))
    asked = Path(os.environ["HASTEN_DATA"]) / "prompts" / "spec_bench_even.jsonl"
    questions = [json.loads(line)["turns"][0] for line in asked.read_text().splitlines()]
    long = [ids for ids in map(tokenizer.encode, questions) if len(ids) > 60][:count]
    prose = [(ids[:30], ids[30 : 30 + tokens]) for ids in long]
    return {"code": code, "quotations": quoted, "prose": prose}


def because(rows: list[dict[str, Any]], shape: dict[str, bool]) -> str:
    """What the figures say of the parts that did not come out."""
    by = {(row["candidates"], row["arm"]): row for row in rows}
    small, large = min(by)[0], max(by)[0]
    said = []
    for stream in STREAMS[:2]:
        if not shape[f"{stream}: joined and pruned beats both parts"]:
            arms = ("pruned", "joined", "retrieved", "draft model")
            taus = ", ".join(f"{arm} {by[large, arm][stream]:.2f}" for arm in arms)
            said.append(f"{stream} with {large} candidates: {taus} tokens a pass")
    if not shape["few candidates: pruned beats unpruned"]:
        both = {s: [by[small, arm][s] for arm in ("pruned", "joined")] for s in STREAMS}
        pairs = (f"{cut:.2f} against {whole:.2f} ({s})" for s, (cut, whole) in both.items())
        said.append(f"with {small} candidates pruning costs as well: {', '.join(pairs)}")
    if not shape["prose: no loss against the draft model"]:
        share = by[large, "pruned"]["prose"] / by[large, "draft model"]["prose"]
        said.append(f"on prose it has {share:.1%} of the draft model's tokens a pass")
    return "; ".join(said)


def measure(
    model: str = "reference",
    draft: str = "reference-draft",
    requests: int = 20,
    tokens: int = 150,
    sizes: tuple[int, ...] = (8, 24),
) -> dict[str, Any]:
    """Tokens a pass of each arm on each stream, for each number of candidates."""
    tokenizer = Tokenizer.load(locate(model))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        all_streams = streams(tokenizer, requests, tokens, folder)
        build(sorted(folder.glob("*.txt")), folder / "x.store", tokenizer)
        rows = []
        for n in sizes:
            base, store = f"dyspec(path={draft},n={n // 2})", f"retrieval(file={folder}/x.store)"
            arms = {
                "draft model": f"dyspec(path={draft},n={n})",
                "retrieved": f"fuse(of=copyspec|{store})",
                "joined": f"fuse(of={base}|copyspec|{store})",
                "pruned": f"rasd(base={base},of=copyspec|{store})",
            }
            for arm, text in arms.items():
                llm = LLM(model, stack=f"draft={text}", max_sequences=1)
                row: dict[str, Any] = {"candidates": n, "arm": arm}
                for stream, requested in all_streams.items():
                    counts = DraftStatistics()
                    for prompt, output in requested:
                        counts.add(replay(llm.engine.drafting, prompt, output, n).counts)
                    row[stream] = counts.tau
                rows.append(row)
    by = {(row["candidates"], row["arm"]): row for row in rows}

    def best(n: int, stream: str) -> bool:
        parts = max(by[n, "draft model"][stream], by[n, "retrieved"][stream])
        return bool(by[n, "pruned"][stream] > parts)

    small, large = min(sizes), max(sizes)
    shape = {
        "code: joined and pruned beats both parts": best(large, "code"),
        "quotations: joined and pruned beats both parts": best(large, "quotations"),
        "few candidates: pruned beats unpruned": all(
            by[small, "pruned"][stream] >= by[small, "joined"][stream] for stream in all_streams
        ),
        "prose: no loss against the draft model": bool(
            by[large, "pruned"]["prose"] >= 0.99 * by[large, "draft model"]["prose"]
        ),
    }
    return {
        "claim": "on documents, copies and code the joined tree beats both parts at equal size; "
        "unpruned is worse when candidates are few; prose loses nothing",
        "experiment": f"{requests} replayed outputs a stream of up to {tokens} tokens, {model} "
        f"with {draft}, datastore of {19 * requests} files of Python",
        "arms": rows,
        "shape": shape,
        "because": because(rows, shape),
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--draft", default="reference-draft")
    parser.add_argument("--requests", type=int, default=20, help="of each stream")
    parser.add_argument("--tokens", type=int, default=150)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
