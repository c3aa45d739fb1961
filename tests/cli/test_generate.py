"""``hasten generate`` and ``hasten chat``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hasten import LLM, SamplingParams
from tests.cli.common import assert_one_line, hasten, offline

PROMPT = "import os\nimport "  # no model ends a text here


def test_text_on_stdout_figures_on_stderr() -> None:
    params = SamplingParams(max_tokens=12)
    expected = LLM(max_sequences=1).generate(PROMPT, params)[0].text
    result = hasten("generate", PROMPT, "--max-tokens", 12)
    assert result.exit_code == 0
    assert result.stdout == expected + "\n"
    assert "first token" in result.stderr and "tokens/s" in result.stderr
    assert "memory bandwidth" in result.stderr and result.stderr.count("\n") == 1
    quiet = hasten("generate", "-", "--max-tokens", 12, "--no-figures", stdin=PROMPT)
    assert (quiet.stdout, quiet.stderr) == (expected + "\n", "")


def test_drafts_show_in_the_figures_and_not_in_the_text() -> None:
    options = ("--max-tokens", 24, "--temperature", 0)
    plain = hasten("generate", "x = 1\n" * 8, *options)
    drafted = hasten("generate", "x = 1\n" * 8, *options, "--stack", "draft=prompt-lookup(k=4)")
    assert drafted.stdout == plain.stdout
    assert "drafted tokens accepted" in drafted.stderr and "drafted" not in plain.stderr


def test_several_outputs_and_a_chat_template() -> None:
    result = hasten(
        "generate", "Hi!", "--chat", "-n", 2, "--seed", 1, "--temperature", 1, "--max-tokens", 4
    )
    assert result.exit_code == 0
    assert result.stdout.startswith("--- 0 (") and "\n--- 1 (" in result.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--stack", "draft=prompt-lokup"), ("did you mean 'prompt-lookup'",)),
        (("--stack", "draft=prompt-lookup(q=3)"), ("no parameter 'q'",)),
        (("--stack", "prompt-lookup"), ("slot=method",)),
        (("--model", "/no/such/folder"), ("/no/such/folder",)),
        (("--model", "."), ("config.json",)),
        (("--temperature", "-1"), ("temperature", "at least 0")),
        (("--top-p", "0"), ("top_p",)),
        (("--stop", ""), ("stop string",)),
    ],
)
def test_what_cannot_run_is_told_in_one_line(args: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_line(hasten("generate", "x", *args), *words)


def test_a_prompt_that_is_too_long_is_told_in_one_line() -> None:
    assert_one_line(hasten("generate", stdin="x = 1\n" * 5000), "the prompt has", "at most")
    assert_one_line(hasten("generate", "x = 1\n" * 40, "--max-length", 48), "the prompt has", "48")


@pytest.mark.parametrize("option", ["--threads", "--max-tokens", "-n"])
def test_counts_start_at_one(option: str) -> None:
    result = hasten("generate", "x", option, 0)
    assert result.exit_code == 2 and option in result.stderr


# ---- as a process ---------------------------------------------------------------------------


def test_a_reader_that_leaves_causes_no_traceback() -> None:
    code = "import sys; from hasten.cli.main import main; sys.argv[0] = 'hasten'; main()"
    args = ["generate", "a\nb\n" * 20, "--max-tokens", "200", "--temperature", "2", "--seed", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=offline(),
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 1


def test_generating_imports_nothing_it_does_not_use() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from hasten.cli.main import app\n"
        "result = CliRunner().invoke(app, ['generate', 'x', '--max-tokens', '2'])\n"
        "assert result.exit_code == 0, result.output\n"
        "unused = ('transformers', 'matplotlib', 'huggingface_hub', 'jinja2', 'rich.progress',\n"
        "          'hasten.training', 'hasten.bench', 'torch._dynamo', 'sympy')\n"
        "print([name for name in unused if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=offline(), timeout=100
    )
    assert done.stdout.strip() == "[]", done.stderr


# ---- chat -----------------------------------------------------------------------------------


def test_a_conversation_through_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[tuple[str, str]]] = []
    chat_prompt = LLM.chat_prompt

    def spy(self: LLM, messages: list[dict[str, str]], **options: object) -> list[int]:
        asked.append([(m["role"], m["content"]) for m in messages])
        return chat_prompt(self, messages, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LLM, "chat_prompt", spy)
    lines = "Hello\n\nAgain\n/reset\nAnew\n/quit\nnever asked\n"
    result = hasten("chat", "--system", "Be brief.", "--max-tokens", 4, stdin=lines)
    assert result.exit_code == 0 and result.stderr == ""
    system = ("system", "Be brief.")
    assert asked[0] == [system, ("user", "Hello")]
    assert asked[1][:2] == asked[0] and asked[1][3] == ("user", "Again")
    assert asked[2] == [system, ("user", "Anew")] and len(asked) == 3
    answer = asked[1][2]
    assert answer[0] == "assistant" and result.stdout.startswith(answer[1] + "\n")


def test_a_turn_that_does_not_fit_is_told_and_the_chat_goes_on() -> None:
    result = hasten("chat", "--max-tokens", 3, stdin="x " * 6000 + "\nshort\n")
    assert result.exit_code == 0
    assert "the prompt has" in result.stderr and "/reset starts over" in result.stderr
    assert result.stdout.count("\n") >= 1  # the short one was answered


def test_profile_names_operations_and_the_roofline() -> None:
    result = hasten("generate", PROMPT, "--max-tokens", 4, "--profile")
    assert result.exit_code == 0
    for text in ("attention", "linear", "all operations", "roofline of a decode step", "a step"):
        assert text in result.stderr
    assert "3 of 3 decode steps ran as one native call." in result.stderr
    assert "operation" not in hasten("generate", PROMPT, "--max-tokens", 2).stderr
