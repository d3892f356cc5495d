"""The Jacobian of the residuals of one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import MissingSecondDerivative
from torch_secondorder._foundation.memory import check_fits
from torch_secondorder._objective.base import Linearization
from torch_secondorder.curvature._batched_jacobian import JacobianProducts
from torch_secondorder.curvature._jacobian_columns import Columns, Rows
from torch_secondorder.curvature._jacobian_kernel import add_gram, kernel, mirror_
from torch_secondorder.curvature._residuals import Residuals

__all__ = ["JacobianMethod", "LocalJacobian", "check_size", "rows_of"]

#: The ways to the Jacobian: by the uses of each parameter in the graph, by vectorized backward
#: passes for rows, or by vectorized double-vjps for columns.
JacobianMethod: TypeAlias = Literal["graph", "rows", "columns"]

# Elements of a Jacobian that is made at once, of one that is kept once it was made, and of a part
# that is made at a time.
_SMALL, _KEPT, _PART = 2**20, 2**24, 2**24


class LocalJacobian:
    """The rows of the Jacobian that belong to the residuals of this process.

    Args:
        linearization: The graph and the parameters.
        residuals: The residuals.
        method: How it is made.
        columns: The columns where they come from the graph.
        rows: The places of the residuals.

    Attributes:
        rows: The places of the residuals.
        count: The number of rows.
        size: The number of columns.
    """

    def __init__(
        self,
        linearization: Linearization,
        residuals: Residuals,
        method: JacobianMethod,
        rows: Sequence[Rows],
        columns: Sequence[Columns] = (),
    ) -> None:
        self._linearization, self._residuals, self._method = linearization, residuals, method
        self.rows, self._columns = rows, columns
        self.count, self.size = rows[-1].stop, linearization.size
        self._vector = linearization.vector
        self._products = JacobianProducts(linearization, residuals.space, residuals.blocks, rows)
        self._kept: Tensor | None = None
        self._covers = sum(part.width for part in columns) == self.size

    @property
    def _by_graph(self) -> bool:
        return self._method == "graph"

    def ordered(self) -> Tensor:
        """The residuals, `(N,)`."""
        result = self._empty(self.count)
        for rows, block in zip(self.rows, self._residuals.blocks, strict=True):
            rows.of(result).copy_(block.values.reshape(rows.samples, rows.channels))
        return result

    def error(self, r: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `J'r - gradient`, in some columns at least, and a bound of that of `J'r`."""
        if r.numel() * self.size <= _SMALL:
            J = self.dense()
            error, norm = J.T @ r - gradient, torch.linalg.vector_norm(J)
        else:
            errors, squares, end = [], [gradient.new_zeros(())], 0
            for whole in self._columns:
                part, own = whole.some(gradient)
                errors += [part.pull(r) - own, gradient[end : whole.start]]
                squares.append(part.square())
                end = whole.stop
            error = torch.cat([*errors, gradient[end:]])
            norm = torch.stack(squares).sum().sqrt()
        return torch.linalg.vector_norm(error), norm * torch.linalg.vector_norm(r)

    def dense(self) -> Tensor:
        """`J`, kept where it is small."""
        if self._kept is not None:
            return self._kept
        check_size("the Jacobian", self.count, self.size, self._vector.dtype, self._vector.device)
        if not self._by_graph:
            self._linearization.check()
            if self._method == "columns":
                with suppress(MissingSecondDerivative):
                    self._kept = self._products.by_columns()
            if self._kept is None:
                self._kept = self._products.by_rows()
            return self._kept
        J = self._empty(self.count, self.size)
        for i, rows in enumerate(self.rows):
            self._write(rows.of(J), i)
        if J.numel() <= _KEPT:
            self._kept = J
        return J

    def _write(self, out: Tensor, block: int, begin: int = 0, end: int | None = None) -> None:
        """Fills `(samples, channels, n)`."""
        if not self._covers:
            out.zero_()
        for part in self._columns:
            part.write(out[..., part.start : part.stop], block, begin, end)

    def _parts(self) -> Iterator[Tensor]:
        """Some rows after the other, `(k, n)`, in any order."""
        if self._kept is not None or not self._by_graph or self.count * self.size <= _KEPT:
            yield self.dense()
            return
        for i, rows in enumerate(self.rows):
            step = max(1, _PART // (self.size * rows.channels))
            for begin in range(0, rows.samples, step):
                end = min(begin + step, rows.samples)
                part = self._empty(end - begin, rows.channels, self.size)
                self._write(part, i, begin, end)
                yield part.flatten(0, 1)

    def between(self, begin: int, end: int) -> Tensor:
        """Some columns, `(N, end - begin)`."""
        if self._kept is not None or not self._by_graph:
            return self.dense()[:, begin:end]
        result = self._zeros(self.count, end - begin)
        for whole in self._columns:
            for piece in whole.pieces(end - begin):
                first, last = max(begin, piece.start), min(end, piece.stop)
                if first >= last:
                    continue
                part = self._empty(self.count, piece.width)
                for i, rows in enumerate(self.rows):
                    piece.write(rows.of(part), i)
                own = part[:, first - piece.start : last - piece.start]
                result[:, first - begin : last - begin] = own
        return result

    def by_backward(self, u: Tensor) -> Tensor:
        """`J'u` by a backward pass, whatever the method is."""
        return self._products.pull(u[None])[0]

    def pull(self, u: Tensor) -> Tensor:
        """`J'u`, from `(N,)` to `(n,)`."""
        if self._kept is not None:
            return self._kept.T @ u
        if not self._by_graph:
            self._linearization.check()
            return self._products.pull(u[None])[0]
        result = self._zeros(self.size)
        for part in self._columns:
            result[part.start : part.stop] = part.pull(u)
        return result

    def push(self, v: Tensor) -> Tensor:
        """`J v`, from `(n,)` to `(N,)`."""
        if self._kept is not None:
            return self._kept @ v
        if not self._by_graph:
            self._linearization.check()
            try:
                self._linearization.check_transposable()
                return self._products.push(v[None])[0].contiguous()
            except MissingSecondDerivative:
                return self.dense() @ v  # by rows, which take one derivative
        result = self._zeros(self.count)
        for part in self._columns:
            part.add_push(v[part.start : part.stop], result)
        return result

    def normal_matrix(self) -> Tensor:
        """`J'J`."""
        result: Tensor | None = None
        for part in self._parts():
            if result is None:
                result = self._zeros(self.size, self.size)
            add_gram(result, part.T)
        return self._zeros(self.size, self.size) if result is None else mirror_(result)

    def diagonal(self) -> Tensor:
        """The diagonal of `J'J`."""
        if self._kept is not None or not self._by_graph:
            return self.dense().square().sum(0)
        result = self._zeros(self.size)
        for whole in self._columns:
            for piece in whole.pieces(max(1, _PART // self.count)):
                result[piece.start : piece.stop] = piece.squares()
        return result

    def kernel(self, weights: Tensor | None = None) -> Tensor:
        """`J diag(weights) J'`."""
        if self._by_graph:
            return kernel(self._columns, self.rows, weights, self._empty(0))
        J = self.dense()
        result = self._zeros(self.count, self.count)
        add_gram(result, J, None if weights is None else J * weights)
        return mirror_(result)

    def collected(self, changes: Sequence[Tensor]) -> Tensor:
        """The changes of the residuals, `(N,)`, with those of the outputs."""
        return self._products.collected([z[None] for z in changes], 1)[0].contiguous()

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self._vector.dtype, device=self._vector.device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self._vector.dtype, device=self._vector.device)


def rows_of(residuals: Residuals) -> list[Rows]:
    """The rows of all blocks, by samples where their channels have an order."""
    found: list[Rows] = []
    start = 0
    for block in residuals.blocks:
        found.append(Rows(start, block.samples, block.channels, block.scale is None))
        start = found[-1].stop
    return found


def check_size(
    name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises where a matrix does not fit into memory."""
    instead = "use products with it, pull() and push(), or fewer residuals at a time"
    check_fits(name, (rows, columns), dtype, device, instead)
