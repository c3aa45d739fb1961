"""Interleaved measurement: every contestant once per round, in rotating order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from hasten.bench.contestants import Contestant, Run
from hasten.bench.workloads import Item
from hasten.decoding.params import SamplingParams
from hasten.training.validate import ends_in_loop


@dataclass
class Spread:
    """Minimum, median and maximum of repeated measurements."""

    values: list[float]

    def __str__(self) -> str:
        low, mid, high = min(self.values), median(self.values), max(self.values)
        digits = 0 if mid >= 100 else 1 if mid >= 10 else 2
        return f"{mid:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

    @property
    def median(self) -> float:
        return median(self.values)


@dataclass
class Row:
    """What was measured of one contestant, with how its output relates to the baseline's."""

    name: str
    tokens_per_second: Spread
    decode_per_second: Spread
    ttft_ms: Spread
    ratio: Spread
    """Tokens per second relative to the first contestant, round by round."""
    output: str
    tau: float | None = None
    outside: Spread | None = None
    runs: list[Run] = field(default_factory=list, repr=False)


def compare(
    contestants: Sequence[Contestant],
    items: Sequence[Item],
    params: SamplingParams,
    rounds: int = 5,
    on_run: Callable[[str, int], None] = lambda name, round_: None,
    warm_up: int | None = None,
) -> list[Row]:
    """Measure all contestants in the same minutes; the first one is the baseline.

    One uncounted round warms up, with the first ``warm_up`` items only if that is given. The order
    rotates, so that no contestant always runs first.
    """
    runs: dict[str, list[Run]] = {c.name: [] for c in contestants}
    if len(runs) != len(contestants):
        raise ValueError("two contestants have the same name")
    for round_ in range(rounds + 1):
        turn = round_ % len(contestants)
        for contestant in [*contestants[turn:], *contestants[:turn]]:
            on_run(contestant.name, round_)
            run = contestant.run(items if round_ else items[:warm_up], params)
            if round_:
                runs[contestant.name].append(run)
    base = runs[contestants[0].name]
    return [_row(c.name, runs[c.name], base) for c in contestants]


def _row(name: str, runs: list[Run], base: list[Run]) -> Row:
    outside = [r.outside for r in runs if r.outside is not None]
    first = runs[0]
    return Row(
        name=name,
        tokens_per_second=Spread([r.tokens_per_second for r in runs]),
        decode_per_second=Spread([r.decode_per_second for r in runs]),
        ttft_ms=Spread([1000 * median(r.ttft) for r in runs]),
        ratio=Spread(
            [r.tokens_per_second / b.tokens_per_second for r, b in zip(runs, base, strict=True)]
        ),
        output=min(
            (agreement(r.tokens, b.tokens) for r, b in zip(runs, base, strict=True)), key=_equal
        ),
        tau=first.speculation.tau if first.speculation.accepted else None,
        outside=Spread([100 * x for x in outside]) if outside else None,
        runs=runs,
    )


def _equal(text: str) -> bool:
    """Orders the rounds' verdicts: one round that differs decides."""
    return text.startswith("equal")


def agreement(tokens: dict[str, list[int]], base: dict[str, list[int]]) -> str:
    """How many outputs equal the baseline's, and how long the others agree with it."""
    if tokens == base:
        return f"equal ({len(base)} of {len(base)})"
    same = sum(tokens.get(k) == v for k, v in base.items())
    common = [
        next(
            (i for i, (a, b) in enumerate(zip(tokens.get(k, []), v, strict=False)) if a != b),
            min(len(tokens.get(k, [])), len(v)),
        )
        for k, v in base.items()
    ]
    share = sum(common) / max(1, sum(map(len, base.values())))
    return f"{same} of {len(base)} equal, {100 * share:.0f} % of tokens before a difference"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: median (min-max)."""
    head = (
        "contestant",
        "tokens/s",
        "against first",
        "decode tokens/s of one sequence",
        "first token ms",
        "output against first",
        "tokens a pass",
        "outside the forward %",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells: list[Any] = [
            _code(row.name),
            row.tokens_per_second,
            f"{row.ratio}x",
            row.decode_per_second,
            row.ttft_ms,
            row.output,
            "" if row.tau is None else f"{row.tau:.2f}",
            row.outside or "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _code(name: str) -> str:
    """A stack's name in a Markdown table, where a bar would end the cell."""
    return "`" + name.replace("|", "\\|") + "`"


@dataclass
class Category:
    """A kind of work within a comparison.

    Attributes:
        loops: share of the baseline's outputs that end in a loop, which any drafter guesses.
        speeds: decode tokens/s of one sequence (tokens after the first by the seconds from the
            first to the last, summed over the items), by contestant.
        ratios: the same against the baseline, round by round, of the others.
        whole: tokens/s with the prompts' time, against the baseline.
    """

    name: str
    items: int
    loops: float
    speeds: dict[str, Spread]
    ratios: dict[str, Spread]
    whole: dict[str, Spread]


def by_category(rows: Sequence[Row], items: Sequence[Item]) -> list[Category]:
    """The comparison for each category of the items. Meant for one item at a time: an item's
    seconds are then its own. Prompts do not count in speeds and ratios, since drafts do nothing
    for them. Categories without a token after the first are left out."""
    found: dict[str, list[str]] = {}
    for item in items:
        found.setdefault(item.category, []).append(item.id)
    base = rows[0]
    categories = []
    for name, ids in found.items():
        if not all(sum(run.spent[i] for i in ids) for row in rows for run in row.runs):
            continue
        loops = sum(ends_in_loop(base.runs[0].tokens[i]) for i in ids) / len(ids)
        speeds = {
            row.name: Spread(
                [
                    sum(run.decoded[i] for i in ids) / sum(run.spent[i] for i in ids)
                    for run in row.runs
                ]
            )
            for row in rows
        }
        ratios = {
            row.name: Spread(
                [
                    own / plain
                    for own, plain in zip(
                        speeds[row.name].values, speeds[base.name].values, strict=True
                    )
                ]
            )
            for row in rows[1:]
        }
        whole = {
            row.name: Spread(
                [
                    _whole(own, ids) / _whole(plain, ids)
                    for own, plain in zip(row.runs, base.runs, strict=True)
                ]
            )
            for row in rows[1:]
        }
        categories.append(Category(name, len(ids), loops, speeds, ratios, whole))
    return categories


def _whole(run: Run, ids: Sequence[str]) -> float:
    """Tokens a second of some items with their prompts."""
    return sum(len(run.tokens[i]) for i in ids) / sum(run.whole[i] for i in ids)


def category_table(categories: Sequence[Category]) -> str:
    """Contestants by categories, in three Markdown tables: decode tokens/s of one sequence, the
    same against the baseline, and against it with the prompts; median (min-max)."""
    names = [c.name or "all" for c in categories]
    shares = [f"{100 * c.loops:.0f} % of {c.items}" for c in categories]
    lines = [
        *_head("decode tokens/s of one sequence", names),
        *(
            _cells(_code(name), [str(c.speeds[name]) for c in categories])
            for name in categories[0].speeds
        ),
        "",
        *_head("decoding against first", names),
        _cells("plain outputs that end in a loop", shares),
        *(
            _cells(_code(name), [f"{c.ratios[name]}x" for c in categories])
            for name in categories[0].ratios
        ),
        "",
        *_head("with prompts, against first", names),
        *(
            _cells(_code(name), [f"{c.whole[name]}x" for c in categories])
            for name in categories[0].whole
        ),
    ]
    return "\n".join(lines)


def _head(first: str, names: Sequence[str]) -> list[str]:
    return [_cells(first, names), "|" + "---|" * (1 + len(names))]


def _cells(first: str, others: Sequence[str]) -> str:
    return "| " + " | ".join([first, *others]) + " |"
