"""The engine in its process: the same text as without one, and every way either side can end."""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hasten import LLM, SamplingParams
from hasten.decoding.constraints.grammar import GrammarConstraining
from hasten.decoding.params import StructuredOutputs
from hasten.serving import engine_process, frames
from hasten.serving.engine_client import EngineClient, EngineStopped, RequestRefused
from hasten.serving.messages import Abort, Piece, Ping, Refused, Snapshot, Step, Stop, Submit
from tests.serving.conftest import SIZES, Loop

LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)

Start = Callable[..., EngineClient]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(**SIZES)


async def collect(client: EngineClient, prompt: list[int], params: Any, name: str) -> list[Piece]:
    return [piece async for piece in client.stream(prompt, params, request_id=name)]


async def idle(client: EngineClient) -> Snapshot:
    """The first snapshot without work."""
    while client.snapshot.running or client.snapshot.waiting:
        await asyncio.sleep(0.02)
    return client.snapshot


def random_params(rng: random.Random, text: str) -> SamplingParams:
    """Everything that changes what comes back; ``text`` is something that stop strings may hit."""
    at = rng.randrange(max(1, len(text) - 3))
    return SamplingParams(
        max_tokens=rng.choice([1, 5, 20, 40]),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.3]),
        seed=rng.randrange(2**40),
        n=rng.choice([1, 1, 1, 3]),
        logprobs=rng.choice([None, None, 0, 2]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        stop=rng.choice([(), (), "\n", (text[at : at + 3] or "x", "==")]),
        include_stop=rng.random() < 0.3,
        repetition_penalty=rng.choice([None, 1.2]),
        bad_words=rng.choice([(), ("the",), ([5, 6],)]),
        logit_bias=rng.choice([{}, {7: 2.0}]),
        stop_token_ids=rng.choice([(), (11,)]),
        ignore_eos=rng.random() < 0.5,
    )


def test_thirty_requests_equal_the_offline_output(
    llm: LLM, loop: Loop, engine_client: EngineClient
) -> None:
    rng = random.Random(3)
    phrases = ["def add(a, b):\n    return a + b\n", "import os\n", "The list of names is", "x = 1"]
    texts = ["".join(rng.choices(phrases, k=rng.randint(1, 4))) for _ in range(30)]
    prompts = [llm.tokenizer.encode(text) for text in texts]
    plain = llm.generate(prompts, SamplingParams(max_tokens=20, temperature=0))
    params = [random_params(rng, result.text) for result in plain]
    expected = llm.generate(prompts, params)

    async def main() -> list[list[Piece]]:
        work = [
            collect(engine_client, prompt, p, f"thirty-{i}")
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]
        return await asyncio.gather(*work)

    for pieces, want in zip(loop.run(main()), expected, strict=True):
        for output in want.outputs:
            mine = [piece for piece in pieces if piece.index == output.index]
            assert "".join(p.text for p in mine) == output.text
            assert [t for p in mine for t in p.token_ids] == output.token_ids
            assert [p.finish_reason for p in mine] == [None] * (len(mine) - 1) + [
                output.finish_reason
            ]
            if output.logprobs is not None:
                assert [one for p in mine for one in p.logprobs or []] == output.logprobs
            figures = mine[-1].figures
            assert figures is not None and figures.first_token is not None
            assert figures.arrived <= figures.first_token <= time.monotonic()
        first_last = [p for p in pieces if p.index == 0][-1]
        assert first_last.prompt_logprobs == want.prompt_logprobs
    snapshot = loop.run(idle(engine_client))
    assert snapshot.pages_used == 0 and snapshot.leaked_pages == 0
    assert 1 << 26 < snapshot.rss_bytes < 1 << 36


def test_a_consumer_that_goes_away_ends_its_request(
    loop: Loop, engine_client: EngineClient
) -> None:
    async def main() -> None:
        finished = engine_client.snapshot.finished

        async def first_of(name: str) -> None:
            async with aclosing(engine_client.stream([5, 6], LONG, request_id=name)) as pieces:
                async for _ in pieces:
                    return

        await asyncio.gather(*(first_of(f"leaves-{i}") for i in range(8)))  # closed mid-stream
        tasks = [
            asyncio.create_task(collect(engine_client, [5, 6], LONG, f"cancelled-{i}"))
            for i in range(8)
        ]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not engine_client._queues
        snapshot = await idle(engine_client)
        assert snapshot.pages_used == 0 and snapshot.cached_pages > 0
        assert snapshot.finished - finished <= 16
        assert snapshot.tokens < 16 * 400  # ended early, not run to the end

    loop.run(main())


def test_what_can_never_run_is_refused(loop: Loop, engine_client: EngineClient) -> None:
    async def refused(prompt: list[int], params: SamplingParams) -> RequestRefused:
        with pytest.raises(RequestRefused) as caught:
            await collect(engine_client, prompt, params, "refused")
        return caught.value

    async def main() -> None:
        assert "512" in str(await refused([5] * 600, LONG))
        assert "outside" in str(await refused([10**6], LONG))
        assert "empty" in str(await refused([], LONG))
        assert (await refused([5], SamplingParams(logit_bias={10**6: 1.0}))).client_error
        assert "64" in str(await refused([2**70], LONG))  # msgpack has no such integer
        assert "passed on" in str(await refused([5], SamplingParams(stop="\ud800")))
        # another request with an id in use
        async with aclosing(engine_client.stream([5, 6], LONG, request_id="twice")) as pieces:
            await anext(pieces)
            with pytest.raises(RequestRefused, match="in use"):
                await collect(engine_client, [5], LONG, "twice")
        assert (await idle(engine_client)).pages_used == 0

    loop.run(main())


def test_a_hanging_engine_shows_and_recovers_and_a_killed_one_ends_every_stream(
    loop: Loop, llm: LLM, own_engine: Start
) -> None:
    expected = llm.generate([[5, 6]], LONG)[0].outputs[0].token_ids
    client = own_engine()

    async def hang() -> None:
        async with aclosing(client.stream([5, 6], LONG, request_id="slow")) as pieces:
            tokens = list((await anext(pieces)).token_ids)
            os.kill(client.pid, signal.SIGSTOP)
            await asyncio.sleep(3.1)
            assert client.stalled > 3 and client.alive
            os.kill(client.pid, signal.SIGCONT)
            async for piece in pieces:
                tokens += piece.token_ids
        assert tokens == expected
        await asyncio.sleep(1.3)  # idle: nothing but pings
        assert client.stalled < 1.3

    async def stay() -> None:
        os.kill(client.pid, signal.SIGINT)  # Ctrl-C is for the parent, which drains
        os.kill(client.pid, signal.SIGTERM)
        assert len(await collect(client, [5], SamplingParams(max_tokens=3), "deaf")) == 3

    async def die() -> None:
        tasks = [asyncio.create_task(collect(client, [5, 6], LONG, f"k{i}")) for i in range(5)]
        await asyncio.sleep(0.2)
        assert client.alive and not any(task.done() for task in tasks)
        os.kill(client.pid, signal.SIGKILL)
        began = time.monotonic()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, EngineStopped) and "SIGKILL" in str(r) for r in results)
        await asyncio.wait_for(client.dead.wait(), 2)
        assert time.monotonic() - began < 2
        assert not client.alive
        with pytest.raises(EngineStopped, match="SIGKILL"):
            await collect(client, [5], LONG, "later")

    for part in (client.start, hang, stay, die):
        loop.run(part())
    with pytest.raises(ChildProcessError):  # it is no zombie
        os.waitpid(client.pid, os.WNOHANG)


def test_an_engine_that_cannot_start_says_why(loop: Loop, own_engine: Start) -> None:
    client = own_engine("/nonexistent/folder")
    with pytest.raises(EngineStopped, match="no such folder") as caught:
        loop.run(client.start())
    assert "\n" not in str(caught.value)
    assert client._process.returncode == 1 and client.dead.is_set()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stack": "draft=nonsense"}, "nonsense"),
        ({"max_length": 1 << 30}, "max_length"),
        ({"kv_bytes": 1}, "kv_bytes"),
    ],
)
def test_reasons_of_a_failed_start_are_one_line(options: dict[str, Any], said: str) -> None:
    settings = engine_process.Settings(fd=0, parent=0, model="reference", **options)
    with pytest.raises(ValueError) as caught:
        engine_process._load(settings)
    reason = engine_process._reason(caught.value)
    assert said in reason and "\n" not in reason


def test_the_engine_ends_with_its_parent() -> None:
    """The parent is killed while the engine works: no farewell, nobody to reap but the system."""
    script = (
        "import asyncio, sys\n"
        "from hasten.serving.engine_client import EngineClient, SamplingParams\n"
        "async def main():\n"
        f"    client = EngineClient('reference', **{SIZES!r})\n"
        "    await client.start()\n"
        "    params = SamplingParams(max_tokens=500, ignore_eos=True)\n"
        "    async for _ in client.stream([5], params, request_id='a'):\n"
        "        print(client.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    engine = int(parent.stdout.readline())
    assert Path(f"/proc/{engine}").exists()
    parent.kill()
    parent.wait()
    until = time.monotonic() + 2
    while _runs(engine):
        assert time.monotonic() < until, "the engine outlives its parent"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    """False also for a zombie whose new parent has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- the loop without a process -----------------------------------------------------------------


class Peer:
    """The parent's end of a link, with a server at the other that runs in a thread."""

    def __init__(self, llm: LLM) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(20)
        self.file = self.socket.makefile("rb")
        self.link = frames.Link(theirs)
        self.server = engine_process.EngineServer(llm.frontend, self.link)
        self.engine = llm.engine
        self.gone = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except frames.PeerGone:
            self.gone = True

    def tell(self, command: Any) -> None:
        self.socket.sendall(frames.framed(msgspec.msgpack.encode(command)))

    def read(self) -> Step:
        count = frames.length(self.file.read(frames.HEADER.size))
        return msgspec.msgpack.decode(self.file.read(count), type=Step)

    def until(self, number: int) -> tuple[list[Piece], list[Refused]]:
        """All that comes before the answer to a ping and the end of all work."""
        self.tell(Ping(number))
        pieces, refused, answered = [], [], False
        while True:
            step = self.read()
            pieces += step.pieces
            refused += step.refused
            answered |= step.answers == number
            if answered and not step.snapshot.running + step.snapshot.waiting:
                return pieces, refused

    def until_held_up(self) -> int:
        """Wait until the engine waits for this peer, which does not read; returns its steps."""
        before = 0
        while before <= frames.MAX_UNSENT or before != len(self.link._unsent):
            before = len(self.link._unsent)
            time.sleep(0.3)
        return self.engine.stats.steps

    def close(self) -> None:
        """Every test ends with an idle engine and nothing kept about any request."""
        self.tell(Stop())
        self.thread.join(20)
        assert not self.thread.is_alive() and not self.gone
        assert not self.engine.has_work and not self.server._open
        assert not self.server.front._entries
        self.engine.check_ledger()


def test_an_unreadable_request_is_refused_and_harms_no_other(llm: LLM) -> None:
    peer = Peer(llm)
    good = Submit("good", [5], LONG)
    raw = msgspec.msgpack.decode(msgspec.msgpack.encode(good))
    changes = {"nan": {"temperature": float("nan")}, "n": {"n": 10**9}, "text": {"stop": [1]}}
    for name, change in changes.items():
        peer.tell({**raw, "id": name, "params": {**raw["params"], **change}})
    peer.tell(good)
    peer.tell(Submit("good", [6], LONG))  # in use for as long as the first one runs
    pieces, refused = peer.until(7)
    assert [r.request_id for r in refused] == [*changes, "good"]
    assert [r.client_error for r in refused] == [False] * 3 + [True]
    assert all(len(r.message) <= engine_process.MAX_ERROR for r in refused)
    assert [p.request_id for p in pieces] == ["good"] * 400
    peer.close()


def test_nobody_waits_for_a_grammar_but_who_asked_for_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling takes as long as this test likes; others run to their end meanwhile."""
    compile_ = GrammarConstraining._compile
    begun, go_on = threading.Event(), threading.Event()

    def slow(self: GrammarConstraining, wanted: StructuredOutputs) -> Any:
        begun.set()
        assert go_on.wait(20)
        return compile_(self, wanted)

    def asked(pattern: str) -> SamplingParams:
        return SamplingParams(max_tokens=9, structured_outputs=StructuredOutputs(regex=pattern))

    monkeypatch.setattr(GrammarConstraining, "_compile", slow)
    peer = Peer(llm)
    peer.tell(Submit("slow", PROMPT, asked("qx{3}")))
    peer.tell(Submit("bad", PROMPT, asked("(")))
    peer.tell(Submit("gone", PROMPT, asked("qy{3}")))
    assert begun.wait(20)
    peer.tell(Submit("other", PROMPT, SamplingParams(max_tokens=5, ignore_eos=True)))
    peer.tell(Abort("gone"))
    done: list[Piece] = []
    while not done or done[-1].finish_reason is None:
        step = peer.read()
        done += step.pieces
        assert step.snapshot.waiting >= 1 or not step.pieces
    assert {piece.request_id for piece in done} == {"other"}
    go_on.set()
    pieces, refused = peer.until(3)
    assert {p.request_id for p in pieces} == {"slow"}
    assert "".join(p.text for p in pieces) == "qxxx"
    assert [r.request_id for r in refused] == ["bad"] and "unclosed group" in refused[0].message
    peer.close()


def test_a_peer_that_does_not_read_holds_the_engine_up(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "MAX_UNSENT", 1 << 16)
    params = SamplingParams(max_tokens=1, prompt_logprobs=50, temperature=0)
    expected = llm.generate([PROMPT], params)[0].prompt_logprobs
    peer = Peer(llm)
    for i in range(20):  # some 200 kB each
        peer.tell(Submit(f"r{i}", PROMPT, params))
    steps = peer.until_held_up()
    assert peer.engine.has_work, "it ran to the end as if somebody had read"
    assert len(peer.link._unsent) < 20 * 200_000
    time.sleep(0.3)
    assert peer.engine.stats.steps == steps
    pieces, _ = peer.until(1)
    assert [p.request_id for p in pieces] == [f"r{i}" for i in range(20)]
    assert all(p.prompt_logprobs == expected for p in pieces)
    peer.close()


def test_a_peer_that_goes_ends_an_engine_that_waits_for_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "MAX_UNSENT", 1 << 16)
    peer = Peer(llm)
    params = SamplingParams(max_tokens=1, prompt_logprobs=50)
    for i in range(20):
        peer.tell(Submit(f"r{i}", PROMPT, params))
    peer.until_held_up()
    peer.file.close()
    peer.socket.close()
    peer.thread.join(5)
    assert peer.gone
    for name in list(peer.server._open):  # the process would be gone with all it holds
        llm.frontend.discard(name)
    llm.engine.check_ledger()


def test_what_is_too_large_for_a_message(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "MAX_FRAME", 20_000)
    peer = Peer(llm)
    for i in range(8):  # 5 kB each: too much for one message, not for several
        small = SamplingParams(max_tokens=2, prompt_logprobs=0, ignore_eos=True)
        peer.tell(Submit(f"small{i}", PROMPT, small))
    peer.tell(Submit("large", PROMPT, SamplingParams(max_tokens=2, prompt_logprobs=50)))
    pieces, _ = peer.until(1)
    peer.close()
    last = {p.request_id: p for p in pieces if p.finish_reason is not None}
    assert len(pieces) == 18 and len(last) == 9
    large = last.pop("large")
    assert large.finish_reason == "error" and "fewer alternatives" in str(large.error)
    for piece in last.values():
        assert piece.finish_reason == "length" and len(piece.prompt_logprobs or ()) == len(PROMPT)


PROMPT = [random.Random(5).randrange(10, 4000) for _ in range(300)]


def test_a_wait_ends_for_a_message_and_for_another_thread() -> None:
    ours, theirs = socket.socketpair()
    link = frames.Link(theirs)
    for wakes in (1, 3, 100_000):  # before it waits: once is enough for any number
        for _ in range(wakes):
            link.wake()
        link.wait()
        while link._woken in select.select([link._woken], [], [], 0)[0]:
            link.wait()
        waiting = threading.Thread(target=link.wait)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        link.wake()
        waiting.join(5)
        assert not waiting.is_alive() and link.next() is None
    waiting = threading.Thread(target=link.wait)
    waiting.start()
    ours.sendall(frames.framed(b"hello"))
    waiting.join(5)
    assert not waiting.is_alive() and link.next() == b"hello"


def test_messages_survive_any_cut() -> None:
    rng = random.Random(1)
    messages = [rng.randbytes(rng.choice([0, 1, 3, 4, 100, 70_000])) for _ in range(200)]
    stream = b"".join(frames.framed(message) for message in messages)
    ours, theirs = socket.socketpair()
    link, got, at = frames.Link(theirs), [], 0
    while at < len(stream):
        cut = rng.choice([1, 2, 5, 1000, 60_000])
        ours.sendall(stream[at : at + cut])
        at += cut
        while rng.random() < 0.9 and (message := link.next()) is not None:
            got.append(message)
    while (message := link.next()) is not None:
        got.append(message)
    assert got == messages
    ours.sendall(b"\xff\xff\xff\xff")  # would be 4 GiB
    with pytest.raises(ValueError, match="announced"):
        link.next()
    ours.close()
    theirs.close()
