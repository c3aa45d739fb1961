"""The tables of ``--profile``: time by operation, bandwidth, and the roofline of a decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from hasten.engine.engine import Engine
    from hasten.engine.profile import Profile, Steps


def show(profile: Profile, engine: Engine) -> None:
    """Print what was measured to standard error."""
    from rich.console import Console

    from hasten import _native

    # as for the line of figures: a model that fits a cache is held against that cache
    bandwidth = _native.read_bandwidth(min(engine.model.weight_bytes, 1 << 30))
    console = Console(stderr=True)
    for name, steps in (("decode steps", profile.decode), ("other steps", profile.other)):
        if steps.count:
            console.print(table(name, steps, bandwidth))
    if profile.decode.count:
        console.print(roofline(profile.decode, engine, bandwidth))


def table(name: str, steps: Steps, bandwidth: float) -> Table:
    """Time, calls and bytes by operation, a step; ``roof`` is the share of the read bandwidth.

    Text is made, and the caller works, between steps.
    """
    from rich.table import Table

    whole = steps.seconds + steps.between
    made = Table(title=f"{steps.count} {name}, {steps.rows / steps.count:.1f} rows each")
    made.add_column("operation", no_wrap=True)
    for column in ("calls", "µs", "share", "µs/call", "MB", "GB/s", "roof"):
        made.add_column(column, justify="right")

    def row(what: str, seconds: float, calls: int = 0, nbytes: int = 0) -> None:
        speed = nbytes / seconds if seconds else 0.0
        made.add_row(
            what,
            f"{calls / steps.count:.1f}" if calls else "",
            f"{1e6 * seconds / steps.count:.1f}",
            f"{100 * seconds / whole:.1f} %",
            f"{1e6 * seconds / calls:.1f}" if calls else "",
            f"{nbytes / steps.count / 1e6:.2f}" if nbytes else "",
            f"{speed / 1e9:.1f}" if nbytes else "",
            f"{100 * speed / bandwidth:.0f} %" if nbytes else "",
        )

    by_time = sorted(steps.operations.items(), key=lambda item: -item[1].seconds)
    for operation, spent in by_time:
        row(operation, spent.seconds, spent.calls, spent.bytes)
    made.add_section()
    calls = sum(spent.calls for _, spent in by_time)
    row("all operations", steps.native_seconds, calls, sum(s.bytes for _, s in by_time))
    row("Python in the step", steps.seconds - steps.native_seconds)
    row("between steps", steps.between)
    made.add_section()
    row("a step", whole)
    return made


def roofline(steps: Steps, engine: Engine, bandwidth: float) -> str:
    """One line: the bytes of a decode step at the speed of a plain read, beside what it took."""
    weights, cached = engine.model.weight_bytes, steps.kv_bytes / steps.count
    least = (weights + cached) / bandwidth
    took = (steps.seconds + steps.between) / steps.count
    line = (
        f"roofline of a decode step: {weights / 1e6:.1f} MB of weights and {cached / 1e6:.2f} MB "
        f"of keys and values at {bandwidth / 1e9:.1f} GB/s are {1000 * least:.3f} ms; it took "
        f"{1000 * took:.3f} ms: {100 * least / took:.0f} %.\n"
        f"{steps.recorded} of {steps.count} decode steps ran as one native call"
    )
    reason = engine.unrecorded
    return line + (f" ({reason})." if reason else ".")
