"""The engine from outside: scores, ends, refusals, failures, figures, and the law of samples."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hasten.decoding.params import SamplingParams
from hasten.decoding.text import TextStream
from hasten.engine.clock import VirtualClock
from hasten.engine.engine import Engine, EngineConfig, RequestRefused
from hasten.engine.request import Request
from hasten.engine.walk import Rows, SequenceWalk
from hasten.methods import Card, MethodError
from hasten.models.base import Decoder
from hasten.scheduling.base import Plan
from hasten.scheduling.stall_free import StallFree
from hasten.speculation.tree import TokenTree
from hasten.speculation.verifiers.sample_match import SampleMatch
from hasten.stack import Stack
from tests.engine.world import Scripted
from tests.models.drive import whole

Make = Callable[..., Decoder]
PROMPT = [(13 * i * i + 7 * i + 2) % 61 for i in range(45)]


def engine_of(model: Decoder, stack: Any = None, clock: Any = None, **sizes: Any) -> Engine:
    config = EngineConfig(**{"max_sequences": 4, "max_batch_tokens": 64, **sizes})
    return Engine(model, Stack.parse(stack), config, clock)


def drain(engine: Engine) -> dict[tuple[str, int], dict[str, Any]]:
    """Run to the end; what each sequence gave, put together from its deltas."""
    out: dict[tuple[str, int], dict[str, Any]] = {}
    for _ in range(5000):
        if not engine.has_work:
            break
        for delta in engine.step():
            key = (delta.sequence.request.id, delta.sequence.index)
            got = out.setdefault(key, {"tokens": [], "logprobs": [], "text": "", "reason": None})
            assert got["reason"] is None, "a delta after the end"
            got["tokens"] += delta.tokens
            got["logprobs"] += delta.logprobs or []
            got["text"] += delta.text or ""
            got["reason"] = delta.sequence.finish_reason
        engine.check_ledger()
    assert not engine.has_work, "no end"
    assert engine.cache.usage == 0 and not engine.requests
    return out


def alone(model: Decoder, prompt: list[int], **params: Any) -> dict[str, Any]:
    """One request in an engine of its own."""
    engine = engine_of(model)
    engine.add(prompt, SamplingParams(**params))
    return drain(engine).popitem()[1]


def output(request: Request, index: int = 0) -> list[int]:
    return request.sequences[index].tokens[len(request.prompt) :]


# ---- scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [5, 64])
@pytest.mark.parametrize("drafter", ["none", "prompt-lookup(k=4)"])
def test_scores_are_those_of_one_forward_pass(tiny: Make, budget: int, drafter: str) -> None:
    model = tiny("llama")
    engine = engine_of(model, f"draft={drafter}", max_batch_tokens=budget)
    params = SamplingParams(max_tokens=9, prompt_logprobs=3, logprobs=2, ignore_eos=True)
    request = engine.add(PROMPT, params)
    (got,) = drain(engine).values()
    tokens = request.sequences[0].tokens
    law = whole(model, tokens).log_softmax(-1)
    assert request.prompt_logprobs is not None and request.prompt_logprobs[0] is None
    entries = request.prompt_logprobs[1:] + got["logprobs"]
    assert len(entries) == len(tokens) - 1
    for at, entry in enumerate(entries):
        assert entry is not None
        own, best = entry
        assert own == pytest.approx(float(law[at, tokens[at + 1]]), abs=1e-5)
        top = law[at].topk(3 if at < len(PROMPT) - 1 else 2)
        assert [i for i, _ in best] == top.indices.tolist()
        assert [v for _, v in best] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert got["tokens"] == law[len(PROMPT) - 1 : -1].argmax(-1).tolist()


def test_scoring_alone_generates_nothing(tiny: Make) -> None:
    model = tiny("llama")
    engine = engine_of(model)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, n=2, logprobs=1)
    request = engine.add(PROMPT, params)
    got = drain(engine)
    law = whole(model, PROMPT).log_softmax(-1)
    assert request.prompt_logprobs is not None
    scores = [entry[0] for entry in request.prompt_logprobs[1:] if entry is not None]
    expected = law[torch.arange(len(PROMPT) - 1), PROMPT[1:]].tolist()
    assert scores == pytest.approx(expected, abs=1e-5)
    assert [(g["tokens"], g["logprobs"], g["reason"]) for g in got.values()] == [
        ([], [], "length")
    ] * 2
    assert engine.stats.tokens == 0


def test_a_prompt_that_fills_the_context_can_be_scored(tiny: Make) -> None:
    """Also where the context is what the pool holds."""
    model = tiny("llama")
    block = engine_of(model).cache.layout.block_bytes()
    for sizes in ({}, {"kv_bytes": 3 * block}):
        engine = engine_of(model, **sizes)
        prompt = (PROMPT * 6)[: engine.max_length]
        engine.add(prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))
        for _ in range(50):
            engine.step()
        assert not engine.has_work, f"no end with {sizes}"


# ---- ends -----------------------------------------------------------------------------------


class Letters:
    """Token i is a letter or two; odd tokens end a word."""

    def __init__(self) -> None:
        self.flushed = 0

    @staticmethod
    def word(token: int) -> str:
        return chr(97 + token % 26) * (1 + token // 26) + (" " if token % 2 else "")

    def step(self, token: int) -> str:
        return self.word(token)

    def flush(self) -> str:
        return ""


def test_limits(tiny: Make) -> None:
    model = tiny("llama")
    free = alone(model, PROMPT, max_tokens=None, ignore_eos=True)
    assert free["reason"] == "length"
    assert len(PROMPT) + len(free["tokens"]) == model.config.max_positions
    for count in (1, 2, 17):
        got = alone(model, PROMPT, max_tokens=count, ignore_eos=True)
        assert got["reason"] == "length" and got["tokens"] == free["tokens"][:count]


def test_end_of_sequence_and_stop_tokens(tiny: Make) -> None:
    model = tiny("llama")
    free = alone(model, PROMPT, max_tokens=40, ignore_eos=True)["tokens"]
    # this very model, with a token that it will say as its end of sequence
    last = next(i for i in range(4, 40) if free[i] not in free[:i])
    ending = tiny("llama", eos_token_id=[60 if free[last] != 60 else 59, free[last]])
    ended = alone(ending, PROMPT, max_tokens=40)
    assert ended["tokens"] == free[: last + 1] and ended["reason"] == "stop"
    assert alone(ending, PROMPT, max_tokens=40, ignore_eos=True)["tokens"] == free
    stopped = alone(model, PROMPT, max_tokens=40, ignore_eos=True, stop_token_ids=[free[last]])
    assert stopped["tokens"] == free[: last + 1] and stopped["reason"] == "stop"
    late = alone(ending, PROMPT, max_tokens=40, min_tokens=last + 2)
    assert free[last] not in late["tokens"][: last + 2] and len(late["tokens"]) >= last + 2
    assert late["tokens"][:last] == free[:last] and late["tokens"][last] != free[last]


@pytest.mark.parametrize("stack", ["plain", "draft=prompt-lookup(k=6)"])
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(tiny: Make, include: bool, stack: str) -> None:
    model = tiny("llama")
    free = alone(model, PROMPT, max_tokens=60, ignore_eos=True)["tokens"]
    words = [Letters.word(token) for token in free]
    text = "".join(words)
    stop = text[9:13]  # begins and ends anywhere in a token
    at = text.index(stop)
    needed = next(i for i in range(61) if stop in "".join(words[:i]))

    def run(**changes: Any) -> dict[str, Any]:
        engine = engine_of(model, stack)
        params = SamplingParams(
            max_tokens=60, ignore_eos=True, stop=[stop, "QQ"], include_stop=include, **changes
        )
        engine.add(PROMPT, params, texts=[TextStream(Letters(), params.stop, include)])
        return drain(engine).popitem()[1]

    got = run()
    assert got["reason"] == "stop" and got["tokens"] == free[:needed]
    assert got["text"] == text[: at + len(stop) if include else at]
    late = run(min_tokens=needed + 1)
    assert late["tokens"][: needed + 1] == free[: needed + 1]


# ---- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "the prompt is empty"),
        ([3, 61], {}, "token ids outside 0..60"),
        ([-1], {}, "token ids outside 0..60"),
        ([3] * 256, {}, "the prompt has 256 tokens, at most 255 fit (context 256)"),
        ([3] * 257, {"max_tokens": 0}, "the prompt has 257 tokens, at most 256 fit"),
        ([3], {"logit_bias": {61: 1.0}}, "logit_bias names token 61, outside 0..60"),
        ([3], {"allowed_token_ids": [4, -1]}, "allowed_token_ids names token -1"),
        ([3], {"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ([3], {"stop_token_ids": [99]}, "stop_token_ids names token 99"),
        ([3], {"stop": "x"}, "stop strings need a tokenizer"),
    ],
)
def test_refusals_queue_nothing(
    tiny: Make, prompt: list[int], params: dict[str, Any], words: str
) -> None:
    engine = engine_of(tiny("llama"))
    with pytest.raises(RequestRefused) as error:
        engine.add(prompt, SamplingParams(**params))
    assert words in str(error.value)
    assert not engine.has_work and not engine.requests and engine.step() == []


@pytest.mark.parametrize("word", [[], [61], [5, 99], [-1]])
def test_bad_words_that_are_no_tokens_are_refused(tiny: Make, word: list[int]) -> None:
    engine = engine_of(tiny("llama"))
    with pytest.raises(RequestRefused):
        engine.add([3, 4], SamplingParams(), bad_words=[word])


def test_ids_are_unique_while_in_use(tiny: Make) -> None:
    engine = engine_of(tiny("llama"))
    engine.add([3], SamplingParams(max_tokens=2), request_id="a")
    with pytest.raises(RequestRefused, match="request id 'a' is in use"):
        engine.add([4], SamplingParams(), request_id="a")
    assert len(engine.waiting) == 1
    drain(engine)
    engine.add([4], SamplingParams(max_tokens=2), request_id="a")
    drain(engine)


def test_too_little_memory(tiny: Make) -> None:
    model = tiny("llama")
    block = engine_of(model).cache.layout.block_bytes()
    with pytest.raises(ValueError, match=r"holds no page of"):
        engine_of(model, kv_bytes=block - 1)
    assert engine_of(model, kv_bytes=2 * block).max_length in (31, 32)
    for name in ("max_sequences", "max_batch_tokens", "kv_bytes"):
        with pytest.raises(ValueError, match=f"{name} is 0, must be at least 1"):
            EngineConfig(**{name: 0})


def test_nothing_left_to_choose_ends_one_request_only(tiny: Make) -> None:
    model = tiny("llama")
    engine = engine_of(model)
    params = SamplingParams(max_tokens=5, allowed_token_ids=[7], ignore_eos=True)
    bad = engine.add(PROMPT[:20], params, bad_words=[[7, 7]], request_id="bad")
    engine.add(PROMPT[:20], SamplingParams(max_tokens=5, ignore_eos=True), request_id="good")
    got = drain(engine)
    assert got["bad", 0] == {"tokens": [7], "logprobs": [], "text": "", "reason": "error"}
    assert "no token can be chosen" in str(bad.sequences[0].error)
    expected = alone(model, PROMPT[:20], max_tokens=5, ignore_eos=True)
    assert got["good", 0]["tokens"] == expected["tokens"]


# ---- failures and aborts --------------------------------------------------------------------


class Flaky:
    """An executor that fails at the steps that it is told."""

    def __init__(self, inner: Any, fails: set[int]) -> None:
        self.inner, self.fails, self.steps = inner, fails, 0

    def submit(self, *args: Any) -> Any:
        self.steps += 1
        if self.steps in self.fails:
            raise RuntimeError("out of luck")
        return self.inner.submit(*args)

    def move(self, *args: Any) -> None:
        self.inner.move(*args)


@pytest.mark.parametrize("fails", [1, 3, 4])
def test_a_failing_step_ends_its_requests_and_no_others(tiny: Make, fails: int) -> None:
    model = tiny("llama")
    engine = engine_of(model, max_sequences=2, max_batch_tokens=24)
    engine.executor = Flaky(engine.executor, {fails})
    params = SamplingParams(max_tokens=6, ignore_eos=True, n=2)
    for i in range(4):
        engine.add(PROMPT[i : i + 30], params, request_id=str(i))
    out: dict[tuple[str, int], str] = {}
    while engine.has_work:
        for delta in engine.step():
            sequence = delta.sequence
            if sequence.finish_reason is not None:
                assert (sequence.request.id, sequence.index) not in out
                out[sequence.request.id, sequence.index] = sequence.finish_reason
                if sequence.finish_reason == "error":
                    assert sequence.error == "RuntimeError: out of luck"
                else:
                    start = int(sequence.request.id)
                    expected = alone(
                        model, PROMPT[start : start + 30], max_tokens=6, ignore_eos=True
                    )
                    assert output(sequence.request, sequence.index) == expected["tokens"]
        engine.check_ledger()
    assert len(out) == 8 and set(out.values()) == {"error", "length"}
    assert engine.cache.usage == 0 and not engine.requests
    engine.add(PROMPT[:30], SamplingParams(max_tokens=6, ignore_eos=True))
    expected = alone(model, PROMPT[:30], max_tokens=6, ignore_eos=True)
    assert drain(engine).popitem()[1]["tokens"] == expected["tokens"]


def test_abort_anywhere(tiny: Make) -> None:
    engine = engine_of(tiny("llama"), max_sequences=2, max_batch_tokens=16)
    assert engine.abort("nobody") == []
    params = SamplingParams(max_tokens=20, ignore_eos=True, n=3)
    for name in ("prompt", "decoding", "waiting"):
        engine.add(PROMPT, params, request_id=name)
    assert [len(engine.abort(name)) for name in ("waiting", "waiting")] == [3, 0]
    engine.step()
    deltas = engine.abort("prompt")  # in the middle of its prompt, twins asleep
    assert [d.sequence.finish_reason for d in deltas] == ["abort"] * 3
    assert all(d.tokens == [] for d in deltas) and "prompt" not in engine.requests
    while not engine.stats.tokens:
        engine.step()
    assert len(engine.abort("decoding")) == 3
    assert not engine.has_work and engine.cache.usage == 0 and not engine.requests
    engine.check_ledger()


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_twins_queue_where_no_table_row_is_free(tiny: Make, rows: int, reuse: bool) -> None:
    model = tiny("llama")
    params = {"n": 5, "seed": 3, "temperature": 1.0, "max_tokens": 7, "ignore_eos": True}
    engine = engine_of(model, max_sequences=rows, prefix_reuse=reuse)
    request = engine.add(PROMPT, SamplingParams(**params))
    drain(engine)
    roomy = engine_of(model, max_sequences=5)
    other = roomy.add(PROMPT, SamplingParams(**params))
    drain(roomy)
    texts = [output(request, i) for i in range(5)]
    assert texts == [output(other, i) for i in range(5)]
    assert len({tuple(text) for text in texts}) > 1
    assert (engine.cache.stats.prefix_hits > 0) == reuse


# ---- figures --------------------------------------------------------------------------------


class Ticking:
    """An executor whose steps take half a second of virtual time."""

    def __init__(self, inner: Any, clock: VirtualClock) -> None:
        self.inner, self.clock = inner, clock

    def submit(self, *args: Any) -> Any:
        self.clock.advance(0.5)
        return self.inner.submit(*args)

    def move(self, *args: Any) -> None:
        self.inner.move(*args)


def test_figures_on_a_virtual_clock(tiny: Make) -> None:
    clock = VirtualClock(100.0)
    engine = engine_of(tiny("llama"), clock=clock, max_sequences=1, max_batch_tokens=20)
    engine.executor = Ticking(engine.executor, clock)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    first = engine.add(PROMPT, params)
    clock.advance(1.0)
    second = engine.add(PROMPT, params)
    drain(engine)
    one, two = (r.sequences[0].figures for r in (first, second))
    assert (one.arrived, one.scheduled, two.arrived) == (100.0, 101.0, 101.0)
    assert one.token_times == [102.5, 103.0, 103.5] and one.ttft == 2.5  # 45 tokens: 3 steps
    assert (one.speculation.passes, one.cached_tokens, one.preemptions) == (3, 0, 0)
    assert two.scheduled == 103.5 and two.cached_tokens == 32
    assert two.token_times == [104.0, 104.5, 105.0]
    stats = engine.stats
    assert (stats.steps, stats.tokens, stats.speculation.passes, stats.finished) == (8, 6, 6, 2)
    assert stats.rows == 45 + 2 + 13 + 2 and stats.step_seconds == 4.0
    page = engine.cache.layout.block_bytes()
    assert stats.decode_steps == 4 and stats.decode_kv_bytes == 2 * (46 + 47) * page // 16
    with pytest.raises(ValueError, match="backwards"):
        clock.advance(-0.1)


def test_priorities_go_first(tiny: Make) -> None:
    engine = engine_of(tiny("llama"), max_sequences=1)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    for name, priority in (("a", 1), ("b", 0), ("c", -1), ("d", 0)):
        engine.add(PROMPT[:9], params, request_id=name, priority=priority)
    assert [request for request, _ in drain(engine)] == ["c", "b", "d", "a"]


# ---- the law of samples ---------------------------------------------------------------------

VOCAB, SAMPLES = 8, 20_480
ALPHA = 1e-4 / 9  # three checks in each of three runs


@dataclass(frozen=True)
class AcceptFirst:
    """Planted bias: the first candidate becomes output whatever the target says."""

    def refuses(self, params: SamplingParams) -> str | None:
        return None

    def verify(self, tree: Any, walk: Any) -> list[int]:
        path = [0]
        if children := tree.children(0):
            path.append(children[0])
            if walk.emit(0, tree.token[children[0]]):
                return path
        walk.emit(path[-1], walk.choose(path[-1]))
        return path


AcceptFirst.card = Card(  # type: ignore[attr-defined]
    "accept-first", ("verify",), AcceptFirst, "", "lossy", "none", frozenset(),
    frozenset({"accepts-tokens"}),
)  # fmt: skip


def sample(
    model: Decoder, prompt: list[int], drafts: str | None, verify: Any, samples: int
) -> NDArray[Any]:
    """Counts [first token, second token]."""
    parts: dict[str, Any] = {"select": "all"}
    if drafts is not None:
        parts["draft"] = Scripted(drafts, VOCAB, rng=random.Random(1))
    if verify is not None:
        parts["verify"] = verify
    engine = engine_of(model, parts, max_sequences=140, max_batch_tokens=512)
    counts = np.zeros((VOCAB, VOCAB), np.int64)
    length = 3 if drafts else 2  # no draft for the last token
    for seed in range(samples // 128):
        params = SamplingParams(
            n=128, seed=seed, temperature=1.2, max_tokens=length, ignore_eos=True
        )
        request = engine.add(prompt, params)
        while engine.has_work:
            engine.step()
        for index in range(128):
            first, second, *_ = output(request, index)
            counts[first, second] += 1
    found = engine.stats.speculation
    assert found.drafted > samples / 4 if drafts else found.drafted == 0
    assert (found.drafts > 0) == (found.drafted > 0)
    assert found.drafts <= found.drafted and found.drafts <= found.passes
    return counts


def p_value(counts: NDArray[Any], probs: NDArray[Any]) -> float:
    """Of Pearson's test, by Wilson and Hilferty; cells expected less than 8 times are joined."""
    due = probs.ravel() * counts.sum()
    seen = counts.ravel()
    rare = due < 8
    due, seen = (np.append(x[~rare], x[rare].sum()) for x in (due, seen))
    due, seen = due[due > 0], seen[due > 0]
    freedom = len(due) - 1
    x = float(((seen - due) ** 2 / due).sum())
    z = ((x / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def law(model: Decoder, prompt: list[int]) -> NDArray[np.float64]:
    """Exact probabilities [first token, second token] from the model's logits."""
    first = (whole(model, prompt)[-1].double() / 1.2).softmax(-1)
    rows = [whole(model, [*prompt, token])[-1].double() / 1.2 for token in range(VOCAB)]
    return (first[:, None] * torch.stack(rows).softmax(-1)).numpy()


@pytest.mark.parametrize(
    ("drafts", "verify", "right"),
    [(None, None, True), ("mixed", None, True), ("mixed", AcceptFirst(), False)],
    ids=["plain", "drafts", "planted-bias"],
)
def test_the_law_of_samples(tiny: Make, drafts: str | None, verify: Any, right: bool) -> None:
    model = tiny("llama", vocab_size=VOCAB, scale=0.15)
    prompt = [3, 1, 4, 1, 5]
    exact = law(model, prompt)
    assert exact.sum(1).max() < 0.9 and exact.sum(0).max() < 0.9
    counts = sample(model, prompt, drafts, verify, SAMPLES if right else SAMPLES // 4)
    first, second, both = (
        p_value(counts.sum(1), exact.sum(1)),
        p_value(counts.sum(0), exact.sum(0)),
        p_value(counts, exact),
    )
    assert first > ALPHA, "the first token never has a draft"
    assert (second > ALPHA and both > ALPHA) == right, (second, both)


def test_one_poisoned_request_harms_no_other(tiny: Make) -> None:
    """A processor that fails ends its own request; the other goes on in the same steps."""
    engine = engine_of(tiny("llama"))
    good = engine.add([3, 4, 5], SamplingParams(max_tokens=6, ignore_eos=True))
    bad = engine.add([3, 4, 6], SamplingParams(max_tokens=6, logit_bias={5: 1.0}))

    def broken(*_: object) -> None:
        raise IndexError("planted")

    bad.sequences[0].sampler.choose = broken  # type: ignore[method-assign]
    drain(engine)
    assert bad.sequences[0].finish_reason == "error" and "planted" in bad.sequences[0].error
    assert good.sequences[0].finish_reason == "length" and good.sequences[0].num_output == 6


def test_a_stray_stream_cannot_stop_the_engine(tiny: Make) -> None:
    """Pages held by a stream that does not run are found when nothing else can go on."""
    engine = engine_of(tiny("llama"), max_sequences=1)
    request = engine.add([3] * 20, SamplingParams(max_tokens=2, ignore_eos=True))
    engine.step()
    sequence = request.sequences[0]
    engine.running.remove(sequence)  # lost: its table row and its pages stay taken
    other = engine.add([4] * 20, SamplingParams(max_tokens=2, ignore_eos=True))
    for _ in range(5):
        engine.step()
    assert other.sequences[0].finish_reason == "length"
    assert engine.cache.stats.leaked_pages == 2


BAD = [3, 4, 6]
"""A prompt whose sequence is treated wrongly in the next tests; that of others is not."""


def one_ends_and_others_do_not(engine: Engine, model: Decoder, error: str) -> None:
    """A good request, a bad one and one that waits: the bad one alone ends with this error."""
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
    bad = engine.add(BAD, params)
    good = [engine.add(prompt, params) for prompt in ([3, 4, 5], PROMPT)]
    drain(engine)
    (sequence,) = bad.sequences
    assert sequence.finish_reason == "error" and error in str(sequence.error), sequence.error
    assert engine.cache.stats.leaked_pages == 0
    for request in good:
        expected = alone(model, request.prompt, max_tokens=12, ignore_eos=True, temperature=0)
        assert output(request) == expected["tokens"]


@pytest.mark.parametrize("fault", ["a node more", "a node less", "no own token", "behind the end"])
def test_a_verifier_that_commits_what_it_did_not_emit(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    verify = SampleMatch.verify

    def wrong(self: SampleMatch, tree: TokenTree, walk: SequenceWalk) -> list[int]:
        if walk.sequence.request.prompt != BAD or len(tree) < 3:
            return verify(self, tree, walk)
        if fault == "no own token":
            walk.emit(0, tree.token[1])
            return [0, 1]
        path = verify(self, tree, walk)
        if fault == "a node more":
            return [*path, path[-1] + 1] if path[-1] + 1 < len(tree) else [*path, path[-1]]
        if fault == "behind the end":
            while not walk.emit(0, 5):
                pass
            walk.emit(0, 5)
        return path[:-1]

    monkeypatch.setattr(SampleMatch, "verify", wrong)
    model = tiny("llama")
    engine = engine_of(model, "draft=scripted(k=4)", max_sequences=2)
    error = "behind the end" if fault == "behind the end" else "verify=sample-match broke its"
    one_ends_and_others_do_not(engine, model, error)


@dataclass(frozen=True)
class Unruly(Scripted):
    """Right drafts, but for one sequence something that no drafter may do."""

    fault: str = ""

    def propose(self, sequences: Any, budgets: Any) -> list[TokenTree]:
        trees = super().propose(sequences, budgets)
        for i, (sequence, budget) in enumerate(zip(sequences, budgets, strict=True)):
            root = sequence.tokens[-1]
            if sequence.request.prompt != BAD or sequence.num_output < 3:
                continue
            if self.fault == "too many":
                trees[i] = TokenTree.chain([root] + [5] * (budget + 1))
            elif self.fault == "root":
                trees[i] = TokenTree.chain([root + 1, 5])
            elif self.fault in ("below", "above"):
                trees[i] = TokenTree.chain([root, -1 if self.fault == "below" else 61])
            elif self.fault == "committed before":
                sequence.stream.computed += 1
        return trees

    def observe(self, outcomes: Any) -> None:
        super().observe(outcomes)
        for outcome in outcomes:
            sequence = outcome.sequence
            if sequence.request.prompt == BAD and self.fault == "committed after":
                sequence.stream.computed += 1


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("too many", "candidates for a budget of"),
        ("root", "instead of the pending token"),
        ("below", "a candidate outside 0..60"),
        ("above", "a candidate outside 0..60"),
        ("committed before", "left 0 tokens to compute instead of 1"),
        ("committed after", "positions are computed of"),
    ],
)
def test_a_drafter_that_breaks_its_contract(tiny: Make, fault: str, error: str) -> None:
    model = tiny("llama")
    stack = Stack({**Stack.parse().methods, "draft": Unruly("random", 61, fault=fault)})
    config = EngineConfig(max_sequences=2, max_batch_tokens=64)
    one_ends_and_others_do_not(Engine(model, stack, config), model, error)


@pytest.mark.parametrize("steps", [0, 2])
def test_an_engine_that_cannot_go_on_says_so(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """A schedule that lets nothing run, from the beginning or in the middle: no endless loop."""
    engine = engine_of(tiny("llama"), max_sequences=1)
    requests = [engine.add(PROMPT, SamplingParams(max_tokens=9)) for _ in range(2)]
    for _ in range(steps):
        engine.step()
    monkeypatch.setattr(StallFree, "plan", lambda *_: Plan())
    drain(engine)
    for request in requests:
        (sequence,) = request.sequences
        assert sequence.finish_reason == "error"
        assert "schedule=stall-free lets nothing run" in str(sequence.error)


@pytest.mark.parametrize(
    "params", [{"stop_token_ids": [1.5]}, {"bad_words": [[1.5]]}, {"logit_bias": {1.5: 1.0}}]
)
def test_ids_that_are_no_integers_are_refused(params: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no token id"):
        SamplingParams(**params)  # type: ignore[arg-type]


def test_keys_of_json_are_token_ids() -> None:
    assert SamplingParams(logit_bias={"7": 1.0}).logit_bias == {7: 1.0}  # type: ignore[dict-item]


def test_thousands_may_wait_and_leave(tiny: Make) -> None:
    """Lines stay in order of rank, aborts find their place in them, and nothing is left over."""
    rng = random.Random(4)
    engine = Engine(tiny("llama"), Stack.parse(), EngineConfig(max_sequences=4, kv_bytes=1 << 20))
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    left = []
    for i in range(3000):
        left.append(f"r{i}")
        engine.add([5, 6, 7], params, request_id=left[-1], priority=rng.randrange(3))
    rng.shuffle(left)
    while left:
        for _ in range(100):
            engine.abort(left.pop())
        for delta in engine.step():
            assert delta.sequence.finish_reason != "error"
        for line in (engine.waiting, engine.running):
            assert [s.rank for s in line] == sorted(s.rank for s in line)
            assert all(s.finish_reason is None for s in line)
    assert not engine.has_work and not engine.requests and engine.cache.usage == 0
    engine.check_ledger()


@pytest.mark.parametrize(
    "choices",
    [
        "control=fixed(k={})",
        "control=smartspec(most={})",
        "draft=prompt-lookup(k={})",
        "draft=copyspec(k={})",
        "draft=aggressive(k={})",
        "draft=aded(nodes={})",
        "draft=del(k={})",
        "draft=scripted(k={})",
        "draft=any(of=prompt-lookup(k={})|copyspec)",
    ],
)
def test_drafts_that_never_fit_are_refused_at_once(tiny: Make, choices: str) -> None:
    """The pool has 5 pages of 16 positions."""
    model = tiny("llama")
    page = Engine(model, Stack.parse(""), EngineConfig(max_sequences=1)).cache.layout.block_bytes()
    for most in (80, 81):
        stack = Stack.parse(choices.format(most))
        config = EngineConfig(max_sequences=4, kv_bytes=5 * page)
        if most == 80:
            Engine(model, stack, config)
        else:
            with pytest.raises(MethodError, match=r"81 .* does not fit the 5 pages .* kv_bytes"):
                Engine(model, stack, config)


def test_numbers_of_a_walk_belong_to_their_position(tiny: Make) -> None:
    """Where a walk began, and how many numbers it took before, changes none of them."""
    engine = engine_of(tiny("llama"))
    (sequence,) = engine.add([2, 3], SamplingParams(temperature=1.0, seed=4)).sequences
    logits = np.zeros((2, 61), np.float32)
    rows = Rows(logits, [0, 0], np.full(2, math.log(61), np.float32), True)

    def drawn(walk: SequenceWalk) -> list[int]:
        return [walk.draw(np.ones(1 << 20)) for _ in range(2)]

    walk = SequenceWalk(sequence, 0, rows)
    before = drawn(walk)
    walk.emit(0, 5)
    after = drawn(walk)
    assert after == drawn(SequenceWalk(sequence, 0, rows))
    assert len({*before, *after}) == 4


def test_laws_ahead_are_those_of_the_history_there(tiny: Make) -> None:
    engine = engine_of(tiny("llama"))
    params = SamplingParams(temperature=1.0, seed=4, presence_penalty=0.7, bad_words=[[5, 6]])
    (sequence,) = engine.add([2, 3], params, bad_words=[[5, 6]]).sequences
    logits = np.random.default_rng(0).normal(size=(3, 61)).astype(np.float32)
    rows = Rows(logits, [0] * 3, np.zeros(3, np.float32), True)
    walk = SequenceWalk(sequence, 0, rows)
    ahead = walk.ahead(2, [9, 5])
    assert ahead[6] == 0 and not np.array_equal(ahead, walk.law(2))
    for token in (9, 5):
        walk.emit(0, token)
    assert np.array_equal(ahead, walk.law(2))
