"""The ways in which DistributedDataParallel is used, with every optimizer; and torchrun."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import on_both, run_on_ranks
from torch_secondorder import LBFGS, AdaHessian, FunctionalObjective, NewtonCG, Sophia, StepStatus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]

newton = partial(NewtonCG, lr=0.5, max_cg_iter=4, weight_decay=0.1)
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "LBFGS": partial(LBFGS, max_iter=2, max_eval=20, weight_decay=0.1),
    "NewtonCG": newton,
    "NewtonCG, kfac": partial(newton, preconditioner="kfac"),
    "NewtonCG, fisher": partial(newton, curvature="fisher", preconditioner="martens"),
    "NewtonCG, differences": partial(newton, curvature_products="finite_difference"),
    "AdaHessian": partial(AdaHessian, lr=0.02, eps=0.01, update_period=2),
    "Sophia": partial(Sophia, lr=0.02, gamma=5.0, update_period=2),
    "Sophia, gnb": partial(Sophia, lr=0.02, gamma=5.0, update_period=2, estimator="gnb"),
}


class Net(nn.Module):
    """Two heads; each call uses those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor, heads: str = "both") -> Tensor:
        z = self.body(x).tanh()
        if heads == "both":
            return self.left(z) + self.right(z)
        return self.left(z) if heads == "left" else self.right(z)


#: What DistributedDataParallel is told.
MODES: dict[str, dict[str, Any]] = {
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
    "static, views": {"static_graph": True, "gradient_as_bucket_view": True},
    "no_sync": {},
    "different": {"find_unused_parameters": True},
    "different, views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
}


class Task:
    """A network in one of the modes, and this rank's part of a batch of four quarters."""

    def __init__(self, rank: int, ranks: int, mode: str) -> None:
        torch.manual_seed(5)
        self.plain = Net()
        self.model: Any = self.plain
        if ranks > 1:
            self.model = DistributedDataParallel(self.plain, **MODES[mode])
        x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
        #: Heads and samples of each `backward()`.
        self.pieces: list[tuple[str, list[int]]] = [("both", [0, 1, 2, 3])]
        if mode == "no_sync":
            self.pieces = [("both", [0, 2]), ("both", [1, 3])]
        elif mode.startswith("different"):
            self.pieces = [("left", [0, 1]), ("right", [2, 3])]
        quarters = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 16, 4)]
        if ranks > 1:
            own = (2 * rank, 2 * rank + 1)
            self.pieces = [(heads, [i for i in held if i in own]) for heads, held in self.pieces]
            self.pieces = [piece for piece in self.pieces if piece[1]]
        self.quarters = quarters

    def closure(self) -> Tensor:
        self.model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for number, (heads, held) in enumerate(self.pieces, 1):
            x, y = (torch.cat([self.quarters[i][k] for i in held]) for k in (0, 1))
            last = number == len(self.pieces)
            ready = last or not isinstance(self.model, DistributedDataParallel)
            with contextlib.nullcontext() if ready else self.model.no_sync():
                loss = F.cross_entropy(self.model(x, heads), y) / len(self.pieces)
                loss.backward()
            total += loss.detach()
        return total

    def state(self) -> list[Tensor]:
        """Weights, and what an ordinary call of the closure leaves in `p.grad`."""
        self.closure()
        params = list(self.plain.parameters())
        return [p.detach().clone() for p in params] + [p.grad.clone() for p in params]


def use(rank: int, ranks: int) -> dict[str, list[Tensor]]:
    """Some steps, each followed by an ordinary forward and backward."""
    found = {}
    for mode in MODES:
        for name, make in OPTIMIZERS.items():
            task = Task(rank, ranks, mode)
            optimizer = make(task.model.parameters())
            states = []
            for _ in range(3):
                optimizer.step(task.closure)
                states += task.state()
            found[f"{mode}: {name}"] = states
    return found
