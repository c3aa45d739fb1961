"""The thread pool and the memory of weights."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch

from hasten import _native
from hasten.kernels.linear import linear, pack
from hasten.kernels.memory import ARENA, weight_memory

from .common import assert_same_bits

# every kernel thread's processors after the pool has run with one thread for each processor
PROCESSORS = """
import os
from hasten import _native
_native.set_num_threads(len(os.sched_getaffinity(0)))
_native.read_bandwidth(64 << 20, 1)
for task in os.listdir("/proc/self/task"):
    print(*sorted(os.sched_getaffinity(int(task))))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
@pytest.mark.skipif(os.cpu_count() == 1, reason="one processor has no workers")
def test_workers_are_bound_where_there_is_one_for_each_processor() -> None:
    everywhere = " ".join(map(str, sorted(os.sched_getaffinity(0))))

    def run(pin: str) -> list[str]:
        environment = {**os.environ, "HASTEN_PIN": pin}
        command = [sys.executable, "-c", PROCESSORS]
        return subprocess.check_output(command, env=environment, text=True).splitlines()

    bound = [line for line in run("1") if line != everywhere]
    assert len(bound) == len(everywhere.split()) - 1  # all but the caller
    assert len(set(bound)) == len(bound) and all(len(line.split()) == 1 for line in bound)
    assert set(run("0")) == {everywhere}


def test_any_number_of_threads_and_several_callers() -> None:
    w, x = pack(torch.randn(700, 90)), torch.randn(20, 90)
    expected = linear(x, w)
    for threads in (1, 2, 3, 8, 2, 300, 1):
        _native.set_num_threads(threads)
        for _ in range(20):
            assert_same_bits(linear(x, w), expected, f"{threads} threads")
    _native.set_num_threads(2)
    wrong = []

    def call() -> None:
        for _ in range(50):
            if not torch.equal(linear(x, w), expected):
                wrong.append(threading.current_thread().name)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_weight_memory_is_zero_aligned_and_not_shared() -> None:
    pieces = [weight_memory((n, 3), torch.bfloat16) for n in (1, 1000, 7, 2_000_000, 50)]
    for i, piece in enumerate(pieces):
        assert piece.data_ptr() % 64 == 0
        assert (piece == 0).all()
        piece.fill_(i + 1)
    for i, piece in enumerate(pieces):
        assert (piece == i + 1).all()
    assert weight_memory((0, 5), torch.float32).shape == (0, 5)


def test_weight_memory_outlives_its_neighbours() -> None:
    size = ARENA // 8
    first = weight_memory((size,), torch.float32)  # half of a mapping
    kept = weight_memory((1000,), torch.float32).fill_(3.0)
    del first
    for _ in range(3):
        weight_memory((size,), torch.float32)
    gc.collect()
    assert (kept == 3).all()
