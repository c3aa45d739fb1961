"""The ``hasten`` command: one module a subcommand, imported at once but light until it runs."""

from __future__ import annotations

import typer

from hasten.cli import (
    bench,
    chat,
    compare,
    compress,
    datastore,
    generate,
    methods,
    run,
    serve,
    train,
    widen,
)

app = typer.Typer(
    name="hasten",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A decoding engine for language models. Methods are parts: choose them with --stack, "
    "combine them, measure them side by side with 'hasten compare'. "
    "Start with: hasten generate 'def fibonacci(n):'",
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("methods")(methods.methods)
app.command("compare")(compare.compare)
app.add_typer(bench.app, name="bench")
app.add_typer(train.app, name="train")
app.add_typer(compress.app, name="compress")
app.add_typer(datastore.app, name="datastore")
app.command("widen")(widen.widen)


@app.callback(invoke_without_command=True)
def _main(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        import hasten

        print(f"hasten {hasten.__version__}")
        raise typer.Exit()


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
