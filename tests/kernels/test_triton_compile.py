"""Triton kernels compile to machine code for GPUs, also where there is none, and one compiled
kernel serves every number of rows: the ground that a row's bits stand on there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

BY_TILE = {"_int8", "_int4"}
"""Sums of integers are exact, so these may have a tile for few rows and one for many."""


def test_one_compiled_kernel_for_every_number_of_rows(tmp_path: Path) -> None:
    program = Path(__file__).with_name("compile_triton.py")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, str(program), "90"], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    compiled: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for line in done.stdout.splitlines():
        label, kernel, hash_ = json.loads(line)
        compiled[kernel][label].add(hash_)
    assert len(compiled) > 10
    for kernel, by_label in compiled.items():
        if kernel not in BY_TILE:
            first = next(iter(by_label.values()))
            assert all(hashes == first for hashes in by_label.values()), kernel
