"""Reports that can be checked: figures with commit, hardware, versions and command."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from hasten.bench.comparison import Category, Row, category_table, table
from hasten.bench.conditions import Conditions, conditions


def write(
    folder: Path,
    title: str,
    rows: Sequence[Row],
    note: str = "",
    categories: Sequence[Category] = (),
) -> list[Path]:
    """Write ``report.md``, ``report.json`` and ``report.png`` into a folder; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    under = conditions()
    markdown = folder / "report.md"
    image = _plot(folder / "report.png", title, rows)
    kinds = f"{category_table(categories)}\n\n" if categories else ""
    picture = f"\n![{title}](report.png)\n" if image else ""
    markdown.write_text(
        f"# {title}\n\n{note}\n\n{table(rows)}\n{picture}\n{kinds}"
        f"Median (min-max) over {len(rows[0].runs)} interleaved rounds.\n\n{under.markdown()}"
    )
    data = folder / "report.json"
    data.write_text(json.dumps({"title": title, **as_json(rows, under, categories)}, indent=1))
    return [markdown, data, *([image] if image else [])]


def beside_peers() -> str:
    """What a report says where other engines take part: how they run, and memory's speed now."""
    from hasten import _native

    speed = _native.read_bandwidth(1 << 30) / 1e9
    return (
        "; other engines take the prompts in groups that run to their end together; a plain read "
        f"of memory reaches {speed:.1f} GB/s in these minutes"
    )


def as_json(
    rows: Sequence[Row], under: Conditions, categories: Sequence[Category] = ()
) -> dict[str, Any]:
    """Rows and conditions as plain values; every figure is a list with one entry per round."""
    found: dict[str, Any] = {"conditions": vars(under), "rows": [_row(row) for row in rows]}
    if categories:
        found["categories"] = [
            {
                "name": c.name,
                "items": c.items,
                "loops": c.loops,
                "decode_per_second": {name: spread.values for name, spread in c.speeds.items()},
                "ratios": {name: spread.values for name, spread in c.ratios.items()},
                "with_prompts": {name: spread.values for name, spread in c.whole.items()},
            }
            for c in categories
        ]
    return found


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "tokens_per_second": row.tokens_per_second.values,
        "decode_per_second": [x if isfinite(x) else None for x in row.decode_per_second.values],
        "ttft_ms": row.ttft_ms.values,
        "ratio": row.ratio.values,
        "output": row.output,
        "tau": row.tau,
        "speculation": found.to_json() if (found := row.runs[0].speculation).drafted else None,
        "outside_percent": row.outside.values if row.outside else None,
    }


def _plot(path: Path, title: str, rows: Sequence[Row]) -> Path | None:
    """A bar per contestant with its spread; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(rows) + 1.4))
    values = [row.tokens_per_second for row in rows]
    middle = [v.median for v in values]
    spread = [
        [m - min(v.values) for m, v in zip(middle, values, strict=True)],
        [max(v.values) - m for m, v in zip(middle, values, strict=True)],
    ]
    names = [textwrap.fill(row.name, 48) for row in rows]
    axes.barh(names, middle, xerr=spread, color="#4878a8", capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second (median, min to max)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
