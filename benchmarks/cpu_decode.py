"""Decoding on a CPU beside the engines that a user would pick: python benchmarks/cpu_decode.py

    HASTEN_PEERS=~/peers python benchmarks/cpu_decode.py --convert   # once: minutes, gigabytes
    HASTEN_PEERS=~/peers python benchmarks/cpu_decode.py             # measures, goes on if stopped
    python benchmarks/cpu_decode.py --report                         # the tables alone

Groups of one shape and one kind of weights are measured one after another. In a group every engine,
hasten too, has a process of its own (hasten.bench.peers), which is paused whenever it is not its
turn. Round 0 measures every engine in every case, one process at a time; peers that are more than
1.5x behind the best there, or not among the best two, leave the case, and the report lists them
with that figure. In the following rounds the remaining take turns, in rotating order. Every figure
goes to cells.jsonl at once; a run that was stopped goes on where it was.

Cases: `decode-N` is the rate at batch 1 behind N prompt tokens; `batch-8` that of eight sequences
with prompts of 128 together; `prefill-512` is 512 over the time to the first token; `step-R` is the
time of one step with R rows behind 128 tokens, logits and choice of all rows included.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.random_checkpoint import SHAPES, write  # noqa: E402
from hasten import _native  # noqa: E402
from hasten.bench.comparison import Spread  # noqa: E402
from hasten.bench.conditions import conditions  # noqa: E402
from hasten.bench.peers.engines import PEERS, Command, Peer, Setup  # noqa: E402
from hasten.bench.peers.process import RUNNERS, EngineProcess, PeerError  # noqa: E402

BEHIND = 1.5
KEEP = 2
STEPS = (1, 4, 8, 16)
LENGTH, SEQUENCES = 2176, 8


@dataclass(frozen=True)
class Case:
    """Prompts of a length, and how many tokens follow each; `new` 1 measures the prompt."""

    prompt: int
    new: int
    batch: int = 1

    def measure(self, process: EngineProcess, rng: random.Random) -> float:
        """Tokens per second."""
        prompts = [
            [rng.randrange(300, 4096) for _ in range(self.prompt)] for _ in range(self.batch)
        ]
        times = process.ask(do="generate", prompts=prompts, new=self.new)["times"]
        if self.new == 1:
            return float(self.prompt / times[0])
        return float(self.batch * (self.new - 1) / (times[-1] - times[0]))


PAGES = "codec=native(dtype=bfloat16)"
"""How hasten keeps keys and values: in as many bits as the peers do by default, or more."""

CASES = {
    "decode-128": Case(128, 25),
    "decode-2048": Case(2048, 17),
    "batch-8": Case(128, 13, batch=8),
    "prefill-512": Case(512, 1),
}
SHORT = {"decode-128": Case(128, 129)}  # of models whose token takes a millisecond


@dataclass(frozen=True)
class Group:
    """What is measured together: one shape, one kind of weights.

    ``compressed``: what `hasten compress rtn --weights` is told, empty for the checkpoint's own.
    ``targets``: case -> (ratio to the best peer, share of the roofline or None).
    ``steps``: whether steps of several rows are measured, too.
    """

    shape: str
    weights: str
    compressed: str
    targets: dict[str, tuple[float, float | None]]
    steps: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape} {self.weights}"

    def case(self, name: str) -> Case:
        return SHORT[name] if self.shape == "ref-small" else CASES[name]


FOUR, FOUR_ALL = "int4", "int4(head=int4)"
GROUPS = (
    Group("qwen0.5b", "bfloat16", "", {"decode-128": (1.15, 0.85)}),
    Group(
        "qwen0.5b",
        "int8",
        "int8",
        {
            "decode-128": (1.4, 0.85),
            "decode-2048": (1.6, None),
            "batch-8": (1.6, None),
            "prefill-512": (1.2, None),
        },
        steps=True,
    ),
    Group(
        "qwen0.5b",
        "int4",
        FOUR,
        {
            "decode-128": (1.4, 0.75),
            "decode-2048": (1.6, None),
            "batch-8": (1.6, None),
            "prefill-512": (1.2, None),
        },
        steps=True,
    ),
    Group(
        "qwen0.5b", "int4-head4", FOUR_ALL, {"decode-128": (1.4, 0.75), "decode-2048": (1.6, None)}
    ),
    Group("ref-small", "int8", "int8", {"decode-128": (1.0, None)}),
    Group("ref-small", "int4", FOUR, {"decode-128": (1.0, None)}),
    Group("ref-small", "int4-head4", FOUR_ALL, {"decode-128": (1.0, None)}),
    Group("llama1b", "bfloat16", "", {"decode-128": (1.15, None)}),
    Group(
        "llama1b",
        "int8",
        "int8",
        {"decode-128": (1.2, None), "prefill-512": (1.1, None), "batch-8": (1.4, None)},
    ),
    Group(
        "llama1b",
        "int4",
        FOUR,
        {"decode-128": (1.2, None), "prefill-512": (1.1, None), "batch-8": (1.4, None)},
    ),
    Group("llama1b", "int4-head4", FOUR_ALL, {"decode-128": (1.2, None)}),
)
STEP_TARGETS = {4: 1.1, 8: 1.2, 16: 1.5}  # time of a step against that of one row
LOSS_TARGET = 0.15  # of the rate, from context 128 to 2,048


class Records:
    """Lines of JSON on disk: what was measured, what could not be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines()]

    def add(self, **record: Any) -> None:
        self.lines.append(record)
        with self.path.open("a") as out:
            out.write(json.dumps(record) + "\n")

    def retry_absent(self) -> None:
        """Forget who could not run: that may have been mended since."""
        self.lines = [line for line in self.lines if line["what"] != "absent"]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return [
            line for line in self.lines if all(line.get(k) == value for k, value in wanted.items())
        ]

    def values(self, **wanted: Any) -> dict[int, float]:
        """Figures by round, without round 0."""
        return {r["round"]: r["value"] for r in self.find(what="cell", **wanted) if r["round"]}


def measure_group(group: Group, setup: Setup, records: Records, rounds: int, threads: int) -> None:
    """All rounds of a group that are not on record."""
    checkpoint = checkpoint_of(setup, group.shape)
    cases = [*group.targets, *(["steps"] if group.steps else [])]
    running: dict[str, EngineProcess] = {}
    try:
        for round_ in range(rounds + 1):
            todo = planned(group, records, cases, round_)
            if not todo:
                continue
            speed = _native.read_bandwidth(1 << 30, 5)
            records.add(what="bandwidth", group=group.name, round=round_, value=speed)
            names = list(dict.fromkeys(name for name, _ in todo))
            turn = round_ % len(names)
            for name in [*names[turn:], *names[:turn]]:
                if name not in running:
                    try:
                        running[name] = start(name, group, setup, checkpoint, records, threads)
                    except PeerError as error:
                        records.add(what="absent", group=group.name, engine=name, why=str(error))
                        print(f"  {error}", flush=True)
                        continue
                for case in [case for n, case in todo if n == name]:
                    try:
                        measure_cell(group, name, running[name], case, round_, records)
                    except PeerError as error:
                        records.add(
                            what="absent", group=group.name, engine=name, case=case, why=str(error)
                        )
                        print(f"  {error}", flush=True)
                if not round_:  # all at once might not fit into memory
                    running.pop(name).close()
    finally:
        for process in running.values():
            process.close()


def planned(
    group: Group, records: Records, cases: Sequence[str], round_: int
) -> list[tuple[str, str]]:
    """(engine, case) pairs of a round that are still to be measured."""
    pairs = []
    for name in ["hasten", *(peer.name for peer in PEERS if group.weights in peer.forms)]:
        gone = records.find(what="absent", group=group.name, engine=name)
        if any("case" not in line for line in gone):
            continue
        for case in cases:
            if case == "steps" and name not in ("hasten", "llama.cpp"):
                continue  # the others' interfaces give no logits of several rows
            first = "step-1" if case == "steps" else case
            cell = {"what": "cell", "group": group.name, "engine": name, "case": first}
            if any(line["case"] == case for line in gone) or records.find(**cell, round=round_):
                continue
            if round_ and case != "steps" and name not in kept(group, records, case):
                continue
            pairs.append((name, case))
    return pairs


def kept(group: Group, records: Records, case: str) -> list[str]:
    """hasten, and the peers that round 0 showed to be near the best."""
    first = {
        line["engine"]: line["value"]
        for line in records.find(what="cell", group=group.name, case=case, round=0)
    }
    peers = sorted((n for n in first if n != "hasten"), key=lambda n: -first[n])
    near = [n for n in peers if first[n] * BEHIND >= first[peers[0]]]
    return ["hasten", *near[:KEEP]]


def start(
    name: str, group: Group, setup: Setup, checkpoint: Path, records: Records, threads: int
) -> EngineProcess:
    """A loaded engine that has run once."""
    began = time.perf_counter()
    facts: dict[str, Any] = {}
    if name == "hasten":
        model = hasten_checkpoint(setup, group, checkpoint)
        process = EngineProcess(
            name, [sys.executable, RUNNERS / HASTEN.runner], setup.environment(threads)
        )
        try:
            facts = process.ask(
                do="load",
                model=str(model),
                weights=PAGES,  # the folder says how weights are held
                threads=threads,
                length=LENGTH,
                sequences=SEQUENCES,
            )
        except BaseException:
            process.close()
            raise
        label = f"{facts.pop('engine')} {facts.pop('version')} {group.weights}"
    else:
        (peer,) = (peer for peer in PEERS if peer.name == name)
        process, label = setup.start(
            peer, checkpoint, group.weights, threads=threads, length=LENGTH, sequences=SEQUENCES
        )
    facts |= {"label": label, "load_seconds": round(time.perf_counter() - began, 2)}
    records.add(what="engine", group=group.name, engine=name, **facts)
    process.ask(do="generate", prompts=[list(range(300, 364))], new=8)
    return process


def measure_cell(
    group: Group, name: str, process: EngineProcess, case: str, round_: int, records: Records
) -> None:
    where = {"what": "cell", "group": group.name, "engine": name, "round": round_}
    if case == "steps":
        told = process.ask(do="verify", context=128, rows=STEPS, repeats=5)["seconds"]
        for rows in STEPS:
            records.add(**where, case=f"step-{rows}", value=1e3 * median(told[str(rows)]))
        shown = " / ".join(f"{1e3 * median(told[str(rows)]):.1f}" for rows in STEPS) + " ms"
    else:
        rng = random.Random(f"{group.shape} {case} {round_}")  # the same prompts for everybody
        began = time.perf_counter()
        value = group.case(case).measure(process, rng)
        if not round_ and time.perf_counter() - began < 2:  # one cold figure should not decide
            value = max(value, group.case(case).measure(process, rng))
        records.add(**where, case=case, value=value)
        shown = f"{value:.1f}"
    print(f"{group.name} {case} round {round_}: {name} {shown}", flush=True)


def hasten_checkpoint(setup: Setup, group: Group, checkpoint: Path, convert: bool = False) -> Path:
    """Quantized weights are read as a user would keep them: written once by `hasten compress`."""
    if not group.compressed:
        return checkpoint
    return setup.converted(HASTEN, checkpoint, group.compressed, convert)


def _compress(setup: Setup, checkpoint: Path, form: str, target: Path) -> list[Command]:
    command = [sys.executable, "-m", "hasten.cli.main", "compress", "rtn", checkpoint]
    return [[*command, "-o", target, "--weights", form]]


HASTEN = Peer("hasten", "", "hasten_runner.py", {}, _compress)


def checkpoint_of(setup: Setup, shape: str) -> Path:
    """Random weights in a shape, below ``$HASTEN_PEERS``; written on first use."""
    assert setup.folder is not None
    folder = setup.folder / "checkpoints" / shape
    if not folder.exists():
        part = folder.with_name(f"part-{shape}")
        write(part, SHAPES[shape])
        part.rename(folder)
    return folder


# ---- report -----------------------------------------------------------------------------------


def report(records: Records, groups: Iterable[Group], folder: Path) -> Path:
    """``report.md`` and ``report.png`` from what is on record."""
    rows = [row for group in groups for row in [*rates(records, group), *steps(records, group)]]
    head = "| case | best peer | its figure | hasten | ratio | wanted | share of roofline | met |"
    lines = [
        "# Decoding on a CPU, beside other engines",
        "",
        "Random weights in real shapes; tokens/s; median (min-max) over interleaved rounds, ratios",
        "round by round. Share of roofline: the bytes of hasten's weights (head included, keys and",
        "values not) times its rate, over what a plain read of 1 GiB reached in the same rounds.",
        "`int4` has an 8-bit head, `int4-head4` a 4-bit one. hasten keeps keys and values in",
        "bfloat16, llama.cpp in float16, OpenVINO in 8 bits.",
        "How: docstring of [cpu_decode.py](../cpu_decode.py), [peers](../../docs/peers.md).",
        "",
        head,
        "|" + "---|" * (head.count("|") - 1),
        *(row.markdown() for row in rows),
    ]
    if plot(folder / "report.png", rows):
        lines += ["", "![ratio to the best peer](report.png)"]
    lines += ["", "## Every engine in the first round", "", *first_round(records, groups)]
    lines += ["", "## Memory and load", "", *memory(records, groups), ""]
    lines += [conditions().markdown()]
    out = folder / "report.md"
    out.write_text("\n".join(lines))
    return out


@dataclass
class Line:
    """One row of the table."""

    case: str
    best: str
    theirs: Spread | None
    ours: Spread
    ratio: Spread | None
    wanted: str
    share: Spread | None
    met: bool | None

    def markdown(self) -> str:
        met = {True: "yes", False: "**no**", None: ""}[self.met]
        share = f"{self.share} %" if self.share else ""
        ratio = f"{self.ratio}x" if self.ratio else ""
        cells = [self.case, self.best, self.theirs or "", self.ours, ratio, self.wanted, share, met]
        return "| " + " | ".join(map(str, cells)) + " |"


def rates(records: Records, group: Group) -> list[Line]:
    """The cases of a group, and what a long context costs."""
    lines = []
    for case, (wanted, share_wanted) in group.targets.items():
        ours = records.values(group=group.name, case=case, engine="hasten")
        if not ours:
            continue
        rivals = {
            name: values
            for name in kept(group, records, case)[1:]
            if (values := records.values(group=group.name, case=case, engine=name))
        }
        best = max(rivals, key=lambda name: median(rivals[name].values()), default=None)
        theirs = rivals[best] if best else {}
        common = sorted(ours.keys() & theirs.keys())
        ratio = Spread([ours[r] / theirs[r] for r in common]) if common else None
        share = None
        if group.case(case).batch == 1 and group.case(case).new > 1 and group.shape != "ref-small":
            speed = {
                r["round"]: r["value"] for r in records.find(what="bandwidth", group=group.name)
            }
            nbytes = records.find(what="engine", group=group.name, engine="hasten")[-1][
                "weight_bytes"
            ]
            share = Spread([100 * ours[r] * nbytes / speed[r] for r in ours])
        text = f"≥ {wanted}x" + (f", ≥ {100 * share_wanted:.0f} %" if share_wanted else "")
        met = None
        if ratio:
            met = ratio.median >= wanted
            if share_wanted and share:
                met = met and share.median >= 100 * share_wanted
        label = label_of(records, group, best) if best else "none ran"
        spread = Spread(list(theirs.values())) if theirs else None
        mine = Spread(list(ours.values()))
        lines.append(Line(f"{group.name} {case}", label, spread, mine, ratio, text, share, met))
    short, long = (
        records.values(group=group.name, case=f"decode-{n}", engine="hasten") for n in (128, 2048)
    )
    if common := sorted(short.keys() & long.keys()):
        kept_share = Spread([100 * long[r] / short[r] for r in common])
        least = 100 * (1 - LOSS_TARGET)
        lines.append(
            Line(
                f"{group.name} rate at 2048 over rate at 128, %",
                "",
                None,
                kept_share,
                None,
                f"≥ {least:.0f} %",
                None,
                kept_share.median >= least,
            )
        )
    return lines


def steps(records: Records, group: Group) -> list[Line]:
    """A step of several rows against one of one row, each engine against itself."""
    lines = []
    for rows, wanted in STEP_TARGETS.items() if group.steps else ():
        against: dict[str, Spread] = {}
        for name in ("hasten", "llama.cpp"):
            one, many = (
                records.values(group=group.name, case=f"step-{n}", engine=name) for n in (1, rows)
            )
            if common := sorted(one.keys() & many.keys()):
                against[name] = Spread([many[r] / one[r] for r in common])
        if "hasten" not in against:
            continue
        ours, theirs = against["hasten"], against.get("llama.cpp")
        lines.append(
            Line(
                f"{group.name} step of {rows} rows, times a step of 1",
                label_of(records, group, "llama.cpp") if theirs else "",
                theirs,
                ours,
                None,
                f"≤ {wanted}",
                None,
                ours.median <= wanted,
            )
        )
    return lines


def first_round(records: Records, groups: Iterable[Group]) -> list[str]:
    """What every engine reached before the slower ones left, and who could not run."""
    lines = ["| group | case | figures of one round |", "|---|---|---|"]
    missing = []
    for group in groups:
        cells = records.find(what="cell", group=group.name, round=0)
        for case in dict.fromkeys(cell["case"] for cell in cells):
            found = [(c["engine"], c["value"]) for c in cells if c["case"] == case]
            found.sort(key=lambda pair: pair[1], reverse=not case.startswith("step"))
            figures = ", ".join(f"{engine} {value:.3g}" for engine, value in found)
            unit = ", ms" if case.startswith("step") else ""
            lines.append(f"| {group.name} | {case}{unit} | {figures} |")
        missing += [
            f"- {group.name}: {line['why']}"
            for line in records.find(what="absent", group=group.name)
        ]
    return [*lines, "", *dict.fromkeys(missing)]


def memory(records: Records, groups: Iterable[Group]) -> list[str]:
    """hasten's peak against what it has to hold, and seconds from the start to a loaded model."""
    lines = [
        "| group | weights MB | room for pages MB | peak MB until loaded | loaded after s |",
        "|---|---|---|---|---|",
    ]
    for group in groups:
        for facts in records.find(what="engine", group=group.name, engine="hasten")[-1:]:
            lines.append(
                f"| {group.name} | {facts['weight_bytes'] / 1e6:.0f} "
                f"| {facts['kv_bytes'] / 1e6:.0f} | {facts['peak_bytes'] / 1e6:.0f} "
                f"| {facts['load_seconds']:.1f} |"
            )
    return lines


def label_of(records: Records, group: Group, name: str) -> str:
    return str(records.find(what="engine", group=group.name, engine=name)[-1]["label"])


def plot(path: Path, rows: Sequence[Line]) -> bool:
    """Ratios to the best peer with their spread; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [(row.case, row.ratio, row.wanted) for row in rows if row.ratio]
    if not shown:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(shown) + 1.2))
    for at, (_, ratio, wanted) in enumerate(shown):
        low, high = min(ratio.values), max(ratio.values)
        error = [[ratio.median - low], [high - ratio.median]]
        axes.barh(at, ratio.median, xerr=error, color="#4878a8", capsize=2)
        goal = float(wanted.removeprefix("≥ ").split("x")[0])
        axes.plot([goal, goal], [at - 0.4, at + 0.4], color="#c04040")
    axes.set_yticks(range(len(shown)), [case for case, _, _ in shown], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times the best other engine, same rounds (red: wanted)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="groups whose name holds this, as 'qwen0.5b int8'"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=_native.get_num_threads())
    parser.add_argument("--convert", action="store_true", help="make checkpoints, measure nothing")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "cpu-decode")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    groups = [group for group in GROUPS if args.only in group.name]
    records = Records(args.out / "cells.jsonl")
    if not args.report:
        setup = Setup.find()
        if setup.folder is None:
            parser.error("HASTEN_PEERS must name the folder of the other engines: docs/peers.md")
        _native.set_num_threads(args.threads)
        if not args.convert:
            records.retry_absent()
        for group in groups:
            if args.convert:
                convert_group(setup, group)
            else:
                measure_group(group, setup, records, args.rounds, args.threads)
    if not args.convert:
        print(f"wrote {report(records, groups, args.out)}")


def convert_group(setup: Setup, group: Group) -> None:
    checkpoint = checkpoint_of(setup, group.shape)
    print(hasten_checkpoint(setup, group, checkpoint, convert=True), flush=True)
    for peer in PEERS:
        if group.weights in peer.forms:
            try:
                setup.python(peer)
                print(
                    setup.converted(peer, checkpoint, peer.forms[group.weights], True), flush=True
                )
            except PeerError as error:
                print(error, flush=True)


if __name__ == "__main__":
    main()
