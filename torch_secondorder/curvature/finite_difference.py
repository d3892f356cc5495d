"""Hessian products without second derivatives: differences of gradients."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from torch_secondorder.curvature.base import LinearOperator
from torch_secondorder.evaluation import Objective
from torch_secondorder.vector import max_norm, to_host

__all__ = ["FiniteDifference"]


class FiniteDifference(LinearOperator):
    """The Hessian of an objective where it stands, by central differences of its gradient.

    `H v` is `(g(theta + h v) - g(theta - h v)) / 2h`: two evaluations, and nothing is asked of the
    closure but gradients. The step is scaled by the norms, `h |v| = eps^(1/3) (1 + |theta|)`, which
    balances rounding, of order `eps / h`, with truncation, of order `h^2` (Nocedal and Wright 2006,
    section 8.1). About two thirds of the digits are right in float64, and three to four digits of
    float32: enough for a Newton step, too little for a spectrum.

    Args:
        objective: Where it stands when a product is made counts.

    >>> from torch_secondorder.objective import FunctionalObjective
    >>> x = torch.tensor([3.0, 5.0], dtype=torch.float64)
    >>> objective = FunctionalObjective(lambda x: x[0] ** 2 * x[1], x)
    >>> (FiniteDifference(objective) @ torch.eye(2, dtype=torch.float64)).round(decimals=6)
    tensor([[10.,  6.],
            [ 6.,  0.]], dtype=torch.float64)
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        vector = objective.vector
        self.size, self.dtype, self.device = vector.size, vector.dtype, vector.device

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        objective = self._objective
        norms = torch.linalg.vector_norm
        scale = max_norm(v)
        unit = v / scale  # the squares of v itself may leave the range of float32
        largest, norm, size = to_host(scale, norms(unit), norms(objective.position))
        if not 0 < largest < inf:
            return v * 0.0
        h = objective.vector.precision ** (1 / 3) * (1 + size) / norm
        step = unit.mul_(h)
        ahead = objective.trial(step).grad
        behind = objective.trial(step, -1.0).grad
        return (ahead - behind).div_(2 * h).mul_(scale)
