"""The engine in its thread: many consumers, those that go away, and every way it can end."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from hasten import LLM, AsyncLLM, SamplingParams
from hasten.api.async_llm import EngineStopped
from hasten.decoding.constraints.grammar import GrammarConstraining
from hasten.decoding.params import StructuredOutputs
from hasten.engine.engine import RequestRefused
from tests.api.common import SIZES, assert_idle, prompts

LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def shared() -> Iterator[AsyncLLM]:
    engine = AsyncLLM(**SIZES)
    yield engine
    asyncio.run(engine.close())
    assert not engine._thread.is_alive()


def run(main: Callable[[], Awaitable[Any]], seconds: float = 40) -> Any:
    """A coroutine in a loop of its own; hanging is a failure."""
    return asyncio.run(asyncio.wait_for(main(), seconds))  # type: ignore[arg-type]


async def idle(engine: AsyncLLM) -> None:
    """Wait for the queued commands and the step in progress, then look."""
    for _ in range(200):
        await asyncio.wrap_future(engine._call(lambda: None))
        if not engine._front.engine.has_work:
            break
        await asyncio.sleep(0.01)
    assert not engine._sinks
    assert_idle(engine._front)


async def text_of(engine: AsyncLLM, prompt: str, params: SamplingParams) -> tuple[str, list[int]]:
    pieces = [piece async for piece in engine.stream(prompt, params)]
    assert pieces[-1].finish_reason is not None
    return "".join(p.text for p in pieces), [t for p in pieces for t in p.token_ids]


def test_fifty_streams_equal_the_offline_output(shared: AsyncLLM, llm: LLM) -> None:
    texts = prompts(50, seed=4)
    params = [
        SamplingParams(max_tokens=12, temperature=0.0 if i % 2 else 1.0, seed=i) for i in range(50)
    ]
    expected = [r.outputs[0] for r in llm.generate(texts, params)]

    async def main() -> Any:
        streams = [text_of(shared, t, p) for t, p in zip(texts, params, strict=True)]
        wholes = [shared.generate(t, p) for t, p in zip(texts[:5], params[:5], strict=True)]
        result = await asyncio.gather(*streams), await asyncio.gather(*wholes)
        await idle(shared)
        return result

    streamed, whole = run(main)
    assert streamed == [(o.text, o.token_ids) for o in expected]
    assert [w.outputs[0].token_ids for w in whole] == [o.token_ids for o in expected[:5]]


def test_all_outputs_of_a_request_arrive(shared: AsyncLLM, llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.2, seed=1, n=3, ignore_eos=True)
    expected = [o.token_ids for o in llm.generate("a = ", params)[0].outputs]

    async def main() -> None:
        result = await shared.generate("a = ", params)
        assert [o.token_ids for o in result.outputs] == expected
        streamed: list[list[int]] = [[], [], []]
        async for piece in shared.stream("a = ", params):
            streamed[piece.index] += piece.token_ids
        assert streamed == expected
        await idle(shared)

    run(main)


@pytest.mark.parametrize("after", [0, 0.0005, 0.1])
def test_a_cancelled_task_ends_its_request(shared: AsyncLLM, after: float) -> None:
    async def consume() -> None:
        async for _ in shared.stream("def f(x):\n", LONG):
            pass

    async def main() -> None:
        tasks = [asyncio.create_task(consume()) for _ in range(3)]
        tasks += [asyncio.create_task(shared.generate("x = ", LONG)) for _ in range(3)]  # type: ignore[misc]
        await asyncio.sleep(after)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) for r in results)
        await idle(shared)

    run(main)
    finished = shared._front.engine.stats.tokens
    assert finished < 6 * 400  # they did not run to their end


def test_leaving_a_stream_early_ends_its_request(shared: AsyncLLM) -> None:
    async def main() -> None:
        stream = shared.stream("def f(x):\n", LONG)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        await idle(shared)

    run(main)


def test_bad_requests_raise_in_the_caller(shared: AsyncLLM) -> None:
    async def main() -> None:
        with pytest.raises(RequestRefused, match="600 tokens"):
            await shared.generate([1] * 600)
        with pytest.raises(RequestRefused, match="empty"):
            await anext(shared.stream([]))  # type: ignore[arg-type]
        with pytest.raises(RequestRefused, match="in use"):
            stream = shared.stream("x", LONG, request_id="mine")
            await anext(stream)  # type: ignore[arg-type]
            await shared.generate("y", LONG, request_id="mine")
        await stream.aclose()  # type: ignore[attr-defined]
        await idle(shared)

    run(main)


def test_a_grammar_is_compiled_beside_the_engine(
    shared: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = GrammarConstraining._compile
    go_on = threading.Event()

    def slow(self: GrammarConstraining, wanted: StructuredOutputs) -> Any:
        assert go_on.wait(20)
        return compile_(self, wanted)

    monkeypatch.setattr(GrammarConstraining, "_compile", slow)
    params = SamplingParams(max_tokens=9, structured_outputs=StructuredOutputs(regex="qz{3}"))
    bad = SamplingParams(structured_outputs=StructuredOutputs(regex="("))

    async def main() -> None:
        constrained = asyncio.create_task(shared.generate("x", params))
        await asyncio.sleep(0.05)
        await asyncio.wait_for(shared.generate("y", SamplingParams(max_tokens=3)), 20)
        assert not constrained.done()
        go_on.set()
        assert (await constrained).outputs[0].text == "qzzz"
        with pytest.raises(RequestRefused, match="unclosed group"):
            await shared.generate("x", bad)

    run(main)


def test_a_consumer_whose_loop_is_gone_harms_nobody(shared: AsyncLLM) -> None:
    """A loop that is closed in the middle of a stream, as a crashed program would leave it."""
    loop = asyncio.new_event_loop()
    stream = shared.stream("def f(x):\n", LONG)
    loop.run_until_complete(anext(stream))  # type: ignore[arg-type]
    loop.close()

    async def main() -> None:
        await idle(shared)
        result = await shared.generate("x", SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(result.outputs[0].token_ids) == 3

    run(main)
    del stream
    gc.collect()


def test_closing_tells_those_who_wait() -> None:
    async def main() -> None:
        engine = AsyncLLM(**SIZES)
        waiting = [asyncio.create_task(engine.generate("x = ", LONG)) for _ in range(3)]
        waiting += [asyncio.create_task(text_of(engine, "y = ", LONG)) for _ in range(3)]  # type: ignore[misc]
        await asyncio.sleep(0.1)
        late = asyncio.create_task(engine.close())
        waiting += [asyncio.create_task(engine.generate("z = ", LONG)) for _ in range(3)]
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, EngineStopped) and "closed" in str(result)
        await late
        with pytest.raises(EngineStopped, match="closed"):
            await engine.generate("x")
        await engine.close()  # again, as an exit stack might
        assert_idle(engine._front)

    run(main)


def test_a_command_queued_behind_the_end_is_answered() -> None:
    async def main() -> None:
        engine = AsyncLLM(**SIZES)
        engine._commands.put(None)
        try:
            answer = engine._call(lambda: 1)
        except EngineStopped:
            pass  # the thread was quicker
        else:
            with pytest.raises(EngineStopped):
                await asyncio.wrap_future(answer)
        await engine.close()

    run(main)


def test_an_engine_that_fails_tells_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with AsyncLLM(**SIZES) as engine:
            step, steps = engine._front.step, []

            def broken() -> Any:
                steps.append(1)
                if len(steps) == 3:
                    raise ArithmeticError("bits fell out")
                return step()

            monkeypatch.setattr(engine._front, "step", broken)
            waiting = [engine.generate("x = ", LONG), text_of(engine, "y = ", LONG)]
            for result in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(result, EngineStopped)
                assert "ArithmeticError: bits fell out" in str(result)
            with pytest.raises(EngineStopped, match="bits fell out"):
                await engine.generate("x")

    run(main)
