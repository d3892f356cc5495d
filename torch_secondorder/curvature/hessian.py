"""The Hessian of the evaluated loss."""

from __future__ import annotations

from torch import Tensor

from torch_secondorder.curvature.base import LinearOperator
from torch_secondorder.evaluation import Evaluation

__all__ = ["Hessian"]


class Hessian(LinearOperator):
    """The Hessian at an evaluated point, by a second backward pass over the retained graph.

    A product costs one to two gradients (Pearlmutter 1994, "Fast exact multiplication by the
    Hessian"); nothing of the forward pass is repeated. Regularization is included. The operator is
    valid until the parameters move.

    Args:
        evaluation: Made by `Objective.evaluate(curvature=True)`.

    Raises:
        ValueError: The evaluation was made without curvature.

    >>> import torch
    >>> from torch_secondorder.objective import FunctionalObjective
    >>> objective = FunctionalObjective(lambda x: x[0] ** 2 * x[1], torch.tensor([3.0, 5.0]))
    >>> Hessian(objective.evaluate(curvature=True)) @ torch.eye(2)
    tensor([[10.,  6.],
            [ 6.,  0.]])
    """

    def __init__(self, evaluation: Evaluation) -> None:
        if evaluation.linearization is None:
            raise ValueError(
                "this evaluation has no curvature: make it with evaluate(curvature=True)"
            )
        self._linearization = evaluation.linearization
        self._vectorizes = True
        self.size = evaluation.linearization.size

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        return self._linearization.hessian_product(v)

    def matmat(self, V: Tensor) -> Tensor:
        """See `LinearOperator.matmat`; in one vectorized backward pass where operations allow."""
        if self._vectorizes:
            try:
                return self._linearization.hessian_product(V.T).T
            except (RuntimeError, NotImplementedError):  # an operation without a batching rule
                self._vectorizes = False
        return super().matmat(V)
