"""Kangaroo's claim: the confidence at which drafts stop has a best value strictly inside (0, 1).

Without a stop (eta = 0) a pass yields the most tokens but drafts the most in vain; with a stop at
every doubt (eta = 1) a draft has one token. In between, fewer steps are wasted for little yield.

    python -m benchmarks.speculation.claims.kangaroo --train-tokens 400000

Without ``--head`` an adapter is trained first, as ``hasten train kangaroo`` does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speculation.claims.request_stream import prompts_of
from benchmarks.speculation.claims.weight_reads import engine_for, measure_reads
from hasten import LLM
from hasten.models.loading import load_model, locate
from hasten.training.documents import documents
from hasten.training.kangaroo import AdapterRun, train_adapter

ETAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def sweep(
    head: str, model: str, name: str, prompts: int, tokens: int
) -> dict[float, dict[str, Any]]:
    """Figures for each eta over the prompts of a workload; every output is plain decoding's."""
    llm = LLM(model, max_sequences=1)
    texts = prompts_of(llm, name, prompts)
    plain = measure_reads(engine_for(llm, "plain"), texts, tokens)
    rows = {}
    for eta in ETAS:
        engine = engine_for(llm, f"draft=kangaroo(head={head},eta={eta})")
        found = measure_reads(engine, texts, tokens)
        if found.outputs != plain.outputs:
            raise SystemExit(f"eta={eta} changed the output")
        rows[eta] = found.row(llm.engine.model.weight_bytes)
    return rows


def trained(model: str, tokens: int, work: Path) -> str:
    """A fresh adapter, from so many tokens of text read as often as ``hasten train`` does."""
    llm, run = LLM(model, max_sequences=1), AdapterRun(tokens=tokens)
    texts = documents(llm.tokenizer, 2 * run.length)
    train_adapter(load_model(locate(model)), texts, work / "head", work, run)
    return str(work / "head")


def because(rows: dict[float, dict[str, Any]], shape: dict[str, bool]) -> str:
    """What the figures say of the parts that did not come out."""
    speeds = {eta: float(row["tokens_per_read"]) for eta, row in rows.items()}
    best, inside = max(ETAS, key=speeds.__getitem__), max(ETAS[1:-1], key=speeds.__getitem__)
    first, last = rows[ETAS[0]], rows[ETAS[-1]]
    said = []
    if not shape["best_threshold_is_inside"]:
        said.append(
            f"the best eta is {best:g}, an end of the range: {rows[best]['wasted_per_token']:g} "
            f"drafts a token are wasted there, {first['wasted_per_token']:g} without a stop; the "
            f"best inside, {inside:g}, has {speeds[inside] / speeds[best]:.1%} of its speed"
        )
    if not shape["faster_than_plain"]:
        drafts = last["drafted_per_token"] * last["tau"]  # of a pass
        price = (last["tau"] / last["tokens_per_read"] - 1) / drafts
        said.append(
            f"a draft reads {price:.0%} of the weights that a pass reads, which at most "
            f"{first['tau']:.2f} tokens a pass do not pay for"
        )
    return "; ".join(said)


def measure(
    head: str | None = None,
    model: str = "reference",
    train_tokens: int = 400_000,
    name: str = "code",
    prompts: int = 24,
    tokens: int = 96,
    work: Path | None = None,
) -> dict[str, Any]:
    """The sweep, and which parts of the claim it shows. ``work`` keeps features and adapter."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = head or trained(model, train_tokens, work or Path(folder))
        rows = sweep(adapter, model, name, prompts, tokens)
    best = max(ETAS, key=lambda eta: float(rows[eta]["tokens_per_read"]))
    first, last = ETAS[0], ETAS[-1]
    shape = {
        "best_threshold_is_inside": first < best < last,
        "fewer_tokens_a_pass_than_without_a_stop": rows[best]["tau"] < rows[first]["tau"],
        "fewer_wasted_drafts": rows[best]["wasted_per_token"] < rows[first]["wasted_per_token"],
        "faster_than_plain": rows[best]["tokens_per_read"] > 1,
    }
    source = "a given adapter" if head else f"adapter trained on {train_tokens:,} tokens"
    return {
        "claim": "an interior confidence threshold beats both ends: fewer tokens a pass than "
        "without a stop, fewer wasted drafts, more speed",
        "experiment": f"{model}, {source}, {prompts} prompts of '{name}', {tokens} greedy tokens, "
        "batch 1; speed is tokens by bytes of weights read, plain decoding = 1",
        "etas": {str(eta): row for eta, row in rows.items()},
        "best_eta": best,
        "shape": shape,
        "because": because(rows, shape),
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", help="adapter from hasten train kangaroo; default: train one")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--train-tokens", type=int, default=400_000, help="of text, read 4 times")
    parser.add_argument("--work", type=Path, help="keeps hidden states and adapter for other runs")
    parser.add_argument("--workload", dest="name", default="code", help="code, tasks or spec-bench")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
