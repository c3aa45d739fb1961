"""Tiny random checkpoints in the Hugging Face layout, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny import CONFIGS, randomized


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """``checkpoint(name)``: the folder of a saved model of `CONFIGS`, and that model."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = randomized(CONFIGS[name]())
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return get
