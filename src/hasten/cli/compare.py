"""``hasten compare``: stacks side by side on the same prompts."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options as o
from hasten.stack import with_weights


def compare(
    stacks: Annotated[
        list[str], typer.Argument(help="Stacks; the first is the baseline. 'plain' is no choices.")
    ],
    workload: Annotated[
        str, typer.Option("--workload", "-w", help="code, spec-bench, or a JSONL file.")
    ] = "code",
    limit: Annotated[int, typer.Option(min=1, help="Prompts of the workload to use.")] = 16,
    model: o.Model = "reference",
    weights: o.WeightsText = None,
    max_tokens: o.MaxTokens = 64,
    batch: o.Batch = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds; one more warms up.")] = 5,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Also measure other engines on the same weights: transformers, and those below "
            "$HASTEN_PEERS. Every output then has --max-tokens tokens.",
        ),
    ] = False,
    convert: o.Convert = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for Markdown, JSON and PNG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    max_length: o.MaxLength = None,
    kv_bytes: o.KvBytes = None,
    threads: o.Threads = None,
) -> None:
    """Measure stacks in interleaved rounds: speed, and whether the output stays the same.

    Every stack runs once per round in rotating order, so that a machine whose speed drifts
    treats them alike. Decoding is greedy.

    Example: hasten compare plain draft=prompt-lookup select=sink-window -w code
    """
    with o.one_line_errors():
        stacks = [text for given in stacks if (text := with_weights(given, weights)) is not None]
        from hasten.bench import workloads

        if workload in workloads.WORKLOADS:
            items = workloads.workload(workload, limit)
        elif Path(workload).suffix == ".jsonl":
            items = list(islice(workloads.read_items(Path(workload)), limit))
        else:
            names = ", ".join(workloads.WORKLOADS)
            o.fail(f"no workload '{workload}'; give one of {names}, or a file ending in .jsonl")
        if not items:
            o.fail(f"{workload} holds no prompts")
        o.folder_to_write(output)
        o.set_threads(threads)
        from hasten.api.frontend import Frontend
        from hasten.bench import comparison, report
        from hasten.bench.contestants import Contestant, HastenContestant, peer_contestants
        from hasten.bench.peers.engines import Setup
        from hasten.stack import Stack

        chosen = [str(Stack.parse(text)) for text in stacks]
        for name in chosen:
            if chosen.count(name) > 1:
                o.fail(f"the stack '{name}' is given twice; each is measured once per round")
        setup = Setup.find() if peers else None
        # other engines run a batch to its full length, so then everybody does
        params = o.sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=peers)
        contestants: list[Contestant] = []
        fronts: list[Frontend] = []
        for text in stacks:
            front = Frontend(
                model,
                stack=text,
                max_sequences=batch,
                max_length=max_length,
                kv_bytes=kv_bytes,
                share=fronts,
            )
            fronts.append(front)
            contestants.append(HastenContestant(str(front.stack), front))
        absent: list[str] = []
        with ExitStack() as open_peers:
            if setup is not None:
                running, absent = open_peers.enter_context(
                    peer_contestants(fronts[0], items, max_tokens, batch, setup, convert)
                )
                contestants += running
            with o.line_of_rounds(rounds) as show:
                rows = comparison.compare(contestants, items, params, rounds, show)
        shape = f"{len(items)} prompts of {workload}, batch {batch}, {max_tokens} tokens, greedy"
        if setup is not None:
            shape += report.beside_peers(absent)
        if as_json:
            print(json.dumps({"shape": shape} | report.as_json(rows, report.conditions())))
        else:
            print(comparison.table(rows))
            print(f"\n{shape}; {rounds} rounds.\n{report.conditions().markdown()}")
        if output is not None:
            for path in report.write(output, f"{model}: {workload}", rows, f"{shape}."):
                print(f"wrote {path}", file=sys.stderr)
