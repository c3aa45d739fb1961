"""Offline generation, chat and scoring."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hasten import LLM, SamplingParams
from hasten.engine.engine import RequestRefused
from tests.api.common import prompts

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def test_one_prompt_and_a_list_give_the_same(llm: LLM) -> None:
    texts = prompts(5)
    together = llm.generate(texts, GREEDY)
    alone = [llm.generate(text, GREEDY) for text in texts]
    assert [len(x) for x in alone] == [1] * 5
    assert [x[0].outputs[0].token_ids for x in alone] == [r.outputs[0].token_ids for r in together]
    assert [r.prompt for r in together] == texts
    assert all(len(r.outputs[0].token_ids) == 8 for r in together)
    assert all(r.outputs[0].finish_reason == "length" for r in together)
    assert llm.generate([], GREEDY) == []


def test_token_ids_of_any_integer_kind_are_a_prompt(llm: LLM) -> None:
    text = "def add(a, b):"
    ids = llm.tokenizer.encode(text)
    expected = llm.generate(text, GREEDY)[0].outputs[0].token_ids
    for form in (ids, tuple(ids), np.array(ids), [ids], [np.array(ids)]):
        result = llm.generate(form, GREEDY)
        assert len(result) == 1
        assert result[0].prompt is None and result[0].prompt_token_ids == ids
        assert result[0].outputs[0].token_ids == expected


def test_each_prompt_has_its_own_params(llm: LLM) -> None:
    each = [
        SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, logprobs=k)
        for n, k in ((1, None), (5, 0), (3, 2))
    ]
    results = llm.generate(["a b c"] * 3, each)
    assert [len(r.outputs[0].token_ids) for r in results] == [1, 5, 3]
    assert [r.outputs[0].logprobs is None for r in results] == [True, False, False]
    with pytest.raises(ValueError, match="3 prompts but 2 sampling parameters"):
        llm.generate(["a"] * 3, each[:2])


def test_seeded_outputs_of_one_prompt_differ_and_repeat(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, seed=7, n=4, ignore_eos=True)
    first, second = (llm.generate("x = ", params)[0] for _ in range(2))
    assert [o.index for o in first.outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in first.outputs}) == 4
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in second.outputs]
    assert first.text == first.outputs[0].text


def test_logprobs_name_the_token_and_its_rivals(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=0, logprobs=3, ignore_eos=True)
    output = llm.generate("import os\n", params)[0].outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == 6
    for token, (logprob, rivals) in zip(output.token_ids, output.logprobs, strict=True):
        assert rivals[0] == (token, logprob)  # greedy: the likeliest one
        assert [x for _, x in rivals] == sorted((x for _, x in rivals), reverse=True)
        assert len(rivals) == 3 and sum(math.exp(x) for _, x in rivals) <= 1 + 1e-5


def test_a_stop_string_ends_the_text(llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=3, ignore_eos=True)
    free = llm.generate("class A:\n", params)[0].outputs[0]
    stop = free.text[7:10]
    cut = free.text.find(stop)
    for include in (False, True):
        stopping = SamplingParams(
            max_tokens=24, temperature=1.0, seed=3, ignore_eos=True, stop=stop, include_stop=include
        )
        output = llm.generate("class A:\n", stopping)[0].outputs[0]
        assert output.text == free.text[: cut + (len(stop) if include else 0)]
        assert output.finish_reason == "stop"
        assert output.token_ids == free.token_ids[: len(output.token_ids)]
        assert len(output.token_ids) < len(free.token_ids)


def test_chat_goes_through_the_template(llm: LLM) -> None:
    one = [{"role": "user", "content": "What is 2 + 3?"}]
    two = [{"role": "system", "content": "Be brief."}, *one]
    ids = [llm.chat_prompt(c) for c in (one, two)]
    assert ids[0] == llm.tokenizer.chat_ids(one)
    direct = [r.outputs[0].token_ids for r in llm.generate(ids, GREEDY)]
    assert [r.outputs[0].token_ids for r in llm.chat([one, two], GREEDY)] == direct
    assert [r.outputs[0].token_ids for r in llm.chat(one, GREEDY)] == direct[:1]


# ---- scoring --------------------------------------------------------------------------------


def test_a_score_is_what_prompt_logprobs_say(llm: LLM) -> None:
    texts = prompts(4)
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0)
    scores = llm.score(texts)
    for score, result in zip(scores, llm.generate(texts, wanted), strict=True):
        entries = result.prompt_logprobs
        assert entries is not None and entries[0] is None
        assert score.token_ids == result.prompt_token_ids[1:]
        assert score.logprobs == [e[0] for e in entries[1:] if e is not None]
        assert score.total == sum(score.logprobs) < 0
    assert llm.score(texts[1])[0] == scores[1]


def test_a_score_repeats_what_generation_reported(llm: LLM) -> None:
    """The same rows, once as prompt and once as output: the same bits."""
    params = SamplingParams(max_tokens=10, temperature=0, logprobs=0, ignore_eos=True)
    contexts = [llm.tokenizer.encode(text) for text in prompts(6)]
    outputs = [r.outputs[0] for r in llm.generate(contexts, params)]
    scores = llm.score([o.token_ids for o in outputs], contexts)
    for score, output in zip(scores, outputs, strict=True):
        assert output.logprobs is not None
        assert score.token_ids == output.token_ids
        assert score.logprobs == [logprob for logprob, _ in output.logprobs]
        assert score.greedy == [True] * 10


def test_a_token_that_is_not_the_likeliest_is_not_greedy(llm: LLM) -> None:
    context = llm.tokenizer.encode("for i in range(")
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=2)
    output = llm.generate(context, params)[0].outputs[0]
    assert output.logprobs is not None
    second, logprob = output.logprobs[0][1][1]
    score = llm.score([[second]], [context])[0]
    assert (score.token_ids, score.logprobs, score.greedy) == ([second], [logprob], [False])


def test_contexts_and_texts_go_in_pairs(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 texts but 1 contexts"):
        llm.score(["a", "b"], ["c"])


# ---- refusals -------------------------------------------------------------------------------


def test_a_refused_prompt_is_named_and_leaves_nothing_queued(llm: LLM) -> None:
    many = ["fine", "fine too", [1] * 600, "never seen"]
    with pytest.raises(RequestRefused, match=r"prompts\[2\]: the prompt has 600 tokens"):
        llm.generate(many, GREEDY)
    # the fixture asserts that "fine" is not left behind


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([[]], GREEDY, "prompt is empty"),
        ([10**6], GREEDY, "token ids outside"),
        ([-1], GREEDY, "token ids outside"),
        ("x", SamplingParams(stop_token_ids=[10**6]), "stop_token_ids names token 1000000"),
        ("x", SamplingParams(bad_words=[""]), "bad_words holds an empty entry"),
        ([[1.5, 2.5]], GREEDY, "text or a list of token ids"),
    ],
)
def test_what_can_never_run_is_refused(
    llm: LLM, prompt: object, params: SamplingParams, message: str
) -> None:
    with pytest.raises(RequestRefused, match=message):
        llm.generate(prompt, params)  # type: ignore[arg-type]


def test_arguments_of_another_kind_are_named(llm: LLM) -> None:
    for prompts_ in ({"prompt": "x"}, 5):
        with pytest.raises(TypeError, match="text, token ids, or a list of these, not"):
            llm.generate(prompts_, GREEDY)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="params are SamplingParams"):
        llm.generate("x", {"max_tokens": 3})  # type: ignore[arg-type]
    with pytest.raises(RequestRefused, match=r"prompts\[1\]: a prompt is text"):
        llm.generate(["x", None], GREEDY)  # type: ignore[list-item]


def test_a_step_that_fails_ends_its_requests_only(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no room")

    expected = llm.generate("x = 1", GREEDY)[0].outputs[0].token_ids
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.executor, "submit", broken)
        output = llm.generate("x = 1", GREEDY)[0].outputs[0]
    assert output.finish_reason == "error" and output.error == "MemoryError: no room"
    assert llm.generate("x = 1", GREEDY)[0].outputs[0].token_ids == expected


def test_vectors_are_the_same_alone_and_together_and_leave_nothing(llm: LLM) -> None:
    texts = prompts(6)
    together = llm.embed(texts)
    assert together == [llm.embed(text)[0] for text in texts]
    assert len(together[0]) == llm.engine.model.config.hidden_size
    assert len({tuple(v) for v in together}) == len(set(texts))
    with pytest.raises(RequestRefused):
        llm.embed(["fine", []])
    assert not llm.engine.has_work
