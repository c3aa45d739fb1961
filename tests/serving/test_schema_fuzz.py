"""Every route of /openapi.json with valid and invalid data made from it, by schemathesis: no server
error, and each answer has a status, a content type and a shape that the document names.

The same seed each time, so that a change breaks the test and not the day; ``-m soak`` takes a new
one and five times as many examples.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.serving.live import live

pytest.importorskip("schemathesis")

SIZES = ("--max-length", "48", "--kv-bytes", "48M", "--max-sequences", "32")
SHORT = ("--max-n", "4", "--max-best-of", "4", "--max-prompts", "4", "--max-outputs", "16")
"""So that no valid body asks for thousands of tokens."""
WITH_DATA = {
    *("POST /v1/completions", "POST /v1/chat/completions", "POST /v1/embeddings"),
    *("POST /tokenize", "POST /detokenize", "GET /v1/models/{name}"),
}
"""Operations that take something: the others are one request each, whatever the count."""
STATEFUL = "[phases.stateful.generation]\nmax-examples = {count}\n"
"""There is one link, from the list of models to a model: no need for thousands of walks."""
NOT_SAID = "positive_data_acceptance"
"""A check that is left out: JSON Schema cannot say that prompt and answer must fit together into
the context, that fields exclude each other, or that 3.0 is no whole number here."""


def fuzz(folder: Path, examples: int, seed: int, seconds: float) -> Counter[str]:
    """Run schemathesis with all phases against a server of its own; returns cases by operation."""
    report, events = folder / "report.json", folder / "events.ndjson"
    (folder / "schemathesis.toml").write_text(STATEFUL.format(count=examples // 20))
    options = {
        "--max-examples": examples,
        "--mode": "all",
        "--phases": "examples,coverage,fuzzing,stateful",
        "--checks": "all",
        "--exclude-checks": NOT_SAID,
        "--request-timeout": 30,
        "--seed": seed,
        "--report": "json,ndjson",
        "--report-json-path": report,
        "--report-ndjson-path": events,
    }

    async def run() -> str:
        async with live(folder, *SIZES, *SHORT) as server:
            command = [sys.executable, "-m", "schemathesis.cli", "run", "--no-color"]
            command += [str(word) for option in options.items() for word in option]
            command += ["--continue-on-failure", f"{server.server.base_url}/openapi.json"]
            process = await asyncio.create_subprocess_exec(
                *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder
            )
            try:
                output, _ = await asyncio.wait_for(process.communicate(), seconds)
            finally:
                if process.returncode is None:
                    process.kill()
            metrics = await server.idle(5)
            assert metrics["leaked_pages_total",] == 0
            return output.decode()

    printed = asyncio.run(run())
    assert report.exists(), printed
    found = json.loads(report.read_text())
    assert not found["failures"] and not found["errors"] and found["exit_code"] == 0, printed
    log = (folder / "serve.log").read_text()
    assert "Traceback" not in log and "ERROR" not in log, log[-3000:]
    return cases_by_operation(events)


def cases_by_operation(events: Path) -> Counter[str]:
    cases: Counter[str] = Counter()
    for line in events.read_text().splitlines():
        if (ended := json.loads(line).get("ScenarioFinished")) is not None:
            recorder = ended["recorder"]
            cases[recorder["label"]] += len(recorder.get("cases", ()))
    return cases


def test_routes_keep_to_their_description(tmp_path: Path) -> None:
    cases = fuzz(tmp_path, examples=200, seed=1, seconds=280)
    assert {name for name, count in cases.items() if count >= 200} >= WITH_DATA


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_routes_keep_to_their_description_for_long(tmp_path: Path) -> None:
    seed = secrets.randbits(64)
    print(f"seed {seed}")
    cases = fuzz(tmp_path, examples=1000, seed=seed, seconds=3500)
    assert {name for name, count in cases.items() if count >= 1000} >= WITH_DATA
