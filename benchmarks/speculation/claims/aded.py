"""ADED's claim: a table that adapts beats the same table frozen, and a beam over it, ever more.

A stream of requests of one domain (code), then one of another (questions), one request at a time.
All arms verify at most the same number of candidates, and all give the same text.

    python -m benchmarks.speculation.claims.aded --requests 50
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speculation.claims.request_stream import params_of, run, standard_library_table, tau
from hasten import LLM
from hasten.bench.workloads import code, spec_bench

PAPER = "prompt=false,backoff=0,logits=0,decay=1"


def because(found: dict[str, Any]) -> str:
    """What the figures say of the parts that did not come out."""
    shape, arms, gains = (found[name] for name in ("shape", "arms", "adaptive_over_frozen"))
    said = []
    for part, domain in (
        ("rises_in_the_first_domain", "code"),
        ("rises_after_the_switch", "questions"),
    ):
        if not shape[part]:
            first, last = (gains[domain][f"{end}_quarter"] for end in ("first", "last"))
            said.append(
                f"on {domain} the gain over the frozen table goes from {first:.2f} times in the "
                f"first quarter to {last:.2f} in the last"
            )
    if not shape["beats_beam"]:
        pairs = (
            f"{arms['adaptive beam'][d]['tau']:.2f} against {arms['adaptive'][d]['tau']:.2f}"
            for d in gains
        )
        said.append(
            f"a beam over the same table reaches {' and '.join(pairs)}, so what the table holds "
            "decides and not the visits of the search"
        )
    if not shape["beats_frozen"]:
        both = (f"{each['tau']:.2f} times on {domain}" for domain, each in gains.items())
        said.append(f"it has the frozen table's tau {' and '.join(both)}")
    return "; ".join(said)


def measure(
    model: str = "reference",
    requests: int = 50,
    tokens: int = 96,
    budget: int = 24,
    temperature: float = 0.8,
    files: int = 300,
) -> dict[str, Any]:
    """Tau of each arm over the two streams, in all and by quarter of a stream."""
    plain = LLM(model, max_sequences=1)
    questions = spec_bench()[:requests]
    prompts = [str(item.prompt) for item in code(requests)]
    prompts += [plain.chat_prompt([{"role": "user", "content": q.turns[0]}]) for q in questions]
    params = params_of(2 * requests, tokens, temperature)
    expected, _ = run(plain, prompts, params)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table"
        standard_library_table(plain, table, files)
        arms = {
            "adaptive": f"aded({PAPER},corpus={table})",
            "frozen": f"aded({PAPER},corpus={table},adapt=false)",
            "adaptive beam": f"aded({PAPER},corpus={table},search=beam)",
            "frozen beam": f"aded({PAPER},corpus={table},adapt=false,search=beam)",
            "adaptive, no corpus": f"aded({PAPER})",
            "as shipped": "aded",
            "as shipped, corpus": f"aded(corpus={table})",
            "as shipped, corpus, beam": f"aded(corpus={table},search=beam)",
            "token-recycling": "token-recycling",
        }
        rows = {}
        for name, draft in arms.items():
            llm = LLM(model, stack=f"draft={draft},control=fixed(k={budget})", max_sequences=1)
            outputs, counts = run(llm, prompts, params)
            if outputs != expected:
                raise SystemExit(f"draft={draft} changed the output")
            rows[name] = [counts[:requests], counts[requests:]]
    quarter = max(1, requests // 4)
    found = {
        name: {
            domain: {
                "tau": tau(counts),
                "first_quarter": tau(counts[:quarter]),
                "last_quarter": tau(counts[-quarter:]),
            }
            for domain, counts in zip(("code", "questions"), both, strict=True)
        }
        for name, both in rows.items()
    }

    def gain(domain: str, part: str) -> float:
        """Over the frozen table on the same texts, so that their difficulty cancels."""
        return round(found["adaptive"][domain][part] / found["frozen"][domain][part], 4)

    gains = {
        domain: {part: gain(domain, part) for part in ("tau", "first_quarter", "last_quarter")}
        for domain in ("code", "questions")
    }
    shape = {
        "beats_frozen": all(each["tau"] > 1 for each in gains.values()),
        "rises_in_the_first_domain": gains["code"]["last_quarter"] > gains["code"]["first_quarter"],
        "rises_after_the_switch": gains["questions"]["last_quarter"]
        > gains["questions"]["first_quarter"],
        "beats_beam": all(
            found["adaptive"][d]["tau"] > found["adaptive beam"][d]["tau"] for d in gains
        ),
    }
    result = {
        "claim": "tau rises over a request stream and beats the frozen table and a beam over the "
        "same table at equal N; 10 to 30 % over frozen on repetitive domains",
        "experiment": f"{model}, {requests} requests of code, then {requests} questions, "
        f"{tokens} tokens each at temperature {temperature}, one at a time, N = {budget}",
        "arms": found,
        "adaptive_over_frozen": gains,
        "shape": shape,
        "shape_reproduced": all(shape.values()),
    }
    return result | {"because": because(result)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--requests", type=int, default=50, help="of each domain")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--budget", type=int, default=24, help="candidates a pass")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--files", type=int, default=300, help="texts in the corpus' table")
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
