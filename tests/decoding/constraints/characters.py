"""A vocabulary for the tiny models: characters, and some pairs of them."""

from __future__ import annotations

from typing import Any, cast

from hasten.decoding.constraints.base import ConstrainContext
from hasten.engine.engine import Engine

ALPHABET = '{}[]":,.-+ \n0123456789abcdefghijklmnopqrstuvwxyz'
PAIRS = ["ab", "ba", '{"', '":', '",', "tr", "ue", "12", "  ", "aa", "}}"]


class Characters:
    """What `hasten.decoding.constraints` wants of a tokenizer. Ids 0 and 1 stand for no
    text."""

    def __init__(self, texts: str = "") -> None:
        """``texts``: other characters, none of them special."""
        self.texts = [*texts] or ["<s>", "</s>", *ALPHABET, *PAIRS]
        self.special_ids: frozenset[int] = frozenset() if texts else frozenset({0, 1})
        self.vocab_size = len(self.texts)

    def token_bytes(self, token: int) -> bytes:
        return self.texts[token].encode()

    def text(self, tokens: list[int]) -> str:
        """Of an output; special tokens are left out."""
        return "".join(self.texts[token] for token in tokens if token not in self.special_ids)

    def ids(self, text: str) -> list[int]:
        """Character by character."""
        return [self.texts.index(char) for char in text]


def in_characters(engine: Engine, texts: str = "") -> Engine:
    """Give an engine's constraint the vocabulary. For drafters it runs on ids alone as before:
    those that compare vocabularies would want one of the draft model, too."""
    size = engine.model.config.vocab_size
    context = ConstrainContext(size, cast(Any, Characters(texts)))
    engine.constraining = engine.stack["constrain"].start(context)
    return engine
