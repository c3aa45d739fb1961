"""Decodes first, prompt chunks in what is left."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.cache.manager import CacheManager
from hasten.engine.request import Sequence
from hasten.methods import method
from hasten.scheduling.base import Grant, Plan


@method(
    "stall-free",
    slot="schedule",
    paper="Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve "
    "(arXiv:2403.02310)",
    exact="bitwise",
    does=("orders-work",),
)
@dataclass(frozen=True)
class StallFree:
    """Every decoding sequence gets its token; prompts are cut to fill the rest of the budget.

    No decode ever waits for a prompt, and no prompt needs a step of its own. ``chunk`` caps the
    share of one prompt in a step (0 = the whole budget). When pages run out, the sequence last in
    line is preempted: its pages go and it is recomputed later, which by position purity gives
    the same bits.
    """

    chunk: int = 0

    def __post_init__(self) -> None:
        if self.chunk < 0:
            raise ValueError(f"chunk={self.chunk}: need 0 (no cap) or a number of tokens")

    def plan(
        self,
        waiting: list[Sequence],
        running: list[Sequence],
        cache: CacheManager,
        budget: int,
    ) -> Plan:
        plan = Plan()
        cap = self.chunk or budget
        decoding = [s for s in running if s.stream.behind == 1]
        catching_up = [s for s in running if s.stream.behind > 1]
        line = list(running)  # who may still be preempted, last first

        for sequence in decoding[:budget]:
            if sequence.stream.table_row < 0:
                continue  # preempted by an earlier one in this very loop
            while not cache.reserve(sequence.stream, len(sequence.tokens)):
                victim = line.pop()
                cache.release(victim.stream)
                plan.preempted.append(victim)
                if victim is sequence:
                    break
            else:
                plan.grants.append(Grant(sequence, 1))
        plan.rows = len(plan.grants)

        granted = {id(g.sequence) for g in plan.grants}
        for sequence in catching_up:
            stream = sequence.stream
            rows = min(stream.behind, cap, budget - plan.rows)
            if rows <= 0 or stream.table_row < 0:
                continue
            while not cache.reserve(stream, stream.computed + rows):
                # Only prompts behind this one may be pushed out; decodes of this step are settled.
                if not line or line[-1] is sequence or id(line[-1]) in granted:
                    rows = 0
                    break
                victim = line.pop()
                if victim.stream.table_row >= 0:
                    cache.release(victim.stream)
                    plan.preempted.append(victim)
            if rows:
                granted.add(id(sequence))
                plan.grants.append(Grant(sequence, rows))
                plan.rows += rows

        if plan.preempted:
            return plan  # pages are short: admitting now would only thrash
        for sequence in waiting:
            if plan.rows >= budget:
                break
            stream = sequence.stream
            # Beside what is held: its known tokens, one more, and a page for each running one.
            others = len(running) + len(plan.admitted)
            if not cache.attach(stream, headroom=others):
                break
            rows = min(stream.behind, cap, budget - plan.rows)
            reserved = cache.reserve(stream, stream.computed + rows)
            assert reserved, "attach promised the pages"
            plan.admitted.append(sequence)
            plan.grants.append(Grant(sequence, rows))
            plan.rows += rows
        return plan
