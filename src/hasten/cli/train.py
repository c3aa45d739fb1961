"""``hasten train``: recipes for small models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options as o

app = typer.Typer(no_args_is_help=True, help="Train small models for use with hasten.")


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
def acceptance_head(
    out: Annotated[Path, typer.Option("--out", "-o", help="File that gets the head.")],
    model: o.Model = "reference",
    draft: Annotated[
        str, typer.Option(help="The draft model whose states the head reads.")
    ] = "reference-draft",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with a prompt a line. Default: functions of this Python."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts to use at most.")] = 512,
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
        texts = None
        if prompts is not None:
            texts = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line]
        make_head(model, draft, out, recipe, texts, count, report=typer.echo)
