"""The text that may be shown: never a character too early, never one too late."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hasten.decoding.text import TextStream


class Pieces:
    """A decoder whose token i is the i-th piece of bytes; complete code points come out."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        return self.decoder.decode(self.pieces[token])

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


def shown(pieces: Sequence[bytes]) -> list[str]:
    """What the decoder gives for each token, and at the end."""
    decoder = Pieces(pieces)
    return [decoder.step(i) for i in range(len(pieces))] + [decoder.flush()]


def reference(
    parts: list[str], stops: Sequence[str], include: bool, quiet: int
) -> tuple[str, str | None]:
    """(text, stop) by looking at the whole text after each part; no memory, no cleverness."""
    text = ""
    for turn, part in enumerate(parts):
        before, text = len(text), text + part
        if turn < quiet:
            continue
        hits = [
            (at, -len(stop), stop)
            for stop in stops
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > before
        ]
        if hits:
            at, _, stop = min(hits)
            return text[: at + len(stop) if include else at], stop
    return text, None


alphabet = st.sampled_from(["a", "b", "ab", "é", "漢", "🙂", "\n"])
words = st.lists(alphabet, max_size=14).map("".join)


@st.composite
def cut(draw: st.DrawFn) -> list[bytes]:
    """A text cut anywhere, also inside code points; some pieces are empty."""
    data = draw(words).encode()
    if draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))]  # may end inside a code point
    places = draw(st.lists(st.integers(0, len(data)), max_size=12))
    ends = sorted([0, *places, len(data)])
    return [data[a:b] for a, b in itertools.pairwise(ends)]


@given(
    cut(),
    st.lists(words.filter(bool).map(lambda s: s[:4]), max_size=4),
    st.booleans(),
    st.integers(0, 5),
    st.integers(1, 4),
)
@example([b"a", b"b", b"c", b"x"], ["bc", "abcd"], False, 3, 1)  # one stop ends while none may
def test_pieces_are_final_and_add_up(
    pieces: list[bytes], stops: list[str], include: bool, quiet: int, group: int
) -> None:
    expected, stop = reference(shown(pieces), stops, include, quiet)
    stream = TextStream(Pieces(pieces), stops, include)
    out = ""
    for start in range(0, len(pieces), group):
        tokens = range(start, min(start + group, len(pieces)))
        for token in tokens:
            out += stream.push((token,), search=token >= quiet)
        assert expected.startswith(out), "something would have to be taken back"
        # what is held back could still become a stop string, or is no code point yet
        unseen = len("".join(shown(pieces)[: tokens[-1] + 1])) - len(out)
        if stream.stopped_by is None:
            assert unseen < max(map(len, stops), default=1)
    out += stream.finish()
    assert out == expected and stream.stopped_by == stop
    assert stream.finish() == "" and stream.push([]) == ""


@given(cut(), st.lists(words.filter(bool).map(lambda s: s[:3]), max_size=3))
def test_tokens_together_or_one_by_one(pieces: list[bytes], stops: list[str]) -> None:
    one, all_ = TextStream(Pieces(pieces), stops), TextStream(Pieces(pieces), stops)
    single = "".join(one.push((i,)) for i in range(len(pieces))) + one.finish()
    together = all_.push(range(len(pieces)))
    assert together + all_.finish() == single
    assert one.stopped_by == all_.stopped_by


def letters(text: str) -> Pieces:
    return Pieces([c.encode() for c in text])


@pytest.mark.parametrize(
    ("stops", "text", "pushes", "stop"),
    [
        ((), "abc", ["a", "b", "c"], None),
        (("bd",), "abcbd", ["a", "", "bc", "", ""], "bd"),
        (("aab",), "aaab", ["", "", "a", ""], "aab"),
        (("abab", "b"), "xab", ["x", "", "a"], "b"),
        (("cd", "bcd"), "abcd", ["a", "", "", ""], "bcd"),
        (("x",), "ab", ["a", "b"], None),
    ],
)
def test_what_each_token_shows(
    stops: tuple[str, ...], text: str, pushes: list[str], stop: str | None
) -> None:
    stream = TextStream(letters(text), stops)
    assert [stream.push((i,)) for i in range(len(text))] == pushes
    assert stream.stopped_by == stop


def test_after_the_stop_nothing_counts() -> None:
    stream = TextStream(letters("abcabc"), ("b",), include_stop=True)
    assert stream.push(range(4)) == "ab"
    assert stream.push((4, 5)) == "" and stream.finish() == "" and stream.stopped_by == "b"


def test_an_early_stop_string_is_plain_text() -> None:
    stream = TextStream(letters("abab"), ("ab",))
    assert stream.push((0, 1), search=False) == "ab" and stream.stopped_by is None
    assert stream.push((2, 3)) == "" and stream.stopped_by == "ab"
    # it may begin early if it ends late enough
    stream = TextStream(letters("ab"), ("ab",))
    assert stream.push((0,), search=False) == "" and stream.push((1,)) == ""
    assert stream.stopped_by == "ab"


def test_half_a_code_point_at_the_end_is_shown_as_such() -> None:
    stream = TextStream(Pieces([b"a\xf0\x9f"]), ("z",))
    assert stream.push((0,)) == "a" and stream.finish() == "\ufffd"
