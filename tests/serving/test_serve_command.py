"""``hasten serve`` as a process: drain, second signal, engine death, hang, secrets in the log."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.conftest import Command

KEY = "sk-marked-key-8f3a"
PROMPT = "marked-prompt-51c7"


def child(command: Command) -> int:
    """The engine's process id."""
    own = command.process.pid
    return int(Path(f"/proc/{own}/task/{own}/children").read_text().split()[0])


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    started = Command(
        tmp_path,
        "--max-length",
        "4096",
        "--max-queued-requests",
        "512",
        "--request-log",
        str(tmp_path / "requests.jsonl"),
        "--log-format",
        "json",
        environment={"HASTEN_API_KEY": KEY},
    )
    started.http.headers["authorization"] = f"Bearer {KEY}"
    yield started
    started.close()


async def stream(client: httpx.AsyncClient, tokens: int) -> tuple[int, list[str]]:
    """(status, events) of a streamed completion."""
    body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        text = (await answer.aread()).decode()
        return answer.status_code, [line for line in text.split("\n\n") if line]


def test_drain_loses_nothing_and_logs_hold_no_secrets(command: Command) -> None:
    """200 requests in flight when SIGTERM comes: all finish; new ones are sent away; exit 0."""
    engine = child(command)
    command.http.post("/v1/completions", json={"prompt": [PROMPT, 5]})  # wrong
    command.http.get("/v1/models", headers={"authorization": f"Bearer {KEY}x"})

    async def run() -> None:
        limits = httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(
            base_url=command.url, headers=dict(command.http.headers), timeout=120, limits=limits
        ) as client:
            flying = [asyncio.create_task(stream(client, 100)) for _ in range(200)]
            while (await client.get("/hasten/stats")).json()["running"] == 0:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            command.signal(signal.SIGTERM)
            began = time.monotonic()
            while (ready := await client.get("/ready")).status_code == 200:
                assert time.monotonic() - began < 1
            assert "shutting down" in ready.json()["reason"]
            assert (await client.get("/health")).status_code == 200
            late = await client.post("/v1/completions", json={"prompt": "x"})
            assert late.status_code == 503 and late.headers["retry-after"]
            for status, events in await asyncio.gather(*flying):
                assert status == 200
                assert events[-1] == "data: [DONE]"
                reason = json.loads(events[-2].removeprefix("data: "))["choices"][0]
                assert reason["finish_reason"] == "length"

    asyncio.run(run())
    assert command.process.wait(20) == 0
    assert gone(engine)
    log = command.log + Path(command.log_path.parent / "requests.jsonl").read_text()
    assert KEY not in log and PROMPT not in log and "marked" not in log
    for line in command.log.splitlines():
        assert {"time", "level", "message"} <= json.loads(line).keys()
    records = Path(command.log_path.parent / "requests.jsonl").read_text().splitlines()
    outcomes = [json.loads(line).get("outcome", "ok") for line in records]
    assert sorted(outcomes) == ["failed", *["ok"] * 200, "refused"]


def test_second_signal_stops_at_once(command: Command) -> None:
    engine = child(command)

    async def run() -> None:
        async with httpx.AsyncClient(
            base_url=command.url, headers=dict(command.http.headers), timeout=60
        ) as client:
            flying = [asyncio.create_task(stream(client, 400)) for _ in range(60)]
            await asyncio.sleep(0.5)
            command.signal(signal.SIGINT)
            await asyncio.sleep(0.3)
            assert command.process.poll() is None
            command.signal(signal.SIGINT)
            began = time.monotonic()
            for result in await asyncio.gather(*flying, return_exceptions=True):
                if not isinstance(result, Exception):  # told so, if there was time
                    assert "error" in result[1][-2]
            assert time.monotonic() - began < 5

    asyncio.run(run())
    assert command.process.wait(10) == 1
    until = time.monotonic() + 5
    while not gone(engine) and time.monotonic() < until:
        time.sleep(0.05)
    assert gone(engine)


def test_death_and_hang_of_the_engine(command: Command) -> None:
    """A stopped engine is not ready within 10 s but lives; a killed one is dead, and everybody
    who waits hears of it."""
    engine = child(command)
    assert command.http.get("/ready").status_code == 200
    os.kill(engine, signal.SIGSTOP)
    began = time.monotonic()
    while command.http.get("/ready").status_code == 200:
        assert time.monotonic() - began < 10
        time.sleep(0.2)
    assert "no progress" in command.http.get("/ready").json()["reason"]
    assert command.http.get("/health").status_code == 200
    os.kill(engine, signal.SIGCONT)
    while command.http.get("/ready").status_code == 503:
        assert time.monotonic() - began < 20
        time.sleep(0.1)

    async def run() -> None:
        async with httpx.AsyncClient(
            base_url=command.url, headers=dict(command.http.headers), timeout=60
        ) as client:
            body: dict[str, Any] = {"prompt": "x", "max_tokens": 3500, "ignore_eos": True}
            streamed = [asyncio.create_task(stream(client, 3500)) for _ in range(2)]
            whole = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.sleep(0.5)
            os.kill(engine, signal.SIGKILL)
            began = time.monotonic()
            answer = await whole
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_stopped"
            for status, events in await asyncio.gather(*streamed):
                assert status == 200 and events[-1] == "data: [DONE]"
                assert json.loads(events[-2].removeprefix("data: "))["error"]
            assert time.monotonic() - began < 2
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/ready")).status_code == 503
            refused = await client.post("/v1/completions", json=body)
            assert refused.status_code == 503

    asyncio.run(run())
    assert command.process.poll() is None, "it tells probes and clients for some seconds"
    assert "the engine has stopped: the engine process was ended by SIGKILL" in command.log
    command.signal(signal.SIGTERM)
    assert command.process.wait(10) == 1


def test_an_engine_that_hangs_for_good_is_ended(tmp_path: Path) -> None:
    """Who waits is answered, liveness fails, and the server ends for a supervisor to restart."""
    command = Command(tmp_path, "--hang-seconds", "1.5", "--hang-limit", "2")
    try:
        engine = child(command)
        os.kill(engine, signal.SIGSTOP)
        answer = command.http.post("/v1/completions", json={"prompt": "x"}, timeout=15)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_stopped"
        assert command.http.get("/health").status_code == 503
        assert "hung for more than hang_limit=2 seconds" in command.log
        assert gone(engine)
        command.signal(signal.SIGTERM)
        assert command.process.wait(10) == 1
    finally:
        command.close()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such folder"):
        Command(tmp_path, "/nowhere/model")


def test_the_http_side_never_imports_torch() -> None:
    """It would cost seconds and hundreds of megabytes, and its threads."""
    code = "import sys, hasten.serving.server, hasten.serving.app; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
