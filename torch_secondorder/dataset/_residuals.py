"""The residuals of a data set, which are known by their normal equations alone."""

from __future__ import annotations

from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from torch_secondorder._foundation.memory import check_fits
from torch_secondorder._objective.base import Evaluation
from torch_secondorder.curvature import LinearOperator, ResidualJacobian
from torch_secondorder.curvature._normal_equations import NormalEquations
from torch_secondorder.curvature.residual_jacobian import JacobianMethod
from torch_secondorder.dataset._objective import DatasetObjective
from torch_secondorder.dataset._operator import BatchSum

__all__ = ["BatchResiduals"]


class BatchResiduals(NormalEquations):
    """`J'J` of the residuals of a data set, summed over its batches.

    One pass over the loader gives all of it. A batch's rows end with the batch, so there are no
    rows of `J` here, only sums over them: what needs `J` itself is refused.

    Args:
        objective: The objective at its current position.

    Attributes:
        rows: `N`, the residuals of all batches and ranks.
        size: `n`.
        method: The way to the Jacobian of the last batch, see `ResidualJacobian`.
        reason: The reason why it was not `"graph"`.
        finite: Whether the residuals of all batches are finite.
        rest_diagonal: See `ResidualJacobian`.
        rest_is_diagonal: Likewise, for all batches.

    Raises:
        UnknownOutputs: A batch's loss shows no residuals.
        InseparableLoss: A batch's loss is not a sum over samples.
        TooLarge: `J'J` does not fit into memory.
        ValueError: The loss is maximized, or parameters are sharded.
    """

    def __init__(self, objective: DatasetObjective) -> None:
        self.size = objective.vector.size
        vector = objective.vector
        check_fits(
            "J'J",
            (self.size, self.size),
            vector.dtype,
            vector.device,
            "over a data set the residuals come batch by batch, and need this matrix: use NewtonCG "
            "or LBFGS, or steps on one batch each",
        )
        self._objective = objective
        batches = BatchSum(
            objective, lambda evaluation, _: _Normal(evaluation), curvature="jacobian"
        )
        self.rows, self.reason, self.finite = 0, "", True
        self.method: JacobianMethod = "graph"
        self.rest_diagonal: float | Tensor = 0.0
        self.rest_is_diagonal = True
        self._matrix = batches.retried(partial(self._sum, batches))
        self._complete()

    def _sum(self, batches: BatchSum) -> Tensor:
        """Makes the pass; it may be made again from the start."""
        self.rows, self.finite, self.rest_diagonal = 0, True, 0.0
        vector = self._objective.vector
        matrix = torch.zeros(self.size, self.size, dtype=vector.dtype, device=vector.device)

        def add(operator: LinearOperator, weight: float) -> None:
            assert isinstance(operator, _Normal)
            jacobian = operator.jacobian
            self.rows += jacobian.rows
            self.method, self.reason = jacobian.method, jacobian.reason
            self.finite = self.finite and jacobian.finite
            self.rest_diagonal = self.rest_diagonal + weight * jacobian.rest_diagonal
            self.rest_is_diagonal = self.rest_is_diagonal and jacobian.rest_is_diagonal
            matrix.add_(jacobian.normal_matrix(), alpha=weight)

        batches.for_each_operator(add, "normal equations")
        return matrix

    def _complete(self) -> None:
        """Adds the other ranks, whose mean the loss is, and weight decay."""
        objective, ranks = self._objective, self._objective.ranks
        vector = objective.vector
        self._matrix = ranks.average_(self._matrix)
        if ranks.met:
            zeros = torch.zeros(self.size, dtype=vector.dtype, device=vector.device)
            self.rest_diagonal = ranks.average_(zeros + self.rest_diagonal)
            self.rows = sum(rows for (rows,) in ranks.gather([self.rows], vector.device))
            self.finite = not ranks.any(not self.finite, vector.device)
        decays = [slot.decay for slot in objective.slots()]
        if any(decays):
            self.rest_diagonal = self.rest_diagonal + vector.expand(decays)

    def normal_matrix(self) -> Tensor:
        """See `NormalEquations.normal_matrix`."""
        return self._matrix

    def diagonal(self) -> Tensor:
        """See `NormalEquations.diagonal`."""
        return self._matrix.diagonal().clone()

    @property
    def residuals(self) -> NoReturn:
        """Not there.

        Raises:
            TypeError: Always.
        """
        self._refuse("the residuals themselves")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"over a data set there are sums over residuals alone, and not {what}: use "
            'solver="primal", or "auto", without acceleration'
        )


class _Normal(LinearOperator):
    """`J'J` of one batch."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.jacobian = ResidualJacobian(evaluation)
        self.size = self.jacobian.size
        self.dtype, self.device = evaluation.grad.dtype, evaluation.grad.device

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        return self.jacobian.pull(self.jacobian.push(v))
