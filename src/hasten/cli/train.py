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
def kangaroo(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: head=FILE in a stack.")],
    model: o.Model = "reference",
    layer: Annotated[int, typer.Option(min=1, help="Layers that run before the adapter.")] = 2,
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
