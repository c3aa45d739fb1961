"""Goodput: the largest request rate at which enough requests meet their objectives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from math import sqrt


@dataclass(frozen=True)
class Probe:
    """One rate that was tried.

    ``attainment`` is the share that met the objectives; for a probe given up early (``decided``)
    it is an upper bound, below the target already.
    """

    rate: float
    attainment: float
    half_width: float
    requests: int
    decided: bool = False


@dataclass(frozen=True)
class Goodput:
    """Between ``rate`` (met the target) and ``missed`` (did not).

    ``rate`` is 0 where no probe met the target, ``missed`` None where every probe did. The
    interval is the search's; what chance does to one probe is its ``half_width``.
    """

    rate: float
    missed: float | None
    target: float
    grain: float
    probes: list[Probe] = field(default_factory=list)

    @property
    def converged(self) -> bool:
        return bool(self.rate and self.missed and self.missed <= self.rate * (1 + self.grain))

    def __str__(self) -> str:
        if not self.probes:
            return "no rate was probed to its end"
        if not self.rate:
            return f"no probed rate reached {100 * self.target:g} % (lowest {self.missed:.4g}/s)"
        met = next(p for p in self.probes if p.rate == self.rate)
        share = f"{100 * met.attainment:.1f} ± {100 * met.half_width:.1f} %"
        if self.missed is None:
            return f"at least {self.rate:.4g}/s ({share}; no probed rate missed the target)"
        text = f"{self.rate:.4g}/s ({share}; {self.missed:.4g}/s misses {100 * self.target:g} %)"
        return text if self.converged else f"{text}; stopped after {len(self.probes)} probes"


async def search(
    probe: Callable[[float], Awaitable[Probe | None]],
    *,
    start: float,
    target: float = 0.9,
    grain: float = 0.05,
    step: float = 2.0,
    max_probes: int = 16,
    on_probe: Callable[[Probe], None] = lambda probe: None,
) -> Goodput:
    """Bracket by factors of ``step`` from ``start``, then bisect on the logarithm of the rate.

    Stops when the lowest rate that missed is within ``grain`` of the highest below it that met the
    target, or after ``max_probes``. Attainment falls with the rate up to chance, so one probe
    decides a side; take enough requests a probe (its half-width is printed). A ``probe`` that
    gives None ends the search with what is known.
    """
    if not (start > 0 and 0 < target <= 1 and grain > 0 and step > 1 and max_probes > 0):
        raise ValueError(
            "start, grain and max_probes must be positive, target in (0, 1], step above 1"
        )
    probes: list[Probe] = []
    met, missed = 0.0, None
    rate = start
    while len(probes) < max_probes:
        tried = await probe(rate)
        if tried is None:
            break
        probes.append(tried)
        on_probe(tried)
        if tried.attainment >= target:
            met = rate
        else:
            missed = rate
        if met and missed is not None and missed <= met * (1 + grain):
            break
        if missed is None:
            rate = met * step
        elif not met:
            rate = missed / step
        else:
            rate = sqrt(met * missed)
    return Goodput(met, missed, target, grain, probes)
