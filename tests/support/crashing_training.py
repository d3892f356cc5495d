"""A training that saves checkpoints, to be killed at any moment and started again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_secondorder import LBFGS, AdaHessian, DatasetClosure, NewtonCG, Sophia

SAMPLES, BATCH = 96, 24
PERIOD = 2  # steps from one checkpoint to the next

Report = Callable[[str, int], None]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Dropout(0.2), nn.Linear(24, 3))


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "LBFGS": lambda p: LBFGS(p, lr=0.5, max_iter=2, history_size=10),
    "NewtonCG": lambda p: NewtonCG(p, max_cg_iter=4),
    "NewtonCG with all that draws": lambda p: NewtonCG(
        p, curvature="fisher", preconditioner="nystrom", max_cg_iter=3
    ),
    "NewtonCG over the data set": lambda p: NewtonCG(p, preconditioner="kfac", max_cg_iter=3),
    "AdaHessian": lambda p: AdaHessian(p, lr=0.05, update_period=3),
    "Sophia": lambda p: Sophia(p, lr=0.01, estimator="gnb", update_period=3),
}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 8, generator=generator)
    return x, (x @ torch.randn(8, 3, generator=generator)).argmax(1)


class Training:
    """Everything that a run consists of; a step of it is one of each optimizer."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(2)
        self.x, self.y = data()
        self.models = {name: network() for name in OPTIMIZERS}
        self.optimizers = {
            name: make(self.models[name].parameters()) for name, make in OPTIMIZERS.items()
        }
        self.schedulers = {
            name: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
            for name, optimizer in self.optimizers.items()
        }
        self.ballast = torch.randn(
            2**20
        )  # writing a checkpoint takes a while, as it does elsewhere
        self.steps = 0
        self.order = torch.empty(0, dtype=torch.long)

    def step(self) -> None:
        batches = SAMPLES // BATCH
        if self.steps % batches == 0:  # a new epoch
            self.order = torch.randperm(SAMPLES)
        chosen = self.order.view(batches, BATCH)[self.steps % batches]
        for name, optimizer in self.optimizers.items():
            optimizer.step(self._closure(name, chosen))
            self.schedulers[name].step()
        self.steps += 1

    def _closure(self, name: str, chosen: Tensor) -> Callable[[], Tensor]:
        model, optimizer = self.models[name], self.optimizers[name]
        if name == "NewtonCG over the data set":
            loader = DataLoader(TensorDataset(self.x, self.y), batch_size=40, shuffle=True)
            return DatasetClosure(model, F.cross_entropy, loader)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(self.x[chosen]), self.y[chosen])
            loss.backward()
            return loss

        return closure

    def state_dict(self) -> dict[str, Any]:
        parts = {
            "models": self.models,
            "optimizers": self.optimizers,
            "schedulers": self.schedulers,
        }
        state: dict[str, Any] = {
            part: {name: owner.state_dict() for name, owner in owners.items()}
            for part, owners in parts.items()
        }
        state |= {"steps": self.steps, "order": self.order, "ballast": self.ballast}
        return {**state, "random": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in OPTIMIZERS:
            self.models[name].load_state_dict(state["models"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
            self.schedulers[name].load_state_dict(state["schedulers"][name])
        self.steps, self.order = state["steps"], state["order"]
        torch.set_rng_state(state["random"])


def save(state: Any, path: Path) -> None:
    """Replaces a checkpoint as a whole: whenever the process dies, the old or the new one is there.

    The pattern of the README.
    """
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # the contents before the name
    os.replace(temporary, path)


def run(path: Path, steps: int, report: Report = lambda what, step: None) -> None:
    """Trains from the last checkpoint, if there is one, up to a number of steps."""
    training = Training()
    if path.exists():
        training.load_state_dict(torch.load(path, weights_only=True))
    while training.steps < steps:
        report("training", training.steps)
        training.step()
        if training.steps % PERIOD == 0 or training.steps == steps:
            report("saving", training.steps)
            save(training.state_dict(), path)
