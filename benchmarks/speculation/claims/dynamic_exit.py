"""DEL's claim: near the best fixed exit and length of a domain, ahead of any one on a mixed stream.

    python -m benchmarks.speculation.claims.dynamic_exit --train-tokens 1000000

Without ``--model`` the bundled model is first trained on as ``hasten train layerskip`` does; others
have no exits to choose from.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.speculation.claims.request_stream import prompts_of
from benchmarks.speculation.claims.weight_reads import Reads, engine_for, measure_reads
from hasten import LLM
from hasten.models.loading import locate
from hasten.training.layerskip import RUN, train_layerskip

DOMAINS = ("code", "spec-bench")
LENGTHS = (1, 2, 4, 6)


def fixed(llm: LLM, number: int, length: int) -> Any:
    """An engine whose drafts leave at one exit and have one length."""
    engine = engine_for(llm, f"draft=del(k={length})")
    decide = engine.drafting

    def pinned(self: Any, state: Any) -> None:
        state.exit, state.length = number, length

    decide._decide = types.MethodType(pinned, decide)
    decide._learn = lambda *_: None  # no counters, so no confidence either
    decide._states = lambda *_: None
    return engine


def trained(tokens: int, folder: Path) -> str:
    """The bundled model after so many tokens with early exits."""
    steps = tokens // RUN.batch_tokens
    config = replace(RUN, tokens=tokens, warmup_steps=min(RUN.warmup_steps, steps // 10))
    if not train_layerskip(locate("reference"), folder / "model", folder / "work", config):
        raise KeyboardInterrupt
    return str(folder / "model")


def runs_of(
    model: str, prompts: int, tokens: int, lengths: tuple[int, ...]
) -> tuple[int, dict[str, dict[str, Reads]]]:
    """Bytes of the model, and by domain what plain decoding, DEL and each fixed setting read."""
    llm = LLM(model, max_sequences=1)
    decoder = llm.engine.model
    size = decoder.weight_bytes
    # what the head costs in layers, as reads count it
    head = decoder.output.weight.nbytes
    cost = round(head * decoder.config.num_layers / (size - head), 2)
    runs: dict[str, dict[str, Reads]] = {}
    for name in DOMAINS:
        texts = prompts_of(llm, name, prompts)
        plain = measure_reads(engine_for(llm, "plain"), texts, tokens)
        runs[name] = {"plain": plain}
        settings = {"del": engine_for(llm, f"draft=del(head={cost})")}
        for number in range(decoder.config.num_layers - 1):
            for length in lengths:
                settings[f"exit {number + 1}, {length} tokens"] = fixed(llm, number, length)
        for label, engine in settings.items():
            found = runs[name][label] = measure_reads(engine, texts, tokens)
            if found.outputs != plain.outputs:
                raise SystemExit(f"{label} changed the output")
    return size, runs


def measure(
    model: str | None = None,
    train_tokens: int = 1_000_000,
    prompts: int = 12,
    tokens: int = 96,
    lengths: tuple[int, ...] = LENGTHS,
) -> dict[str, Any]:
    """Every fixed setting and DEL over each domain, and over both in turns."""
    with tempfile.TemporaryDirectory() as folder:
        source = model or trained(train_tokens, Path(folder))
        size, runs = runs_of(source, prompts, tokens, lengths)

    def speed(found: Reads) -> float:
        return found.tokens * size / found.bytes

    labels = [label for label in runs[DOMAINS[0]] if label != "del"]
    per_domain: dict[str, dict[str, Any]] = {
        name: {"del": speed(found["del"]), "best": max(labels, key=lambda n: speed(found[n]))}
        for name, found in runs.items()
    }
    for name, facts in per_domain.items():
        facts["best_speed"] = speed(runs[name][facts["best"]])

    def together(label: str) -> float:
        parts = [runs[name][label] for name in DOMAINS]
        return sum(p.tokens for p in parts) * size / sum(p.bytes for p in parts)

    stream = {label: round(together(label), 4) for label in [*labels, "del"]}
    single = max(labels, key=stream.__getitem__)
    shape = {
        "exits_pay_at_all": single != "plain",
        "within_3_percent": all(f["del"] >= 0.97 * f["best_speed"] for f in per_domain.values()),
        "above_any_single": stream["del"] > stream[single],
    }
    because = []
    if not shape["exits_pay_at_all"]:
        exit_of = max((label for label in labels if label != "plain"), key=stream.__getitem__)
        because.append(
            f"no exit pays: the best, {exit_of}, has {stream[exit_of]:.1%} of plain decoding's "
            "speed"
        )
    if not shape["within_3_percent"]:
        because.append(
            "it has "
            + ", ".join(
                f"{f['del'] / f['best_speed']:.1%} of {f['best']} ({name})"
                for name, f in per_domain.items()
            )
        )
    if not shape["above_any_single"]:
        same = len({facts["best"] for facts in per_domain.values()}) == 1
        because.append(
            f"over the stream {stream['del']:g} against {stream[single]:g} of {single}"
            + (", which is best in both domains, so that changes give nothing" if same else "")
        )
    return {
        "claim": "within 2-3 % of the best static exit and length of each domain, above any single "
        "static setting over a stream that changes domain",
        "experiment": (
            model or f"reference, trained on with early exits for {train_tokens:,} tokens"
        )
        + f", {prompts} prompts a domain, {tokens} greedy tokens, batch 1; speed is tokens by "
        "bytes of weights read, plain decoding = 1",
        "domains": per_domain,
        "stream": {"del": stream["del"], "best single": single, "its speed": stream[single]},
        "tau": {
            name: {n: round(r.tau, 3) for n, r in found.items()} for name, found in runs.items()
        },
        "shape": shape,
        "because": "; ".join(because),
        "shape_reproduced": all(shape.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder from hasten train layerskip; default: train one")
    parser.add_argument("--train-tokens", type=int, default=1_000_000)
    parser.add_argument("--prompts", type=int, default=12, help="of each domain")
    parser.add_argument("--tokens", type=int, default=96)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
