"""A stack that says "bitwise" gives the same tokens: batched, alone, short of pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten import LLM, SamplingParams
from hasten.speculation.datastore import build
from tests.api.common import SIZES, assert_idle, prompts

PROMPTS = prompts(30, seed=9)
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
SEEDED = [
    SamplingParams(max_tokens=16, temperature=0.8, top_k=50, seed=i, ignore_eos=True)
    for i in range(30)
]


REQUESTS = [*((p, GREEDY) for p in PROMPTS), *zip(PROMPTS, SEEDED, strict=True)]


def together(llm: LLM) -> list[list[int]]:
    results = llm.generate([p for p, _ in REQUESTS], [q for _, q in REQUESTS])
    assert_idle(llm.frontend)
    return [result.outputs[0].token_ids for result in results]


def one_by_one(llm: LLM, which: slice) -> list[list[int]]:
    return [llm.generate(p, q)[0].outputs[0].token_ids for p, q in REQUESTS[which]]


@pytest.fixture(scope="module")
def expected(loaded: LLM) -> list[list[int]]:
    """Greedy and seeded outputs of the plain stack, everything in one batch."""
    return together(loaded)


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no reuse"])
def test_drafts_change_nothing(expected: list[list[int]], reuse: bool) -> None:
    llm = LLM(stack="draft=prompt-lookup", prefix_reuse=reuse, **SIZES)
    assert together(llm) == expected
    assert llm.stats.speculation.accepted > 20
    assert (llm.engine.cache.stats.prefix_hits > 5) == reuse
    which = slice(0 if reuse else 1, None, 4)
    assert one_by_one(llm, which) == expected[which]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, loaded: LLM) -> Path:
    """A datastore of the prompts themselves."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    assert loaded.tokenizer is not None
    build([folder / "prompts.txt"], folder / "prompts.store", loaded.tokenizer)
    return folder / "prompts.store"


@pytest.mark.parametrize(
    "draft",
    [
        "copyspec(gamma=2,branches=2,adapt=true)",
        "aggressive(k=12)",
        "retrieval(file=STORE)",
        "fallback(first=copyspec,then=model(k=3))",
        "fuse(of=model(k=3)|retrieval(file=STORE)|prompt-lookup)",
        "rasd(base=dyspec(n=8),of=retrieval(file=STORE)|copyspec)",
    ],
)
def test_copied_retrieved_and_joined_drafts_change_nothing(
    expected: list[list[int]], store: Path, draft: str
) -> None:
    llm = LLM(stack=f"draft={draft.replace('STORE', str(store))}", **SIZES)
    assert together(llm) == expected
    counts = llm.stats.speculation
    assert counts.drafted > 50
    assert counts.accepted > 20 or draft.startswith("aggressive")  # these texts are no edits


@pytest.mark.parametrize(
    "sizes",
    [{}, {"prefix_reuse": False, "max_batch_tokens": 48}],
    ids=["reuse", "no reuse, small steps"],
)
def test_preemption_changes_nothing(loaded: LLM, sizes: dict[str, Any]) -> None:
    """Outputs so long that the pages cannot hold them all at once."""
    texts = [text[-60:] for text in PROMPTS[:12]]
    params = [
        SamplingParams(max_tokens=60, temperature=i % 2, seed=i, ignore_eos=True) for i in range(12)
    ]
    expected = loaded.generate(texts, params)
    llm = LLM(stack="draft=prompt-lookup", **(SIZES | {"kv_bytes": 5 << 18} | sizes))
    results = llm.generate(texts, params)
    for result, other in zip(results, expected, strict=True):
        assert result.outputs[0].token_ids == other.outputs[0].token_ids
    assert sum(r.outputs[0].figures.preemptions for r in results) == llm.stats.preemptions > 0
    assert_idle(llm.frontend)


def test_the_plain_stack_alone_and_without_reuse_is_the_plain_stack(
    expected: list[list[int]],
) -> None:
    which = slice(None, None, 10)
    assert one_by_one(LLM(prefix_reuse=False, **SIZES), which) == expected[which]
