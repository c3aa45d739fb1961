"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator

import openai
import pytest

from hasten import LLM, SamplingParams
from tests.serving.conftest import Live

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("reference", max_sequences=4, max_length=512, kv_bytes=32 << 20)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["reference"]
    assert client.models.retrieve("reference").id == "reference"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"


def test_chat_gives_the_text_of_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.chat.completions.create(model="reference", messages=HELLO, max_tokens=12)
    expected = llm.chat(HELLO, SamplingParams(max_tokens=12))[0]
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.outputs[0].finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"


def test_stream_has_role_content_reason_usage_in_this_order(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="reference",
            messages=HELLO,
            max_completion_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].finish_reason is None
    assert middle and all(chunk.choices[0].delta.content for chunk in middle)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert last.choices[0].finish_reason == "length" and not last.choices[0].delta.content
    assert usage.choices == [] and usage.usage is not None
    assert usage.usage.completion_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_without_options_has_no_usage(client: openai.OpenAI) -> None:
    chunks = client.completions.create(model="reference", prompt="x", max_tokens=3, stream=True)
    assert all(chunk.usage is None for chunk in chunks)


async def _ask(live: Live) -> list[str]:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:

        async def one(number: int) -> str:
            stream = await client.completions.create(
                model="reference", prompt=f"def f{number}(", max_tokens=8, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*map(one, range(8)))


def test_async_client_many_at_once(live: Live, llm: LLM) -> None:
    import asyncio

    texts = asyncio.run(_ask(live))
    params = SamplingParams(max_tokens=8)
    assert texts == [o.text for o in llm.generate([f"def f{i}(" for i in range(8)], params)]


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="reference", messages=HELLO, temperature=-1)
    assert error.value.param == "temperature"
    assert error.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as stream:  # before the first byte of the stream
        client.completions.create(model="reference", prompt="1 " * 600, max_tokens=1, stream=True)
    assert stream.value.code == "context_length_exceeded"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="reference", messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 4
    text = b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode()
    assert text == answer.choices[0].message.content
    for entry in logprobs.content:  # greedy: the chosen token is the likeliest
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0


def test_several_prompts_and_n(client: openai.OpenAI, llm: LLM) -> None:
    prompts = ["import", "class A:"]
    answer = client.completions.create(
        model="reference", prompt=prompts, n=2, max_tokens=5, temperature=1, seed=7
    )
    params = SamplingParams(max_tokens=5, temperature=1, seed=7, n=2)
    expected = [o.text for r in llm.generate(prompts, params) for o in r.outputs]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    ids = [llm.tokenizer.encode(prompt) for prompt in prompts]
    again = client.completions.create(
        model="reference", prompt=ids, n=2, max_tokens=5, temperature=1, seed=7
    )
    assert [choice.text for choice in again.choices] == expected


def test_best_of_keeps_the_likeliest(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.completions.create(
        model="reference", prompt="def", n=1, best_of=4, max_tokens=6, temperature=2, seed=3
    )
    params = SamplingParams(max_tokens=6, temperature=2, seed=3, n=4, logprobs=0)
    outputs = llm.generate("def", params)[0].outputs
    best = max(outputs, key=lambda o: sum(p for p, _ in o.logprobs or []) / len(o.token_ids))
    assert [choice.text for choice in answer.choices] == [best.text]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(len(o.token_ids) for o in outputs)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_loglikelihood_as_lm_eval_asks(client: openai.OpenAI, llm: LLM, max_tokens: int) -> None:
    """Token ids in, echo with one alternative, what lm-evaluation-harness makes of it."""
    texts = ["def add(a, b):\n    return a + b", "import os, sys", 'print("héllo 日本")']
    ids = [llm.tokenizer.encode(text) for text in texts]
    answer = client.completions.create(
        model="reference",
        prompt=ids,
        max_tokens=max_tokens,
        logprobs=1,
        echo=True,
        temperature=0,
        seed=1234,
    )
    scores = llm.score(ids)
    for choice, score, tokens in zip(answer.choices, scores, ids, strict=True):
        found = choice.logprobs
        assert found is not None and found.token_logprobs is not None
        assert found.top_logprobs is not None
        end = len(tokens)
        assert found.token_logprobs[0] is None and len(found.token_logprobs) == end + max_tokens
        assert found.token_logprobs[1:end] == score.logprobs
        greedy = [
            value == max(top.values())
            for value, top in zip(
                found.token_logprobs[1:end], found.top_logprobs[1:end], strict=True
            )
        ]
        assert greedy == score.greedy
        assert found.text_offset is not None and found.tokens is not None
        for place, token in zip(found.text_offset, found.tokens, strict=True):
            if not token.startswith(("bytes:", "<|")):
                assert choice.text[place : place + len(token)] == token


def test_embeddings(client: openai.OpenAI, live: Live) -> None:
    texts = ["def add(a, b):", "import os", "def add(a, b):"]
    answer = client.embeddings.create(model="reference", input=texts)  # asks for base64
    vectors = [item.embedding for item in answer.data]
    assert vectors[0] == vectors[2] != vectors[1]
    assert all(math.isclose(sum(x * x for x in v), 1, abs_tol=1e-5) for v in vectors)
    plain = live.http.post("/v1/embeddings", json={"input": texts[1]}).json()
    assert plain["data"][0]["embedding"] == pytest.approx(vectors[1], abs=1e-6)
    packed = live.http.post(
        "/v1/embeddings", json={"input": texts[1], "encoding_format": "base64"}
    ).json()["data"][0]["embedding"]
    raw = base64.b64decode(packed)
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == vectors[1]
