"""Small modules for trainers of either package of Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_secondorder

HOSTS = [lightning.pytorch, pytorch_lightning]

#: What the two warn of on import or with settings that are meant here.
NOISE = [
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed"),
]

#: Each optimizer, with numbers that make progress in a few steps.
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "LBFGS": lambda p: torch_secondorder.LBFGS(p, max_iter=3),
    # The losses are float32, whose rounding systems amplify at the low damping of the start.
    "NewtonCG": lambda p: torch_secondorder.NewtonCG(p, max_cg_iter=10, damping=1.0),
    "LevenbergMarquardt": lambda p: torch_secondorder.LevenbergMarquardt(
        p, lr=0.3, momentum=0.9, max_norm=0.5, globalization=None
    ),
    "AdaHessian": lambda p: torch_secondorder.AdaHessian(p, lr=0.05, update_period=2),
    "Sophia": lambda p: torch_secondorder.Sophia(p, lr=0.01, update_period=2),
}

#: Others that go the ways of these; each with checkpoints and without the monitors.
MORE_OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SOAP": lambda p: torch_secondorder.SOAP(p, lr=0.01, eps=1e-4, update_period=2),
    "KFAC": lambda p: torch_secondorder.KFAC(p, damping=0.1, update_period=2),
    "AdaSecant": lambda p: torch_secondorder.AdaSecant(p, lr=0.05),
}
ALL_OPTIMIZERS = {**OPTIMIZERS, **MORE_OPTIMIZERS}


class Batches:
    """The same batches in each epoch; knows where it is, for checkpoints within one."""

    def __init__(self, count: int = 4, size: int = 8, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(count, size, 5, generator=generator).to(dtype)
        self.y = torch.randint(3, (count, size), generator=generator)
        self._next = 0

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[list[Tensor]]:
        start, self._next = self._next, 0
        for i in range(start, len(self.x)):
            self._next = (i + 1) % len(self.x)
            yield [self.x[i], self.y[i]]

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 6), *(layers or [nn.Tanh()]), nn.Linear(6, 3))


def module(host: Any, configure: Any, *layers: nn.Module, **methods: Any) -> Any:
    """A LightningModule as anybody would write it.

    Args:
        host: The package.
        configure: Makes what `configure_optimizers` returns, from the parameters.
        layers: Of its network.
        methods: More of its methods.
    """

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]).float(), batch[1])
        self.log("loss", loss)
        return loss

    body = {
        "training_step": training_step,
        "configure_optimizers": lambda self: configure(self.net.parameters()),
    }
    kind = type("Classifier", (host.LightningModule,), {**body, **methods})
    made = kind()
    made.net = network(*layers)
    return made


def trainer(host: Any, tmp_path: Any, **arguments: Any) -> Any:
    """A quiet trainer on the CPU."""
    usual = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return host.Trainer(**(usual | arguments))


def saver(host: Any, step: int, path: Path) -> Any:
    """A callback that saves a checkpoint after so many steps."""

    def on_train_batch_end(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.global_step == step:
            trainer.save_checkpoint(path)

    return type("Saver", (host.Callback,), {"on_train_batch_end": on_train_batch_end})()


def by_hand(configure: Any, net: nn.Module, batches: Any, epochs: int = 1) -> list[Tensor]:
    """The same training in a loop; returns the weights."""
    optimizer = configure(net.parameters())
    for _ in range(epochs):
        for x, y in batches:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x).float(), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    return weights(net)


def weights(net: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in (*net.parameters(), *net.buffers())]


def identical(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
