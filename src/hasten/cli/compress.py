"""``hasten compress``: a checkpoint in a smaller form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options as o

app = typer.Typer(no_args_is_help=True, help="Write a checkpoint with quantized weights.")


@app.command()
def rtn(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id in Hugging Face layout, or 'reference'.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist.")],
    weights: Annotated[
        str, typer.Option(help="int8, int4, or one with parameters: 'int4(group=64)'.")
    ] = "int4",
    threads: o.Threads = None,
) -> None:
    """Round each weight to the nearest code, and write safetensors that every command reads.

    The folder needs no option when it is used: it says how its weights are held. Example:
    hasten compress rtn MODEL -o MODEL-int4 && hasten generate -m MODEL-int4 'def f(x):'
    """
    with o.one_line_errors():
        o.set_threads(threads)
        from hasten.stack import Stack
        from hasten.weights.compress import compress

        chosen = Stack.parse({"weights": weights})["weights"]
        if chosen.form("layer") is None:
            o.fail(f"--weights is '{weights}', expected int8 or int4")
        size = compress(model, out, chosen, progress=True)
        print(f"wrote {out} ({size / 1e6:.0f} MB of tensors)")
