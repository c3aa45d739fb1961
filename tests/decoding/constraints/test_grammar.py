"""Masks against enumerated languages, the way back, limits; requests of a running engine."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import pytest

from hasten.decoding.constraints import grammar
from hasten.decoding.constraints.base import ConstrainContext, ConstraintError
from hasten.decoding.constraints.grammar import Grammar, GrammarConstraining, GrammarState
from hasten.decoding.params import SamplingParams
from hasten.decoding.sampling import Sampler
from hasten.engine import engine as engine_module
from hasten.engine.engine import Engine, EngineConfig, RequestRefused
from hasten.engine.request import Request
from hasten.models.base import Decoder
from hasten.stack import Stack
from tests.decoding.constraints.characters import ALPHABET, Characters, in_characters
from tests.engine.world import World

VOCAB = Characters()
END = 1
Make = Callable[..., Decoder]
Wanted = dict[str, Any]


def constraining(**parameters: Any) -> GrammarConstraining:
    context = ConstrainContext(VOCAB.vocab_size, cast(Any, VOCAB))
    return Grammar(**parameters).start(context)


def opened(wanted: Wanted, whitespace: int = 0, **params: Any) -> GrammarState:
    asked = SamplingParams(structured_outputs=cast(Any, wanted), **params)
    state = constraining(whitespace=whitespace).open(asked, {END})
    assert state is not None
    return state


def allowed(state: GrammarState) -> set[int]:
    row = np.zeros(VOCAB.vocab_size, np.float32)
    state.mask(row)
    assert set(np.unique(row)) <= {0.0, -np.inf}
    return {int(token) for token in np.flatnonzero(row == 0)}


def follow(texts: Iterable[str], so_far: str) -> set[int]:
    """The definition: a token may follow if a text of the language goes on with it."""
    rest = {text[len(so_far) :] for text in texts if text.startswith(so_far)}
    found = {
        token
        for token, piece in enumerate(VOCAB.texts)
        if token not in VOCAB.special_ids and any(text.startswith(piece) for text in rest)
    }
    return found | ({END} if "" in rest else set())


def product(*parts: Iterable[str]) -> list[str]:
    return ["".join(text) for text in itertools.product(*parts)]


RUNS = ["a" * n for n in range(3)]
LANGUAGES: dict[str, tuple[Wanted, list[str]]] = {
    "choice": (
        {"choice": ["a", "ab", "abba", "b{", "tr\n", '""']},
        ["a", "ab", "abba", "b{", "tr\n", '""'],
    ),
    "regex": ({"regex": "a{0,2}(b|ab|12)?"}, product(RUNS, ["", "b", "ab", "12"])),
    "no text": ({"regex": "(ab){0,2}"}, ["", "ab", "abab"]),
    "lark": (
        {"grammar": 'start: PAIR ("," PAIR)?\nPAIR: /[ab]{2}/'},
        [a + b for a in product("ab", "ab") for b in ["", *("," + p for p in product("ab", "ab"))]],
    ),
    "gbnf": (
        {"grammar": 'root ::= "{" inner? "}"\ninner ::= [ab] | "12" | "{}"'},
        ["{" + inner + "}" for inner in ("", "a", "b", "12", "{}")],
    ),
    "schema": (
        {
            "json": {
                "type": "object",
                "properties": {
                    "ab": {"enum": [1, 12, True]},
                    "b": {"type": "array", "items": {"const": "aa"}, "maxItems": 2},
                },
                "required": ["ab"],
                "additionalProperties": False,
            }
        },
        product(
            ['{"ab":'],
            ["1", "12", "true"],
            ["", ',"b":[]', ',"b":["aa"]', ',"b":["aa","aa"]'],
            ["}"],
        ),
    ),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_masks_are_those_of_the_language(name: str) -> None:
    wanted, texts = LANGUAGES[name]
    rng = random.Random(name)
    for _ in range(60):
        state, so_far = opened(wanted), ""
        while True:
            expected = follow(texts, so_far)
            assert allowed(state) == expected, so_far
            assert state.is_accepting() == (so_far in texts)
            assert state.is_complete() == (expected == {END})
            token = rng.choice(sorted(expected))
            state.advance(token)
            if token == END:
                assert so_far in texts and state.is_complete()
                break
            so_far += VOCAB.texts[token]


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_way_back_and_forks(name: str) -> None:
    """Any walk of steps forward, back and aside gives the masks of its path walked straight."""
    wanted, _ = LANGUAGES[name]
    rng = random.Random(name)
    states: list[tuple[GrammarState, list[int]]] = [(opened(wanted), [])]
    for _ in range(300):
        state, path = rng.choice(states)
        if path and rng.random() < 0.4:
            count = rng.randint(1, len(path))
            state.rollback(count)
            del path[-count:]
        elif len(states) < 6 and rng.random() < 0.2:
            states.append((state.fork(), list(path)))
        elif END in path:  # what would follow an end matters to nobody, but must be undone
            state.advance(rng.randrange(VOCAB.vocab_size))
            path.append(0)
        else:
            path.append(rng.choice(sorted(allowed(state))))
            state.advance(path[-1])
        straight = opened(wanted)
        for token in path:
            straight.advance(token)
        assert allowed(state) == allowed(straight)
        assert state.is_accepting() == straight.is_accepting()
        assert state.is_complete() == straight.is_complete()


@pytest.mark.parametrize("name", LANGUAGES)
def test_what_is_allowed_of_a_path_is_what_its_masks_allow(name: str) -> None:
    """Random paths, ends among them, from random places; the place is the same afterwards."""
    rng = random.Random(name)
    for _ in range(20):
        state = opened(LANGUAGES[name][0])
        for _ in range(rng.randrange(4)):
            if ways := sorted(allowed(state) - {END}):
                state.advance(rng.choice(ways))
        before, paths, expected = allowed(state), [], []
        for _ in range(8):
            path: list[int] = []
            walk, count = state.fork(), 0
            while len(path) < 6:
                ways = sorted(allowed(walk))
                token = rng.choice(ways) if ways and rng.random() < 0.8 else rng.randrange(2, 61)
                path.append(token)
                if count == len(path) - 1 and token in ways:
                    walk.advance(token)
                    count += 1
            paths.append(path)
            expected.append(count)
        assert state.allowed(paths) == expected
        assert state.allowed([[]]) == [0] and allowed(state) == before
        for token, (count,) in ((t, state.allowed([[t]])) for t in range(1, VOCAB.vocab_size)):
            assert (count == 1) == (token in before)


def test_a_token_that_may_not_follow_is_no_way_on() -> None:
    state = opened({"regex": "ab"})
    with pytest.raises(ValueError, match="cannot follow"):
        state.advance(VOCAB.ids("b")[0])
    with pytest.raises(ValueError, match="cannot follow"):
        state.advance(0)
    state.advance(VOCAB.ids("a")[0])
    assert allowed(state) == set(VOCAB.ids("b"))


def test_ends() -> None:
    """A special stop token is an end; one that is text follows where the grammar has it."""
    a, b = VOCAB.ids("ab")
    assert allowed(opened({"regex": "b?"}, stop_token_ids=[0, a])) == {0, END, b}
    state = opened({"regex": "b"}, stop_token_ids=[0, a])
    assert allowed(state) == {b}
    state.advance(b)
    assert allowed(state) == {0, END} and state.is_complete()


def test_a_larger_matrix_than_the_vocabulary() -> None:
    """Rows of logits may be wider than the tokenizer; what it does not know cannot follow."""

    class Short(Characters):
        def token_bytes(self, token: int) -> bytes:
            return super().token_bytes(token) if token < self.vocab_size else b""

    context = ConstrainContext(VOCAB.vocab_size + 9, cast(Any, Short()))
    params = SamplingParams(structured_outputs=cast(Any, {"regex": "a[^q]*"}))
    state = Grammar().start(context).open(params, frozenset())
    assert state is not None
    state.advance(VOCAB.ids("a")[0])
    row = np.zeros(VOCAB.vocab_size + 9, np.float32)
    state.mask(row)
    assert not np.isfinite(row[VOCAB.vocab_size :]).any()
    assert np.isfinite(row).sum() == VOCAB.vocab_size - 3  # the special ones and q


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_blanks_in_json_are_bounded(limit: int) -> None:
    state = opened({"json": {"type": "array", "items": {"type": "null"}}}, whitespace=limit)
    state.advance(VOCAB.ids("[")[0])
    space, count = VOCAB.ids(" ")[0], 0
    while space in allowed(state):
        state.advance(space)
        count += 1
    assert count == limit and VOCAB.ids("]")[0] in allowed(state)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"json": {"type": "strin"}}, "structured_outputs.json: .*Invalid type"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"$ref": "http://localhost/schema"}}, "retriev"),
        ({"json": {"enum": []}}, "Unsatisfiable"),
        ({"json": "[1]"}, "structured_outputs.json"),
        (
            {"json": '{"type": "array", "uniqueItems": true, "x-guidance": {"lenient": true}}'},
            "uni",
        ),
        ({"regex": "("}, "structured_outputs.regex: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"regex": "(a|aa|aaa)*" * 2900}, "too costly, make it simpler"),
        ({"regex": "()"}, "allows no text"),
        ({"grammar": "start: missing"}, "structured_outputs.grammar: .*missing"),
        ({"grammar": "root = ::"}, "structured_outputs.grammar"),
        ({"grammar": '%llguidance {"no_forcing": false}\nstart: "a"'}, "%llguidance"),
    ],
)
def test_what_does_not_compile_is_refused_by_name(wanted: Wanted, reason: str) -> None:
    with pytest.raises(ConstraintError, match=reason) as caught:
        opened(wanted)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({}, "none given"),
        ({"regex": "a", "json_object": True}, "json_object and regex given"),
        ({"regexp": "a"}, "regexp"),
        ({"json": "{"}, "no JSON schema"),
        ({"json": "[" * 30_000}, "nested too deep"),
        ({"json": {"const": float("nan")}}, "no JSON schema"),
        ({"json": True}, "an object, or its text"),
        ({"json_object": 1}, "true or false"),
        ({"choice": "ab"}, "list of texts"),
        ({"choice": []}, "at least 1"),
        ({"choice": ["a", 1]}, "no text"),
        ({"choice": ["a"] * 10_001}, "at most 10000"),
        ({"regex": ""}, "empty"),
        ({"regex": 7}, "no text"),
        ({"regex": "\ud800"}, "Unicode"),
        ({"grammar": "a" * 32_001}, "more than 32000 characters"),
        ({"json": '"' + "a" * 32_001}, "more than 32000 characters"),
        (5, "mapping"),
    ],
)
def test_what_is_not_even_asked_right(wanted: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SamplingParams(structured_outputs=wanted)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


BOMBS: dict[str, Wanted] = {
    "repetitions": {"regex": "(((a{1000}){1000}){1000}){1000}"},
    "alternatives": {"regex": "(a|aa|aaa)*" * 2900},
    "states": {"regex": "[ab]*a[ab]{5000}"},
    "ambiguous": {"grammar": 'start: a\na: a a | "a" | a "a" | "a" a'},
    "left and right": {"grammar": 'start: a\na: "a"? a? "a"? a?'},
    "deep": {"json": nested(500)},
    "wide": {"json": {"properties": {f"k{i}": {"maxLength": 1000} for i in range(1200)}}},
    "long": {"json": {"type": "string", "maxLength": 10**9}},
    "many": {"choice": [f"{i:08}" for i in range(4_000)]},
    "combinations": {"json": {"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": i}]} for i in
                                        range(40)]}},
    "recursive": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_work_is_bounded(name: str) -> None:
    """Compiling and thirty masks end soon, with an error or without."""
    rng = random.Random(name)
    began = time.process_time()
    try:
        state = opened(BOMBS[name])
        for _ in range(30):
            choices = sorted(allowed(state) - {END})
            if not choices:
                break
            state.advance(rng.choice(choices))
    except ValueError as error:
        assert len(str(error)) < 500
    assert time.process_time() - began < 2


def test_compiled_grammars_are_kept_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    made = constraining(cached=2)
    compile_ = GrammarConstraining._compile

    def counted(self: GrammarConstraining, wanted: Any) -> Any:
        compiled.append(wanted.regex)
        return compile_(self, wanted)

    monkeypatch.setattr(GrammarConstraining, "_compile", counted)
    for regex in ("a", "b", "a", "c", "a", "b"):
        params = SamplingParams(structured_outputs=cast(Any, {"regex": regex}))
        state = made.open(params, frozenset())
        assert state is not None and allowed(state) == set(VOCAB.ids(regex))
    assert compiled == ["a", "b", "c", "b"]


def test_what_another_thread_prepared_is_not_compiled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where: list[str] = []
    compile_ = GrammarConstraining._compile

    def counted(self: GrammarConstraining, wanted: Any) -> Any:
        where.append(threading.current_thread().name)
        return compile_(self, wanted)

    monkeypatch.setattr(GrammarConstraining, "_compile", counted)
    made, keeps_none = constraining(cached=3), constraining(cached=0)
    asked = [
        SamplingParams(structured_outputs=cast(Any, {"regex": regex})) for regex in ("a", "ab?")
    ]
    threads = [threading.Thread(target=made.prepare, args=(p,), name="beside") for p in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(made.is_prepared, asked)) and made.is_prepared(SamplingParams())
    for params in asked:
        made.prepare(params)
        state = made.open(params, frozenset())
        assert state is not None and allowed(state) >= set(VOCAB.ids("a"))
    assert where == ["beside", "beside"]
    bad = SamplingParams(structured_outputs=cast(Any, {"regex": "("}))
    assert not made.is_prepared(bad)
    with pytest.raises(ConstraintError, match="unclosed group"):
        made.prepare(bad)
    where.clear()
    keeps_none.prepare(asked[0])
    assert keeps_none.is_prepared(asked[0]) and not where
    assert keeps_none.open(asked[0], frozenset()) is not None and len(where) == 1


def test_looking_ahead_leaves_no_trace() -> None:
    """`Sampler.after` and the state that it shares, an end among the tokens included."""
    logits = np.random.default_rng(3).normal(0, 2, VOCAB.vocab_size).astype(np.float32)
    params = SamplingParams(
        temperature=1.0, structured_outputs=cast(Any, {"regex": "ab?a*"})
    ).resolved({})

    def sampler(output: list[int]) -> Sampler:
        state = constraining().open(params, {END})
        made = Sampler(params, [7], frozenset({END}), 0, 0, (), state)
        for token in output:
            made.push(token)
        return made

    a, b = VOCAB.ids("ab")
    now = sampler([a])
    before = now.law(logits)
    for ahead in ([], [b], [b, a], [b, a, a], [a, a, END], [END, 7]):
        with now.after(ahead) as later:
            assert np.array_equal(later.law(logits), sampler([a, *ahead]).law(logits))
        assert np.array_equal(now.law(logits), before)


# ---- in the engine ------------------------------------------------------------------------------


def engine(model: Decoder, choices: str = "constrain=grammar(whitespace=1)") -> Engine:
    config = EngineConfig(max_sequences=8, max_batch_tokens=128)
    return in_characters(Engine(model, Stack.parse(choices), config))


def finish(engine: Engine) -> None:
    while engine.has_work:
        for delta in engine.step():
            assert delta.sequence.error is None, delta.sequence.error


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,9}$"},
        "age": {"type": "integer", "minimum": 18, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["ab", "ba", None]}, "maxItems": 3},
        "at": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}},
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "at"],
    "additionalProperties": False,
}


def is_person(text: str) -> bool:
    value = json.loads(text)
    tags = value.pop("tags", [])
    x = value["at"].pop("x", True)
    return bool(
        value.keys() == {"name", "age", "at"}
        and 1 <= len(value["name"]) <= 9
        and set(value["name"]) <= set(ALPHABET[-26:])
        and type(value["age"]) is int
        and 18 <= value["age"] <= 120
        and all(tag in ("ab", "ba", None) for tag in tags)
        and len(tags) <= 3
        and value["at"] == {}
        and isinstance(x, bool)
    )


@pytest.mark.parametrize(
    ("method", "ignore_eos"),
    [
        ("", False),
        ("", True),
        ("draft=token-recycling,verify=typical,", False),  # which looks ahead, and takes what fits
    ],
)
def test_samples_are_always_what_was_asked_for(tiny: Make, method: str, ignore_eos: bool) -> None:
    made = engine(tiny("llama"), f"{method}constrain=grammar(whitespace=1)")
    rng = random.Random(1)
    requests: list[tuple[Request, Callable[[str], bool]]] = []
    kinds: list[tuple[Wanted, Callable[[str], bool]]] = [
        ({"json": PERSON}, is_person),
        ({"choice": ["yes", "no", "ab"]}, lambda text: text in ("yes", "no", "ab")),
        (
            {"regex": "[0-9]{4}-(0[1-9]|1[0-2])"},
            lambda text: len(text) == 7 and text[:4].isdigit() and 1 <= int(text[5:]) <= 12,
        ),
    ]
    for seed in range(20):
        for wanted, valid in kinds:
            params = SamplingParams(
                max_tokens=200,
                temperature=1.0,
                n=3,
                seed=seed,
                ignore_eos=ignore_eos,
                min_tokens=seed % 4,
                structured_outputs=cast(Any, wanted),
            )
            prompt = [rng.randrange(2, 61) for _ in range(rng.randint(1, 20))]
            requests.append((made.add(prompt, params), valid))
    finish(made)
    texts = set()
    for request, valid in requests:
        for sequence in request.sequences:
            tokens = sequence.tokens[len(request.prompt) :]
            assert sequence.finish_reason == "stop"
            assert END not in tokens  # it ends by itself where nothing else could follow
            text = VOCAB.text(tokens)
            assert valid(text), text
            texts.add(text)
    assert len(texts) > 100
    assert bool(made.stats.speculation.accepted) == bool(method)


def test_any_object_is_json_or_cut_by_the_limit(tiny: Make) -> None:
    made = engine(tiny("llama"))
    params = SamplingParams(
        max_tokens=150,
        temperature=1.0,
        n=3,
        seed=4,
        structured_outputs=cast(Any, {"json_object": True}),
        # so that strings end
        logit_bias={VOCAB.ids('"')[0]: 4.0, VOCAB.ids("}")[0]: 3.0},
    )
    requests = [made.add([seed], params) for seed in range(2, 22)]
    finish(made)
    whole = 0
    for request in requests:
        for sequence in request.sequences:
            text = VOCAB.text(sequence.tokens[1:])
            assert text.lstrip().startswith("{")
            if sequence.finish_reason == "stop":
                assert isinstance(json.loads(text), dict)
                whole += 1
    assert whole > 30


def test_where_the_text_may_end_the_model_decides(tiny: Make) -> None:
    """The end competes with what may follow; ``min_tokens`` keeps it away."""
    made = engine(tiny("llama"))
    base = {"temperature": 0.0, "max_tokens": 20, "structured_outputs": {"regex": "a*"}}
    first = made.add([5], SamplingParams(**base, logit_bias={END: 50.0}))
    later = made.add([5], SamplingParams(**base, logit_bias={END: 50.0}, min_tokens=3))
    never = made.add([5], SamplingParams(**base, logit_bias={END: 50.0}, ignore_eos=True))
    finish(made)
    (a,), (aa,) = (VOCAB.ids("a"), [VOCAB.texts.index("aa")])
    assert first.sequences[0].tokens[1:] == [END]
    assert later.sequences[0].tokens[-1] == END and later.sequences[0].num_output == 4
    assert set(never.sequences[0].tokens[1:]) <= {a, aa}
    assert never.sequences[0].num_output == 20 and never.sequences[0].finish_reason == "length"


def test_logprobs_are_those_of_the_model(tiny: Make) -> None:
    """Before the mask: the same as when the text is given as a prompt."""
    made = engine(tiny("llama"))
    params = SamplingParams(
        temperature=0.0,
        max_tokens=9,
        logprobs=2,
        structured_outputs=cast(Any, {"regex": "[a-f]{12}"}),
    )
    request, found = made.add([7, 8, 9], params), []
    while made.has_work:
        for delta in made.step():
            found += delta.logprobs or []
    scored = made.add(request.sequences[0].tokens, SamplingParams(max_tokens=0, prompt_logprobs=2))
    finish(made)
    assert scored.prompt_logprobs is not None and found == scored.prompt_logprobs[3:]


def test_a_ban_that_leaves_no_way_on_is_an_error(tiny: Make) -> None:
    made = engine(tiny("llama"))
    params = SamplingParams(
        structured_outputs=cast(Any, {"regex": "cd"}), bad_words=[VOCAB.ids("cd")]
    )
    request = made.add([5], params, bad_words=[VOCAB.ids("cd")])
    while made.has_work:
        made.step()
    (sequence,) = request.sequences
    assert sequence.finish_reason == "error" and "structured_outputs" in str(sequence.error)


def test_a_text_that_the_vocabulary_cannot_write_is_an_error(tiny: Make) -> None:
    made = engine(tiny("llama"))
    request = made.add([5], SamplingParams(structured_outputs=cast(Any, {"regex": "abQ"})))
    while made.has_work:
        made.step()
    (sequence,) = request.sequences
    assert sequence.finish_reason == "error" and "has no token" in str(sequence.error)


def test_a_grammar_that_outgrows_its_limits_ends_its_own_sequence_only(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grammar.LIMITS, "step_max_items", 60)
    made = engine(tiny("llama"))
    wanted = {"grammar": 'start: a\na: a a | "a" | a "a" | "a" a'}
    params = SamplingParams(
        structured_outputs=cast(Any, wanted), max_tokens=60, ignore_eos=True, temperature=0.0
    )
    request = made.add([5], params)
    other = made.add([5], SamplingParams(max_tokens=60, ignore_eos=True))
    while made.has_work:
        made.step()
    (sequence,) = request.sequences
    assert sequence.finish_reason == "error" and "too costly" in str(sequence.error)
    assert other.sequences[0].finish_reason == "length"


def test_an_engine_without_a_vocabulary_refuses(tiny: Make) -> None:
    made = Engine(tiny("llama"), Stack.parse(""))
    with pytest.raises(RequestRefused, match="tokenizer"):
        made.add([5], SamplingParams(structured_outputs=cast(Any, {"regex": "a"})))
    assert not made.has_work


# ---- with drafts, preemption, forks, processors --------------------------------------------------

WANTED: list[Wanted] = [
    {"regex": "([a-m]{2,5}[ ,.])+"},
    {"json": {"type": "object", "additionalProperties": {"type": "integer"}}},
    {"choice": ["abba", "ab", "yes"]},
    {"grammar": 'start: "{" (start | /[a-c]/)* "}"'},
]


def constrained(rng: random.Random) -> SamplingParams:
    """Parameters of every kind beside a constraint."""
    base: dict[str, Any] = {
        "max_tokens": rng.choice([2, 12, 30]),
        "seed": rng.randrange(1000),
        "n": rng.choice([1, 1, 3]),
        "logprobs": rng.choice([None, 2]),
        "temperature": rng.choice([0.0, 0.0, 0.7, 1.5]),
        "ignore_eos": rng.random() < 0.5,
        "structured_outputs": rng.choice(WANTED),
    }
    base |= rng.choice(
        [
            {},
            {"min_p": 0.05, "top_k": 9},
            {"top_p": 0.8, "typical_p": 0.9},
            {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
            {"logit_bias": {13: 2.0, 9: -3.0}, "min_tokens": 2},
        ]
    )
    return SamplingParams(**base)


def same_as_alone(tiny: Make, seeds: int = 3, drafts: str = "mixed") -> list[World]:
    """Random constrained requests with scripted drafts in a small pool."""
    worlds = []
    for seed in range(seeds):
        rng = random.Random(seed)
        world = World(tiny("llama"), drafts=drafts, blocks=9, seed=seed)
        in_characters(world.engine), in_characters(world.solo)
        for _ in range(25):
            prompt = [rng.randrange(2, 61) for _ in range(rng.randint(1, 30))]
            world.add(prompt, constrained(rng))
        world.drain()
        worlds.append(world)
    return worlds


@pytest.mark.parametrize("drafts", ["none", "right", "wrong", "random", "branching", "mixed"])
def test_drafts_change_nothing(tiny: Make, drafts: str) -> None:
    worlds = same_as_alone(tiny, drafts=drafts)
    assert sum(world.engine.stats.preemptions for world in worlds)
    found = [world.engine.stats.speculation for world in worlds]
    accepted, drafted = sum(s.accepted for s in found), sum(s.drafted for s in found)
    assert drafts == "none" or drafted > (100 if drafts != "random" else 0)
    assert accepted == drafted if drafts == "right" else accepted < drafted or not drafted


@pytest.mark.parametrize(
    "draft",
    ["prompt-lookup", "copyspec(gamma=1,branches=3)", "aded", "token-recycling", "aggressive"],
)
def test_drafters_that_see_their_trees_cut(tiny: Make, draft: str) -> None:
    """What they learn from a part of their trees keeps the output."""
    drafted = 0
    for seed in range(2):
        rng = random.Random(seed)
        world = World(tiny("llama"), drafts=None, choices=f"draft={draft}", blocks=14, seed=seed)
        in_characters(world.engine), in_characters(world.solo)
        for _ in range(20):
            world.add([rng.randrange(2, 61) for _ in range(rng.randint(1, 30))], constrained(rng))
        world.drain()
        drafted += world.engine.stats.speculation.drafted
    assert drafted


@pytest.mark.parametrize("drafts", ["random", "branching", "mixed"])
def test_cutting_what_is_forbidden_saves_rows_and_loses_nothing(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, drafts: str
) -> None:
    """With the same random drafts, cut and whole."""
    cut = [world.engine.stats for world in same_as_alone(tiny, drafts=drafts)]
    monkeypatch.setattr(engine_module, "allowed_part", lambda tree, _: tree)
    whole = [world.engine.stats for world in same_as_alone(tiny, drafts=drafts)]
    assert sum(s.speculation.drafted for s in cut) < sum(s.speculation.drafted for s in whole) * 0.8
    assert [s.tokens for s in cut] == [s.tokens for s in whole]
