"""Choice of implementation and instruction set; the thread pool; the bandwidth probe."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from hasten import _native
from hasten.kernels.dispatch import module, operation
from hasten.kernels.linear import linear, pack
from hasten.kernels.rms_norm import rms_norm

from .common import ISAS, assert_same_bits


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_environment_forces_the_instruction_set(isa: str) -> None:
    done = run("from hasten import _native; print(_native.get_isa())", HASTEN_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = run("from hasten import _native", HASTEN_ISA="avx1024")
    assert done.returncode != 0
    assert "HASTEN_ISA=avx1024" in done.stderr
    with pytest.raises(ValueError, match="no such instruction set"):
        _native.set_isa("avx1024")


def test_environment_forces_the_reference() -> None:
    code = (
        "import hasten.kernels.linear as l, torch\n"
        "l.cpu.linear = None\n"
        "print(tuple(l.linear(torch.zeros(2, 3), l.pack(torch.zeros(4, 3))).shape))"
    )
    assert run(code, HASTEN_KERNELS="ref").stdout.strip() == "(2, 4)"
    assert "is none of ref, cpu, triton" in run(code, HASTEN_KERNELS="cuda").stderr


def test_a_forced_choice_that_cannot_run_raises() -> None:
    x, w = torch.zeros(2, 3), pack(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="impl='cuda'"):
        linear(x, w, impl="cuda")
    with pytest.raises(RuntimeError, match="on meta"):
        linear(x.to("meta"), w, impl="cpu")


def test_number_of_threads() -> None:
    _native.set_num_threads(3)
    assert _native.get_num_threads() == 3
    with pytest.raises(ValueError, match="positive"):
        _native.set_num_threads(0)
    code = "from hasten import _native; print(_native.get_num_threads())"
    assert run(code, OMP_NUM_THREADS="5").stdout.strip() == "5"


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_more_threads_than_cores_and_callers_at_once(threads: int) -> None:
    """The pool serves one caller at a time; the others do their work themselves."""
    _native.set_num_threads(threads)
    w, x = pack(torch.randn(500, 100)), torch.randn(8, 100)
    expected = linear(x, w)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(200):
            if not torch.equal(linear(x, w), expected):
                wrong.append("differs")

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_gets_its_own_threads() -> None:
    code = (
        "import os, torch\n"
        "from hasten import _native\n"
        "from hasten.kernels.linear import linear, pack\n"
        "_native.set_num_threads(2)\n"
        "w, x = pack(torch.randn(500, 100)), torch.randn(8, 100)\n"
        "y = linear(x, w)\n"
        "child = os.fork()\n"
        "same = all(torch.equal(linear(x, w), y) for _ in range(50))\n"
        "if child == 0: os._exit(0 if same else 1)\n"
        "print(same, os.waitpid(child, 0)[1])\n"
    )
    done = run(code)
    assert done.stdout.strip() == "True 0", done.stderr


def test_numpy_arrays_go_the_slow_way_in() -> None:
    w, x = pack(torch.randn(7, 9)), torch.randn(2, 9)
    out = torch.empty(2, 7)
    _native.linear(x.numpy(), w.data, 7, 9, None, None, out)
    assert_same_bits(out, linear(x, w))


def test_read_bandwidth() -> None:
    assert 1e8 < _native.read_bandwidth(8 << 20, 2) < 1e13
    with pytest.raises(ValueError, match="positive"):
        _native.read_bandwidth(0, 1)


def test_triton_runs_on_cuda_tensors_and_in_its_interpreter_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, weight = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"tensors are on cpu; Triton runs on CUDA devices"):
        rms_norm(x, weight, 1e-5, impl="triton")


def test_nothing_runs_in_place_of_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"rms_norm\.norm_of_nothing has no 'ref' impl"):
        operation("hasten.kernels.rms_norm", "norm_of_nothing", "ref", torch.zeros(1))
    with pytest.raises(RuntimeError, match="dispatch has no 'cpu' implementation"):
        module("hasten.kernels.dispatch", "cpu")


def test_without_triton_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from hasten.kernels.dispatch import module\n"
        "module('hasten.kernels.rms_norm', 'triton')"
    )
    assert "need the package 'triton': pip install 'hasten[gpu]'" in run(code).stderr
