"""One loaded model for all tests of the api; each test leaves it idle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hasten import LLM
from tests.api.common import SIZES, assert_idle


@pytest.fixture(scope="session")
def loaded() -> LLM:
    return LLM(**SIZES)


@pytest.fixture
def llm(loaded: LLM) -> Iterator[LLM]:
    yield loaded
    assert_idle(loaded.frontend)
