"""Closures, and functions and points to make them of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Line searches by name.
SEARCHES = ["strong_wolfe", "hager_zhang", "armijo"]
#: Globalizations of NewtonCG by name.
GLOBALIZATIONS = ["damping", "trust_region", "line_search"]


def standard(optimizer: Any, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The standard closure of an optimizer."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def closure_of(value: Callable[[], Tensor], *params: Tensor) -> Callable[[], Tensor]:
    """The standard closure of some parameters, for tests that make their optimizer later."""

    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss = value()
        loss.backward()
        return loss

    return closure


def start_at(*values: float, device: torch.device | str = "cpu") -> nn.Parameter:
    """A parameter in float64."""
    return nn.Parameter(torch.tensor(values, dtype=torch.float64, device=device))


def rosenbrock(x: Tensor) -> Tensor:
    """The function of Rosenbrock, whose minimum is at ones."""
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
