"""Figures from outcomes.

For a request with intended arrival a and emissions of tokens at e_1..e_m (n tokens in all):

- TTFT = e_1 - a, queueing included;
- TPOT = (e_m - e_1) / (n - 1); a request with n = 1 has none and counts as meeting any;
- TBT = the gaps e_j - e_{j-1}, one for each emission after the first;
- ITL = the same per token: a gap before an emission of k tokens is k intervals of gap / k;
- E2E = e_m - a.

Percentiles of TTFT, TPOT and E2E are over requests, those of TBT and ITL over all gaps and tokens
of all requests; between two values they are interpolated. Only complete answers have latencies,
but all requests count for attainment: unfinished, rejected and failed ones are violations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from hasten.bench.serving.load import Outcome

PERCENTILES = (50, 90, 99)
LATE = 0.025
"""Seconds: a generator whose p99 lateness exceeds this did not offer the load it names."""


def ttft(outcome: Outcome) -> float:
    """Seconds from the intended arrival to the first token."""
    return outcome.timeline.times[0] - outcome.arrived


def e2e(outcome: Outcome) -> float:
    """Seconds from the intended arrival to the last token."""
    return outcome.timeline.times[-1] - outcome.arrived


def tpot(outcome: Outcome) -> float | None:
    """Seconds per token after the first; None for an output of one token."""
    tokens = outcome.timeline.tokens
    if tokens < 2:
        return None
    return (outcome.timeline.times[-1] - outcome.timeline.times[0]) / (tokens - 1)


def tbt(outcome: Outcome) -> list[float]:
    """Gaps between emissions, in seconds."""
    return [b - a for a, b in pairwise(outcome.timeline.times)]


def itl(outcome: Outcome) -> list[float]:
    """Seconds between tokens, one value per token after the first emission.

    Where the server does not tell how many tokens an emission brought, emissions count as tokens.
    """
    counts = outcome.timeline.counts[1:]
    return [gap / k for gap, k in zip(tbt(outcome), counts, strict=True) for _ in range(k) if k > 0]


def counts_known(outcome: Outcome) -> bool:
    """Whether the emissions account for all tokens."""
    return sum(outcome.timeline.counts) == outcome.timeline.tokens


@dataclass(frozen=True)
class Slo:
    """Service level objectives in seconds; None where there is none."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    @classmethod
    def parse(cls, words: Sequence[str]) -> Slo:
        """``ttft:500 tpot:50 e2el:2000``, in milliseconds."""
        values: dict[str, float] = {}
        for word in (part for given in words for part in given.split()):
            name, _, number = word.partition(":")
            try:
                value = float(number)
            except ValueError:
                value = math.nan
            if name not in ("ttft", "tpot", "e2el") or not 0 <= value < math.inf:
                raise ValueError(
                    f"'{word}' is not an objective; write ttft:MS, tpot:MS or e2el:MS, such as "
                    "ttft:500"
                )
            if name in values:
                raise ValueError(f"the objective {name} is given twice")
            values[name] = value / 1000
        return cls(**values)

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.ttft, self.tpot, self.e2el))

    def __str__(self) -> str:
        named = {"ttft": self.ttft, "tpot": self.tpot, "e2el": self.e2el}
        return " ".join(f"{k}:{1000 * v:g}" for k, v in named.items() if v is not None)

    def meets_ttft(self, outcome: Outcome) -> bool:
        return outcome.ok and (self.ttft is None or ttft(outcome) <= self.ttft)

    def meets_tpot(self, outcome: Outcome) -> bool:
        per_token = tpot(outcome) if outcome.ok else None
        return outcome.ok and (self.tpot is None or per_token is None or per_token <= self.tpot)

    def meets(self, outcome: Outcome) -> bool:
        """All objectives at once."""
        return (
            self.meets_ttft(outcome)
            and self.meets_tpot(outcome)
            and (self.e2el is None or e2e(outcome) <= self.e2el)
        )

    def hopeless(self, outcome: Outcome, now: float) -> bool:
        """Whether a request that has not ended can no longer meet them."""
        if outcome.ended is not None:
            return not self.meets(outcome)
        age = now - outcome.arrived
        if self.e2el is not None and age > self.e2el:
            return True
        return self.ttft is not None and not outcome.timeline.times and age > self.ttft


def half_width(good: int, total: int) -> float:
    """Half of Wilson's 95 % interval for a share: what a sample of this size leaves open."""
    if total == 0:
        return 1.0
    z, p = 1.96, good / total
    return z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))


def spread(values: Iterable[float], name: str, scale: float = 1000.0) -> dict[str, float | None]:
    """Mean, standard deviation, median and percentiles, in ms; all None without values."""
    array = np.fromiter(values, dtype=np.float64) * scale
    found: dict[str, float | None] = {}
    found[f"mean_{name}_ms"] = float(array.mean()) if len(array) else None
    found[f"median_{name}_ms"] = float(np.median(array)) if len(array) else None
    found[f"std_{name}_ms"] = float(array.std()) if len(array) else None
    for p in PERCENTILES:
        found[f"p{p}_{name}_ms"] = float(np.percentile(array, p)) if len(array) else None
    return found


def lengths(values: Sequence[int]) -> dict[str, float | None]:
    """Mean, p50, p90 and p99 of token counts."""
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {
        "mean": float(np.mean(values)),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
    }


def summarize(
    outcomes: Sequence[Outcome], slo: Slo, *, warmup: float = 0.0, detailed: bool = True
) -> dict[str, Any]:
    """All figures of a run, under the key names of ``vllm bench serve`` where it has them.

    Args:
        warmup: requests that arrive in the first ``warmup`` seconds are not counted.
        detailed: with the lists that have one entry per request.
    """
    first = min((o.arrived for o in outcomes), default=0.0)
    counted = [o for o in outcomes if o.arrived >= first + warmup]
    done = [o for o in counted if o.ok]
    if counted:
        start = min(o.arrived for o in counted)
        ended = max(max(o.ended or o.arrived, o.arrived) for o in counted)
        window = max(o.arrived for o in counted) - start
        duration = max(ended - start, 1e-9)
    else:
        start = window = duration = 0.0
    # planned lengths where a server tells nothing
    inputs = [o.timeline.input_len or o.planned.prompt_tokens for o in counted]
    outputs = [o.timeline.tokens if o.ok else 0 for o in counted]
    read = sum(n for n, o in zip(inputs, counted, strict=True) if o.ok)
    written = sum(outputs)
    rejected = [o for o in counted if o.rejected]
    good = sum(slo.meets(o) for o in counted)
    late = [o.sent - o.due for o in counted if o.sent is not None]
    lateness = spread(late, "lateness")
    worst = lateness["p99_lateness_ms"]

    def per_second(amount: float) -> float:
        return amount / duration if duration else 0.0

    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(counted) - len(done),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": per_second(len(done)),
        "request_goodput": per_second(good) if slo else None,
        "output_throughput": per_second(written),
        "total_token_throughput": per_second(read + written),
        "max_output_tokens_per_s": _peak_tokens(done, start),
        "max_concurrent_requests": _peak_concurrency(counted),
    }
    figures |= spread(map(ttft, done), "ttft")
    figures |= spread((t for o in done if (t := tpot(o)) is not None), "tpot")
    figures |= spread((gap for o in done for gap in itl(o)), "itl")
    figures |= spread((gap for o in done for gap in tbt(o)), "tbt")
    figures |= spread(map(e2e, done), "e2el")
    figures |= {
        "num_requests": len(counted),
        "num_warmup_requests": len(outcomes) - len(counted),
        "arrival_window": window,
        "arrival_rate": (len(counted) - 1) / window if window else None,
        "rejected": len(rejected),
        "error_kinds": dict(Counter(o.error for o in counted if o.error is not None)),
        "input_lengths": lengths(inputs),
        "output_lengths": lengths([n for n, o in zip(outputs, counted, strict=True) if o.ok]),
        "wrong_output_lengths": sum(o.timeline.tokens != o.planned.output_tokens for o in done),
        "emissions_without_token_counts": sum(not counts_known(o) for o in done),
        "late_client": worst is not None and worst > 1000 * LATE,
    }
    figures |= lateness
    figures |= spread((o.ended - o.arrived for o in rejected if o.ended), "rejection")
    figures |= spread(
        (o.ended - o.sent for o in rejected if o.ended and o.sent), "rejection_from_send"
    )
    if slo:
        figures["slo"] = str(slo)
        figures["slo_attainment"] = _share(good, len(counted))
        figures["slo_attainment_ttft"] = _share(sum(map(slo.meets_ttft, counted)), len(counted))
        figures["slo_attainment_tpot"] = _share(sum(map(slo.meets_tpot, counted)), len(counted))
        figures["slo_attainment_half_width"] = half_width(good, len(counted))
    if detailed:
        figures |= {
            "input_lens": inputs,
            "output_lens": outputs,
            "ttfts": [ttft(o) if o.ok else 0.0 for o in counted],
            "itls": [itl(o) if o.ok else [] for o in counted],
            "generated_texts": [o.timeline.text for o in counted],
            "errors": [
                "" if o.ok else f"{o.error}: {o.message}" if o.message else o.error for o in counted
            ],
        }
    return figures


def _share(good: int, total: int) -> float | None:
    return good / total if total else None


def _peak_tokens(done: Sequence[Outcome], start: float) -> float:
    """Most output tokens within one second of the run's clock."""
    seconds: Counter[int] = Counter()
    for outcome in done:
        for at, count in zip(outcome.timeline.times, outcome.timeline.counts, strict=True):
            seconds[math.floor(at - start)] += count
    return float(max(seconds.values(), default=0))


def _peak_concurrency(outcomes: Sequence[Outcome]) -> int:
    """Most requests that were sent and not ended at the same time."""
    changes = sorted(
        change
        for o in outcomes
        if o.sent is not None and o.ended is not None
        for change in ((o.sent, 1), (o.ended, -1))
    )
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
