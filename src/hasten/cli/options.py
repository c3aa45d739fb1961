"""Options that several commands share, and how errors reach a terminal."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import hasten

if TYPE_CHECKING:
    from hasten.decoding.params import SamplingParams
    from hasten.engine.engine import Engine

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Folder or hub id in Hugging Face layout, a .gguf file or org/name:Q4_K_M, or "
        "'reference' (bundled).",
    ),
]
StackText = Annotated[
    str | None,
    typer.Option(
        "--stack",
        "-s",
        help="Methods to use, such as 'draft=prompt-lookup(k=8)', separated by commas; "
        "'hasten methods' lists them. Default: the plain choice everywhere.",
    ),
]
WeightsText = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="Short for a choice of weights in the stack: int8, int4 ('int4(group=64)'), bf16. "
        "Default: as the model's files have them.",
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
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
Batch = Annotated[int, typer.Option(min=1, help="Sequences that run at the same time.")]


def size(text: str) -> int:
    """A number of bytes, such as 65536, 512M or 2G."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(f"'{text}' is not a size such as 65536, 512M or 2G")
    return int(match[1]) << (10 * " KMGT".index(match[2] or " "))


MaxLength = Annotated[
    int | None,
    typer.Option(min=1, help="Longest sequence, in tokens. Default: what the model was made for."),
]
KvBytes = Annotated[
    int | None,
    typer.Option(
        parser=size,
        metavar="SIZE",
        help="Memory for keys and values, such as 512M or 2G. Default: a quarter of what is free, "
        "at most 2G.",
    ),
]
Convert = Annotated[
    bool,
    typer.Option(
        "--convert",
        help="First convert the checkpoint for other engines that need it (minutes, "
        "gigabytes; kept in $HASTEN_PEERS/models).",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")]

Profile = Annotated[
    bool,
    typer.Option("--profile", help="Print time and bandwidth by operation, and the roofline."),
]


@contextmanager
def profiled(engine: Engine, wanted: bool) -> Iterator[None]:
    """Print a profile of the engine's steps inside of the block, if one is wanted."""
    if not wanted:
        yield
        return
    from hasten.cli import profile
    from hasten.engine.profile import profiling

    with profiling() as engine.profile:
        yield
    profile.show(engine.profile, engine)
    engine.profile = None


Device = Annotated[
    str, typer.Option(help="Where the model runs: cpu, or cuda (cuda:1) with a GPU.")
]


def set_threads(threads: int | None) -> None:
    """Threads for the kernels and for torch, before a model is loaded."""
    if threads is None:
        return
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
    print("hasten:", *message.splitlines(), file=sys.stderr)
    raise typer.Exit(1)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend (bad values, bad files, missing packages) into one line."""
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe has seen enough: typer ends without a word
        raise
    except ModuleNotFoundError as error:
        fail(hasten.NO_TORCH if error.name == "torch" else f"{error}; is the package installed?")
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        fail(f"{where}{error.strerror or error}")
    except (ValueError, MemoryError) as error:
        fail(str(error) or "out of memory")
    except KeyboardInterrupt:
        print("\nhasten: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


def folder_to_write(path: Path | None) -> None:
    """Make a report's folder before the measurement, so that a bad path costs no time."""
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            fail(f"{path}: no permission to write")


def duration(seconds: float) -> str:
    """A time to wait, as coarse as an estimate is: 40 s, 12 min, 1 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


@contextmanager
def line_of_rounds(rounds: int, contestants: int) -> Iterator[Callable[[str, int], None]]:
    """A line on a terminal that says which round runs (0 warms up), who, and how long all will
    take if the rest is as fast as what was seen; wiped at the end."""
    terminal = sys.stderr.isatty()
    began = time.monotonic()
    done = 0

    def show(name: str, round_: int) -> None:
        nonlocal done
        if terminal:
            what = f"round {round_} of {rounds}" if round_ else "warming up"
            left = ""
            if done:
                seconds = (time.monotonic() - began) / done * ((rounds + 1) * contestants - done)
                left = f", about {duration(seconds)} left"
            line = f"{what}, {done % contestants + 1} of {contestants}{left}: {name}"
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be wiped
            print(f"\r\033[K{line[:width]}", end="", file=sys.stderr, flush=True)
        done += 1

    try:
        yield show
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
