"""Texts for a draft model: read, divided into three parts, cut to windows, prompts and answers.

A document belongs to one part only: to pre-train on, to ask the target about, or to measure with.
Everything is a pure function of the texts, a seed and a step.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hasten.models.base import ModelConfig
from hasten.models.facts import CheckpointError
from hasten.models.tokenizer import Tokenizer
from hasten.training.corpus import HELD_OUT_PER_MILLE, SourceFile, per_mille
from hasten.training.data import Batch, Ids, scored_batch

PROMPTS_PER_MILLE = 150
FEW = 100
"""Fewer documents than this are cut to pieces first, so that every part gets some of them."""
PIECE = 8_000
"""Characters of a piece, about."""
SCORED_LOGITS = 1 << 24
"""Logits of a batch at most. A vocabulary of 128,000 would need gigabytes for every position."""
UNKNOWN_SHARE = 0.05
ENCODED_AT_ONCE = 256
"""Documents. The tokenizer's own result takes many times what the ids take."""
HEADS_SHARE = 0.25
"""Windows and prompts that begin where a document begins."""


def read_texts(paths: Iterable[Path]) -> list[SourceFile]:
    """The text files among ``paths`` and in folders among them; what is not UTF-8 is left out."""
    files = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(2, "no such file or folder", str(path))
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in inside:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                files.append(SourceFile(file.as_posix(), text))
    return files


def pieces(file: SourceFile) -> Iterator[SourceFile]:
    """A document cut at line ends into parts of about ``PIECE`` characters."""
    lines: list[str] = []
    size = number = 0
    for line in file.text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= PIECE:
            yield SourceFile(f"{file.path}#{number}", "".join(lines))
            lines, size, number = [], 0, number + 1
    if "".join(lines).strip():
        yield SourceFile(f"{file.path}#{number}", "".join(lines))


@dataclass(frozen=True)
class Division:
    """Documents by use; no two parts share one."""

    pretraining: list[str]
    asking: list[str]
    held_out: list[str]

    @classmethod
    def of(cls, files: Sequence[SourceFile]) -> Division:
        """About 3 % held out (of the standard library the files that the reference models never
        saw, too), 15 % to ask about, the others to pre-train on, by a hash of the name.

        Raises:
            ValueError: less than three documents.
        """
        files = list({file.text: file for file in files}.values())  # a copy would be a leak
        if len(files) < FEW:
            files = [piece for file in files for piece in pieces(file)]
            files = list({file.text: file for file in files}.values())
        if len(files) < 3:
            raise ValueError(
                f"the text gives {len(files)} documents of up to {PIECE:,} characters, and three "
                "parts are needed (to pre-train, to ask about, to measure); give more text"
            )
        ranked = sorted(files, key=lambda file: (per_mille(file.path), file.path))
        places = [per_mille(file.path) for file in ranked]
        third = len(files) // 3
        held = sum(place < HELD_OUT_PER_MILLE for place in places)
        held = min(max(1, held), third)
        asked = sum(place < HELD_OUT_PER_MILLE + PROMPTS_PER_MILLE for place in places[held:])
        asked = min(max(1, asked), third)
        texts = [file.text for file in ranked]
        return cls(texts[held + asked :], texts[held : held + asked], texts[:held])


class Speech:
    """How a target's texts begin, go on and end, in its own tokens.

    A draft that sees other special tokens than its target is trained for prompts that never come.
    """

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, name: str) -> None:
        """
        Raises:
            CheckpointError: the tokenizer has ids that the model lacks.
        """
        highest = max(tokenizer.core.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= highest < config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has ids up to {highest}, the model {config.vocab_size} rows",
                name,
                "A draft would propose tokens that the target cannot judge; use the tokenizer "
                "that belongs to the model.",
            )
        self.tokenizer, self.name = tokenizer, name
        self.eos = config.eos_ids
        body = tokenizer.encode("a", add_special_tokens=False)
        whole = tokenizer.encode("a")
        starts = range(len(whole) - len(body) + 1)
        at = next((i for i in starts if whole[i : i + len(body)] == body), 0)
        self.lead = whole[:at]
        """What the tokenizer puts before every text."""

    def bodies(self, texts: Sequence[str]) -> list[Ids]:
        """Documents as tokens, without what comes before and after them.

        Raises:
            ValueError: much of the text is unknown to the tokenizer.
        """
        core = self.tokenizer.core
        bodies = []
        for first in range(0, len(texts), ENCODED_AT_ONCE):
            some = list(texts[first : first + ENCODED_AT_ONCE])
            found = core.encode_batch(some, add_special_tokens=False)
            bodies += [np.array(one.ids, np.int64) for one in found if one.ids]
        total = sum(map(len, bodies))
        unknown = self.tokenizer.special_tokens.get("unk_token")
        token = None if unknown is None else core.token_to_id(unknown)
        missed = 0 if token is None else sum(int((body == token).sum()) for body in bodies)
        if not total or missed > UNKNOWN_SHARE * total:
            raise ValueError(
                f"{missed:,} of {total:,} tokens of the text are unknown to the tokenizer of "
                f"{self.name}: give text that the target was made for (--text)"
            )
        return bodies

    def document(self, body: Ids) -> Ids:
        """A whole text, as it is pre-trained on."""
        return np.concatenate(
            [np.array(self.lead, np.int64), body, np.array(self.eos[:1], np.int64)]
        )


class Windows:
    """Pre-training rows: windows of the documents in one stream, every token scored."""

    def __init__(self, speech: Speech, texts: Sequence[str], vocab_size: int, seed: int) -> None:
        documents = [speech.document(body) for body in speech.bodies(texts)]
        self.stream = np.concatenate(documents)
        self.starts = [0, *accumulate(map(len, documents[:-1]))]
        self.vocab_size, self.seed = vocab_size, seed

    def batch(self, step: int, rows: int, length: int) -> Batch:
        """``rows`` windows of ``length`` tokens; a text shorter than that is repeated."""
        rng = random.Random(f"{self.seed}/{step}")
        ids = np.empty((rows, length + 1), np.int64)
        for row in range(rows):
            head = rng.random() < HEADS_SHARE
            start = rng.choice(self.starts) if head else rng.randrange(len(self.stream))
            ids[row] = self.stream.take(range(start, start + length + 1), mode="wrap")
        count = min(rows * length, max(1, SCORED_LOGITS // self.vocab_size))
        return scored_batch(ids, np.ones(ids.shape, np.bool_), count, (self.seed, step))


class Prompts:
    """Beginnings for the target to go on from: the lead and a cut from a document."""

    def __init__(
        self, speech: Speech, texts: Sequence[str], shortest: int, longest: int, seed: str
    ) -> None:
        self.lead, self.bodies, self.seed = speech.lead, speech.bodies(texts), seed
        self.shortest, self.longest = shortest, longest
        self.ends = list(accumulate(map(len, self.bodies)))

    def __getitem__(self, index: int) -> list[int]:
        """Prompt ``index``, of any number: a document by its length, a place in it."""
        rng = random.Random(f"{self.seed}/{index}")
        body = rng.choices(self.bodies, cum_weights=self.ends)[0]
        length = min(rng.randint(self.shortest, self.longest), len(body))
        start = 0 if rng.random() < HEADS_SHARE else rng.randrange(len(body) - length + 1)
        return [*self.lead, *body[start : start + length].tolist()]


@dataclass(frozen=True)
class Answer:
    """What the target wrote after a prompt."""

    prompt: list[int]
    tokens: list[int]
    temperature: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def read_answers(file: Path) -> list[Answer]:
    """The whole lines of a file, which is cut behind the last of them."""
    if not file.exists():
        return []
    whole = file.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if len(kept) < len(whole):
        with file.open("rb+") as opened:
            opened.truncate(len(kept))
    return [Answer(**json.loads(line)) for line in kept.splitlines()]


class Answers:
    """Alignment rows: a prompt with its answer, of which the answer alone is scored."""

    def __init__(self, answers: Sequence[Answer], vocab_size: int, seed: int) -> None:
        self.answers = answers
        self.vocab_size, self.seed = vocab_size, seed
        self.length = max(len(one.prompt) + len(one.tokens) for one in answers) - 1
        """Of the longest row; the first target is the second token."""
        self.most = max(len(one.tokens) for one in answers)
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.answers))

    def batch(self, step: int, rows: int, length: int) -> Batch:
        """Every answer once an epoch, in another order each time. Rows are filled up with a token
        that nobody sees: it comes later and is not scored."""
        ids: Ids = np.zeros((rows, length + 1), np.int64)
        scored = np.zeros((rows, length + 1), np.bool_)
        for row in range(rows):
            epoch, place = divmod(step * rows + row, len(self.answers))
            one = self.answers[self.order(epoch)[place]]
            text = (one.prompt + one.tokens)[: length + 1]
            ids[row, : len(text)] = text
            scored[row, len(one.prompt) : len(text)] = True
        count = min(rows * self.most, max(1, SCORED_LOGITS // self.vocab_size))
        return scored_batch(ids, scored, count, (self.seed, step))
