"""Generated tasks that need real context: copying, retrieval, lists, arithmetic, JSON, edits, chat.

A task turns a random generator and a length into a ``Sample``: segments of text, some of which are
answers. Only answers are trained on, because the rest is mostly random: the loss then asks for
nothing but the ability, and induction forms several times sooner. ``length`` counts tokens and is
approximate (a task knows no tokenizer).
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hasten.training.bpe import ASSISTANT, END, SYSTEM, USER
from hasten.training.conversation import SYSTEM_PROMPTS, Exchange, passage, small_exchange
from hasten.training.words import FIRST_NAMES, WORDS

CHARACTERS_PER_TOKEN = 2.4


@dataclass(frozen=True)
class Segment:
    """A piece of text; an answer is what the model must produce, up to and with the stop mark."""

    text: str
    answer: bool = False


@dataclass(frozen=True)
class Sample:
    """One generated document. Its last answer is the one that validation asks for."""

    task: str
    segments: tuple[Segment, ...]
    stop: str

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    @property
    def prompt(self) -> str:
        """Everything before the last answer."""
        return "".join(segment.text for segment in self.segments[: self._last()])

    @property
    def expected(self) -> str:
        """The last answer without its stop mark."""
        return self.segments[self._last()].text.removesuffix(self.stop)

    def check(self, output: str) -> bool:
        """Whether generated text, cut at the stop mark, is exactly the expected answer."""
        return output.split(self.stop, 1)[0] == self.expected

    def _last(self) -> int:
        return max(i for i, segment in enumerate(self.segments) if segment.answer)


class Task(Protocol):
    """``queries`` bounds the number of questions about one context; 0 means as many as fit."""

    @property
    def name(self) -> str: ...

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample: ...


def ask(text: str) -> Segment:
    return Segment(text)


def answer(text: str) -> Segment:
    return Segment(text, answer=True)


# --- random material -----------------------------------------------------------------------------


def letters(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(low, high)))


def digits(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choices(string.digits, k=rng.randint(low, high)))


ATOMS: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: rng.choice(WORDS),
    lambda rng: f"{rng.choice(WORDS)}_{rng.choice(WORDS)}",
    lambda rng: f"{rng.choice(WORDS)}_{digits(rng, 1, 2)}",
    lambda rng: letters(rng, 3, 6),
    lambda rng: rng.choice(FIRST_NAMES),
    lambda rng: f"{letters(rng, 2, 3)}{digits(rng, 2, 3)}",
    lambda rng: rng.choice(WORDS).capitalize() + rng.choice(WORDS).capitalize(),
)
VALUES: tuple[Callable[[random.Random], str], ...] = (
    *ATOMS,
    lambda rng: digits(rng, 2, 5),
    lambda rng: f"{rng.choice(WORDS)} {rng.choice(WORDS)}",
    lambda rng: "".join(rng.choices("0123456789abcdef", k=6)),
)


def distinct(rng: random.Random, make: Callable[[random.Random], str], count: int) -> list[str]:
    """Up to ``count`` different strings."""
    found: dict[str, None] = {}
    for _ in range(count * 3):
        if len(found) == count:
            break
        found[make(rng)] = None
    return list(found)


def table(rng: random.Random, characters: int, overhead: int) -> list[tuple[str, str]]:
    """Pairs of distinct keys and values that fill about ``characters``, ``overhead`` each."""
    make_key, make_value = rng.choice(ATOMS), rng.choice(VALUES)
    pairs: list[tuple[str, str]] = []
    used = 0
    seen: set[str] = set()
    for _ in range(4000):
        if used >= characters and len(pairs) >= 2:
            break
        key, value = make_key(rng), make_value(rng)
        if key not in seen:
            seen.add(key)
            pairs.append((key, value))
            used += len(key) + len(value) + overhead
    return pairs


def asked(rng: random.Random, pairs: list[tuple[str, str]], queries: int) -> list[tuple[str, str]]:
    """The pairs to ask for, each once, in random order."""
    limit = queries or rng.choice((1, 4, len(pairs) // 2, len(pairs)))
    return rng.sample(pairs, min(max(1, limit), len(pairs)))


def context_share(rng: random.Random, length: int, queries: int) -> int:
    """Characters for the context, leaving room for the questions."""
    share = 0.92 if queries == 1 else rng.uniform(0.45, 0.7)
    return int(length * CHARACTERS_PER_TOKEN * share)


# --- retrieval -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RetrievePairs:
    """``key: value`` lines, then keys to complete."""

    name: str = "retrieve.pairs"

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample:
        mark = rng.choice((":", " =", " ->", " is"))
        pairs = table(rng, context_share(rng, length, queries), overhead=4)
        body = "".join(f"{key}{mark} {value}\n" for key, value in pairs)
        segments = [ask(body + rng.choice(("---\n", "\nLook up:\n", "\n")))]
        for key, value in asked(rng, pairs, queries):
            segments += [ask(f"{key}{mark}"), answer(f" {value}\n")]
        return Sample(self.name, tuple(segments), "\n")


@dataclass(frozen=True)
class RetrieveDict:
    """A Python dictionary, then subscripts at a prompt."""

    name: str = "retrieve.dict"

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample:
        pairs = table(rng, context_share(rng, length, queries), overhead=11)
        label = rng.choice(("table", "data", "config", "d", "settings", "index"))
        body = "".join(f"    '{key}': '{value}',\n" for key, value in pairs)
        segments = [ask(f"{label} = {{\n{body}}}\n")]
        for key, value in asked(rng, pairs, queries):
            segments += [ask(f">>> {label}['{key}']\n"), answer(f"'{value}'\n")]
        return Sample(self.name, tuple(segments), "\n")


@dataclass(frozen=True)
class RetrieveFunction:
    """Function definitions that return constants, then calls."""

    name: str = "retrieve.function"

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample:
        make_value = rng.choice(VALUES)
        names = distinct(rng, rng.choice(ATOMS[1:4]), max(2, length // 22))
        pairs = [(name, make_value(rng)) for name in names]
        limit = context_share(rng, length, queries)
        body, kept = "", []
        for name, value in pairs:
            body += f"def {name}():\n    return '{value}'\n\n"
            kept.append((name, value))
            if len(body) > limit:
                break
        segments = [ask(body)]
        for name, value in asked(rng, kept, queries):
            segments += [ask(f">>> {name}()\n"), answer(f"'{value}'\n")]
        return Sample(self.name, tuple(segments), "\n")


@dataclass(frozen=True)
class RetrieveChat:
    """A table in a user's turn, then questions about it, turn by turn."""

    name: str = "retrieve.chat"

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample:
        pairs = table(rng, context_share(rng, length, queries), overhead=5)
        topic, one = rng.choice(
            (
                ("codes", "What is the code for {}?"),
                ("passwords", "What is the password of {}?"),
                ("values", "Which value belongs to {}?"),
                ("settings", "What is {} set to?"),
                ("entries", "Look up {}."),
                ("places", "Where is {}?"),
            )
        )
        line = rng.choice(("{}: {}", "{} = {}", "- {}: {}", "{} -> {}"))
        body = "\n".join(line.format(key, value) for key, value in pairs)
        opening = rng.choice((f"Here are the {topic}:\n", f"These are the {topic}.\n", ""))
        segments = []
        before = f"{opening}{body}\n"
        for key, value in asked(rng, pairs, queries):
            segments.append(ask(f"{USER}{before}{one.format(key)}{END}{ASSISTANT}"))
            segments.append(answer(f"{value}{END}"))
            before = ""
        return Sample(self.name, tuple(segments), END)


# --- copying -------------------------------------------------------------------------------------


def random_line(rng: random.Random) -> str:
    make = rng.choice(VALUES)
    return rng.choice((" ", " ", ", ", "-")).join(make(rng) for _ in range(rng.randint(1, 5)))


def random_lines(rng: random.Random, characters: int) -> list[str]:
    lines = [random_line(rng)]
    while sum(map(len, lines)) + 3 * len(lines) < characters:
        lines.append(random_line(rng))
    return lines


@dataclass(frozen=True)
class CopyBlock:
    """Random lines, then the same lines again."""

    name: str = "copy.block"

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample:
        lines = random_lines(rng, int(length * CHARACTERS_PER_TOKEN * 0.47))
        body = "\n".join(lines)
        if rng.random() < 0.5:
            verb = rng.choice(("Repeat this", "Copy this", "Say exactly this", "Echo"))
            prompt = f"{USER}{verb}:\n{body}{END}{ASSISTANT}"
            return Sample(self.name, (ask(prompt), answer(f"{body}{END}")), END)
        prompt = f"# text\n{body}\n# copy\n"
        return Sample(self.name, (ask(prompt), answer(f"{body}\n# end")), "\n# end")


@dataclass(frozen=True)
class CopyLine:
    """Numbered random lines, then single lines by their number."""

    name: str = "copy.line"

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample:
        lines = random_lines(rng, int(context_share(rng, length, queries) * 0.85))
        numbered = [(f"{i}", line) for i, line in enumerate(lines, start=1)]
        body = "".join(f"{number}| {line}\n" for number, line in numbered)
        wanted = asked(rng, numbered, queries)
        if rng.random() < 0.5:
            segments = [ask(body + "---\n")]
            for number, line in wanted:
                segments += [ask(f"{number}|"), answer(f" {line}\n")]
            return Sample(self.name, tuple(segments), "\n")
        segments = []
        before = body
        for number, line in wanted:
            segments.append(ask(f"{USER}{before}What is line {number}?{END}{ASSISTANT}"))
            segments.append(answer(f"{line}{END}"))
            before = ""
        return Sample(self.name, tuple(segments), END)


# --- lists and numbers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ListOperation:
    """Python list expressions evaluated at a prompt."""

    name: str = "list"

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample:
        segments: list[Segment] = []
        used = 0.0
        while True:
            items: list[int] | list[str]
            if rng.random() < 0.5:
                items = [rng.randint(0, 99) for _ in range(rng.randint(2, 8))]
            else:
                items = [rng.choice(WORDS) for _ in range(rng.randint(2, 6))]
            segments.append(ask(f">>> a = {items!r}\n"))
            for _ in range(1 if queries == 1 else rng.randint(1, 4)):
                question, result = self._operation(rng, items)
                segments += [ask(f">>> {question}\n"), answer(f"{result}\n")]
                used += len(items) * 5 + 10
            if queries == 1 or used > length * 0.8:
                return Sample(self.name, tuple(segments), "\n")

    @staticmethod
    def _operation(rng: random.Random, items: list[int] | list[str]) -> tuple[str, str]:
        one = rng.choice(items)
        at = rng.randrange(len(items))
        table: tuple[tuple[str, object], ...] = (
            ("a[::-1]", items[::-1]),
            ("sorted(a)", sorted(items)),
            ("max(a)", max(items)),
            ("min(a)", min(items)),
            ("len(a)", len(items)),
            (f"a.count({one!r})", items.count(one)),  # type: ignore[arg-type]
            (f"a.index({one!r})", items.index(one)),  # type: ignore[arg-type]
            (f"a[{at}]", items[at]),
            ("a[-1]", items[-1]),
            (f"a[:{at}]", items[:at]),
            (f"{one!r} in a", True),
            ("a + a", items + items),
        )
        question, result = rng.choice(table)
        return question, repr(result)


@dataclass(frozen=True)
class Arithmetic:
    """Sums, differences, small products and comparisons."""

    name: str = "arithmetic"

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample:
        chat = rng.random() < 0.3
        segments: list[Segment] = []
        count = 1 if queries == 1 else max(1, length // 14)
        for _ in range(count):
            question, result = self._expression(rng)
            if chat:
                form = rng.choice(("What is {}?", "Compute {}.", "{}", "How much is {}?"))
                segments.append(ask(f"{USER}{form.format(question)}{END}{ASSISTANT}"))
                segments.append(answer(f"{result}{END}"))
            else:
                segments += [ask(f">>> {question}\n"), answer(f"{result}\n")]
        return Sample(self.name, tuple(segments), END if chat else "\n")

    @staticmethod
    def _expression(rng: random.Random) -> tuple[str, str]:
        size = rng.choice((10, 100, 100, 1000))
        a, b = rng.randrange(size), rng.randrange(size)
        kind = rng.choice("++--*<>=")
        if kind == "*":
            a, b = rng.randrange(13), rng.randrange(13)
            return f"{a} * {b}", str(a * b)
        if kind == "+":
            return f"{a} + {b}", str(a + b)
        if kind == "-":
            return f"{a} - {b}", str(a - b)
        if kind == "=":
            b = a if rng.random() < 0.5 else b
            return f"{a} == {b}", str(a == b)
        return f"{a} {kind} {b}", str(a < b if kind == "<" else a > b)


# --- JSON ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonFill:
    """A JSON schema and values in prose or lines, answered by an object that fits the schema."""

    name: str = "json"

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample:
        count = max(2, min(12, length // 40 if queries == 1 else rng.randint(2, 6)))
        keys = distinct(rng, rng.choice(ATOMS[:4]), count)
        values: dict[str, object] = {}
        kinds: dict[str, dict[str, str]] = {}
        for key in keys:
            kind = rng.choice(("string", "integer", "boolean", "string"))
            kinds[key] = {"type": kind}
            if kind == "string":
                values[key] = rng.choice(VALUES)(rng)
            elif kind == "integer":
                values[key] = rng.randint(0, 999)
            else:
                values[key] = rng.random() < 0.5
        shuffled = list(keys)
        rng.shuffle(shuffled)
        facts = "\n".join(f"{key}: {self._plain(values[key])}" for key in shuffled)
        schema = {"type": "object", "properties": kinds, "required": keys}
        verb = rng.choice(("Write JSON for this schema", "Fill in the schema", "Answer in JSON"))
        prompt = f"{USER}{verb}:\n{json.dumps(schema)}\nValues:\n{facts}{END}{ASSISTANT}"
        return Sample(self.name, (ask(prompt), answer(json.dumps(values) + END)), END)

    @staticmethod
    def _plain(value: object) -> str:
        return ("yes" if value else "no") if isinstance(value, bool) else str(value)


# --- edits of code -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodeEdit:
    """Real code, then the same code with one change: renamed, one line removed, or untouched.

    Most of the answer is already in the prompt, which is what speculation by lookup lives on.
    """

    sources: Sequence[str]
    name: str = "edit"

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample:
        body = self._snippet(rng, int(length * 1.35))
        kind = rng.choice(("rename", "rename", "delete", "insert", "same"))
        request, changed = "Copy this code without changes.", body
        if kind == "rename":
            names = sorted(set(re.findall(r"\b[a-z_][a-z_]{2,}\b", body)))
            if names:
                old, new = rng.choice(names), rng.choice(ATOMS[:2])(rng)
                request = f"Rename {old} to {new} in this code."
                changed = re.sub(rf"\b{old}\b", new, body)
        elif kind in ("delete", "insert"):
            lines = body.split("\n")
            at = rng.randrange(len(lines))
            if kind == "delete" and len(lines) > 2 and lines[at].strip():
                request = f"Remove this line from the code: {lines[at].strip()}"
                changed = "\n".join(lines[:at] + lines[at + 1 :])
                if lines.count(lines[at]) > 1:
                    request, changed = "Copy this code without changes.", body
            elif kind == "insert":
                comment = f"# {rng.choice(WORDS)} {rng.choice(WORDS)}"
                request = f"Put the comment {comment} on top of this code."
                changed = f"{comment}\n{body}"
        prompt = f"{USER}{request}\n{body}{END}{ASSISTANT}"
        return Sample(self.name, (ask(prompt), answer(f"{changed}{END}")), END)

    def _snippet(self, rng: random.Random, characters: int) -> str:
        """Whole lines from a random place, about ``characters`` long, dedented, not blank."""
        for _ in range(20):
            text = rng.choice(self.sources)
            start = text.find("\n", rng.randrange(max(1, len(text) - characters))) + 1
            piece = text[start : start + characters]
            lines = piece.split("\n")[:-1]
            lines = [line.rstrip() for line in lines if line.strip()]
            if lines and "<|" not in piece:
                indent = min(len(line) - len(line.lstrip()) for line in lines)
                return "\n".join(line[indent:] for line in lines)
        return "x = 1\nprint(x)"


# --- conversation --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversation:
    """Several short exchanges of different kinds, sometimes under a system prompt."""

    name: str = "chat"

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample:
        segments: list[Segment] = []
        used = 0.0
        if rng.random() < 0.3:
            segments.append(ask(f"{SYSTEM}{rng.choice(SYSTEM_PROMPTS)}{END}"))
        while True:
            exchange: Exchange = small_exchange(rng)
            segments.append(ask(f"{USER}{exchange.user}{END}{ASSISTANT}"))
            segments.append(answer(f"{exchange.assistant}{END}"))
            used += (len(exchange.user) + len(exchange.assistant)) / 3.2 + 4
            if queries == 1 or used > length * 0.8 or rng.random() < 0.3:
                return Sample(self.name, tuple(segments), END)


@dataclass(frozen=True)
class PassageQuestion:
    """A passage about several people as long as wanted, and one question about it."""

    name: str = "passage"

    def generate(self, rng: random.Random, length: int, queries: int = 0) -> Sample:
        exchange = passage(rng, max(2, length // 32))
        prompt = f"{USER}{exchange.user}{END}{ASSISTANT}"
        return Sample(self.name, (ask(prompt), answer(f"{exchange.assistant}{END}")), END)


def all_tasks(sources: Sequence[str]) -> tuple[tuple[Task, float], ...]:
    """Every task with its share of the generated documents. ``sources`` feeds the code edits."""
    return (
        (RetrievePairs(), 3.0),
        (RetrieveDict(), 2.0),
        (RetrieveFunction(), 1.5),
        (RetrieveChat(), 3.0),
        (CopyBlock(), 4.0),
        (CopyLine(), 3.0),
        (ListOperation(), 2.0),
        (Arithmetic(), 2.0),
        (JsonFill(), 2.0),
        (CodeEdit(sources), 3.0),
        (PassageQuestion(), 2.0),
        (Conversation(), 6.0),
    )
