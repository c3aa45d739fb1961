"""``hasten widen``: a small model's function at a large model's cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options as o


def widen(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    model: o.Model = "reference",
    preset: Annotated[str, typer.Option(help="Size: 0.1b, 0.5b, 1b, or 25m, 60m.")] = "0.5b",
    dtype: Annotated[
        str, typer.Option(help="float32 keeps the function exact; bfloat16 rounds the splits.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Of the random splits.")] = 0,
) -> None:
    """Embed a small Llama in a shape of about 0.5B or 1B parameters.

    The result computes the same function in float32 and costs what a model of that size costs, so
    speed-ups can be measured with a trained model's acceptance rates where weights do not fit any
    cache. Example: hasten widen /tmp/wide && hasten bench latency -m /tmp/wide
    """
    with o.one_line_errors():
        if dtype not in ("float32", "bfloat16"):
            o.fail(f"--dtype is '{dtype}', expected float32 or bfloat16")
        import torch

        from hasten.models.loading import locate
        from hasten.training.widen import widen as build

        build(locate(model), out, preset, dtype=getattr(torch, dtype), seed=seed)
        print(f"wrote {out}")
