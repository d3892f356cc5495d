"""The Hessian of the evaluated loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torch_secondorder.curvature.base import Linearized

__all__ = ["Hessian"]


class Hessian(Linearized):
    """The Hessian at an evaluated point, by a second backward pass over the retained graph.

    A product costs one to two gradients (Pearlmutter 1994, "Fast exact multiplication by the
    Hessian"); nothing of the forward pass is repeated. Regularization is included. The operator is
    valid until the parameters move.

    Args:
        evaluation: Made by `Objective.evaluate(curvature=True)`.

    Raises:
        ValueError: The evaluation was made without curvature.

    >>> import torch
    >>> from torch_secondorder import FunctionalObjective
    >>> objective = FunctionalObjective(lambda x: x[0] ** 2 * x[1], torch.tensor([3.0, 5.0]))
    >>> Hessian(objective.evaluate(curvature=True)) @ torch.eye(2)
    tensor([[10.,  6.],
            [ 6.,  0.]])
    """

    _bends = True

    def _multiply(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        return self._linearization.graph.hessian_product(tangents, batched)
