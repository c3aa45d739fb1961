"""``hasten run``: a file of prompts in, a file of answers out."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from hasten.cli import options as o
from hasten.stack import with_weights

if TYPE_CHECKING:
    from hasten.api.run_items import Event, Progress
    from hasten.bench.workloads import Item
    from hasten.decoding.params import SamplingParams


def run(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="JSONL; each line has 'prompt', 'turns' or 'messages', and may have 'id' and "
            "'params'. Leave it out with --workload."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSONL to append to; finished ids are skipped."),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload", "-w", help="Built-in prompts instead of a file: code, tasks, spec-bench."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts.")] = None,
    model: o.Model = "reference",
    stack: o.StackText = None,
    weights: o.WeightsText = None,
    max_tokens: o.MaxTokens = 256,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    seed: o.Seed = None,
    stop: o.Stop = None,
    batch: o.Batch = 64,
    show: Annotated[
        bool, typer.Option("--show", help="Stream the answers to standard output, in input order.")
    ] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut the left end of prompts that are too long.")
    ] = False,
    max_length: o.MaxLength = None,
    kv_bytes: o.KvBytes = None,
    threads: o.Threads = None,
    device: o.Device = "cpu",
) -> None:
    """Answer many prompts in one continuous batch.

    One line of JSON per prompt is appended to the output as it finishes: id, outputs (one per
    turn), finish_reasons, figures, and error if there was one. Interrupted runs resume: the same
    command goes on where the output file ends. A row's key stands for its prompt and settings; if
    they changed since, the run is refused. The exit status is 1 if a prompt had an error.

    Example: hasten run questions.jsonl -o answers.jsonl --stack draft=prompt-lookup
    """
    with o.one_line_errors(), ExitStack() as cleanup:
        stack = with_weights(stack, weights)
        if (source is None) == (workload is None):
            o.fail("give either a JSONL file or --workload")
        if output is None and not show:
            o.fail("say where the answers go: --output FILE, or --show for the terminal")
        if source is not None and output is not None and source.resolve() == output.resolve():
            o.fail("the answers would go into the file of prompts; choose another --output")
        from hasten.bench import workloads

        params = o.sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
        )
        if workload is not None:
            items = workloads.workload(workload, limit)
        else:
            assert source is not None
            items = list(islice(workloads.read_items(source), limit))
        if not items:
            o.fail(f"{source} holds no prompts")
        done = _finished(output) if output is not None else {}
        keys = _keys(items, params, model, stack)
        for name, row in done.items():
            if row.get("key") not in (None, keys.get(name)) and name in keys:
                o.fail(
                    f"{output} holds id '{name}' for another prompt or other settings; "
                    "choose another --output"
                )
        todo = [item for item in items if item.id not in done]
        if done:
            _say_what_is_done(items, done)
        if not todo:
            return
        sink = None
        if output is not None:
            sink = cleanup.enter_context(output.open("a", encoding="utf-8"))
        o.set_threads(threads)
        from hasten.api.figures import line_of_figures
        from hasten.api.llm import LLM
        from hasten.api.run_items import ItemRunner

        llm = LLM(
            model,
            stack=stack,
            max_sequences=batch,
            max_length=max_length,
            kv_bytes=kv_bytes,
            device=device,
            progress=True,
        )
        runner = ItemRunner(llm.frontend, params, truncate)
        screen = _InOrder(todo, sys.stdout) if show else None
        began, errors, finished = time.perf_counter(), 0, 0
        ttfts: list[float] = []
        events = runner.run(todo)
        cleanup.callback(events.close)
        try:
            for event in _with_bar(events, llm, len(todo), shown=show):
                if screen is not None:
                    screen.take(event)
                if event.done:
                    finished += 1
                    errors += event.progress.error is not None
                    figures = [r.outputs[0].figures for r in event.progress.results]
                    ttfts += [f.ttft for f in figures if f.ttft is not None]
                    if sink is not None:
                        row = _row(event.progress, keys[event.progress.item.id])
                        sink.write(json.dumps(row, ensure_ascii=False) + "\n")
                        sink.flush()
        except KeyboardInterrupt:
            again = "" if output is None else "; the same command goes on from here"
            print(f"\nhasten: interrupted after {finished} of {len(todo)}{again}", file=sys.stderr)
            raise typer.Exit(130) from None
        seconds = time.perf_counter() - began
        print(
            f"{finished} prompts in {seconds:.1f} s, {errors} errors | "
            + line_of_figures(llm, ttfts, seconds),
            file=sys.stderr,
        )
        if errors:
            raise typer.Exit(1)


def _keys(
    items: list[Item], params: SamplingParams, model: str, stack: str | None
) -> dict[str, str]:
    """By id, a short hash of an item's prompt and of the settings that it runs with."""
    from hasten.stack import Stack

    stack = str(Stack.parse(stack))
    settings = {field.name: getattr(params, field.name) for field in fields(params)}
    keys = {}
    for item in items:
        facts = [item.prompt, item.turns, {**settings, **item.params}, model, stack]
        text = json.dumps(facts, sort_keys=True, default=dict)
        keys[item.id] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return keys


def _row(progress: Progress, key: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": progress.item.id,
        "key": key,
        "outputs": [result.text for result in progress.results],
        "finish_reasons": [result.outputs[0].finish_reason for result in progress.results],
        "figures": [
            {
                "ttft": c.figures.ttft,
                "tokens": len(c.token_ids),
                "passes": c.figures.speculation.passes,
                "drafted": c.figures.speculation.drafted,
                "accepted": c.figures.speculation.accepted,
                "cached_tokens": c.figures.cached_tokens,
                "preemptions": c.figures.preemptions,
            }
            for result in progress.results
            for c in result.outputs[:1]
        ],
    }
    if progress.error is not None:
        row["error"] = progress.error
    return row


def _finished(output: Path) -> dict[str, dict[str, Any]]:
    """By id, the rows of an earlier output, of each only ``error`` and ``key`` if it has them.

    A half-written last line is cut off, so that it is redone. A file of another kind is refused
    before anything in it changes.
    """
    if not output.exists():
        return {}
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    half = data[len(whole) :]
    done = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            row["outputs"]
            done[str(row["id"])] = {name: row[name] for name in ("error", "key") if name in row}
        except (ValueError, KeyError, TypeError):
            o.fail(f"{output}:{number} is not a line that 'hasten run' wrote; choose another file")
    if half:
        start = b'{"id": '
        if half[: len(start)] != start[: len(half)]:
            o.fail(f"{output} ends in what 'hasten run' did not write; choose another file")
        with output.open("rb+") as file:
            file.truncate(len(whole))
    return done


def _say_what_is_done(items: list[Item], done: dict[str, dict[str, Any]]) -> None:
    before = [item.id for item in items if item.id in done]
    errors = sum("error" in done[name] for name in before)
    retry = f", {errors} of them errors (delete their lines to try them again)" if errors else ""
    print(f"hasten: resuming, {len(before)} of {len(items)} done before{retry}", file=sys.stderr)


class _InOrder:
    """Streams the item whose turn it is, and holds back the text of those behind it."""

    def __init__(self, items: list[Item], out: TextIO) -> None:
        self._order = [item.id for item in items]
        self._held: dict[str, list[str]] = {}
        self._ended: set[str] = set()
        self._turns: dict[str, int] = {}  # turns whose heading is out
        self._at = 0
        self._out = out

    def take(self, event: Event) -> None:
        progress = event.progress
        name = progress.item.id
        parts = self._held.setdefault(name, [])
        if event.piece is not None:
            turn = len(progress.results)
            if turn == self._turns.get(name, 0):
                self._turns[name] = turn + 1
                mark = f"[{name}]" if turn == 0 else ">"
                parts.append(f"\n{mark} {_heading(progress.item, turn)}\n")
            parts.append(event.piece.text)
        if event.done:
            if progress.error:
                parts.append(f"\n[{name}] error: {progress.error}")
            parts.append("\n")
            self._ended.add(name)
        while self._at < len(self._order):
            current = self._order[self._at]
            for text in self._held.get(current, ()):
                self._out.write(text)
            self._held[current] = []
            if current not in self._ended:
                break
            del self._held[current]
            self._at += 1
        self._out.flush()


def _heading(item: Item, turn: int) -> str:
    """The end of what is asked, in one line."""
    asked = item.prompt if item.prompt is not None else item.turns[turn]
    if isinstance(asked, tuple):
        return f"{len(asked)} token ids"
    text = asked if isinstance(asked, str) else str(asked[-1].get("content", ""))
    return text[-300:].rstrip("\n").rsplit("\n", 1)[-1]


def _with_bar(events: Iterator[Event], llm: Any, total: int, shown: bool) -> Iterator[Event]:
    """The events, with a progress bar on standard error if that is a terminal of its own."""
    if shown or not sys.stderr.isatty():
        yield from events
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        began, finished = time.perf_counter(), 0
        for event in events:
            finished += event.done
            rate = llm.stats.tokens / (time.perf_counter() - began)
            engine = llm.engine
            bar.update(
                task,
                completed=finished,
                description=f"{rate:.0f} tokens/s, {len(engine.running)} running, "
                f"{len(engine.waiting)} waiting, {100 * engine.cache.usage:.0f} % of pages",
            )
            yield event
