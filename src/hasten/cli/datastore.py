"""``hasten datastore``: texts to draft from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options as o

app = typer.Typer(no_args_is_help=True, help="Texts that draft=retrieval proposes from.")


@app.callback()
def _group() -> None:
    """One command now; the group keeps its name when more come."""


@app.command()
def build(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="UTF-8 text files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    model: o.Model = "reference",
) -> None:
    """Index text files by the tokens of a model, 8 bytes a token.

    Example: hasten datastore build src/*.py -o code.store -m MODEL &&
    hasten generate -m MODEL --stack 'draft=retrieval(file=code.store)' 'def f(x):'
    """
    with o.one_line_errors():
        from hasten.models.loading import locate
        from hasten.models.tokenizer import Tokenizer
        from hasten.speculation.datastore import build as build_datastore

        tokenizer = Tokenizer.load(locate(model))
        with _bar() as report:
            count = build_datastore(texts, out, tokenizer, report)
        print(f"wrote {out} ({count} tokens, {out.stat().st_size / 1e6:.1f} MB)")


@contextmanager
def _bar() -> Iterator[Callable[[str, float], None]]:
    """A progress bar, if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)
