"""Under what a measurement was taken: command, commit, machine, versions. Needs no torch."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Conditions:
    """Under what a measurement was taken."""

    command: str
    date: str
    commit: str
    cpu: str
    cores: int
    threads: int
    isa: str
    versions: dict[str, str]

    def markdown(self) -> str:
        packages = ", ".join(f"{k} {v}" for k, v in self.versions.items())
        return (
            f"- command: `{self.command}`\n- date: {self.date}, commit: {self.commit}\n"
            f"- machine: {self.cpu}, {self.cores} cores, {self.threads} threads, {self.isa}\n"
            f"- versions: {packages}\n"
        )


def conditions() -> Conditions:
    """Of this process, now."""
    from hasten import _native

    return Conditions(
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        date=datetime.date.today().isoformat(),
        commit=_commit(),
        cpu=_cpu(),
        cores=os.cpu_count() or 0,
        threads=_native.get_num_threads(),
        isa=_native.get_isa(),
        versions={"python": platform.python_version()}
        | {name: v for name in ("hasten", "torch", "transformers") if (v := _version(name))},
    )


def _commit() -> str:
    where = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=where,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip()


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
