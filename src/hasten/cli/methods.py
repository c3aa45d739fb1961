"""``hasten methods``: what can be put into a stack."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hasten.cli import options as o


def methods(
    slot: Annotated[str | None, typer.Argument(help="Only this slot.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of cards for programs.")] = False,
    compatibility: Annotated[
        bool, typer.Option("--compatibility", help="Which methods run together, as Markdown.")
    ] = False,
) -> None:
    """List the methods of every slot: parameters, exactness, paper."""
    with o.one_line_errors():
        from hasten.method_tables import compatibility_table
        from hasten.methods import SLOTS, MethodError, cards

        if slot is not None and slot not in SLOTS:
            raise MethodError(f"unknown slot '{slot}'; slots: {', '.join(SLOTS)}")
        chosen = cards(slot)
        if as_json:
            print(json.dumps([card.to_json() for card in chosen], indent=2))
            return
        if compatibility:
            print(compatibility_table())
            return
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column in ("slot", "method (parameters = defaults)", "exact", "what it does"):
            table.add_column(column, overflow="fold")
        for card in chosen:
            parameters = ", ".join(f"{k}={v}" for k, v in card.to_json()["parameters"].items())
            what = card.summary.replace("``", "")
            table.add_row(
                ", ".join(card.slots),
                f"[bold]{card.name}[/bold]" + escape(f"({parameters})" if parameters else ""),
                card.exact,
                escape(what) + (f"\n[dim]{escape(card.paper)}[/dim]" if card.paper else ""),
            )
        console = Console()
        console.print(table)
        console.print(
            "\nThe first method of each slot is its plain choice. A stack names the others:\n"
            "  hasten generate --stack 'draft=prompt-lookup(k=8),select=sink-window' 'def f(x):'"
        )
