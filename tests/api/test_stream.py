"""Streaming: the pieces are the text."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from hasten import LLM, SamplingParams
from hasten.api.output import Piece
from hasten.engine.engine import RequestRefused
from tests.api.common import assert_idle, prompts

REQUESTS = 120


def multibyte_tokens(llm: LLM) -> list[int]:
    """Tokens with bytes above 127: parts of characters, whole ones, and byte soup in sequence."""
    tokens = range(llm.tokenizer.vocab_size)
    return [t for t in tokens if any(b > 127 for b in llm.tokenizer.token_bytes(t))]


def requests(llm: LLM, seed: int) -> list[tuple[str, SamplingParams]]:
    """Random requests: lengths, seeds, several outputs, and texts made of pieces of characters."""
    rng = random.Random(seed)
    soup = multibyte_tokens(llm)
    ascii_too = [*soup, *rng.sample(range(100, llm.tokenizer.vocab_size), len(soup))]
    made = []
    for i, prompt in enumerate(prompts(REQUESTS, seed)):
        allowed = (None, soup, ascii_too)[i % 3]
        params = SamplingParams(
            max_tokens=rng.randint(1, 12),
            temperature=rng.choice((0.7, 1.0, 2.0)),
            seed=seed + i,
            allowed_token_ids=allowed,
            n=2 if i % 10 == 0 else 1,
        )
        made.append((prompt[-60:], params))
    return made


def with_stops(params: SamplingParams, text: str, rng: random.Random) -> SamplingParams:
    """The same request with stop strings, most of them cut from its own text."""
    at = rng.randrange(max(1, len(text)))
    stops = [text[at : at + rng.randint(1, 4)] or "never", "\N{SNOWMAN} never"]
    return SamplingParams(
        **{
            name: getattr(params, name)
            for name in ("max_tokens", "temperature", "seed", "allowed_token_ids")
        },
        stop=stops,
        include_stop=rng.random() < 0.5,
    )


def stream_all(llm: LLM, todo: list[tuple[str, SamplingParams]]) -> list[list[Piece]]:
    """Stream many requests, up to twelve open at once, in turns."""
    pieces: list[list[Piece]] = [[] for _ in todo]
    waiting = list(enumerate(todo))
    streams: list[tuple[int, Iterator[Piece]]] = []
    while waiting or streams:
        while waiting and len(streams) < 12:
            i, (prompt, params) = waiting.pop(0)
            streams.append((i, llm.stream(prompt, params)))
        for i, stream in list(streams):
            piece = next(stream, None)
            if piece is None:
                streams.remove((i, stream))
            else:
                pieces[i].append(piece)
    return pieces


def check(llm: LLM, todo: list[tuple[str, SamplingParams]]) -> list[str]:
    """Pieces against ``generate``: text, tokens and end of every output. Returns the texts."""
    results = llm.generate([p for p, _ in todo], [q for _, q in todo])
    for result, pieces in zip(results, stream_all(llm, todo), strict=True):
        for output in result.outputs:
            own = [piece for piece in pieces if piece.index == output.index]
            assert "".join(piece.text for piece in own) == output.text
            assert [t for piece in own for t in piece.token_ids] == output.token_ids
            reasons = [piece.finish_reason for piece in own]
            assert reasons == [None] * (len(own) - 1) + [output.finish_reason]
    return [result.text for result in results]


def test_pieces_concatenate_to_the_text(llm: LLM) -> None:
    todo = requests(llm, seed=100)
    texts = check(llm, todo)
    assert sum(any(ord(c) > 127 for c in text) for text in texts) > REQUESTS / 3


def test_pieces_concatenate_with_stop_strings(llm: LLM) -> None:
    rng = random.Random(3)
    todo = [(p, q) for p, q in requests(llm, seed=1000) if q.n == 1]
    free = [r.text for r in llm.generate([p for p, _ in todo], [q for _, q in todo])]
    stopping = [(p, with_stops(q, text, rng)) for (p, q), text in zip(todo, free, strict=True)]
    texts = check(llm, stopping)
    shorter = 0
    for (_, params), text, whole in zip(stopping, texts, free, strict=True):
        stop = params.stop[0]
        cut = whole.find(stop)
        if cut >= 0:
            whole = whole[: cut + len(stop)] if params.include_stop else whole[:cut]
            shorter += 1
        assert text == whole
    assert shorter > len(todo) / 2


def test_leaving_early_ends_the_request(llm: LLM) -> None:
    params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    for count, _ in enumerate(llm.stream("def f(x):\n", params), 1):
        if count == 3:
            assert llm.engine.requests and llm.engine.cache.usage > 0
            break
    assert_idle(llm.frontend)
    stream = llm.stream("def f(x):\n", params)
    next(stream)
    stream.close()
    assert_idle(llm.frontend)
    assert llm.last_figures is not None and len(llm.last_figures.token_times) == 1


def test_generating_inside_a_stream_takes_none_of_its_pieces(llm: LLM) -> None:
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    expected = llm.generate("import re\n", params)[0]
    text = ""
    for piece in llm.stream("import re\n", params):
        text += piece.text
        if len(text) == len(piece.text):  # once, after the first piece
            llm.generate(prompts(3), SamplingParams(max_tokens=20, temperature=0))
    assert text == expected.text


def test_a_refused_stream_raises_at_its_first_piece(llm: LLM) -> None:
    with pytest.raises(RequestRefused, match="empty"):
        next(llm.stream([]))
