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
        list[str] | None,
        typer.Argument(
            help="Stacks; the first is the baseline. 'plain' is no choices. And other engines on "
            "its weights: llama.cpp, openvino, ctranslate2, onnxruntime-genai, transformers, "
            "transformers:prompt-lookup, transformers:assisted=MODEL."
        ),
    ] = None,
    workload: Annotated[
        str, typer.Option("--workload", "-w", help="code, tasks, spec-bench, or a JSONL file.")
    ] = "code",
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            help="Drafters to add to the first stack, such as 'aded+copyspec': each is a row. "
            "'all' is every drafter of hasten methods but none and the instruments of measurement "
            "(scripted). Those that need a file which is not there are named below the table.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of the workload to use.")] = 16,
    model: o.Model = "reference",
    weights: o.WeightsText = None,
    max_tokens: o.MaxTokens = 64,
    batch: o.Batch = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds; one more warms up.")] = 5,
    warm_up: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts of the round that warms up. Default: all."),
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Also measure all other engines that are there: transformers, and those below "
            "$HASTEN_PEERS. Beside other engines every output has --max-tokens tokens.",
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

    Examples:

      hasten compare plain draft=prompt-lookup select=sink-window -w code

      hasten compare --draft all --workload spec-bench --batch 1

      hasten compare plain draft=prompt-lookup transformers:prompt-lookup -w tasks --batch 1

    With --batch 1 and prompts of several kinds there are tables by kind, too. Engines with a
    speculation of their own draft for one sequence at a time: --batch 1.
    """
    with o.one_line_errors():
        if not stacks and draft is None:
            raise typer.BadParameter("name stacks to compare, or drafters with --draft")
        from hasten.bench import workloads
        from hasten.bench.peers.engines import Setup, named_peer

        named = [(text, peer) for text in stacks or () if (peer := named_peer(text)) is not None]
        given = [text for text in stacks or () if text not in dict(named)] or ["plain"]
        if draft is not None:
            given += [f"{given[0]},draft={name}" for name in _drafters(draft)]
        stacks = [text for one in given if (text := with_weights(one, weights)) is not None]
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
        from hasten.methods import MethodError
        from hasten.stack import Stack

        chosen = [str(Stack.parse(text)) for text in stacks]
        chosen += [text for text, _ in named]
        for name in chosen:
            if chosen.count(name) > 1:
                o.fail(f"'{name}' is given twice; each is measured once per round")
        setup = Setup.find() if peers or named else None
        # other engines run a batch to its full length, so then everybody does
        forced = setup is not None
        params = o.sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=forced)
        contestants: list[Contestant] = []
        fronts: list[Frontend] = []
        absent: list[str] = []
        asked = len(stacks) if draft is None else len(stacks) - len(_drafters(draft))
        for place, text in enumerate(stacks):
            try:
                front = Frontend(
                    model,
                    stack=text,
                    max_sequences=batch,
                    max_length=max_length,
                    kv_bytes=kv_bytes,
                    progress=True,
                    share=fronts,
                )
            except MethodError as error:
                if place < asked:
                    raise
                name, said = str(Stack.parse(text)), str(error)
                absent.append(said if said.startswith(name) else f"{name}: {said}")
                continue
            fronts.append(front)
            contestants.append(HastenContestant(str(front.stack), front))
        with ExitStack() as open_peers:
            if setup is not None:
                running, missing = open_peers.enter_context(
                    peer_contestants(
                        fronts[0],
                        items,
                        max_tokens,
                        batch,
                        setup,
                        convert,
                        named=[peer for _, peer in named],
                        others=peers,
                    )
                )
                contestants += running
                absent += missing
            with o.line_of_rounds(rounds, len(contestants)) as show:
                rows = comparison.compare(contestants, items, params, rounds, show, warm_up)
        shape = f"{len(items)} prompts of {workload}, batch {batch}, {max_tokens} tokens, greedy"
        if setup is not None:
            shape += report.beside_peers()
        shape += f"; {rounds} {'round' if rounds == 1 else 'rounds'}"
        shape += "".join(f"\n- without {line}" for line in absent)
        # with more at a time, an item's seconds are not its own
        kinds = comparison.by_category(rows, items) if batch == 1 else []
        if as_json:
            found = report.as_json(rows, report.conditions(), kinds)
            print(json.dumps({"shape": shape} | found))
        else:
            print(comparison.table(rows))
            if kinds:
                print(f"\n{comparison.category_table(kinds)}")
            print(f"\n{shape}\n\n{report.conditions().markdown()}")
        if output is not None:
            for path in report.write(output, f"{model}: {workload}", rows, shape, kinds):
                print(f"wrote {path}", file=sys.stderr)


def _drafters(text: str) -> list[str]:
    """Names of drafters: ``all`` (that draft for somebody), or some joined by ``+``."""
    if text != "all":
        return [name.strip() for name in text.split("+")]
    from hasten.methods import cards

    return [
        card.name
        for card in cards("draft")
        if "proposes-tokens" in card.does and "only-measures" not in card.does
    ]
