"""A device that is not there is refused, before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from hasten.models.device import parse_device
from tests.cli.common import assert_one_line, hasten


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [["generate", "x"], ["chat"]])
def test_no_gpu(command: list[str]) -> None:
    result = hasten(*command, "--device", "cuda")
    assert_one_line(result, "device 'cuda' cannot be used here", "torch")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", ""])
def test_other_names(name: str) -> None:
    with pytest.raises(ValueError, match="is none of cpu, cuda"):
        parse_device(name)


def test_the_cpu() -> None:
    assert parse_device("cpu") == torch.device("cpu")
