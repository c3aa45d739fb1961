"""``hasten train``: recipes for small models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli import options as o

app = typer.Typer(no_args_is_help=True, help="Train small models for use with hasten.")


Prompts = Annotated[
    Path | None,
    typer.Option(help="Text file with a prompt a line. Default: functions of this Python."),
]
Count = Annotated[int, typer.Option(min=1, help="Prompts to use at most.")]


def _lines(prompts: Path | None) -> list[str] | None:
    if prompts is None:
        return None
    found = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line]
    if not found:
        o.fail(f"--prompts {prompts}: there are no prompts; give one a line")
    return found


@app.command()
def reference(
    out: Annotated[
        Path,
        typer.Option(help="Folder that gets target/ and draft/, to be used as a --model each."),
    ] = Path("trained-reference"),
    work: Annotated[
        Path, typer.Option(help="Checkpoints and logs; the same folder resumes.")
    ] = Path("build/reference"),
    stages: Annotated[
        list[str] | None, typer.Option("--stage", help="target, draft, report; default all three.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for the target.")] = None,
    draft_minutes: Annotated[float | None, typer.Option(help="Time for the draft.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Token budget of the target.")] = None,
    draft_tokens: Annotated[int | None, typer.Option(help="Token budget of the draft.")] = None,
    samples: Annotated[int, typer.Option(help="Samples for each cell of the report.")] = 64,
    threads: o.Threads = None,
) -> None:
    """Train the bundled target and draft again, from this interpreter's standard library.

    Ctrl-C saves a checkpoint; the same command goes on from it. On a CPU the full recipe takes
    two to three hours; --minutes gives a shorter one.
    """
    with o.one_line_errors():
        known = ("target", "draft", "report")
        chosen = tuple(stages or known)
        for stage in chosen:
            if stage not in known:
                o.fail(f"unknown stage '{stage}'; there are: {', '.join(known)}")
        o.set_threads(threads)
        from dataclasses import replace

        from hasten.training.reference import Recipe, budget, train_reference

        recipe = Recipe()
        recipe = replace(
            recipe,
            target=replace(recipe.target, **budget(minutes, tokens)),
            draft=replace(recipe.draft, **budget(draft_minutes, draft_tokens)),
        )
        train_reference(
            work, out, recipe, stages=chosen, samples=samples, picture=work / "loss.png"
        )


@app.command()
def trigrams(
    texts: Annotated[
        list[Path],
        typer.Argument(help="UTF-8 text files, or folders: then all files in them.", exists=True),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Table file to write.")],
    model: o.Model = "reference",
    successors: Annotated[
        int, typer.Option(min=1, max=15, help="Heaviest ones kept of a pair.")
    ] = 12,
    min_count: Annotated[
        int, typer.Option(min=1, help="Leave tri-grams out that occur less often.")
    ] = 1,
) -> None:
    """Count the tri-grams of texts, for --stack 'draft=aded(corpus=FILE)'.

    The table holds ids of the model's tokenizer, and only models with this tokenizer can use it.
    Memory: some 16 bytes for each different tri-gram.
    """
    with o.one_line_errors():
        from rich.console import Console
        from rich.progress import track

        from hasten.models.loading import locate
        from hasten.models.tokenizer import Tokenizer
        from hasten.speculation.trigrams import TrigramCounter, save

        files = [
            f for path in texts for f in (sorted(path.rglob("*")) if path.is_dir() else [path])
        ]
        files = [file for file in files if file.is_file()]
        tokenizer = Tokenizer.load(locate(model))
        counter = TrigramCounter()
        skipped = 0
        terminal = Console(stderr=True)
        for file in track(
            files, "counting", console=terminal, transient=True, disable=not terminal.is_terminal
        ):
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                skipped += 1
                continue
            counter.add(tokenizer.encode(text, add_special_tokens=False))
        if skipped:
            print(f"left out {skipped} files that are not UTF-8 text", file=sys.stderr)
        table = counter.table(successors, min_count)
        if not len(table["pairs"]):
            o.fail("the texts hold no tri-grams: give longer ones, or a lower --min-count")
        out.parent.mkdir(parents=True, exist_ok=True)
        save(table, tokenizer, out)
        print(
            f"wrote {out} ({len(table['pairs'])} pairs with {len(table['tokens'])} successors, "
            f"{out.stat().st_size / 1e6:.1f} MB)"
        )


@app.command()
def acceptance_head(
    out: Annotated[Path, typer.Option("--out", "-o", help="File that gets the head.")],
    model: o.Model = "reference",
    draft: Annotated[
        str, typer.Option(help="The draft model whose states the head reads.")
    ] = "reference-draft",
    prompts: Prompts = None,
    count: Count = 512,
    length: Annotated[int, typer.Option(min=2, help="Tokens the target writes for each.")] = 128,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the texts.")] = 3,
    seed: Annotated[int, typer.Option(help="Same seed, same head.")] = 0,
    threads: o.Threads = None,
) -> None:
    """Train the head with which control=specdec++ ends drafts; minutes for small models."""
    with o.one_line_errors():
        o.set_threads(threads)
        from hasten.training.acceptance_head import HeadRecipe, make_head

        recipe = HeadRecipe(length=length, epochs=epochs, seed=seed)
        make_head(model, draft, out, recipe, _lines(prompts), count, report=typer.echo)


@app.command()
def tree(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: tree=FILE in a stack.")],
    model: o.Model = "reference",
    draft: Annotated[
        str, typer.Option(help="The drafter that will use it; there is token-recycling.")
    ] = "token-recycling",
    nodes: Annotated[int, typer.Option(min=1, max=1024, help="Candidates of the tree.")] = 80,
    depth: Annotated[int, typer.Option(min=1, max=64, help="Levels at most.")] = 8,
    prompts: Prompts = None,
    count: Count = 256,
    length: Annotated[int, typer.Option(min=2, help="Tokens the model writes for each.")] = 128,
    temperature: o.Temperature = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same tree.")] = 0,
    threads: o.Threads = None,
) -> None:
    """Fit the tree of draft=token-recycling to what a model writes; minutes for small models.

    Measures how often the candidate of each rank is right at each depth, and takes the tree that
    gains most by these figures. Smaller budgets use its best part.
    Example: hasten train tree -o tree.json && hasten generate
    --stack 'draft=token-recycling(tree=tree.json),control=fixed(k=80)' 'def f(x):'
    """
    with o.one_line_errors():
        if draft != "token-recycling":
            o.fail(f"--draft {draft}: it has no static tree; there is: token-recycling")
        texts = _lines(prompts)
        o.set_threads(threads)
        from rich.console import Console
        from rich.progress import Progress

        from hasten import LLM
        from hasten.speculation.calibration import best_tree, expected_gain, save_tree
        from hasten.speculation.drafters.token_recycling import TEMPLATE
        from hasten.training.acceptance_head import functions
        from hasten.training.tree import AT_ONCE, measure_ranks

        texts = functions(count) if texts is None else texts[:count]
        out.parent.mkdir(parents=True, exist_ok=True)
        stack = f"draft=token-recycling,control=fixed(k={nodes})"
        rows = max(512, AT_ONCE * (nodes + 1))
        llm = LLM(model, stack=stack, max_sequences=AT_ONCE, max_batch_tokens=rows)
        params = o.sampling(max_tokens=length, temperature=temperature, seed=seed, ignore_eos=True)
        terminal = Console(stderr=True)
        with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
            task = bar.add_task("measuring", total=len(texts))
            measured = measure_ranks(
                llm, texts, params, depth, lambda done: bar.update(task, completed=done)
            )
        found = best_tree(measured.accuracy, nodes)
        if not found:
            o.fail("no candidate was ever right: give more prompts, or a greater --length")
        save_tree(out, draft, found, measured)
        taus = [1 + expected_gain(measured.accuracy, tree) for tree in (TEMPLATE[:nodes], found)]
        print(
            f"wrote {out} ({len(found)} nodes, {max(map(len, found))} deep; tokens a pass expected "
            f"from {measured.reached[0]} places: {taus[1]:.3f}, of the default tree {taus[0]:.3f})"
        )


@app.command()
def kangaroo(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: head=FILE in a stack.")],
    model: o.Model = "reference",
    layer: Annotated[
        int | None,
        typer.Option(
            min=1, help="Layers that run before the adapter. Default: one in 16 of the model's."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of text to learn from.")] = 400_000,
    epochs: Annotated[float, typer.Option(help="Passes over them.")] = 4.0,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text file; may be given several times. Default: the standard library."),
    ] = None,
    work: Annotated[
        Path, typer.Option(help="Keeps the model's hidden states; used again by the next run.")
    ] = Path("build/kangaroo"),
    threads: o.Threads = None,
) -> None:
    """Train the adapter of draft=kangaroo: a model's first layers then draft for the model.

    Example: hasten train kangaroo -o adapter.safetensors && hasten generate
    --stack 'draft=kangaroo(head=adapter.safetensors)' 'def f(x):'
    """
    with o.one_line_errors():
        o.set_threads(threads)
        from hasten.models.loading import load_model, locate
        from hasten.models.tokenizer import Tokenizer
        from hasten.training.documents import documents
        from hasten.training.kangaroo import AdapterRun, train_adapter

        folder = locate(model)
        run = AdapterRun(layer=layer, tokens=tokens, epochs=epochs)
        texts = documents(Tokenizer.load(folder), 2 * run.length, text or ())
        losses = train_adapter(load_model(folder), texts, out, work, run)
        print(f"wrote {out} (loss {losses[0]:.3f} -> {losses[-1]:.3f})")


@app.command()
def layerskip(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, used as a --model.")],
    model: o.Model = "reference",
    work: Annotated[
        Path, typer.Option(help="Checkpoints and logs; the same folder resumes.")
    ] = Path("build/layerskip"),
    minutes: Annotated[float | None, typer.Option(help="Time to train.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Token budget.")] = None,
    threads: o.Threads = None,
) -> None:
    """Go on training a reference model so that its early layers can draft (draft=del).

    Ctrl-C saves a checkpoint; the same command goes on from it.
    """
    with o.one_line_errors():
        o.set_threads(threads)
        from dataclasses import replace

        from hasten.models.loading import locate
        from hasten.training.layerskip import RUN, train_layerskip
        from hasten.training.reference import budget

        config = replace(RUN, **budget(minutes, tokens))
        if train_layerskip(locate(model), out, work, config):
            print(f"wrote {out}")
        else:
            print(f"interrupted; the same command goes on from {work}")


@app.command()
def draft(
    model: o.Model = "reference",
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder that gets the draft, for draft=model(path=)."),
    ] = Path("trained-draft"),
    work: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoints, logs and answers; the same folder resumes. Default: OUT.work"
        ),
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            help="File or folder of UTF-8 text, several times if need be: what the target is used "
            "for. Default: this interpreter's standard library.",
        ),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the draft.")] = 2,
    hidden: Annotated[int, typer.Option(min=32, help="Hidden size, in steps of 32.")] = 128,
    exits: Annotated[
        str, typer.Option(help="Layers after which the draft can answer (draft=s2d): 1/2/3.")
    ] = "",
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to pre-train on.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time to pre-train at most.")] = None,
    align_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the target writes to align with.")
    ] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to measure acceptance with.")] = 48,
    seed: Annotated[int, typer.Option(help="Of weights, batches, prompts and answers.")] = 1,
    compile_: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile; needs a C++ compiler.")
    ] = True,
    threads: o.Threads = None,
) -> None:
    """Train a draft model for any target: pre-train on text, align with the target's own answers.

    At the end acceptance is measured on held-out text, before and after alignment, printed, and
    written to report.json beside the weights. Ctrl-C keeps what is there; the same command goes on.
    """
    with o.one_line_errors():
        if exits and not all(part.isdigit() for part in exits.split("/")):
            o.fail(f"--exits '{exits}': write layer counts such as 1/2/3")
        o.set_threads(threads)
        from hasten.training.draft import DraftRecipe, report_text, train_draft
        from hasten.training.draft_data import read_texts

        given = {"tokens": tokens, "minutes": minutes, "align_tokens": align_tokens}
        budgets: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        recipe = DraftRecipe(
            layers=layers,
            hidden=hidden,
            exits=tuple(int(part) for part in exits.split("/")) if exits else (),
            answer_tokens=answer_tokens,
            prompts=prompts,
            seed=seed,
            compile=compile_,
            **budgets,
        )
        files = read_texts(texts) if texts else None
        work = work or out.with_name(out.name + ".work")
        report = train_draft(model, out, recipe, work=work, files=files)
        if report is None:
            print(f"interrupted; the same command goes on from {work}")
        else:
            print(f"{report_text(report)}\nwrote {out}")
