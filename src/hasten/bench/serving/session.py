"""Runs against one server: warm up, measure once, or search for the goodput."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from hasten.bench.serving import goodput
from hasten.bench.serving.goodput import Goodput, Probe
from hasten.bench.serving.load import Outcome, Planned, Target, run_load
from hasten.bench.serving.metrics import Slo, half_width
from hasten.bench.serving.plan import PromptsOf, Shape, plan
from hasten.bench.serving.trace import Row

WARMUP_NUMBER = 1 << 40  # requests of the warm-up have numbers of their own, and so other prompts


class TargetRefuses(ValueError):
    """The server does not answer the kind of request that is to be measured."""


async def warm_up(
    target: Target, rows: Sequence[Row], count: int, prompts: PromptsOf, seed: int
) -> None:
    """Send ``count`` requests that are not measured, a few at a time.

    Raises:
        TargetRefuses: none of them was answered; there is nothing to measure.
    """
    few = [rows[i % len(rows)] for i in range(count)]
    warm = plan(few, prompts(seed), WARMUP_NUMBER)
    outcomes = await run_load(target, warm, max_concurrency=8, closed_loop=True)
    if outcomes and not any(o.ok for o in outcomes):
        first = outcomes[0]
        raise TargetRefuses(f"the server answers no request ({first.error}): {first.message}")


async def measure(
    target: Target,
    shape: Shape,
    prompts: PromptsOf,
    *,
    max_concurrency: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    watch: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """One run at the shape's own rate."""
    rows = shape.at_rate(shape.rate)
    return await run_load(
        target,
        plan(rows, prompts(shape.seed)),
        max_concurrency=max_concurrency,
        closed_loop=shape.closed_loop,
        interrupted=interrupted,
        watch=watch,
    )


async def probe_rate(
    target: Target,
    shape: Shape,
    prompts: PromptsOf,
    slo: Slo,
    rate: float,
    *,
    needed: float,
    number: int = 0,
    interrupted: Callable[[], bool] = lambda: False,
) -> Probe | None:
    """The attainment at a rate; None if interrupted.

    Given up as soon as it can no longer reach ``needed``.

    Arrivals and lengths are those of the shape; prompts are new for every ``number``, since a
    server would answer old ones from its prefix cache. Afterwards the server is let run empty.
    """
    rows = shape.at_rate(rate)
    allowed = math.floor(len(rows) * (1 - needed) + 1e-9)
    violations = 0

    def watch(outcomes: Sequence[Outcome]) -> None:
        nonlocal violations
        now = time.monotonic()
        violations = sum(slo.hopeless(o, now) for o in outcomes)

    outcomes = await run_load(
        target,
        plan(rows, prompts(shape.seed + 1 + number)),
        interrupted=lambda: violations > allowed or interrupted(),
        watch=watch,
    )
    if interrupted():
        return None
    decided = violations > allowed
    if decided:
        await _until_idle(target)
        good = len(rows) - violations
    else:
        good = sum(map(slo.meets, outcomes))
    return Probe(rate, good / len(rows), half_width(good, len(rows)), len(rows), decided)


async def _until_idle(target: Target) -> None:
    """Wait until a new request is answered: what was given up is then out of its way."""
    for _ in range(240):
        await asyncio.sleep(0.25)
        outcome = Outcome(0, Planned(0.0, "Hello", 1, 1), arrived=time.monotonic())
        await target.run(outcome, target.encode(outcome.planned))
        if outcome.ok:
            return


async def search_goodput(
    target: Target,
    shape: Shape,
    prompts: PromptsOf,
    slo: Slo,
    *,
    start: float,
    needed: float = 0.9,
    grain: float = 0.05,
    step: float = 2.0,
    max_probes: int = 16,
    probe_seconds: float | None = None,
    least_requests: int = 1,
    first_number: int = 0,
    interrupted: Callable[[], bool] = lambda: False,
    on_probe: Callable[[Probe], None] = lambda probe: None,
) -> Goodput:
    """Bisect on the request rate; see `goodput.search`.

    Args:
        probe_seconds: a probe sends what arrives in this time at its rate, though at least
            ``least_requests`` and at most the whole shape. None: always the whole shape.
        first_number: number of the first probe; probes with the same number have equal prompts.
    """
    if not slo:
        raise ValueError("a goodput needs objectives, such as --goodput 'ttft:500 tpot:50'")
    numbers = itertools.count(first_number)

    async def probe(rate: float) -> Probe | None:
        count = len(shape.rows)
        if probe_seconds is not None:
            count = min(count, max(least_requests, round(rate * probe_seconds)))
        return await probe_rate(
            target,
            replace(shape, rows=shape.rows[:count]),
            prompts,
            slo,
            rate,
            needed=needed,
            number=next(numbers),
            interrupted=interrupted,
        )

    return await goodput.search(
        probe,
        start=start,
        target=needed,
        grain=grain,
        step=step,
        max_probes=max_probes,
        on_probe=on_probe,
    )
