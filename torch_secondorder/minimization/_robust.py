"""Costs of residuals: half their squares, or less for large ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

#: The names of the losses.
LossName: TypeAlias = Literal["linear", "huber", "soft_l1", "cauchy", "arctan"]

# The least curvature, as a share of the weight. The exact curvature of large residuals is zero or
# negative. On fits of NIST's curves to data with outliers, fewer Jacobians are taken than with the
# whole weight: 8 percent (soft_l1), 24 (arctan) and 27 (cauchy).
_SHARE = 0.1


def _huber(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    root = z.clamp(min=1.0).sqrt()
    inside = z <= 1.0
    bend = torch.where(inside, 0.0, -0.5 / root**3)
    return torch.where(inside, z, 2.0 * root - 1.0), root.reciprocal(), bend


def _soft_l1(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    root = (1.0 + z).sqrt()
    return 2.0 * z / (root + 1.0), root.reciprocal(), -0.5 / root**3


def _cauchy(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights = (1.0 + z).reciprocal()
    return z.log1p(), weights, -weights.square()


def _arctan(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights = (1.0 + z * z).reciprocal()
    return z.atan(), weights, -2.0 * z * weights.square()


#: `rho`, `rho'` and `rho''` at the squares `z` of scaled residuals.
_RHO: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "huber": _huber,
    "soft_l1": _soft_l1,
    "cauchy": _cauchy,
    "arctan": _arctan,
}


def cost_of(residuals: Tensor, loss: LossName, scale: float) -> Tensor:
    """The cost `scale^2 sum(rho((r / scale)^2)) / 2` of residuals, 0-dim.

    Its second derivative is taken to be `rho' + 2 z rho''`, but at least a share of the weight
    `rho'` (Triggs, McLauchlan, Hartley and Fitzgibbon 2000, "Bundle adjustment: a modern
    synthesis").

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
    z = (r / scale).square()
    rho, weights, bend = _RHO[loss](z)
    curvature = torch.maximum(weights + 2.0 * z * bend, _SHARE * weights)
    value = 0.5 * scale * scale * rho.sum()
    cost: Tensor = _Cost.apply(value, residuals, curvature, (weights - curvature) * r)  # type: ignore[no-untyped-call]
    return cost


class _Cost(torch.autograd.Function):
    """A value whose first derivative by `r` is `curvature * r + offset`."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, residuals: Tensor, curvature: Tensor, offset: Tensor
    ) -> Tensor:
        ctx.save_for_backward(residuals, curvature, offset)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[None, Tensor, None, None]:
        residuals, curvature, offset = ctx.saved_tensors
        return None, factor * (curvature * residuals + offset), None, None
