"""Rows and columns of a Jacobian from vectorized passes over the retained graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_secondorder._autograd.vectorized import at_once, in_turn, many_at_once
from torch_secondorder._objective.base import Linearization
from torch_secondorder.curvature._jacobian_columns import Rows
from torch_secondorder.curvature._output_space import OutputSpace, Tensors
from torch_secondorder.curvature._residuals import ResidualBlock

__all__ = ["JacobianProducts"]


class JacobianProducts:
    """Products with the Jacobian of residuals and its transpose, those of this process.

    Args:
        linearization: The graph and the parameters.
        space: The outputs.
        blocks: The residuals.
        rows: Where they are among the rows of the Jacobian.
    """

    def __init__(
        self,
        linearization: Linearization,
        space: OutputSpace,
        blocks: Sequence[ResidualBlock],
        rows: Sequence[Rows],
    ) -> None:
        self._linearization, self._space = linearization, space
        self._blocks, self._rows = blocks, rows
        self._vector = linearization.vector
        self._vectorizes = True

    def pull(self, u: Tensor) -> Tensor:
        """`J'u`, from `(k, N)` to `(k, n)`."""
        cotangents: list[Tensor | None] = [None] * len(self._space.tensors)
        for block, rows in zip(self._blocks, self._rows, strict=True):
            weights = rows.of(u.T).movedim(-1, 0)
            weights = weights.reshape(len(u), block.samples, block.channels)
            for output, part in zip(block.outputs, block.spread(weights), strict=True):
                cotangents[output] = part.to(self._space.values[output])
        pulled = self._several(self._space.pull, cotangents, len(u))
        return self._vector.scaled(self._vector.gather(pulled, batch=(len(u),)))

    def push(self, v: Tensor) -> Tensor:
        """`J v`, from `(k, n)` to `(k, N)`."""
        tangents = self._vector.split(self._vector.scaled(v))
        return self.collected(self._several(self._space.push, tangents, len(v)), len(v))

    def collected(self, changes: Sequence[Tensor | None], count: int) -> Tensor:
        """The changes of the residuals, `(k, N)`, with those of the outputs, `(k, ...)`."""
        result = torch.empty(
            self._rows[-1].stop, count, dtype=self._vector.dtype, device=self._vector.device
        )
        for block, rows in zip(self._blocks, self._rows, strict=True):
            collected = block.collect([changes[i] for i in block.outputs])
            found = collected.reshape(count, rows.samples, rows.channels)
            rows.of(result).copy_(found.movedim(0, -1))
        return result.T

    def by_rows(self) -> Tensor:
        """The whole Jacobian, a backward pass for some rows at a time."""
        total = self._rows[-1].stop
        return self._whole(total, lambda units: self.pull(units))

    def by_columns(self) -> Tensor:
        """The whole Jacobian, a product with some unit vectors at a time."""
        return self._whole(self._vector.size, lambda units: self.push(units)).T

    def _whole(self, size: int, products: Callable[[Tensor], Tensor]) -> Tensor:
        step = many_at_once(self._linearization.graph, self._vector.device)
        parts = []
        for start in range(0, size, step):
            units = torch.zeros(
                min(step, size - start), size, dtype=self._vector.dtype, device=self._vector.device
            )
            units[:, start:].fill_diagonal_(1.0)
            parts.append(products(units))
        return torch.cat(parts)

    def _several(
        self, multiply: Callable[..., Tensors], directions: Sequence[Tensor | None], count: int
    ) -> Tensors:
        if count > 1 and self._vectorizes:
            found = at_once(multiply, directions)
            if found is not None:
                return found
            self._vectorizes = False
        return in_turn(multiply, directions)
