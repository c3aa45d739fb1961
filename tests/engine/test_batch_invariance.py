"""Nothing around a row changes its bits: over whole models, and over the engine.

`tests/kernels` says so of each operation. Here all of them run together, in every form of weights
and of pages. The bits that every other run must give are those of a sequence that is computed one
token a step, alone, on one thread.
"""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from hasten import _native
from hasten.cache.layout import PAGE_SIZE, KVLayout, KVStorage
from hasten.decoding.params import SamplingParams
from hasten.engine.batch import Batch, Segment
from hasten.engine.engine import Engine, EngineConfig
from hasten.engine.recording import MAX_ROWS, Recorder
from hasten.kernels.linear import BLOCK_KINDS, Weight, pack, pack_blocks
from hasten.models.base import Decoder
from hasten.models.paged import PagedKV
from hasten.speculation.tree import TokenTree
from hasten.stack import Stack
from hasten.weights.base import Matrix, WeightFormat
from tests.conftest import RandomWeights, tiny_facts
from tests.engine.test_randomized import MODELS
from tests.kernels.common import INTEGER_ISAS, assert_same_bits

VOCAB = 61
LENGTH = 44  # crosses pages and ends within one
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
"""What blocks of 256 divide."""
EVEN = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "moe_intermediate_size": 64}
"""What groups of 64 divide."""


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    """Whatever a test sets, the next one starts from the defaults."""
    isa, threads = _native.get_isa(), _native.get_num_threads()
    yield
    _native.set_isa(isa)
    _native.set_num_threads(threads)


@pytest.fixture
def rng() -> random.Random:
    """A fresh seed for every test, shown when it fails; HASTEN_TEST_SEED repeats one."""
    seed = int(os.environ.get("HASTEN_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"HASTEN_TEST_SEED={seed}")
    return random.Random(seed)


class RandomBlocks(RandomWeights):
    """Matrices of random blocks of a GGUF file; routers are float32."""

    def __init__(self, kind: str) -> None:
        super().__init__(0, 0.25)
        self.kind = kind

    def stored(self, wanted: Matrix) -> Weight | None:
        if wanted.role == "router":
            return pack(torch.cat(list(wanted.read(self))))
        n, k = wanted.rows, wanted.inputs
        values, nbytes, _ = BLOCK_KINDS[self.kind]
        made = np.random.default_rng(sum(map(ord, "".join(wanted.outputs))))
        raw = made.integers(0, 256, (n, k // values, nbytes), dtype=np.uint8)
        for at in {"Q4_K": (0, 2), "Q6_K": (208,)}.get(self.kind, (0,)):
            scale = 2.0 ** made.uniform(-9, -7, (n, k // values, 1))
            scale *= made.choice([-1, 1], scale.shape)
            raw[..., at : at + 2] = scale.astype(np.float16).view(np.uint8)
        rows = torch.from_numpy(raw.reshape(n, -1))
        return pack_blocks([rows], n, k, self.kind, gated=wanted.gated)


def build(architecture: str, weights: str) -> Decoder:
    """A tiny model; ``weights`` is a method of that slot or the kind of a GGUF block."""
    source: RandomWeights
    changes: dict[str, Any]
    if weights in BLOCK_KINDS:
        source, changes = RandomBlocks(weights), WIDE
    else:
        changes = {**EVEN, "v_head_dim": 32} if weights.startswith("int4") else {}
        form: WeightFormat = Stack.parse(f"weights={weights}")["weights"]
        source = RandomWeights(0, 0.25, form)
        source.dtype = form.torch_dtype or torch.float32
    module = importlib.import_module(f"hasten.models.{architecture}")
    facts = tiny_facts(architecture, **{**MODELS.get(architecture, {}), **changes})
    model: Decoder = module.Model(module.configure(facts, torch.float32), source)
    model.sampling_defaults = {"temperature": 0.0}
    return model


@dataclass
class Bench:
    """A model, a text and its expected logits [LENGTH, V]; ``others`` sequences beside it."""

    model: Decoder
    layout: KVLayout
    rng: random.Random

    def __post_init__(self) -> None:
        self.text = self.random_tokens(LENGTH)
        _native.set_isa(INTEGER_ISAS[0])
        _native.set_num_threads(1)
        self.expected = self.chunked([1] * LENGTH)
        assert self.expected.isfinite().all()
        assert len({int(row.argmax()) for row in self.expected}) > 3, "a model that says little"

    def random_tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCAB) for _ in range(count)]

    def fresh(self, rows: int = 1) -> tuple[KVStorage, list[Any]]:
        """Pages of garbage, and tables that refer to them in random order."""
        blocks = LENGTH // PAGE_SIZE + 2
        shuffle = np.random.default_rng(self.rng.randrange(2**31)).permutation
        tables = [
            shuffle(rows * g.head_groups * blocks).astype(np.int32).reshape(rows, -1, blocks)
            for g in self.layout.groups
        ]
        storage = KVStorage(self.layout, [table.size for table in tables])
        for pages in (*storage.k, *storage.v):
            pages.view(torch.int8).fill_(self.rng.randrange(1, 64))
        return storage, tables

    def step(self, kv: tuple[KVStorage, list[Any]], segments: list[Segment]) -> torch.Tensor:
        storage, tables = kv
        batch = Batch.build(segments, tables)
        return self.model.logits(self.model.forward(batch, PagedKV(storage, batch)), batch.wanted)

    def chunked(self, sizes: list[int], recorded: bool = False) -> torch.Tensor:
        """Logits of the text in chunks of these sizes, alone."""
        storage, tables = self.fresh()
        recorder = Recorder(self.model, storage)
        recorder.refused = None if recorded else "unrecorded"
        parts, start = [], 0
        for size in sizes:
            segments = [Segment(0, start, self.text[start : start + size], wanted="all")]
            batch = Batch.build(segments, tables)
            found = recorder.run(batch)
            assert (found is not None) == (recorded and size <= MAX_ROWS), recorder.refused
            parts.append(
                self.step((storage, tables), segments) if found is None else found.logits.clone()
            )
            start += size
        return torch.cat(parts)

    def random_sizes(self, most: int = LENGTH) -> list[int]:
        sizes: list[int] = []
        while (left := LENGTH - sum(sizes)) > 0:
            sizes.append(self.rng.randint(1, min(left, most)))
        return sizes

    def among(self, others: int) -> torch.Tensor:
        """The text in random chunks, in a random place among the rows of other sequences."""
        rng, rows = self.rng, min(others, 12)
        kv, parts, start = self.fresh(rows + 1), [], 0
        for size in self.random_sizes():
            beside, left = [], others
            for row in range(1, rows + 1):
                after = rows - row  # sequences that share what this one leaves
                least = max(1, left - LENGTH * after)
                count = rng.randint(least, min(LENGTH, left - after))
                tokens = self.random_tokens(count)
                beside.append(Segment(row, rng.randint(0, LENGTH - count), tokens, wanted="all"))
                left -= count
            rng.shuffle(beside)
            at = rng.randint(0, len(beside))
            own = Segment(0, start, self.text[start : start + size], wanted="all")
            logits = self.step(kv, [*beside[:at], own, *beside[at:]])
            before = sum(segment.num_rows for segment in beside[:at])
            parts.append(logits[before : before + size])
            start += size
        return torch.cat(parts)

    def as_tree(self) -> torch.Tensor:
        """The end of the text as one path of a tree among wrong ones; the rest is its prompt."""
        rng, root = self.rng, self.rng.randrange(LENGTH - 10, LENGTH - 2)
        nodes, path = [(0, -1, self.text[root])], [0]  # (depth, parent, token)
        for depth in range(1, LENGTH - root):
            level = [(depth, path[-1], self.text[root + depth])]
            above = [i for i, node in enumerate(nodes) if node[0] == depth - 1]
            level += [
                (depth, rng.choice(above), rng.randrange(VOCAB)) for _ in range(rng.randint(0, 2))
            ]
            rng.shuffle(level)
            right = (depth, path[-1], self.text[root + depth])
            place = len(nodes) + level.index(right)
            nodes += level
            path.append(place)
        kv = self.fresh()
        first = self.step(kv, [Segment(0, 0, self.text[:root], wanted="all")])
        tree = TokenTree([token for _, _, token in nodes], [parent for _, parent, _ in nodes])
        logits = self.step(kv, [Segment(0, root, [self.text[root]], tree)])
        return torch.cat([first, logits[path]])

    def check(self, counts: list[int]) -> None:
        """All of it on every instruction set, with a number of threads of 1, 2, 3 each."""
        for turn, isa in enumerate(INTEGER_ISAS):
            _native.set_isa(isa)
            for threads in (1, 2, 3):
                _native.set_num_threads(threads)
                where = f"{isa}, {threads} threads"
                same = {
                    "whole": self.chunked([LENGTH]),
                    "chunks": self.chunked(self.random_sizes()),
                    "recorded": self.chunked(self.random_sizes(MAX_ROWS), recorded=True),
                    "tree": self.as_tree(),
                }
                others = counts[(3 * turn + threads) % len(counts)]
                same[f"among {others} rows"] = self.among(others)
                for what, logits in same.items():
                    assert_same_bits(logits, self.expected, f"{what}, {where}")


FORMS = {
    "float32": "checkpoint",
    "bfloat16": "checkpoint(dtype=bfloat16)",
    "int8": "int8",
    "int4": "int4",
    "int4 with zeros, 4-bit head": "int4(group=64,asymmetric=true,head=int4)",
    **{kind: kind for kind in BLOCK_KINDS},
}
PAGES = [
    (dtype, space)
    for dtype in (torch.float32, torch.bfloat16, torch.int8)
    for space in ("rotated", "pre-rope")
]
COUNTS = [1, 2, 7, 15, 16, 17, 63, 100, 255]
"""Rows of others in the batch."""


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_every_form_of_weights(form: str, rng: random.Random) -> None:
    model = build("qwen3", FORMS[form])
    Bench(model, model.config.kv_layout(), rng).check(COUNTS)


@pytest.mark.parametrize(("dtype", "space"), PAGES)
def test_logits_over_every_form_of_pages(
    dtype: torch.dtype, space: str, rng: random.Random
) -> None:
    model = build("llama", "int8")
    layout: Any = replace(model.config.kv_layout(dtype), key_space=space)
    Bench(model, layout, rng).check(COUNTS)


@pytest.mark.parametrize("weights", ["checkpoint", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gemma2", "deepseek_v2"])
def test_logits_of_unlike_architectures(
    architecture: str, weights: str, rng: random.Random
) -> None:
    model = build(architecture, weights)
    Bench(model, model.config.kv_layout(), rng).check(COUNTS)


def outcome(
    engine: Engine, prompt: list[int], params: SamplingParams, late: int = 0
) -> tuple[tuple[Any, ...], int]:
    """What a prompt added after ``late`` steps gives, and how many ran beside it at most."""
    for _ in range(late):
        engine.step()
    request = engine.add(prompt, params)
    logprobs: list[Any] = []
    beside = 0
    while not request.finished:
        for delta in engine.step():
            if delta.sequence.request is request:
                logprobs += delta.logprobs or []
        if any(sequence.request is request for sequence in engine.running):
            beside = max(beside, len(engine.running) - 1)
    for other in list(engine.requests):
        engine.abort(other)
    engine.check_ledger()
    return (request.sequences[0].tokens, logprobs, request.prompt_logprobs), beside


@pytest.mark.parametrize("weights", ["checkpoint", "int8"])
def test_one_output_among_any_requests(weights: str, rng: random.Random) -> None:
    shuffle_company(weights, int(os.environ.get("HASTEN_SHUFFLES", "4")), rng)


@pytest.mark.soak
@pytest.mark.parametrize("weights", ["checkpoint", "checkpoint(dtype=bfloat16)", "int8", "int4"])
def test_one_output_among_any_requests_in_50_shuffles(weights: str, rng: random.Random) -> None:
    shuffle_company(weights, 50, rng)


def shuffle_company(weights: str, shuffles: int, rng: random.Random) -> None:
    """One prompt among 1 to 256 others; company, order, chunks, pool and threads change."""
    model = build("llama", weights)
    prompt = [rng.randrange(2, VOCAB) for _ in range(37)]
    params = SamplingParams(
        max_tokens=24, temperature=0.9, seed=3, logprobs=3, prompt_logprobs=1, ignore_eos=True
    )
    _native.set_num_threads(1)
    alone = Engine(model, Stack.parse(""), EngineConfig(max_sequences=1, prefix_reuse=False))
    expected, _ = outcome(alone, prompt, params)
    assert len(expected[0]) == 61 and len(expected[1]) == 24
    block = alone.cache.layout.block_bytes()
    preempted = reused = most_beside = 0
    for turn in range(shuffles):
        count = (256, 256, 1)[turn] if turn < 3 else round(2 ** rng.uniform(0, 8))
        small, reuse = turn % 2 == 0, rng.random() < 0.5 or turn == 0
        _native.set_num_threads(1 + turn % 3)
        most = max(2, min(count + 1, 6 if small else 257))
        engine = Engine(
            model,
            Stack.parse(rng.choice(["", "draft=prompt-lookup(k=3,max_ngram=2)"])),
            EngineConfig(
                max_sequences=most,
                max_batch_tokens=rng.randint(most, most + (64 if small else 4000)),
                kv_bytes=block * (14 if small else 3000),
                prefix_reuse=reuse,
            ),
        )

        for _ in range(count):
            shared = prompt[: rng.choice([0, 0, 16, 32, 37])]
            tail = [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 40))]
            engine.add(
                shared + tail,
                SamplingParams(
                    max_tokens=rng.randint(1, 40) if small else 60,
                    temperature=rng.choice([0.0, 1.0]),
                    seed=rng.randrange(99),
                    ignore_eos=True,
                ),
            )
        found, beside = outcome(engine, prompt, params, rng.randint(0, 12))
        assert found == expected, f"shuffle {turn}: {count} others, {weights}"
        preempted += engine.stats.preemptions
        reused += engine.cache.stats.prefix_hits
        most_beside = max(most_beside, beside)
    assert preempted and reused and most_beside == 256, (preempted, reused, most_beside)
    print(f"{shuffles} shuffles, {preempted} preemptions, {reused} prefix hits")
