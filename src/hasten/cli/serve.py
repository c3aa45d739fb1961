"""``hasten serve``: the OpenAI-compatible server. Its options are the fields of `ServeConfig`."""

from __future__ import annotations

import inspect
import os
from dataclasses import Field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from hasten.cli import options as o
from hasten.serving import config as c

PACKAGES = ("fastapi", "uvicorn", "httptools", "msgspec", "prometheus_client")

HELP = """Serve a model over HTTP, as OpenAI's API does.

Every option can also be set in the environment (--max-length: HASTEN_MAX_LENGTH) and in a YAML file
(max_length: 4096); the command line wins, then the environment, then the file. vLLM's names of
the common options (--max-model-len, --max-num-seqs, ...) work too.

Example: hasten serve reference --stack draft=prompt-lookup --port 8000
"""


def serve(**given: Any) -> None:
    """Options are those of `ServeConfig`, and the name of a file with more of them."""
    with o.one_line_errors():
        file = given.pop("config")
        for one in fields(c.ServeConfig):
            for alias in one.metadata["aliases"]:
                value = given.pop(alias.replace("-", "_"))
                given[one.name] = value if given[one.name] is None else given[one.name]
        effective = c.load(given, os.environ, file)
        for package in PACKAGES:
            if find_spec(package) is None:
                o.fail(f"the server needs the package {package}: pip install 'hasten[serve]'")
        from hasten.serving.server import run

        raise typer.Exit(run(effective))


def _parameter(one: Field[Any]) -> inspect.Parameter:
    """A field as a parameter that typer makes an option of; None = not given."""
    if one.name == "model":
        text = f"{one.metadata['help']} Default: reference."
        return _made(one.name, str, typer.Argument(help=text, show_default=False))
    return _option(one, one.name.replace("_", "-"))


def _option(one: Field[Any], spelling: str, hidden: bool = False) -> inspect.Parameter:
    facts, wanted = one.metadata, c.kind(one)
    about: dict[str, Any] = {
        "help": facts["help"] + _default(one),
        "rich_help_panel": facts["group"],
        "show_default": False,
        "hidden": hidden,
    }
    kind: Any = wanted
    name = f"--{spelling}"
    if wanted is bool:
        name += f"/--no-{spelling}"
    elif wanted == c.TEXTS:
        kind = list[str]
    elif get_origin(wanted) is Literal:
        kind, about["metavar"] = str, "|".join(get_args(wanted))
    elif facts["size"]:
        kind, about["metavar"] = str, "SIZE"
    return _made(spelling.replace("-", "_"), kind, typer.Option(name, **about))


def _made(name: str, kind: Any, marker: Any) -> inspect.Parameter:
    hint = Annotated[kind | None, marker]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)


def _default(one: Field[Any]) -> str:
    """The default, where the help does not explain it and it says anything."""
    default: Any = one.default
    if "Default" in one.metadata["help"] or default in (None, ()) or default is False:
        return ""
    if one.metadata["size"]:
        return f" Default: {default >> 20}M."
    return f" Default: {'on' if default is True else default}."


_FILE = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML file with settings. Default: what HASTEN_CONFIG names, if set.",
            rich_help_panel=c.MODEL,
            show_default=False,
        ),
    ],
)
_PARAMETERS = [
    *map(_parameter, fields(c.ServeConfig)),
    _FILE,
    *(
        _option(one, alias, hidden=True)
        for one in fields(c.ServeConfig)
        for alias in one.metadata["aliases"]
    ),
]
serve.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
serve.__annotations__ = {one.name: one.annotation for one in _PARAMETERS}
serve.__doc__ = HELP
