"""hasten: a decoding engine for language models whose methods are parts that compose.

``LLM`` and ``AsyncLLM`` run a model, ``SamplingParams`` says how to choose tokens, ``Stack`` names
one method per slot. Everything else is reached through these or through the command line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.api.async_llm import AsyncLLM
    from hasten.api.llm import LLM
    from hasten.decoding.params import SamplingParams
    from hasten.stack import Stack

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams", "Stack"]

_HOME = {
    "LLM": "hasten.api.llm",
    "AsyncLLM": "hasten.api.async_llm",
    "SamplingParams": "hasten.decoding.params",
    "Stack": "hasten.stack",
}

NO_TORCH = (
    "hasten needs torch 2.6 or newer, which is not installed with it because the right build "
    "depends on the machine. Without a GPU: pip install torch --index-url "
    "https://download.pytorch.org/whl/cpu ; with one: pip install 'hasten[gpu]'"
)


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``hasten --help`` and ``import hasten`` stay instant."""
    if name not in _HOME:
        raise AttributeError(f"module 'hasten' has no attribute '{name}'")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise ModuleNotFoundError(NO_TORCH, name="torch") from None
        raise
