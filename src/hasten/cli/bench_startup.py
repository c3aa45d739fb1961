"""``hasten bench startup``: how long a server takes to its first answers."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated

import typer

from hasten.cli import options as o

ServeArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--serve-arg",
        help="Argument for 'hasten serve', such as --serve-arg=--max-num-seqs=64; repeatable.",
    ),
]


def startup(
    model: o.Model = "reference",
    repeats: Annotated[int, typer.Option(min=1, help="Starts to measure.")] = 5,
    serve_arg: ServeArgs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Start 'hasten serve' again and again: time to /ready and first token, memory.

    Example: hasten bench startup --repeats 3
    """
    with o.one_line_errors():
        from hasten.bench.conditions import conditions
        from hasten.bench.serving import startup as starting
        from hasten.bench.serving.processes import ServerFailed

        def show(number: int, start: starting.Start) -> None:
            if sys.stderr.isatty():
                print(
                    f"start {number + 1} of {repeats}: ready after {start.ready_seconds:.2f} s",
                    file=sys.stderr,
                )

        try:
            starts = asyncio.run(starting.measure(model, serve_arg or [], repeats, show))
        except ServerFailed as error:
            o.fail(str(error))
        except asyncio.CancelledError:  # SIGTERM; the server is stopped
            raise typer.Exit(143) from None
        if as_json:
            under = {"model": model, "conditions": vars(conditions())}
            print(json.dumps(under | starting.as_json(starts)))
        else:
            print(starting.table(starts))
            print(f"\n{model}, {repeats} starts, median (min-max).\n{conditions().markdown()}")
