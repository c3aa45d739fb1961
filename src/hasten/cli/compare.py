"""``hasten compare``: stacks side by side on the same prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options as o


def compare(
    stacks: Annotated[
        list[str], typer.Argument(help="Stacks; the first is the baseline. 'plain' is no choices.")
    ],
    workload: Annotated[
        str, typer.Option("--workload", "-w", help="code, spec-bench, or a JSONL file.")
    ] = "code",
    limit: Annotated[int, typer.Option(help="Prompts of the workload to use.")] = 16,
    model: o.Model = "reference",
    max_tokens: o.MaxTokens = 64,
    batch: Annotated[int, typer.Option(help="Sequences that run at the same time.")] = 8,
    rounds: Annotated[int, typer.Option(help="Counted rounds; one more warms up.")] = 5,
    peers: Annotated[
        bool, typer.Option("--peers", help="Measure transformers (eager) in the same rounds.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for Markdown, JSON and PNG.")
    ] = None,
    threads: o.Threads = None,
) -> None:
    """Measure stacks in interleaved rounds: speed, and whether the output stays the same.

    Every stack runs once per round in rotating order, so that a machine whose speed drifts
    treats them alike. Decoding is greedy.

    Example: hasten compare plain draft=prompt-lookup select=sink-window -w code
    """
    with o.one_line_errors():
        o.set_threads(threads)
        from hasten.api.frontend import Frontend
        from hasten.bench import comparison, report, workloads
        from hasten.bench.contestants import (
            Contestant,
            HastenContestant,
            TransformersContestant,
        )

        if Path(workload).suffix == ".jsonl":
            items = list(workloads.read_items(Path(workload)))[:limit]
        else:
            items = workloads.workload(workload, limit)
        params = o.sampling(max_tokens=max_tokens, temperature=0.0)
        contestants: list[Contestant] = []
        decoder = None
        for text in stacks:
            front = Frontend(model, stack=text, max_sequences=batch, share=decoder)
            decoder = decoder or front.engine.model
            contestants.append(HastenContestant(str(front.stack), front))
        if peers:
            first = contestants[0]
            assert isinstance(first, HastenContestant)
            dtype = first.front.engine.model.config.dtype
            contestants.append(
                TransformersContestant(str(first.front.folder), dtype, first.front.tokenizer)
            )
        total = rounds * len(contestants)

        def progress(name: str, round_: int) -> None:
            if sys.stderr.isatty():
                print(f"\r\033[Kround {round_} of {rounds}: {name}", end="", file=sys.stderr)

        rows = comparison.compare(contestants, items, params, rounds, progress)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        print(comparison.table(rows))
        print(
            f"\n{len(items)} prompts of {workload}, batch {batch}, {max_tokens} tokens at most; "
            f"{total} runs.\n{report.conditions().markdown()}"
        )
        if output is not None:
            note = (
                f"{len(items)} prompts of `{workload}`, batch {batch}, at most {max_tokens} "
                "tokens, greedy."
            )
            for path in report.write(output, f"{model}: {workload}", rows, note):
                print(f"wrote {path}", file=sys.stderr)
