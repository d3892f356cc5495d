"""The Jacobian of the residuals of a loss by the parameters."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._objective.base import Evaluation
from torch_secondorder.curvature._output_space import LossCurvature, OutputSpace
from torch_secondorder.curvature._residuals import ResidualBlock, residual_blocks

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
        self._space = OutputSpace(linearization.graph)
        curvature = LossCurvature(self._space)
        self._blocks: list[ResidualBlock] = residual_blocks(self._space, curvature)
        self.residuals = torch.cat([b.values.reshape(-1) for b in self._blocks])
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
        rest = evaluation.grad - self.pull(self.residuals)
        if curvature.bypassed or any(decays):
            self.rest_gradient = rest

    def dense(self) -> Tensor:
        """`J`, shape `(N, n)`."""
        vector = self._linearization._objective.vector
        found = []
        for block in self._blocks:
            for sample in range(block.samples):
                for channel in range(block.channels):
                    root = block.root(channel)
                    chosen = torch.zeros_like(root).reshape(block.samples, -1)
                    chosen[sample] = root.reshape(block.samples, -1)[sample]
                    cotangents: list[Tensor | None] = [None] * len(self._space.values)
                    cotangents[block.output] = chosen.reshape(root.shape)
                    found.append(vector.scaled(vector.gather(self._space.pull(cotangents))))
        return torch.stack(found)

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
        there = OutputSpace(evaluation.linearization.graph).values
        change = [(z - z0).detach() for z, z0 in zip(there, self._space.values, strict=True)]
        rows = []
        for block in self._blocks:
            channels = [
                (block.root(channel) * change[block.output]).reshape(block.samples, -1).sum(1)
                for channel in range(block.channels)
            ]
            rows.append(torch.stack(channels, 1).reshape(-1))
        return torch.cat(rows)
