"""Networks, problems and child processes of the scripts that compare two checkouts.

Everything here runs against old and new checkouts, so it imports torch, scikit-learn and the
public interface of torch_secondorder, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "PACKAGE",
    "PROBLEMS",
    "Problem",
    "check_source",
    "checkout",
    "environment",
    "mlp",
    "package_root",
    "run_child",
    "supervised",
]

PACKAGE = "torch_secondorder"


@dataclass
class Problem:
    """A loss of parameters.

    Attributes:
        params: What is optimized.
        loss: The loss at the current parameters.
        model: The network, or None for a plain function.
        inputs: All inputs of the network, or None.
        targets: Their targets, or None.
        criterion: The loss of outputs and targets, or None.
        rows: The samples that the loss is of.
    """

    params: list[Tensor]
    loss: Callable[[], Tensor]
    model: nn.Module | None = None
    inputs: Tensor | None = None
    targets: Tensor | None = None
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def network(self) -> nn.Module:
        """The network of a problem that has one."""
        assert self.model is not None
        return self.model

    def closure(self, optimizer: Any) -> Any:
        """The standard closure."""

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure


def mlp(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """A fully connected network with an activation between its layers, seeded."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """Images of 64 pixels in [0, 1] and their labels."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    return torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)


def supervised(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
) -> Problem:
    """The loss of a network on one batch."""
    params: list[Tensor] = list(model.parameters())

    def loss() -> Tensor:
        if problem.rows == slice(None):  # no operations that somebody might count
            return criterion(model(inputs), targets)
        return criterion(model(inputs[problem.rows]), targets[problem.rows])

    problem = Problem(params, loss, model, inputs, targets, criterion)
    return problem


def rosenbrock(dtype: torch.dtype) -> Problem:
    """The chained Rosenbrock function of a hundred unknowns."""
    x = torch.full((100,), -1.0, dtype=dtype)
    x[::2] = 0.5
    x.requires_grad_()
    return Problem([x], lambda: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum() / 100)


def quadratic(dtype: torch.dtype) -> Problem:
    """A quadratic of two parameters, condition 1e4."""
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    matrix = (basis * torch.logspace(0, 4, 40, dtype=torch.float64)) @ basis.T
    matrix = ((matrix + matrix.T) / 2).to(dtype)
    parts = [torch.ones(25, dtype=dtype), torch.ones(5, 3, dtype=dtype)]
    params = [part.requires_grad_() for part in parts]

    def loss() -> Tensor:
        x = torch.cat([p.reshape(-1) for p in params])
        return x.dot(matrix.mv(x)) / 2

    return Problem(params, loss)


def softmax(dtype: torch.dtype) -> Problem:
    """Softmax regression on digits."""
    inputs, targets = _digits()
    model = mlp([64, 10]).to(dtype)
    return supervised(model, inputs[:500].to(dtype), targets[:500], F.cross_entropy)


def classifier(dtype: torch.dtype, extra: nn.Module | None = None) -> Problem:
    """A small network of linear layers on digits, with one more module after the first layer."""
    inputs, targets = _digits()
    model = mlp([64, 24, 16, 10])
    if extra is not None:
        model = nn.Sequential(model[0], deepcopy(extra), *list(model)[1:])
    return supervised(model.to(dtype), inputs[:200].to(dtype), targets[:200], F.cross_entropy)


def barrier(dtype: torch.dtype) -> Problem:
    """A sum that is not finite beyond zero, with a complex parameter beside the real one."""
    x = torch.linspace(0.02, 6, 20, dtype=dtype).requires_grad_()
    z = torch.complex(torch.linspace(-1, 1, 6, dtype=dtype), torch.ones(6, dtype=dtype))
    z = z.requires_grad_()

    def loss() -> Tensor:
        return (x**2 - torch.log(x)).sum() + ((z - 2).abs() ** 4).sum() / 10

    return Problem([x, z], loss)


def spectral(dtype: torch.dtype) -> Problem:
    """A small network with spectral and with weight normalization, on digits."""
    inputs, targets = _digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(64, 16)),
        nn.Tanh(),
        nn.utils.parametrizations.weight_norm(nn.Linear(16, 10)),
    ).to(dtype)
    return supervised(model, inputs[:100].to(dtype), targets[:100], F.cross_entropy)


def attention(dtype: torch.dtype) -> Problem:
    """A layer of a transformer over the rows of digits, and a recurrent layer."""
    inputs, targets = _digits()
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
            self.recurrent = nn.GRU(8, 6, batch_first=True)
            self.last = nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.recurrent(self.layer(x))
            return self.last(states[:, -1])  # type: ignore[no-any-return]

    images = inputs[:60].reshape(-1, 8, 8).to(dtype)
    return supervised(Network().to(dtype), images, targets[:60], F.cross_entropy)


def convolutional(dtype: torch.dtype) -> Problem:
    """A small convolutional network on digits."""
    inputs, targets = _digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).to(dtype)
    images = inputs[:100].reshape(-1, 1, 8, 8).to(dtype)
    return supervised(model, images, targets[:100], F.cross_entropy)


def autoencoder(dtype: torch.dtype) -> Problem:
    """An autoencoder of digits whose first two modules are the encoder."""
    inputs, _ = _digits()
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(64, 12), nn.Sigmoid())
    model = nn.Sequential(encoder, nn.Linear(12, 64)).to(dtype)
    batch = inputs[:100].to(dtype)
    return supervised(model, batch, batch, F.mse_loss)


def pinn(dtype: torch.dtype) -> Problem:
    """A Poisson equation in one dimension, its residual with second derivatives by the input."""
    model = mlp([1, 12, 12, 1]).to(dtype)
    x = torch.linspace(-1, 1, 40, dtype=dtype).unsqueeze(1)
    ends = torch.tensor([[-1.0], [1.0]], dtype=dtype)
    force = -(torch.pi**2) * torch.sin(torch.pi * x)
    params: list[Tensor] = list(model.parameters())

    def loss() -> Tensor:
        points = x.clone().requires_grad_()
        u = model(points)
        (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), points, create_graph=True)
        return F.mse_loss(second, force) + 10 * F.mse_loss(model(ends), torch.zeros_like(ends))

    return Problem(params, loss, model)


PROBLEMS: dict[str, Callable[[torch.dtype], Problem]] = {
    "rosenbrock": rosenbrock,
    "quadratic": quadratic,
    "softmax": softmax,
    "mlp": classifier,
    "batchnorm": partial(classifier, extra=nn.BatchNorm1d(24)),
    "dropout": partial(classifier, extra=nn.Dropout(0.2)),
    "barrier": barrier,
    "normalized": spectral,
    "attention": attention,
    "cnn": convolutional,
    "autoencoder": autoencoder,
    "pinn": pinn,
}


def checkout(text: str) -> Path:
    """The path of a checkout, for argparse."""
    path = Path(text).resolve()
    if not (path / PACKAGE / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"no {PACKAGE} in {text!r}: give the root of a checkout")
    return path


def environment(root: Path) -> dict[str, str]:
    """The environment of a process that imports the package from a checkout."""
    return {
        **os.environ,
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def package_root() -> Path:
    """The folder of the package that this process imports."""
    module = __import__(PACKAGE)
    assert module.__file__ is not None
    return Path(module.__file__).resolve().parent


def run_child(script: str, root: Path, arguments: Sequence[str]) -> str:
    """Runs a script against a checkout, in a process of its own.

    Args:
        script: The file of the script.
        root: The checkout.
        arguments: Of the command line.

    Returns:
        What it printed.

    Raises:
        SystemExit: The child failed, or imported the package from elsewhere.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=environment(root), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{Path(script).name}: failed in {root}, exit code {done.returncode}")
    return done.stdout


def check_source(root: Path) -> None:
    """Makes sure that the package comes from the checkout that was asked for."""
    if package_root() != root / PACKAGE:
        raise SystemExit(f"{PACKAGE} was imported from {package_root()}, not from {root}")
