"""Ctrl-C at any moment leaves an engine that works."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from hasten import LLM, SamplingParams
from hasten.api.interrupts import held_back
from tests.api.common import assert_idle, prompts

LONG = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_inside_the_block_arrives_after_it() -> None:
    seen = []
    with pytest.raises(KeyboardInterrupt), held_back():
        interrupt()
        time.sleep(0.01)
        seen.append("to the end")
    assert seen == ["to the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    inside = []

    def elsewhere() -> None:
        with held_back():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert inside == [signal.default_int_handler]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_back():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_inside_a_step_waits_for_its_end(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, calls = llm.engine.executor.submit, []

    def interrupted(*args: object) -> object:
        calls.append("begun")
        if len(calls) == 3:
            interrupt()
        result = submit(*args)  # type: ignore[arg-type]
        calls[-1] = "done"
        return result

    monkeypatch.setattr(llm.engine.executor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts(3), LONG)
    assert calls == ["done"] * 3


def test_interrupts_at_random_moments_leave_nothing_behind(llm: LLM) -> None:
    texts = prompts(6)
    expected = [r.outputs[0].token_ids for r in llm.generate(texts, SHORT)]
    rng = random.Random(5)
    for _ in range(12):
        timer = threading.Timer(rng.uniform(0, 0.05), interrupt)
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            llm.generate(texts, LONG)
            timer.join()
            time.sleep(5)  # not reached unless generating took no time at all
        assert_idle(llm.frontend)
    assert [r.outputs[0].token_ids for r in llm.generate(texts, SHORT)] == expected
