"""Options that several commands share, and how errors reach a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from hasten.decoding.params import SamplingParams

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Folder or hub id in Hugging Face layout, or 'reference' (bundled)."
    ),
]
StackText = Annotated[
    str | None,
    typer.Option(
        "--stack",
        "-s",
        help="One choice per slot, such as 'draft=prompt-lookup(k=8),select=sink-window'. "
        "'hasten methods' lists the choices.",
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy. Default: what the model's files say.")
]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this mass.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends the output; may be given several times.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: all cores.")]


def set_threads(threads: int | None) -> None:
    """Threads for the kernels and for torch, before a model is loaded."""
    if threads is None:
        return
    if threads < 1:
        fail(f"--threads is {threads}, must be at least 1")
    import torch

    from hasten import _native

    torch.set_num_threads(threads)
    _native.set_num_threads(threads)


def sampling(**values: Any) -> SamplingParams:
    """Sampling parameters from command-line values; lists that were not given stay out."""
    from hasten.decoding.params import SamplingParams

    return SamplingParams(**{k: v for k, v in values.items() if v is not None})


def fail(message: str) -> NoReturn:
    """One line on standard error, exit status 1."""
    print(f"hasten: {message}", file=sys.stderr)
    raise typer.Exit(1)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend (bad values, bad files, missing packages) into one line."""
    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError, ModuleNotFoundError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("\nhasten: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
