"""Hessian products without second derivatives: differences of gradients."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from torch_secondorder.curvature.base import LinearOperator
from torch_secondorder.curvature.diagonal import Hutchinson
from torch_secondorder.curvature.probes import draw
from torch_secondorder.evaluation import Objective
from torch_secondorder.vector import max_norm

__all__ = ["FiniteDifference", "diagonal_by_differences"]


def diagonal_by_differences(
    estimator: Hutchinson, objective: Objective, generator: torch.Generator | None = None
) -> Tensor:
    """Hutchinson's estimate of the Hessian's diagonal where an objective stands, shape `(n,)`.

    Its products are differences of gradients, two evaluations each, see `FiniteDifference`. The
    random vectors do not depend on how the parameters are sharded.

    Args:
        estimator: Whose random vectors and whose mean.
        objective: Ends at a trial; `settle` puts the parameters back.
        generator: Where randomness comes from; torch's own by default.
    """
    operator, vector = FiniteDifference(objective), objective.vector
    device = vector.device

    def one(size: int) -> Tensor:
        return draw(size, estimator.distribution, generator, dtype=vector.dtype, device=device)

    probes = [vector.drawn(one) for _ in range(estimator.n_samples)]
    return estimator.mean(probes, [operator.matvec(z) for z in probes])


class FiniteDifference(LinearOperator):
    """The Hessian of an objective where it stands, by central differences of its gradient.

    `H v` is `(g(theta + h v) - g(theta - h v)) / 2h`: two evaluations, and nothing is asked of the
    closure but gradients. The step is scaled by the norms, `h |v| = eps^(1/3) (1 + |theta|)`, which
    balances rounding, of order `eps / h`, with truncation, of order `h^2` (Nocedal and Wright 2006,
    section 8.1). About two thirds of the digits are right in float64, and three to four digits of
    float32: enough for a Newton step, too little for a spectrum. Under autocast in bfloat16, and
    with a policy of `fully_shard` to compute in it, one digit is.

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
        self.space = vector.space

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        objective = self._objective
        (largest,) = self.space.to_host(largest=[max_norm(v)])
        if not 0 < largest < inf:
            return v * 0.0
        unit = v / largest  # the squares of v itself may leave the range of float32
        norms = torch.linalg.vector_norm
        norm, size = self.space.to_host(norms=(norms(unit), norms(objective.position)))
        h = objective.precision ** (1 / 3) * (1 + size) / norm
        step = unit.mul_(h)
        ahead = objective.trial(step).grad
        behind = objective.trial(step, -1.0).grad
        return (ahead - behind).div_(2 * h).mul_(largest)
