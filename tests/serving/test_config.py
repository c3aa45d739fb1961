"""Settings: where they come from, and what is said about wrong ones."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hasten.cli import serve
from hasten.cli.main import app
from hasten.cli.serve import PACKAGES
from hasten.serving.config import ConfigError, ServeConfig, load
from hasten.serving.server import bind


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nmax-length: 2\nmax_num_seqs: 3\nkv_bytes: 4M\nserved_model_name: a\n")
    environment = {"HASTEN_PORT": "10", "HASTEN_MAX_LENGTH": "20", "HASTEN_CONFIG": str(file)}
    found = load({"port": 100, "stack": None}, environment)
    assert found.config.port == 100
    assert found.config.max_length == 20
    assert found.config.max_sequences == 3
    assert found.config.kv_bytes == 4 << 20
    assert found.config.names == ("a",)
    assert found.config.drain_timeout == ServeConfig().drain_timeout
    assert found.sources["port"] == "--port"
    assert found.sources["max_length"] == "HASTEN_MAX_LENGTH"
    assert found.sources["max_sequences"] == f"max_sequences in {file}"
    assert found.sources["drain_timeout"] == "default"
    assert "port = 100 (--port)" in found.lines()
    other = tmp_path / "other.yaml"
    other.write_text("port: 5\n")
    assert load({}, {"HASTEN_CONFIG": str(file)}, other).config.port == 5


@pytest.mark.parametrize("name", [one.name for one in fields(ServeConfig)])
def test_every_setting_has_every_form(name: str, tmp_path: Path) -> None:
    """What is set in the environment and in the file arrives, in the type of the default."""
    values = {"log_format": "json", "metrics_compat": "vllm"}
    default = getattr(ServeConfig(), name)
    text = values.get(name, "7")
    if isinstance(default, bool):
        text = str(not default).lower()
    elif isinstance(default, int) and not isinstance(default, bool):
        text = str(max(default - 1, 1))
    found = load({}, {f"HASTEN_{name.upper()}": text}).config
    assert getattr(found, name) != default
    if default is not None:
        assert type(getattr(found, name)) is type(default)
    file = tmp_path / "one.yaml"
    quoted = f'"{text}"' if isinstance(getattr(found, name), str | tuple) else text
    file.write_text(f"{name}: {quoted}\n")
    assert load({}, {}, file).config == found
    with pytest.raises(ConfigError, match=name):
        file.write_text(f"{name}: {{}}\n")
        load({}, {}, file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot: 8000", "did you mean port"),
        ("port: abc", "port in .*expected a whole number"),
        ("port: 70000", "at most 65535"),
        ("port: true", "expected a whole number"),
        ("strict: 3", "expected true or false"),
        ("drain_timeout: .nan", "at least 0"),
        ("max_n: 100000", "at most 128"),
        ("kv_bytes: 3X", "not a size"),
        ("log_format: xml", "one of text, json"),
        ("- port", "name: value"),
        ("port: [", "config file"),
        ("max_num_seqs: 1\nmax_sequences: 2", "set twice"),
        ("api_key: {a: secret-value}", "api_key"),
        ("api_key: ''", "api_key in .*is empty"),
        ("hang_seconds: 0", "at least 1"),
    ],
)
def test_wrong_files_are_told_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        load({}, {}, file)
    assert "\n" not in str(error.value) and "secret-value" not in str(error.value)


def test_wrong_environment_is_told() -> None:
    for name, value in {"PORT": "x", "STRICT": "perhaps", "DRAIN_TIMEOUT": "inf"}.items():
        with pytest.raises(ConfigError, match=f"HASTEN_{name}"):
            load({}, {f"HASTEN_{name}": value})


def test_help_names_every_option() -> None:
    text = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(
        app, ["serve", "--help"]
    )
    shown = set(re.findall(r"--[a-z][a-z-]+", text.output))
    for one in fields(ServeConfig):
        if one.name != "model":
            assert f"--{one.name.replace('_', '-')}" in shown
    assert "--max-num-batched-tokens" not in shown  # taken, but not shown twice


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--host", "0.0.0.0"], "--allow-no-key"),
        (["--max-model-len", "0"], "max_length"),
        (["--host", "192.0.2.1", "--allow-no-key"], "cannot listen on"),
        (["--request-log", "/nowhere/log"], "/nowhere/log"),
        (["--api-key", ""], "--api-key: is empty"),
    ],
)
def test_command_tells_what_is_wrong(options: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["serve", *options])
    assert result.exit_code == 1
    assert says in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("package", PACKAGES)
def test_missing_packages_are_told_before_anything_starts(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == package else name)
    result = CliRunner().invoke(app, ["serve"])
    assert result.exit_code == 1
    assert package in result.stderr and "pip install 'hasten[serve]'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_told_at_once() -> None:
    """Also while the server that has it is still loading."""
    first = bind("127.0.0.1", 0)
    try:
        with pytest.raises(OSError, match="in use; choose another --port"):
            bind("127.0.0.1", first.getsockname()[1])
    finally:
        first.close()
