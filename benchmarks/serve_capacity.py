"""Requests per second at equal objectives: hasten and other servers on the same weights.

    python benchmarks/serve_capacity.py --trace azure_2023_conv.csv --out benchmarks/serve-capacity

Each round starts every contestant in turn (the order rotates), warms it up, and searches for the
largest request rate at which 90 % of the requests meet the objectives. Arrivals have the pattern of
a production trace, stretched to the rate; lengths are the trace's, divided by --length-scale and
forced; prompts are pieces of source code, the same tokens for everybody: as ids for hasten and
llama.cpp, as text for transformers, which takes no ids. All servers run on the same cores with as
many threads as there are cores; the client shares them.

Contestants (what is not there is left out, and the report says so):

- hasten: ``hasten serve`` on the bundled reference model;
- llama.cpp: ``llama-server`` (--llama-server PATH), the same weights as GGUF in float32 and, with
  --llama-types, in other types;
- transformers: ``transformers serve --continuous-batching``, float32, of the interpreter
  --transformers-python (needs accelerate).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the GGUF writer is part of the tests

from hasten.bench.comparison import Spread  # noqa: E402
from hasten.bench.conditions import conditions  # noqa: E402
from hasten.bench.serving import metrics, session, trace  # noqa: E402
from hasten.bench.serving.goodput import Goodput, Probe  # noqa: E402
from hasten.bench.serving.http import HttpClient  # noqa: E402
from hasten.bench.serving.load import Target, run_load  # noqa: E402
from hasten.bench.serving.metrics import Slo  # noqa: E402
from hasten.bench.serving.plan import PromptsOf, Shape, plan  # noqa: E402
from hasten.bench.serving.processes import (  # noqa: E402
    ServerFailed,
    free_port,
    running,
    serve_command,
)
from hasten.bench.serving.prompts import TextPieces, code_text  # noqa: E402
from hasten.bench.serving.trace import Row  # noqa: E402
from hasten.models.tokenizer import Tokenizer  # noqa: E402

MODEL = ROOT / "src" / "hasten" / "reference" / "target"
PLACES = 64  # sequences that every server may run at the same time
CONTEXT = 4096  # positions of the model
TARGET = 0.9


class Ids:
    """The ids of text prompts: the same tokens without the server's tokenizer."""

    def __init__(self, texts: TextPieces, tokenizer: Tokenizer) -> None:
        self._texts, self._tokenizer = texts, tokenizer

    def make(self, number: int, row: Row) -> list[int]:
        return self._tokenizer.encode(self._texts.make(number, row))


@dataclass
class Contestant:
    """A server: how it starts (with ``{port}``), where it tells that it is ready, what it takes."""

    name: str
    command: list[str]
    ready: str
    model: str
    prompts: PromptsOf
    extra: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    found: list[Goodput] = field(default_factory=list)
    beside: list[dict[str, Any]] = field(default_factory=list)
    throughput: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def contestants(args: argparse.Namespace, folder: Path) -> tuple[list[Contestant], list[str]]:
    """Those that can run here, and why others cannot."""
    threads = len(args.cpus)
    tokenizer = Tokenizer.load(MODEL)
    source = tokenizer.encode(code_text(), add_special_tokens=False)

    def texts(seed: int) -> TextPieces:
        return TextPieces(tokenizer, source, seed)

    def ids(seed: int) -> Ids:
        return Ids(texts(seed), tokenizer)

    serve = ["--max-sequences", str(PLACES), "--threads", str(threads)]
    command = serve_command("reference", 0, serve)
    command[command.index("--port") + 1] = "{port}"
    chosen = [Contestant("hasten", command, "/ready", "reference", ids)]
    absent = []
    if args.llama_server and Path(args.llama_server).is_file():
        for kind in args.llama_types:
            command = [args.llama_server, "-m", str(gguf_file(folder, kind)), "--port", "{port}"]
            command += ["--host", "127.0.0.1", "-np", str(PLACES), "--threads", str(threads)]
            command += ["--threads-batch", str(threads), "--threads-http", "4", "--no-webui"]
            command += ["-c", str(8 * CONTEXT), "--kv-unified", "-b", "2048", "-ub", "512"]
            gone = dict.fromkeys(("return_token_ids", "min_tokens"))
            name = f"llama.cpp {kind}"
            chosen.append(Contestant(name, command, "/health", "reference", ids, gone))
    else:
        absent.append(f"llama.cpp: no llama-server at {args.llama_server}")
    if args.transformers_python and Path(args.transformers_python).is_file():
        command = [args.transformers_python, "-m", "transformers.cli.transformers", "serve"]
        command += [str(MODEL), "--continuous-batching", "--device", "cpu", "--dtype", "float32"]
        command += ["--host", "127.0.0.1", "--port", "{port}", "--log-level", "error"]
        # as many cached tokens and a step as long as hasten's; its defaults are made for a GPU
        command += ["--cb-block-size", "32", "--cb-num-blocks", "1024"]
        command += ["--cb-max-batch-tokens", "512"]
        fields = ("return_token_ids", "min_tokens", "ignore_eos", "stream_options")
        endless = json.dumps({"eos_token_id": -1, "do_sample": False})
        extra: dict[str, Any] = dict.fromkeys(fields) | {"generation_config": endless}
        environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        chosen.append(
            Contestant("transformers", command, "/health", str(MODEL), texts, extra, environment)
        )
    else:
        absent.append(f"transformers: no interpreter at {args.transformers_python}")
    return [c for c in chosen if not args.only or any(o in c.name for o in args.only)], absent


def gguf_file(folder: Path, kind: str) -> Path:
    """The reference model as GGUF: f32, or bf16 matrices."""
    from tests.models import gguf_files

    store = {"f32": gguf_files.plain, "bf16": gguf_files.bfloat, "f16": gguf_files.halved}[kind]
    return gguf_files.convert(
        MODEL,
        folder / f"reference-{kind}.gguf",
        store,
        # digits one by one, then GPT-2's pattern: what this tokenizer does
        edit=lambda writer: gguf_files.add_tokenizer(writer, MODEL, "gpt2", "starcoder"),
    )


async def turn(
    contestant: Contestant, rows: Sequence[Row], slo: Slo, args: argparse.Namespace, round_: int
) -> None:
    """Start a contestant, find its goodput, stop it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    cpus = ",".join(map(str, args.cpus))
    command = [part.replace("{port}", str(port)) for part in contestant.command]
    log = args.out / f"{contestant.name.replace(' ', '-')}.log"
    async with running(
        ["taskset", "-c", cpus, *command],
        url,
        log,
        ready=contestant.ready,
        environment=contestant.environment,
    ) as server:
        client = HttpClient(url)
        target = Target(client, "completions", contestant.model, contestant.extra, timeout=120)
        shape = Shape(list(rows), None, None, seed=args.seed + 1000 * round_)
        await session.warm_up(target, shape.rows, 16, contestant.prompts, shape.seed)
        # as fast as it goes with all places taken: where the search begins
        some = plan(rows[:64], contestant.prompts(shape.seed), 1 << 30)
        full = await run_load(target, some, max_concurrency=32, closed_loop=True)
        speed = metrics.summarize(full, slo)["request_throughput"]
        contestant.throughput.append(speed)
        earlier = [f.rate for f in contestant.found if f.rate]

        def show(probe: Probe) -> None:
            bound = "≤ " if probe.decided else ""
            say(
                f"    {probe.rate:7.3g}/s {bound}{100 * probe.attainment:.0f} % of {probe.requests}"
            )

        found = await session.search_goodput(
            target,
            shape,
            contestant.prompts,
            slo,
            start=median(earlier) if earlier else max(0.6 * speed, 0.02),
            needed=TARGET,
            grain=args.grain,
            step=1.2 if earlier else 1.6,
            max_probes=args.max_probes,
            probe_seconds=args.probe_seconds,
            least_requests=args.least_requests,
            on_probe=show,
        )
        contestant.found.append(found)
        if found.rate:
            # the figures at that rate, for the table
            count = max(args.least_requests, round(found.rate * args.probe_seconds))
            at = Shape(list(rows[:count]), None, found.rate, shape.seed + 500)
            outcomes = await session.measure(target, at, contestant.prompts)
            contestant.beside.append(metrics.summarize(outcomes, slo, detailed=False))
        contestant.rss_mib.append(server.rss_bytes() / 2**20)
        client.close()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(chosen: Sequence[Contestant]) -> str:
    head = (
        "server",
        "requests/s at the objectives",
        "against the first",
        "attainment there %",
        "TTFT p50 / p99 ms",
        "TPOT p50 / p99 ms",
        "requests/s with 32 in flight",
        "memory MiB",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    base = chosen[0]
    for c in chosen:
        if not c.found:
            lines.append(f"| {c.name} | did not run: {'; '.join(c.failures)} |" + " |" * 6)
            continue
        pairs = zip(c.found, base.found, strict=False)  # round by round
        ratios = [f.rate / b.rate for f, b in pairs if b.rate]

        def pair(name: str, among: list[dict[str, Any]] = c.beside) -> str:
            values = [
                median([v for b in among if (v := b[f"p{p}_{name}_ms"]) is not None] or [0.0])
                for p in (50, 99)
            ]
            return " / ".join(f"{v:.0f}" for v in values) if among else ""

        share = [100 * b["slo_attainment"] for b in c.beside]
        cells = [
            c.name,
            str(Spread([f.rate for f in c.found])),
            f"{Spread(ratios)}x" if ratios else "",
            str(Spread(share)) if share else "",
            pair("ttft"),
            pair("tpot"),
            str(Spread(c.throughput)),
            f"{median(c.rss_mib):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: Path, chosen: Sequence[Contestant], slo: Slo) -> None:
    """Attainment over rate: every probe of every round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for c in chosen:
        probes = sorted((p for f in c.found for p in f.probes), key=lambda p: p.rate)
        if probes:
            share = [100 * p.attainment for p in probes]
            axes.plot([p.rate for p in probes], share, "o-", ms=4, label=c.name, alpha=0.8)
    axes.axhline(100 * TARGET, color="#888888", lw=1, ls="--")
    axes.set_xlim(left=0)
    axes.set_xlabel("requests per second (a probe is stopped once it cannot reach the line)")
    axes.set_ylabel(f"% within {slo} ms")
    axes.set_ylim(0, 102)
    axes.legend()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write(
    args: argparse.Namespace, chosen: Sequence[Contestant], absent: Sequence[str], rows: list[Row]
) -> None:
    slo = Slo.parse([args.goodput])
    under = conditions()
    prompt = metrics.lengths([r.prompt for r in rows])
    output = metrics.lengths([r.output for r in rows])

    def shown(values: dict[str, float | None]) -> str:
        return f"mean {values['mean']:.0f}, p50 {values['p50']:.0f}, p99 {values['p99']:.0f}"

    notes = [
        f"Objectives `{args.goodput}` (ms) for {100 * TARGET:.0f} % of the requests; arrivals and "
        f"lengths of {Path(args.trace).name} (lengths divided by {args.length_scale:g}): prompt "
        f"tokens {shown(prompt)}; output tokens {shown(output)}. Probes of {args.probe_seconds:g} "
        f"s, at least {args.least_requests} requests; a rate is known to {100 * args.grain:.0f} %.",
        f"Servers on CPUs {','.join(map(str, args.cpus))}, {PLACES} places each; median (min-max) "
        f"over {args.rounds} interleaved rounds.",
        *(f"Left out: {reason}." for reason in absent),
        *(f"{c.name} failed once: {text}." for c in chosen for text in c.failures),
        *(
            f"{c.name}: {wrong} of {sum(b['completed'] for b in c.beside)} outputs at the goodput "
            "do not have the length asked for."
            for c in chosen
            if (wrong := sum(b["wrong_output_lengths"] for b in c.beside))
        ),
    ]
    plot(args.out / "report.png", chosen, slo)
    commands = "\n".join(f"    {' '.join(c.command)}" for c in chosen)
    commands = commands.replace(str(ROOT) + "/", "").replace(str(Path.home()), "~")
    (args.out / "report.md").write_text(
        f"# Serving capacity at equal objectives\n\n{table(chosen)}\n\n![rates](report.png)\n\n"
        + "\n\n".join(notes)
        + f"\n\nCommands:\n\n{commands}\n\n{under.markdown()}"
    )
    data = {
        "conditions": vars(under),
        "notes": notes,
        "contestants": [
            {
                "name": c.name,
                "goodput": [asdict(f) for f in c.found],
                "at_goodput": c.beside,
                "throughput": c.throughput,
                "rss_mib": c.rss_mib,
                "failures": c.failures,
            }
            for c in chosen
        ],
    }
    (args.out / "report.json").write_text(json.dumps(data, indent=1) + "\n")


async def main(args: argparse.Namespace) -> None:
    slo = Slo.parse([args.goodput])
    rows = trace.scaled(trace.read(args.trace, args.trace_start), 1.0, args.length_scale)
    rows, _ = trace.clipped(rows[: args.most_requests + 100], CONTEXT)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        chosen, absent = contestants(args, Path(folder))
        for round_ in range(args.rounds):
            first = round_ % len(chosen)
            for contestant in [*chosen[first:], *chosen[:first]]:
                say(f"round {round_ + 1} of {args.rounds}: {contestant.name}")
                try:
                    await turn(contestant, rows[: args.most_requests], slo, args, round_)
                except (ServerFailed, session.TargetRefuses) as error:
                    say(f"    {error}")
                    contestant.failures.append(str(error).splitlines()[0])
                else:
                    say(f"    {contestant.found[-1]}")
            write(args, chosen, absent, rows)
    for log in args.out.glob("*.log"):
        log.unlink()
    print(table(chosen))


def arguments() -> argparse.Namespace:
    data = Path(os.environ.get("HASTEN_DATA", ".")) / "traces" / "azure_2023_conv.csv"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", type=Path, default=data)
    parser.add_argument("--trace-start", type=float, default=0.0)
    parser.add_argument("--length-scale", type=float, default=8.0)
    parser.add_argument("--goodput", default="ttft:500 tpot:50")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--grain", type=float, default=0.08)
    parser.add_argument("--max-probes", type=int, default=7)
    parser.add_argument("--probe-seconds", type=float, default=8.0)
    parser.add_argument("--least-requests", type=int, default=80)
    parser.add_argument("--most-requests", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="contestants whose name holds one of these")
    parser.add_argument("--llama-server", default=shutil.which("llama-server"))
    parser.add_argument("--llama-types", nargs="*", default=["f32"], help="f32 f16 bf16")
    parser.add_argument("--transformers-python", default=sys.executable)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/serve-capacity"))
    args = parser.parse_args()
    args.cpus = sorted(os.sched_getaffinity(0))
    return args


if __name__ == "__main__":
    asyncio.run(main(arguments()))
