"""Drafters that learn tables over requests: the same tokens, batched, alone, and short of pages."""

from __future__ import annotations

import pytest

from hasten import LLM, SamplingParams
from tests.api.common import SIZES, assert_idle, prompts

PROMPTS = prompts(16, seed=5)
PARAMS = [
    SamplingParams(
        max_tokens=24,
        temperature=0.8 if i % 2 else 0.0,
        seed=i,
        n=2 if i % 4 == 1 else 1,
        ignore_eos=i % 3 > 0,
    )
    for i in range(16)
]


def tokens(llm: LLM, which: slice = slice(None)) -> list[list[list[int]]]:
    found = []
    for tenant in ("a", "b"):  # the second time with a table that knows nothing of the first
        outputs = llm.generate(PROMPTS[which], PARAMS[which], tenant=tenant)
        found += [[completion.token_ids for completion in out.outputs] for out in outputs]
    assert_idle(llm.frontend)
    return found


@pytest.mark.parametrize("draft", ["aded", "token-recycling"])
def test_tables_change_nothing(loaded: LLM, draft: str) -> None:
    stack = f"draft={draft},control=fixed(k=12)"
    llm = LLM(stack=stack, **SIZES)
    assert tokens(llm) == tokens(loaded)
    assert llm.stats.speculation.accepted > 50
    again = tokens(llm, slice(0, None, 3))  # tables are warm now
    assert again == tokens(loaded, slice(0, None, 3))
