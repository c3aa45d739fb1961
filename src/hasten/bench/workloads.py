"""Prompts to run and to measure with: real files, questions, and generated tasks.

A workload is a list of ``Item``; each is what one line of ``hasten run``'s input says. Workloads
are deterministic: the same name and count give the same prompts on the same interpreter.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path

from hasten.api.run_items import Item
from hasten.decoding.params import SamplingParams
from hasten.training.corpus import SourceFile, split, standard_library
from hasten.training.tasks import all_tasks


class WorkloadError(ValueError):
    """Input that cannot be used; the text names file and line, or what to set."""


def code(count: int = 64, seed: int = 0) -> list[Item]:
    """Completion prompts cut from standard-library files that no bundled model was trained on.

    Each ends with the line that begins a function (``def ...``) and starts up to 40 whole lines
    before it, as far as 2000 characters reach. The files take turns; no prompt comes twice.
    """
    rng = random.Random(f"code {seed}")
    places = []  # of each file, in random order
    for file in rng.sample(_held_out_files(), len(_held_out_files())):
        lines = file.text.splitlines(keepends=True)
        starts = [i for i, line in enumerate(lines) if line.lstrip().startswith("def ")]
        places.append([(lines, at) for at in rng.sample(starts, len(starts))])
    prompts: dict[str, None] = {}  # in the order of the draw
    for place in chain.from_iterable(zip_longest(*places)):
        if len(prompts) == count:
            break
        if place is None:  # this file has no further function
            continue
        lines, at = place
        start = max(0, at - 40)
        while start < at and sum(map(len, lines[start : at + 1])) > 2000:
            start += 1
        prompts["".join(lines[start : at + 1])] = None
    if len(prompts) < count:
        raise WorkloadError(f"there are {len(prompts)} different prompts, not {count}")
    return [Item(f"code-{i}", prompt, category="code") for i, prompt in enumerate(prompts)]


@cache
def _held_out_files() -> list[SourceFile]:
    return split(standard_library())[1]


TASKS = {
    "copy.block": "copy",
    "edit": "edit",
    "retrieve.pairs": "key-value",
    "passage": "passages",
    "json": "json",
    "chat": "chat",
}
"""Generated tasks of the workload ``tasks``, with the categories that reports name."""


def tasks(count: int = 60, seed: int = 0, length: int = 384) -> list[Item]:
    """Generated tasks with answers that need their context: copies and edits of code, look-ups,
    questions about passages, JSON, chat; the categories take turns.

    They are of the kinds that the bundled models were trained on, with fresh random parts and, for
    edits, code that was held out. ``length`` is about what prompt and answer have in tokens.
    """
    rng = random.Random(f"tasks {seed}")
    held_out = [file.text for file in _held_out_files()]
    made = {task.name: task for task, _ in all_tasks(held_out)}
    items = []
    for number in range(count):
        name, category = list(TASKS.items())[number % len(TASKS)]
        sample = made[name].generate(rng, length, 1)
        items.append(Item(f"{category}-{number}", sample.prompt, category=category))
    return items


MT_BENCH = frozenset(
    ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
)
"""Kinds of MT-bench, which Spec-Bench reports as one."""


def spec_bench(count: int | None = None) -> list[Item]:
    """Spec-Bench questions (chat, translation, summaries, QA, maths, retrieval; two-turn chats).

    All in their order, or ``count`` of them, for which the six categories take turns.

    Source: Xia et al., "Unlocking Efficiency in Large Language Model Inference" (ACL 2024), with
    the categories of its evaluation.
    """
    try:
        path = data_folder() / "prompts" / "spec_bench_even.jsonl"
        items = list(read_items(path))
    except WorkloadError as error:
        raise WorkloadError(
            f"{error}. Spec-Bench's own file (github.com/hemingkx/Spec-Bench, "
            "data/spec_bench/question.jsonl) is read as it is: --workload question.jsonl"
        ) from None
    items = [
        replace(item, category="mt-bench") if item.category in MT_BENCH else item for item in items
    ]
    if count is None:
        return items
    kinds: dict[str, list[Item]] = {}
    for item in items:
        kinds.setdefault(item.category, []).append(item)
    turns = chain.from_iterable(zip_longest(*kinds.values()))
    return [item for item in turns if item is not None][:count]


def random_tokens(count: int, length: int, output: int, vocab: int, seed: int = 0) -> list[Item]:
    """Prompts of random tokens with forced output lengths: cost only, no meaning."""
    rng = random.Random(f"random {seed}")
    params = {"max_tokens": output, "ignore_eos": True, "temperature": 0}
    return [
        Item(f"random-{i}", tuple(rng.randrange(vocab) for _ in range(length)), params=params)
        for i in range(count)
    ]


WORKLOADS: dict[str, Callable[..., list[Item]]] = {
    "code": code,
    "tasks": tasks,
    "spec-bench": spec_bench,
}
"""Workloads that need nothing but a count, by the name that the command line uses."""


def workload(name: str, count: int | None = None) -> list[Item]:
    """A named workload. Raises ``WorkloadError`` for an unknown name."""
    if name not in WORKLOADS:
        raise WorkloadError(f"no workload '{name}'; there are: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]() if count is None else WORKLOADS[name](count)


def data_folder() -> Path:
    """Where data that is not part of the project lies: ``$HASTEN_DATA``."""
    folder = os.environ.get("HASTEN_DATA")
    if folder is None or not Path(folder).is_dir():
        raise WorkloadError(
            "this workload reads external data: set HASTEN_DATA to the folder that holds it "
            f"(prompts/, traces/, schemas/); it is {folder!r} now"
        )
    return Path(folder)


def read_items(path: Path) -> Iterator[Item]:
    """Lines of a JSONL file: ``prompt`` (text or token ids), ``turns`` or ``messages``.

    ``id`` (or ``question_id``) names the line, else its number does; ``params`` holds sampling
    parameters; ``category`` is for reports.

    Raises:
        WorkloadError: the file is missing, a line is not one of these, or an id comes twice; it
            names the line.
    """
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise WorkloadError(f"cannot read {path}: {error.strerror}") from None
    lines: dict[str, int] = {}
    with file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                item = _item(line, f"{path}:{number}", number)
                if item.id in lines:
                    raise WorkloadError(
                        f"{path}:{number}: id '{item.id}' is that of line {lines[item.id]} already"
                    )
                lines[item.id] = number
                yield item
        except UnicodeDecodeError as error:
            raise WorkloadError(f"{path} is not UTF-8 text ({error.reason})") from None
        except OSError as error:  # a folder opens, but cannot be read
            raise WorkloadError(f"cannot read {path}: {error.strerror}") from None


def _item(line: str, where: str, number: int) -> Item:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise WorkloadError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise WorkloadError(f"{where}: expected an object, found {type(row).__name__}")
    name = str(row.get("id", row.get("question_id", number)))
    params = row.get("params", {})
    if not isinstance(params, dict):
        raise WorkloadError(f"{where}: 'params' must be an object")
    if unknown := params.keys() - {f.name for f in fields(SamplingParams)}:
        raise WorkloadError(f"{where}: no sampling parameter is called '{min(unknown)}'")
    try:
        SamplingParams(**params)
    except (ValueError, TypeError) as error:
        raise WorkloadError(f"{where}: {error}") from None
    given = [key for key in ("prompt", "turns", "messages") if key in row]
    if len(given) != 1:
        raise WorkloadError(f"{where}: needs exactly one of 'prompt', 'turns' and 'messages'")
    value = row[given[0]]
    category = str(row.get("category", ""))
    if given[0] == "prompt":
        if isinstance(value, list) and all(type(t) is int for t in value):
            return Item(name, tuple(value), params=params, category=category)
        if isinstance(value, str):
            return Item(name, value, params=params, category=category)
        raise WorkloadError(f"{where}: 'prompt' must be text or a list of token ids")
    if not isinstance(value, list) or not value:
        raise WorkloadError(f"{where}: '{given[0]}' must be a list with something in it")
    if given[0] == "messages":
        if not all(isinstance(message, dict) for message in value):
            raise WorkloadError(f"{where}: 'messages' must hold objects with 'role' and 'content'")
        return Item(name, turns=(value,), params=params, category=category)
    if not all(isinstance(turn, str) for turn in value):
        raise WorkloadError(f"{where}: 'turns' must hold the user's texts")
    return Item(name, turns=tuple(value), params=params, category=category)
