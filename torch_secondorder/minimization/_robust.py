"""Costs of residuals: half their squares, or less for large ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

#: The names of the losses.
LossName: TypeAlias = Literal["linear", "huber", "soft_l1", "cauchy", "arctan"]


def _huber(z: Tensor) -> tuple[Tensor, Tensor]:
    root = z.clamp(min=1.0).sqrt()
    return torch.where(z <= 1.0, z, 2.0 * root - 1.0), root.reciprocal()


def _soft_l1(z: Tensor) -> tuple[Tensor, Tensor]:
    root = (1.0 + z).sqrt()
    return 2.0 * z / (root + 1.0), root.reciprocal()


def _cauchy(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.log1p(), (1.0 + z).reciprocal()


def _arctan(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.atan(), (1.0 + z * z).reciprocal()


#: `rho(z)` and `rho'(z)` at the squares `z` of scaled residuals.
_RHO: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "huber": _huber,
    "soft_l1": _soft_l1,
    "cauchy": _cauchy,
    "arctan": _arctan,
}


def cost_of(residuals: Tensor, loss: LossName, scale: float) -> Tensor:
    """The cost `scale^2 sum(rho((r / scale)^2)) / 2` of residuals, 0-dim.

    Its second derivative is taken to be the weights `rho'` of iteratively reweighted least squares:
    the quadratic with these lies above the cost, so that its steps lower the cost for linear
    residuals, and it is positive definite where `rho''` would make it indefinite (Holland and
    Welsch 1977).

    Args:
        residuals: `r`, of any shape.
        loss: The name of `rho`.
        scale: The residual from which `rho` is no longer close to the square.

    >>> r = torch.tensor([0.5, 3.0])
    >>> cost_of(r, "huber", 1.0), cost_of(r, "linear", 1.0)  # 1/8 + (3 - 1/2)
    (tensor(2.6250), tensor(4.6250))
    """
    if loss == "linear":
        zeros = torch.zeros_like(residuals)
        return 0.5 * torch.nn.functional.mse_loss(residuals, zeros, reduction="sum")
    r = residuals.detach()
    rho, weights = _RHO[loss]((r / scale).square())
    value = 0.5 * scale * scale * rho.sum()
    cost: Tensor = _Cost.apply(value, residuals, weights)  # type: ignore[no-untyped-call]
    return cost


class _Cost(torch.autograd.Function):
    """A value whose first derivative by `r` is `weights * r`, and whose second is `weights`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, residuals: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(residuals, weights)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[None, Tensor, None]:
        residuals, weights = ctx.saved_tensors
        return None, factor * weights * residuals, None
