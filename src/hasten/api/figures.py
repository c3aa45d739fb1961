"""The line of figures that ends a run: what a user would otherwise have to time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from hasten.api.llm import LLM
from hasten.engine.engine import Engine


def bandwidth_share(engine: Engine) -> tuple[float, float]:
    """(achieved, achievable) bytes per second of the decode steps so far.

    Achieved: weights once a step, keys and values of every context, over the time of the model's
    forward. Achievable: a plain parallel read of a buffer as large as the weights, measured now,
    so that a model which fits a cache is held against that cache (1 GiB of it fits none).
    """
    from hasten import _native

    stats = engine.stats
    moved = stats.decode_steps * engine.model.weight_bytes + stats.decode_kv_bytes
    achieved = moved / stats.decode_seconds if stats.decode_seconds else 0.0
    return achieved, _native.read_bandwidth(min(engine.model.weight_bytes, 1 << 30))


def line_of_figures(llm: LLM, ttfts: Sequence[float] = (), seconds: float | None = None) -> str:
    """One line: time to first token, tokens/s, share of memory bandwidth, and drafts if any.

    ``ttfts`` are the seconds to the first token of each output, the last stream's by default;
    ``seconds`` is the time of the whole run, that of the engine's steps by default.
    """
    stats = llm.stats
    parts = []
    if not ttfts and llm.last_figures is not None and llm.last_figures.ttft is not None:
        ttfts = [llm.last_figures.ttft]
    if ttfts:
        parts.append(f"first token {1000 * median(ttfts):.0f} ms" + " (median)" * (len(ttfts) > 1))
    elapsed = seconds if seconds is not None else stats.step_seconds
    if elapsed:
        parts.append(f"{stats.tokens / elapsed:.1f} tokens/s ({stats.tokens} tokens)")
    if stats.decode_steps:
        achieved, achievable = bandwidth_share(llm.engine)
        parts.append(
            f"{100 * achieved / achievable:.0f} % of memory bandwidth "
            f"({achieved / 1e9:.1f} of {achievable / 1e9:.1f} GB/s, "
            f"{llm.engine.model.weight_bytes / 1e6:.0f} MB of weights)"
        )
    drafts = stats.speculation
    if drafts.drafted:
        parts.append(
            f"{drafts.accepted} of {drafts.drafted} drafted tokens accepted, "
            f"{drafts.tau:.2f} tokens a pass"
        )
    if stats.preemptions:
        parts.append(f"{stats.preemptions} preemptions")
    return " | ".join(parts)
