"""``hasten bench``: one stack at fixed shapes, or a server under load."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import bench_serve, bench_startup
from hasten.cli import options as o
from hasten.stack import with_weights

app = typer.Typer(
    no_args_is_help=True,
    help="Measure one stack at fixed lengths (latency, throughput), or a server (serve, startup).",
)
app.command("serve")(bench_serve.serve)
app.command("startup")(bench_startup.startup)

InputLen = Annotated[int, typer.Option(min=1, help="Prompt tokens (random ids).")]
OutputLen = Annotated[
    int, typer.Option(min=1, help="Generated tokens; end-of-sequence is ignored.")
]
Rounds = Annotated[int, typer.Option(min=1, help="Counted rounds; one more warms up.")]
Peers = Annotated[
    bool,
    typer.Option("--peers", help="Also other engines: transformers, and those in $HASTEN_PEERS."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the report.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def latency(
    model: o.Model = "reference",
    stack: o.StackText = None,
    weights: o.WeightsText = None,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    batch: o.Batch = 1,
    rounds: Rounds = 5,
    peers: Peers = False,
    convert: o.Convert = False,
    output: Output = None,
    as_json: AsJson = False,
    profile: o.Profile = False,
    max_length: o.MaxLength = None,
    kv_bytes: o.KvBytes = None,
    threads: o.Threads = None,
) -> None:
    """Time to first token and tokens per second of a fixed batch.

    Example: hasten bench latency --batch 4 --stack draft=prompt-lookup
    """
    with o.one_line_errors():
        _measure(
            "latency",
            model,
            with_weights(stack, weights),
            batch,
            input_len,
            output_len,
            batch,
            rounds,
            peers,
            convert,
            output,
            as_json,
            max_length,
            kv_bytes,
            threads,
            profile,
        )


@app.command()
def throughput(
    model: o.Model = "reference",
    stack: o.StackText = None,
    weights: o.WeightsText = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts in all.")] = 128,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    batch: o.Batch = 64,
    rounds: Rounds = 3,
    peers: Peers = False,
    convert: o.Convert = False,
    output: Output = None,
    as_json: AsJson = False,
    max_length: o.MaxLength = None,
    kv_bytes: o.KvBytes = None,
    threads: o.Threads = None,
) -> None:
    """Tokens per second of many prompts in one continuous batch.

    Example: hasten bench throughput --num-prompts 64 --batch 16 -o results
    """
    with o.one_line_errors():
        _measure(
            "throughput",
            model,
            with_weights(stack, weights),
            num_prompts,
            input_len,
            output_len,
            batch,
            rounds,
            peers,
            convert,
            output,
            as_json,
            max_length,
            kv_bytes,
            threads,
        )


def _measure(
    what: str,
    model: str,
    stack: str | None,
    count: int,
    input_len: int,
    output_len: int,
    batch: int,
    rounds: int,
    peers: bool,
    convert: bool,
    output: Path | None,
    as_json: bool,
    max_length: int | None,
    kv_bytes: int | None,
    threads: int | None,
    profile: bool = False,
) -> None:
    o.folder_to_write(output)
    o.set_threads(threads)
    from hasten.api.figures import bandwidth_share
    from hasten.api.frontend import Frontend
    from hasten.bench import comparison, report
    from hasten.bench.contestants import Contestant, HastenContestant, peer_contestants
    from hasten.bench.peers.engines import Setup
    from hasten.bench.workloads import random_tokens

    setup = Setup.find() if peers else None
    front = Frontend(
        model,
        stack=stack,
        max_sequences=batch,
        max_length=max_length,
        kv_bytes=kv_bytes,
        progress=True,
    )
    vocab = front.engine.model.config.vocab_size
    items = random_tokens(count, input_len, output_len, vocab)
    contestants: list[Contestant] = [HastenContestant(f"hasten {front.stack}", front)]
    params = o.sampling(max_tokens=output_len, temperature=0.0)
    absent: list[str] = []
    with ExitStack() as open_peers:
        if setup is not None:
            running, absent = open_peers.enter_context(
                peer_contestants(front, items, output_len, batch, setup, convert)
            )
            contestants += running
        line = o.line_of_rounds(rounds, len(contestants))
        with o.profiled(front.engine, profile), line as show:
            rows = comparison.compare(contestants, items, params, rounds, show)
    achieved, achievable = bandwidth_share(front.engine)
    shape = f"{count} prompts of {input_len} tokens, {output_len} generated, batch {batch}"
    if setup is not None:
        shape += report.beside_peers() + "".join(f"; without {line}" for line in absent)
    share = (
        f"decode steps move {achieved / 1e9:.1f} GB/s, {100 * achieved / achievable:.0f} % of the "
        f"{achievable / 1e9:.1f} GB/s that a plain read of as many bytes reaches"
    )
    if as_json:
        figures = {
            "shape": shape,
            "decode_bytes_per_second": achieved,
            "read_bytes_per_second": achievable,
        }
        print(json.dumps(figures | report.as_json(rows, report.conditions())))
    else:
        print(comparison.table(rows))
        print(f"\n{shape}; {share}.\n{report.conditions().markdown()}")
    if output is not None:
        title = f"{what}: {model}"
        for path in report.write(output, title, rows, f"{shape}; {share}."):
            print(f"wrote {path}", file=sys.stderr)
