"""The tokenizer loses nothing and keeps digits and special tokens apart."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hasten.training.bpe import ASSISTANT, BOS, END, EOS, SPECIAL_TOKENS, USER, train_tokenizer

TOKENIZER = train_tokenizer(["def f(x):\n    return x + 1\n", "hello there, world"] * 20, 320)


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_round_trip_of_any_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_round_trip_of_every_byte_pair_of_two_byte_characters() -> None:
    text = "".join(map(chr, range(0x800)))
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids) == text


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("x = 2026 + 113", add_special_tokens=False).tokens
    assert [token for token in tokens if any(map(str.isdigit, token))] == list("2026113")


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 1024
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(7))
    tokens = tokenizer.encode(f"{USER}hi{END}{ASSISTANT}").tokens
    assert tokens[0] == BOS and tokens[1] == USER and tokens[-2:] == [END, ASSISTANT]
    assert EOS not in tokens
