"""Several processes that train one model: each takes a part of the batch, gradients are averaged.

One synchronization a step instead of one an operation: on a machine that does other work too, two
processes of one thread each are several times faster than one process of two threads. Start with
``torchrun --nproc-per-node 2 -m hasten.training.reference``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """This process's place among ``size`` equals. A team of one does nothing."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> Team:
        """The team that ``torchrun`` started, or a team of one."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls(dist.get_rank(), size)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def largest(self, *values: float) -> list[float]:
        """The team's largest of each value, so that all decide alike."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        found: list[float] = shared.tolist()
        return found

    def wait(self) -> None:
        """Until all have come here: what the leader wrote before can be read after."""
        if self.size > 1:
            dist.barrier()
