"""``hasten bench serve``: load on any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from hasten.cli import options as o
from hasten.cli.bench_startup import ServeArgs

if TYPE_CHECKING:
    from hasten.bench.serving.goodput import Probe
    from hasten.bench.serving.load import Outcome, Target
    from hasten.bench.serving.plan import PromptsOf, Shape
    from hasten.bench.serving.server_facts import ServerFacts

T = TypeVar("T")

SERVER, LOAD, LENGTHS, OBJECTIVES, OUTPUT = (
    "Server",
    "Arrivals",
    "Lengths and prompts",
    "Objectives",
    "Output",
)

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_COUNT = 200


def serve(
    base_url: Annotated[
        str | None,
        typer.Option(help=f"Server's address. Default: {DEFAULT_URL}.", rich_help_panel=SERVER),
    ] = None,
    launch: Annotated[
        bool,
        typer.Option(
            "--launch",
            help="Start 'hasten serve MODEL' on a free port, and stop it at the end.",
            rich_help_panel=SERVER,
        ),
    ] = False,
    serve_arg: ServeArgs = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Name of the model at the server (default: its first), or with --launch the "
            "folder or hub id to serve (default: reference).",
            rich_help_panel=SERVER,
        ),
    ] = None,
    endpoint: Annotated[
        str, typer.Option(help="completions or chat.", rich_help_panel=SERVER)
    ] = "completions",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="HASTEN_API_KEY", help="Bearer key.", rich_help_panel=SERVER),
    ] = None,
    extra_body: Annotated[
        str | None,
        typer.Option(
            help="JSON object merged into every request; a null removes a field, for servers that "
            'refuse unknown ones: \'{"ignore_eos": null, "min_tokens": null}\'.',
            rich_help_panel=SERVER,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds for one request.", rich_help_panel=SERVER)
    ] = 600.0,
    request_rate: Annotated[
        str | None,
        typer.Option(
            help="Requests per second. 'inf' (the default without a trace): each as soon as "
            "--max-concurrency allows. With a trace: stretch its times to this mean rate.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    arrivals: Annotated[
        str | None,
        typer.Option(
            help="poisson, gamma, constant, or trace (the times of --trace). Default: trace if "
            "there is one, else poisson.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    cv: Annotated[
        float,
        typer.Option(
            help="Coefficient of variation of gamma gaps: 1 is Poisson, more is burstier (vLLM's "
            "burstiness is 1/cv²).",
            rich_help_panel=LOAD,
        ),
    ] = 1.0,
    spike: Annotated[
        str | None,
        typer.Option(
            help="K:SECONDS@START: K times the rate for some seconds, such as 5:10@30.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Requests at most. Default: {DEFAULT_COUNT}, or all that --duration holds.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Seconds in which requests arrive; all of them are then waited for.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests in flight at most. Waiting for a place counts as latency, except with "
            "--request-rate inf.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    num_warmups: Annotated[
        int,
        typer.Option(min=0, help="Requests before the run, not counted.", rich_help_panel=LOAD),
    ] = 8,
    warmup_seconds: Annotated[
        float,
        typer.Option(
            min=0, help="Requests arriving in this time are not counted.", rich_help_panel=LOAD
        ),
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Same seed: same arrivals, lengths and prompts.", rich_help_panel=LOAD
        ),
    ] = 0,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Replay an Azure CSV (TIMESTAMP, ContextTokens, GeneratedTokens) or a "
            "Mooncake-style JSONL.",
            rich_help_panel=LENGTHS,
        ),
    ] = None,
    trace_start: Annotated[
        float,
        typer.Option(min=0, help="Begin so many seconds into the trace.", rich_help_panel=LENGTHS),
    ] = 0.0,
    time_scale: Annotated[
        float,
        typer.Option(
            help="Multiply the trace's times: 0.5 replays twice as fast.", rich_help_panel=LENGTHS
        ),
    ] = 1.0,
    length_scale: Annotated[
        float,
        typer.Option(
            help="Divide all lengths of the trace, for small models.", rich_help_panel=LENGTHS
        ),
    ] = 1.0,
    input_len: Annotated[
        int, typer.Option(min=1, help="Prompt tokens, without a trace.", rich_help_panel=LENGTHS)
    ] = 128,
    output_len: Annotated[
        int, typer.Option(min=1, help="Output tokens, without a trace.", rich_help_panel=LENGTHS)
    ] = 64,
    range_ratio: Annotated[
        float,
        typer.Option(
            help="Lengths uniform within this share around --input-len and --output-len.",
            rich_help_panel=LENGTHS,
        ),
    ] = 0.0,
    max_context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Cut prompt and output in proportion to fit. Default: the server's "
            "max_model_len, if it tells one.",
            rich_help_panel=LENGTHS,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="ids: random token ids; text: pieces of source code of the right number of "
            "tokens. Default: ids, and text for the chat endpoint.",
            rich_help_panel=LENGTHS,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the model's tokenizer.json; needed for text, and for ids if nothing "
            "else tells the size of the vocabulary.",
            rich_help_panel=LENGTHS,
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(min=1, help="Random ids lie below this.", rich_help_panel=LENGTHS),
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            help="Objectives in ms, as vLLM writes them: 'ttft:500 tpot:50'; also e2el.",
            rich_help_panel=OBJECTIVES,
        ),
    ] = None,
    search_goodput: Annotated[
        bool,
        typer.Option(
            "--search-goodput",
            help="Find the largest rate at which --target of the requests meet the objectives, by "
            "bisection from --request-rate.",
            rich_help_panel=OBJECTIVES,
        ),
    ] = False,
    target: Annotated[
        float, typer.Option(help="Share that must meet them.", rich_help_panel=OBJECTIVES)
    ] = 0.9,
    grain: Annotated[
        float,
        typer.Option(help="Stop when the rate is known to this share.", rich_help_panel=OBJECTIVES),
    ] = 0.05,
    max_probes: Annotated[
        int, typer.Option(min=1, help="Rates to try at most.", rich_help_panel=OBJECTIVES)
    ] = 16,
    result_file: Annotated[
        Path | None,
        typer.Option(
            help="JSON with all figures and lists per request (vLLM's key names).",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    request_log: Annotated[
        Path | None,
        typer.Option(help="JSONL, one line per request.", rich_help_panel=OUTPUT),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for report.md and report.json.", rich_help_panel=OUTPUT
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print JSON (without lists) instead of a table.", rich_help_panel=OUTPUT
        ),
    ] = False,
) -> None:
    """Open-loop load: requests arrive at their times, whatever the server does.

    Latency counts from the intended arrival. Outputs have forced lengths (ignore_eos, min_tokens).

    Examples:

    hasten bench serve --launch --request-rate 5 --num-prompts 100 --goodput 'ttft:500 tpot:50'

    hasten bench serve --base-url http://host:8000 --trace azure_2023_conv.csv --length-scale 8
    --duration 120 --search-goodput --goodput 'ttft:500 tpot:50' -o report
    """
    with o.one_line_errors():
        from hasten.bench.conditions import conditions
        from hasten.bench.serving import metrics, report, session
        from hasten.bench.serving.http import HttpClient
        from hasten.bench.serving.load import Target
        from hasten.bench.serving.processes import ServerFailed, free_port, running, serve_command

        if launch and base_url is not None:
            o.fail("--launch starts a server of its own; leave --base-url out")
        if serve_arg and not launch:
            o.fail("--serve-arg is for the server that --launch starts")
        slo = metrics.Slo.parse(goodput or [])
        if search_goodput and not slo:
            o.fail("--search-goodput needs objectives, such as --goodput 'ttft:500 tpot:50'")
        shape = _shape(
            request_rate,
            arrivals,
            cv,
            spike,
            num_prompts,
            duration,
            seed,
            trace,
            trace_start,
            time_scale,
            length_scale,
            (input_len, output_len, range_ratio),
        )
        start_rate = _start_rate(shape) if search_goodput else None
        extra = _extra_body(extra_body)
        for path in (result_file, request_log):
            if path is not None:
                path.touch()  # a bad path costs no measurement
        o.folder_to_write(output)
        chosen_prompts = prompts or ("text" if endpoint == "chat" else "ids")
        stopped = _Interrupt()

        async def against(url: str) -> tuple[dict[str, Any], list[Outcome]]:
            client = HttpClient(url, api_key)
            try:
                facts = await _facts(client, None if launch else model)
                goal = Target(client, endpoint, facts.model, extra, timeout)
                longest = max_context or facts.max_length
                fitting, cut = _fit(shape, longest)
                local = (model or "reference") if launch else model
                make = _prompts_of(chosen_prompts, tokenizer, vocab_size, facts, local)
                await session.warm_up(goal, fitting.rows, num_warmups, make, seed)
                asked = _asked(facts.model, endpoint, fitting, cv, max_concurrency, len(shape.rows))
                asked |= {"max_context": longest, "clipped": cut}
                with stopped.listening():
                    if start_rate is not None:
                        found, outcomes = await _search(
                            goal, fitting, make, slo, start_rate, target, grain, max_probes, stopped
                        )
                    else:
                        with _progress() as watch:
                            found, outcomes = (
                                {},
                                await session.measure(
                                    goal,
                                    fitting,
                                    make,
                                    max_concurrency=max_concurrency,
                                    interrupted=stopped,
                                    watch=watch,
                                ),
                            )
                return asked | found | {"interrupted": stopped()}, outcomes
            finally:
                client.close()

        async def all_of_it() -> tuple[dict[str, Any], list[Outcome]]:
            if not launch:
                return await against(base_url or DEFAULT_URL)
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            command = serve_command(model or "reference", port, serve_arg or [])
            with tempfile.TemporaryDirectory() as folder:
                # a key in our environment would be the server's too, and is ours as well
                async with running(command, url, Path(folder) / "server.log"):
                    return await against(url)

        try:
            asked, outcomes = _run(all_of_it())
        except (ServerFailed, session.TargetRefuses) as error:
            o.fail(str(error))
        except asyncio.CancelledError:  # SIGTERM; the server that --launch started is stopped
            raise typer.Exit(143) from None
        figures = metrics.summarize(outcomes, slo, warmup=warmup_seconds) if outcomes else {}
        result = asked | figures
        short = {k: v for k, v in result.items() if k not in report.DETAILED}
        if as_json:
            print(json.dumps(short | {"conditions": vars(conditions())}))
        else:
            print(report.table(result) if figures else "")
            if "goodput_text" in result:
                print(f"Goodput: {result['goodput_text']}")
        if result_file is not None:
            result_file.write_text(json.dumps(result | {"conditions": vars(conditions())}))
        if request_log is not None:
            report.write_requests(request_log, outcomes)
        if output is not None and figures:
            title = f"Load on {asked['model_id']}"
            for path in report.write(output, title, result, conditions()):
                print(f"wrote {path}", file=sys.stderr)
        if stopped():
            raise typer.Exit(130)


def _shape(
    request_rate: str | None,
    arrivals: str | None,
    cv: float,
    spike: str | None,
    num_prompts: int | None,
    duration: float | None,
    seed: int,
    trace: Path | None,
    trace_start: float,
    time_scale: float,
    length_scale: float,
    synthetic: tuple[int, int, float],
) -> Shape:
    from hasten.bench.serving import trace as traces
    from hasten.bench.serving.arrivals import PROCESSES, Arrivals, Spike
    from hasten.bench.serving.plan import Shape, synthetic_rows

    rate: float | None = None
    if request_rate is not None:
        try:
            rate = float(request_rate)
        except ValueError:
            rate = math.nan
        if not rate > 0:
            raise ValueError(f"--request-rate must be a positive number or inf, not {request_rate}")
    chosen = arrivals or ("trace" if trace is not None else "poisson")
    if chosen not in (*PROCESSES, "trace"):
        raise ValueError(f"--arrivals is one of {', '.join(PROCESSES)} and trace, not '{chosen}'")
    if chosen == "trace" and (trace is None or spike is not None or cv != 1):
        raise ValueError(
            "arrivals of a trace need --trace FILE and take neither --cv nor --spike; choose "
            "--arrivals poisson or gamma to keep only the trace's lengths"
        )
    if chosen != "trace" and rate is None:
        if trace is not None:
            raise ValueError(f"--arrivals {chosen} needs a --request-rate")
        rate = math.inf
    process = None
    if chosen != "trace":
        process = Arrivals(chosen, cv, Spike.parse(spike) if spike else None)  # type: ignore[arg-type]
    if rate == math.inf and duration is not None:
        raise ValueError("--duration needs arrivals with times; give a --request-rate")
    if trace is not None:
        rows = traces.scaled(traces.read(trace, trace_start), time_scale, length_scale)
        count = num_prompts or (len(rows) if duration is not None else DEFAULT_COUNT)
        if process is None and rate is None and duration is not None:
            rows = [row for row in rows if row.at < duration]
        rows = rows[:count]
    else:
        count = num_prompts or DEFAULT_COUNT
        if num_prompts is None and duration is not None and rate is not None:
            top = Spike.parse(spike).factor if spike else 1.0
            # more than can arrive in that time, whatever the draw
            count = math.ceil(rate * duration * max(1.0, top) * 1.5 + 100 * (1 + cv * cv))
        rows = synthetic_rows(count, *synthetic, seed)
    return Shape(rows, process, rate, seed, duration)


def _start_rate(shape: Shape) -> float:
    """Where the search begins: the rate asked for, or a trace's own."""
    if shape.rate is not None:
        if shape.rate == math.inf:
            raise ValueError("--search-goodput begins at --request-rate; give a finite one")
        return shape.rate
    if len(shape.rows) < 2 or not shape.rows[-1].at:
        raise ValueError("the trace has no rate of its own there; give --request-rate")
    return (len(shape.rows) - 1) / shape.rows[-1].at


def _extra_body(text: str | None) -> dict[str, Any]:
    try:
        extra = json.loads(text or "{}")
    except (ValueError, RecursionError):
        extra = None
    if not isinstance(extra, dict):
        raise ValueError(f"--extra-body must be a JSON object, not {text!r:.80}")
    return extra


async def _facts(client: Any, model: str | None) -> ServerFacts:
    """A server that lists no models can be measured if the model is named."""
    from hasten.bench.serving.server_facts import ServerFacts, server_facts

    try:
        facts = await server_facts(client)
    except ValueError:
        if model is None:
            raise
        return ServerFacts(model)
    return facts if model is None else ServerFacts(model, facts.max_length, facts.vocab_size)


def _fit(shape: Shape, longest: int | None) -> tuple[Shape, int]:
    from dataclasses import replace

    from hasten.bench.serving.trace import clipped

    if longest is None:
        return shape, 0
    rows, cut = clipped(shape.rows, longest)
    return replace(shape, rows=rows), cut


def _prompts_of(
    kind: str, tokenizer: Path | None, vocab_size: int | None, facts: ServerFacts, model: str | None
) -> PromptsOf:
    """Prompts by seed. The tokenizer is that of --tokenizer, or of a model in a local folder."""
    import hasten
    from hasten.bench.serving.prompts import RandomIds, TextPieces, code_text
    from hasten.models.tokenizer import Tokenizer

    if kind not in ("ids", "text"):
        raise ValueError(f"--prompts is ids or text, not '{kind}'")
    bundled = Path(hasten.__file__).parent / "reference" / "target"
    for name in () if tokenizer is not None else (model, facts.model):
        folder = bundled if name == "reference" else Path(name or "/nonexistent")
        if (folder / "tokenizer.json").is_file():
            tokenizer = folder
            break
    if kind == "text":
        if tokenizer is None:
            raise ValueError("prompts of text need --tokenizer FOLDER (the model's own)")
        reader = Tokenizer.load(tokenizer)
        source = reader.encode(code_text(), add_special_tokens=False)
        return lambda seed: TextPieces(reader, source, seed)
    without: Sequence[int] = ()
    if vocab_size is None and tokenizer is not None:
        reader = Tokenizer.load(tokenizer)
        vocab_size = reader.vocab_size
        without = sorted(reader.core.get_added_tokens_decoder())
    vocab_size = vocab_size or facts.vocab_size
    if vocab_size is None:
        raise ValueError(
            "random ids need the size of the vocabulary: give --tokenizer FOLDER or --vocab-size N"
        )
    size = vocab_size
    return lambda seed: RandomIds(size, seed, without)


def _asked(
    model: str, endpoint: str, shape: Shape, cv: float, max_concurrency: int | None, count: int
) -> dict[str, Any]:
    """What the run was, under vLLM's names."""
    rate = shape.rate
    return {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai" if endpoint == "completions" else "openai-chat",
        "model_id": model,
        "num_prompts": count,
        "request_rate": "inf" if rate == math.inf else rate,
        "burstiness": 1 / cv**2,
        "max_concurrency": max_concurrency,
        "arrivals": "trace" if shape.arrivals is None else shape.arrivals.process,
        "seed": shape.seed,
    }


async def _search(
    goal: Target,
    shape: Shape,
    make: PromptsOf,
    slo: Any,
    start: float,
    target: float,
    grain: float,
    max_probes: int,
    stopped: _Interrupt,
) -> tuple[dict[str, Any], list[Outcome]]:
    """The goodput, and the outcomes of a run at that rate for the figures beside it."""
    from dataclasses import replace

    from hasten.bench.serving import session

    def show(probe: Probe) -> None:
        bound = "≤ " if probe.decided else ""
        print(
            f"{probe.rate:9.4g}/s: {bound}{100 * probe.attainment:.1f} "
            f"± {100 * probe.half_width:.1f} % of {probe.requests}",
            file=sys.stderr,
        )

    found = await session.search_goodput(
        goal,
        shape,
        make,
        slo,
        start=start,
        needed=target,
        grain=grain,
        max_probes=max_probes,
        interrupted=stopped,
        on_probe=show,
    )
    outcomes: list[Outcome] = []
    if found.rate and not stopped():
        again = replace(shape, rate=found.rate)
        with _progress() as watch:
            outcomes = await session.measure(goal, again, make, interrupted=stopped, watch=watch)
    said = {
        "goodput": found.rate,
        "goodput_missed": found.missed,
        "goodput_target": target,
        "goodput_converged": found.converged,
        "goodput_text": str(found),
        "goodput_probes": [vars(p) for p in found.probes],
        "request_rate": found.rate,
    }
    return said, outcomes


class _Interrupt:
    """Ctrl-C once: finish with what there is. Twice: as ever."""

    def __init__(self) -> None:
        self._seen = False

    def __call__(self) -> bool:
        return self._seen

    @contextmanager
    def listening(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def seen() -> None:
            self._seen = True
            loop.remove_signal_handler(signal.SIGINT)

        loop.add_signal_handler(signal.SIGINT, seen)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)


@contextmanager
def _progress() -> Iterator[Any]:
    """A line on a terminal, twice a second."""
    terminal = sys.stderr.isatty()
    began = last = time.monotonic()

    def watch(outcomes: Sequence[Outcome]) -> None:
        nonlocal last
        now = time.monotonic()
        if not terminal or now - last < 0.5:
            return
        last = now
        done = sum(x.ok for x in outcomes)
        failed = sum(x.ended is not None and not x.ok for x in outcomes)
        line = f"{now - began:6.1f} s: {len(outcomes)} arrived, {done} done, {failed} failed"
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    try:
        yield watch
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """On uvloop where it is installed: it takes less of the machine from the server."""
    factory = None
    with contextlib.suppress(ModuleNotFoundError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)
