"""The Jacobian of the residuals of a loss by the parameters."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._objective.base import Evaluation
from torch_secondorder.curvature._residuals import Residuals

__all__ = ["JacobianMethod", "ResidualJacobian"]

#: The ways to the Jacobian: by the uses of each parameter in the graph, by vectorized backward
#: passes for rows, or by vectorized double-vjps for columns.
JacobianMethod: TypeAlias = Literal["graph", "rows", "columns"]


class ResidualJacobian:
    """The Jacobian `J` of the residuals `r` of a loss `|r|^2 / 2 + rest(theta)`.

    Rows are residuals, in the order of outputs, samples and channels; columns are the entries of
    the work vector. `J'J` is the Gauss-Newton matrix, `J'r + rest_gradient` the gradient.

    Args:
        evaluation: Made by `Objective.evaluate(curvature=True)`.
        method: A way to the Jacobian; by default the first that works.

    Attributes:
        method: The way that was taken.
        reason: The reason why an earlier way was not; empty if there is none.
        residuals: `r`, shape `(N,)`.
        rest_gradient: The gradient of what is not in the residuals, weight decay included, shape
            `(n,)`; None for zero.
        rest_diagonal: The diagonal of the curvature that weight decay adds to `J'J`: `(n,)`, or a
            number.
        rows: `N`.
        size: `n`.
    """

    def __init__(self, evaluation: Evaluation, *, method: JacobianMethod | None = None) -> None:
        linearization = evaluation.linearization
        assert linearization is not None
        self._linearization = linearization
        self._found: Tensor | None = None
        residuals = Residuals(linearization.graph)
        self._space, self._blocks = residuals.space, residuals.blocks
        self.residuals = torch.cat([b.values.reshape(-1) for b in self._blocks]).to(evaluation.grad)
        self.finite = residuals.finite
        self.rows, self.size = len(self.residuals), linearization.size
        self.method: JacobianMethod = "rows"
        self.reason = ""
        decays = [slot.decay for slot in linearization.slots()]
        counts = [slot.stop - slot.start for slot in linearization.slots()]
        self.rest_diagonal: float | Tensor = 0.0
        self.rest_gradient: Tensor | None = None
        if any(decays):
            self.rest_diagonal = torch.repeat_interleave(
                torch.tensor(decays, dtype=evaluation.grad.dtype), torch.tensor(counts)
            )
        parts = residuals.rest_diagonal()
        if parts is not None:
            vector = linearization._objective.vector
            more = vector.scaled(vector.scaled(vector.gather(parts)))
            self.rest_diagonal = self.rest_diagonal + more
        rest = evaluation.grad - self.pull(self.residuals)
        if residuals.rest_gradient() is not None or any(decays):
            self.rest_gradient = rest

    def dense(self) -> Tensor:
        """`J`, shape `(N, n)`."""
        if self._found is not None:
            return self._found
        vector = self._linearization._objective.vector
        found = []
        for block in self._blocks:
            for sample in range(block.samples):
                for channel in range(block.channels):
                    unit = torch.zeros_like(block.values)
                    unit[sample, channel] = 1
                    cotangents: list[Tensor | None] = [None] * len(self._space.values)
                    for place, part in zip(block.outputs, block.spread(unit), strict=True):
                        cotangents[place] = part
                    found.append(vector.scaled(vector.gather(self._space.pull(cotangents))))
        dtype = self._linearization._objective.vector.dtype
        J = torch.stack(found) if found else torch.zeros(0, self.size)
        self._found = J.to(dtype)
        return self._found

    def pull(self, u: Tensor) -> Tensor:
        """`J'u`, from shape `(N,)` to `(n,)`."""
        return self.dense().T @ u

    def push(self, v: Tensor) -> Tensor:
        """`J v`, from shape `(n,)` to `(N,)`."""
        return self.dense() @ v

    def normal_matrix(self) -> Tensor:
        """`J'J`, shape `(n, n)`."""
        J = self.dense()
        return J.T @ J

    def diagonal(self) -> Tensor:
        """The diagonal of `J'J`, shape `(n,)`."""
        return self.dense().square().sum(0)

    def kernel(self, weights: Tensor | None = None) -> Tensor:
        """`J diag(weights) J'`, shape `(N, N)`; without forming `J` where that is cheaper.

        Args:
            weights: Shape `(n,)`; ones by default.
        """
        J = self.dense()
        return J @ J.T if weights is None else (J * weights) @ J.T

    def change_to(self, evaluation: Evaluation) -> Tensor:
        """The change of the residuals to another point, as far as the outputs change: `(N,)`.

        The root of the curvature is that of this point: `Q'(z - z0)`.

        Args:
            evaluation: One with curvature of the same loss, at the other point.
        """
        assert evaluation.linearization is not None
        there = Residuals(evaluation.linearization.graph).space.values
        change = [(z - z0).detach() for z, z0 in zip(there, self._space.values, strict=True)]
        rows = [b.collect([change[i] for i in b.outputs]).reshape(-1) for b in self._blocks]
        return torch.cat(rows)
