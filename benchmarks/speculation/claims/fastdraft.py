"""FastDraft's claim: alignment raises acceptance, pre-training pays less and less, size has a best.

Drafts of the bundled model from several budgets and of several sizes, each pre-trained and then
aligned with the same answers of the target. Acceptance on held-out code, greedy.

    python -m benchmarks.speculation.claims.fastdraft --tokens 1000000
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.training import corpus
from hasten.training.draft import (
    DraftRecipe,
    Target,
    acceptance,
    align,
    ask,
    claim,
    cost,
    export_draft,
    pretrain,
    speed_up,
)
from hasten.training.draft_data import Division, Prompts

SIZES = (32, 64, 128)
"""Hidden sizes, of 3 to 16 % of the bundled target's parameters. The one in the middle also trains
on less."""


def drafts(
    model: str,
    tokens: int,
    align_tokens: int,
    hidden: Sequence[int],
    prompts: int,
    compile: bool,
    folder: Path,
) -> list[dict[str, Any]]:
    """One row a draft: every size with the whole budget, and the middle one with 1/4 and 1/2."""
    base = DraftRecipe(
        tokens=tokens,
        align_tokens=align_tokens,
        prompts=prompts,
        compile=compile,
        batch_tokens=2048,  # budgets are short: 4,096 would leave too few steps
    )
    target = Target(model)
    division = Division.of(corpus.standard_library())
    source = Prompts(target.speech, division.held_out, base.shortest, base.longest, "claim")
    held_out = [source[number] for number in range(prompts)]
    middle = hidden[len(hidden) // 2]
    plans = [(middle, tokens // 4), (middle, tokens // 2), *((size, tokens) for size in hidden)]
    rows = []
    claim(folder, target, base)
    answers = ask(target, division.asking, base, folder / "answers.jsonl")
    for size, budget in plans:
        recipe, work = replace(base, hidden=size, tokens=budget), folder / f"{size}-{budget}"
        draft, finished = pretrain(target, division.pretraining, recipe, work)
        export_draft(draft, target, (), work / "before")
        if not finished or not align(draft, answers, target, recipe, work):
            raise KeyboardInterrupt
        export_draft(draft, target, (), work / "after")
        prices = cost(target, work / "after", held_out[0], recipe)
        row: dict[str, Any] = {"hidden": size, "tokens": budget, "cost": prices}
        for stage in ("before", "after"):
            found = row[stage] = acceptance(target, work / stage, held_out, recipe)
            tau = found["greedy"]["tau"]
            row[stage]["mbsu"] = speed_up(tau, prices["parameter_ratio"], recipe.k)
            row[stage]["by_latency"] = speed_up(tau, prices["latency_ratio"], recipe.k)
        rows.append(row)
    return rows


def judge(rows: list[dict[str, Any]], hidden: Sequence[int]) -> dict[str, bool]:
    """Which parts of the claim the rows show. Parts, since each may fail for its own reason."""

    def alpha(row: dict[str, Any], stage: str) -> float:
        return float(row[stage]["greedy"]["alpha"])

    middle = hidden[len(hidden) // 2]
    quarter, half, whole = (
        alpha(row, "before")
        for row in sorted((r for r in rows if r["hidden"] == middle), key=lambda r: r["tokens"])
    )
    longest = max(row["tokens"] for row in rows)
    sizes = {row["hidden"]: row for row in rows if row["tokens"] == longest}
    best = max(sizes, key=lambda size: float(sizes[size]["after"]["mbsu"]))
    raised = [alpha(row, "after") - alpha(row, "before") for row in rows]
    return {
        "alignment_raises_alpha": min(raised) > 0,
        "by_5_points_or_more": sum(raised) / len(raised) >= 0.05,
        "more_tokens_help": quarter < half < whole,
        "with_diminishing_returns": whole - half < half - quarter,
        "best_size_is_inside": best not in (min(sizes), max(sizes)),
    }


def because(rows: list[dict[str, Any]], shape: dict[str, bool], hidden: Sequence[int]) -> str:
    """What the figures say of the parts that did not come out."""
    longest = max(row["tokens"] for row in rows)
    middle = hidden[len(hidden) // 2]
    said = []

    def alpha(row: dict[str, Any], stage: str) -> str:
        return f"{row[stage]['greedy']['alpha']:.3f}"

    if not (shape["alignment_raises_alpha"] and shape["by_5_points_or_more"]):
        pairs = (
            f"{alpha(row, 'before')} to {alpha(row, 'after')} ({row['hidden']}, {row['tokens']:,})"
            for row in rows
        )
        said.append(f"alignment takes alpha from {', '.join(pairs)}")
    if not (shape["more_tokens_help"] and shape["with_diminishing_returns"]):
        steps = (
            f"{row['tokens']:,} tokens {alpha(row, 'before')}"
            for row in sorted(rows, key=lambda row: row["tokens"])
            if row["hidden"] == middle
        )
        said.append(f"alpha before alignment by length of pre-training: {', '.join(steps)}")
        if shape["more_tokens_help"]:
            said[-1] += ", so each doubling still gives more than the one before"
    if not shape["best_size_is_inside"]:
        sizes = (
            f"{row['hidden']} {row['after']['mbsu']:.2f} at a cost of "
            f"{row['cost']['parameter_ratio']:.2f}"
            for row in rows
            if row["tokens"] == longest
        )
        said.append(f"MBSU by hidden size: {', '.join(sizes)}")
    return "; ".join(said)


def measure(
    model: str = "reference",
    tokens: int = 1_000_000,
    align_tokens: int = 100_000,
    hidden: Sequence[int] = SIZES,
    prompts: int = 48,
    compile: bool = True,
    work: Path | None = None,
) -> dict[str, Any]:
    """The rows, and which parts of the claim they show. ``work`` goes on from where it stopped."""
    with tempfile.TemporaryDirectory() as folder:
        rows = drafts(model, tokens, align_tokens, hidden, prompts, compile, work or Path(folder))
    shape = judge(rows, hidden)
    return {
        "claim": "alignment raises alpha by 5 to 15 points over pre-training alone; more "
        "pre-training tokens help with diminishing returns; with the draft's cost charged the best "
        "size is neither the smallest nor the largest",
        "experiment": f"{model}, drafts of hidden size {', '.join(map(str, hidden))} pre-trained "
        f"on up to {tokens:,} tokens and aligned with {align_tokens:,} of the target, {prompts} "
        "held-out prompts of code",
        "rows": rows,
        "shape": shape,
        "because": because(rows, shape, hidden),
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="to pre-train on at most")
    parser.add_argument("--align-tokens", type=int, default=100_000, help="of the target")
    parser.add_argument("--hidden", type=int, nargs="+", default=SIZES, help="three or more")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--work", type=Path, help="keeps answers and drafts; the same one goes on")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
