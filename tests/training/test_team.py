"""Two processes that average gradients take the step that one takes on both parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from hasten.training.team import Team

PROGRAM = """
import sys
import torch
from safetensors.torch import save_file
from hasten.training.team import Team

team = Team.from_environment()
weight = torch.nn.Parameter(torch.ones(3, 2))
bias = torch.nn.Parameter(torch.zeros(3))
x = torch.arange(2.0) + 10 * team.rank
(weight @ x + bias).square().sum().backward()
team.average_gradients([weight, bias])
largest = team.largest(team.rank, 5 - team.rank)
team.wait()
result = {"weight": weight.grad, "bias": bias.grad, "largest": torch.tensor(largest)}
save_file(result, f"{sys.argv[1]}/{team.rank}.safetensors")
"""


def test_two_processes_agree(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(program), str(tmp_path)]
    subprocess.run(
        command, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )  # fmt: skip
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    weight = torch.ones(3, 2, requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    loss = torch.zeros(())
    for rank in range(2):
        loss = loss + (weight @ (torch.arange(2.0) + 10 * rank) + bias).square().sum() / 2
    torch.autograd.backward(loss)
    for found in (one, two):
        torch.testing.assert_close(found["weight"], weight.grad)
        torch.testing.assert_close(found["bias"], bias.grad)
        assert found["largest"].tolist() == [1.0, 5.0]


def test_a_team_of_one_changes_nothing() -> None:
    team = Team()
    value = torch.nn.Parameter(torch.ones(2))
    value.grad = torch.full((2,), 3.0)
    team.average_gradients([value])
    team.wait()
    assert value.grad.tolist() == [3.0, 3.0]
    assert team.largest(1.5, 2.0) == [1.5, 2.0]
    assert team.leads
