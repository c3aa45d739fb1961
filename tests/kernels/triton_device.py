"""Where the tests of Triton kernels run: on a CUDA device, else on the CPU in Triton's interpreter.

The interpreter runs each program with numpy, one after the other, so a small test is all it can do;
it shows what a kernel computes, not that it compiles (test_triton_compile.py) or how fast it is.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

pytest.importorskip("triton", reason="triton is not installed")
