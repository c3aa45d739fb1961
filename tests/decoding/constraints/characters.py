"""A vocabulary for the tiny models: characters, and some pairs of them."""

from __future__ import annotations

ALPHABET = '{}[]":,.-+ \n0123456789abcdefghijklmnopqrstuvwxyz'
PAIRS = ["ab", "ba", '{"', '":', '",', "tr", "ue", "12", "  ", "aa", "}}"]


class Characters:
    """What `hasten.decoding.constraints` wants of a tokenizer. Ids 0 and 1 stand for no text."""

    special_ids = frozenset({0, 1})

    def __init__(self) -> None:
        self.texts = ["<s>", "</s>", *ALPHABET, *PAIRS]
        self.vocab_size = len(self.texts)

    def token_bytes(self, token: int) -> bytes:
        return self.texts[token].encode()

    def text(self, tokens: list[int]) -> str:
        """Of an output; special tokens are left out."""
        return "".join(self.texts[token] for token in tokens if token not in self.special_ids)

    def ids(self, text: str) -> list[int]:
        """Character by character."""
        return [self.texts.index(char) for char in text]
