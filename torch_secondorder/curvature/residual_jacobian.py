"""The Jacobian of the residuals of a loss by the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import MissingSecondDerivative, Overwritten
from torch_secondorder._foundation.checks import check_choice
from torch_secondorder._foundation.memory import check_fits
from torch_secondorder._objective.base import Evaluation
from torch_secondorder.curvature._batched_jacobian import JacobianProducts
from torch_secondorder.curvature._graph_jacobian import Rejected, graph_columns
from torch_secondorder.curvature._jacobian_columns import Columns, Rows
from torch_secondorder.curvature._jacobian_kernel import add_gram, kernel, mirror_
from torch_secondorder.curvature._output_space import OutputSpace
from torch_secondorder.curvature._residuals import Residuals

__all__ = ["JacobianMethod", "ResidualJacobian"]

#: The ways to the Jacobian: by the uses of each parameter in the graph, by vectorized backward
#: passes for rows, or by vectorized double-vjps for columns.
JacobianMethod: TypeAlias = Literal["graph", "rows", "columns"]

# Elements of a Jacobian that is kept once it was made, and of a part that is made at a time.
_KEPT, _PART = 2**24, 2**24
# How far the gradient of the residuals may be off, beside a bound of its norm.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 3e-4}
# Graphs of so many structures are remembered.
_REMEMBERED = 64


class ResidualJacobian:
    """The Jacobian `J` of the residuals `r` of a loss `|r|^2 / 2 + rest(theta)`.

    Rows are residuals, in the order of outputs, samples and channels; columns are the entries of
    the work vector. `J'J` is the Gauss-Newton matrix, `J'r + rest_gradient` the gradient. Where
    residuals are made by a root of a matrix for each sample, as those of cross-entropy, a channel's
    rows of all samples come together; their order says nothing.

    Where each row depends on one sample alone, all rows come out of one backward pass
    (`method="graph"`): each operation that takes parameters gets its gradient by the result, what
    it saved gives the rest. That rows are independent is found by trying when a graph of this
    structure is met first, and `J'r` is compared with the gradient in each evaluation. Else rows
    are made by vectorized backward passes, or columns by vectorized double-vjps, whichever are
    fewer. `dense`, `normal_matrix` and `kernel` take memory when they are called, not before.

    Args:
        evaluation: Made by `Objective.evaluate(curvature="jacobian")`, or with `True`.
        method: A way to the Jacobian; by default the first that works.

    Attributes:
        method: The way that was taken.
        reason: The reason why `"graph"` was not; empty if it was, or if another way was asked for.
        residuals: `r`, shape `(N,)`.
        rows: `N`.
        size: `n`.
        finite: Whether the residuals are; if not, they are zeros.

    Raises:
        UnknownOutputs: There is no residual, a RuntimeError.
        ValueError: The evaluation was made without curvature, the loss is maximized, parameters are
            sharded, or `method` is unknown or does not work for this graph.

    >>> from torch_secondorder import FunctionalObjective
    >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1)
    >>> def loss(w):
    ...     return torch.nn.functional.mse_loss(x @ w, y, reduction="sum") / 2
    >>> evaluation = FunctionalObjective(loss, torch.ones(2, 1)).evaluate(curvature=True)
    >>> J = ResidualJacobian(evaluation)
    >>> J.method, J.dense()
    ('graph', tensor([[1., 2.],
            [3., 4.]]))
    """

    def __init__(self, evaluation: Evaluation, *, method: JacobianMethod | None = None) -> None:
        if method is not None:
            check_choice("method", method, JacobianMethod)
        linearization = evaluation.linearization
        if linearization is None:
            raise ValueError(
                'this evaluation has no graph: make it with evaluate(curvature="jacobian")'
            )
        if linearization.maximizes:
            raise ValueError("a sum of squares cannot be maximized: maximize=True has no residuals")
        if linearization.vector.sharded:
            raise ValueError(
                "the Jacobian of residuals by sharded parameters is not supported: use NewtonCG "
                'with curvature="gauss_newton", which needs products only'
            )
        linearization.check()
        self._linearization, self._evaluation = linearization, evaluation
        self._ranks, self._vector = linearization.ranks, linearization.vector
        self.size = linearization.size
        self._kept: Tensor | None = None
        try:
            self._attach(method)
        except Overwritten:
            if not linearization.renew():
                raise
            self._attach(method)

    # Finding the way.

    def _attach(self, method: JacobianMethod | None) -> None:
        self._residuals = Residuals(self._linearization.graph)
        self.finite = self._residuals.finite
        self._rows = _rows_of(self._residuals)
        self._columns: list[Columns] | None = None
        self.reason = ""
        if method in (None, "graph"):
            self._columns, self.reason = self._by_graph()
            if method == "graph" and self.reason:
                raise ValueError(
                    f'method="graph" does not work for this loss: {self.reason}. Leave the method '
                    "out, for rows or columns to be made by vectorized passes"
                )
        self.rows = self._rows[-1].stop
        if self._columns is not None:
            method = "graph"
        elif method is None:
            method = "columns" if self._columns_are_cheaper() else "rows"
        self.method: JacobianMethod = method
        self._products = JacobianProducts(
            self._linearization, self._residuals.space, self._residuals.blocks, self._rows
        )
        self.residuals = self._ordered([block.values for block in self._residuals.blocks])

    def _ordered(self, values: list[Tensor]) -> Tensor:
        """One vector `(N,)` of tensors `(samples, channels)`, one for each block."""
        result = torch.empty(
            self._rows[-1].stop, dtype=self._vector.dtype, device=self._vector.device
        )
        for rows, value in zip(self._rows, values, strict=True):
            rows.of(result).copy_(value.reshape(rows.samples, rows.channels))
        return result

    def _by_graph(self) -> tuple[list[Columns] | None, str]:
        """The columns from the graph, or the reason why there are none."""
        if not self.finite:
            return None, "residuals that are not finite"
        plans = self._linearization.registry.jacobians
        if len(plans) > _REMEMBERED:
            plans.clear()
        tensors, blocks = self._residuals.space.tensors, self._residuals.blocks
        try:
            for again in (False, True):
                columns, rows = graph_columns(tensors, blocks, self._vector, plans, again=again)
                if self._agrees(columns, rows):
                    return columns, ""
        except Rejected as rejected:
            self._rows = _rows_of(self._residuals)
            return None, str(rejected)
        self._rows = _rows_of(self._residuals)
        return None, "samples that depend on one another"

    def _agrees(self, columns: list[Columns], rows: list[Rows]) -> bool:
        """True if the Jacobian, times the residuals, is the gradient."""
        self._rows = rows
        r = self._ordered([block.values for block in self._residuals.blocks])
        expected = self._evaluation.grad
        rest = self.rest_gradient
        if rest is not None:
            expected = expected - rest
        error = torch.linalg.vector_norm(_pulled(columns, r, self.size) - expected)
        bound = torch.linalg.vector_norm(expected)
        if columns:
            squares = torch.stack([part.square() for part in columns]).sum()
            bound = torch.maximum(bound, squares.sqrt() * torch.linalg.vector_norm(r))
        return bool(error <= _TOLERANCE[_narrowest(self._residuals)] * bound)

    def _columns_are_cheaper(self) -> bool:
        # A double-vjp takes two passes.
        if 2 * self.size >= self.rows:
            return False
        try:
            self._linearization.check_transposable()
        except MissingSecondDerivative:
            return False
        return True

    # What is not in the residuals.

    @cached_property
    def rest_gradient(self) -> Tensor | None:
        """The gradient of what is not in the residuals, `(n,)`, weight decay included."""
        parts = self._residuals.rest_gradient()
        decay = self._linearization.decay_gradient()
        if parts is None:
            return decay
        rest = self._vector.scaled(self._vector.gather(parts))
        return rest if decay is None else rest + decay

    @cached_property
    def rest_diagonal(self) -> Tensor | float:
        """The diagonal of the curvature of what is not in the residuals: `(n,)`, or zero.

        Weight decay, and terms of the loss that bypass the outputs such as a penalty on weights.
        """
        parts = self._residuals.rest_diagonal()
        result: Tensor | float = 0.0
        if parts is not None:
            result = self._vector.scaled(self._vector.scaled(self._vector.gather(parts)))
        slots = self._linearization.slots()
        if any(slot.decay for slot in slots):
            result = result + self._vector.expand([slot.decay for slot in slots])
        return result

    # The matrix and products with it.

    def dense(self) -> Tensor:
        """`J`, shape `(N, n)`; it may be kept and returned again, so do not write into it.

        Raises:
            TooLarge: It does not fit into memory.
        """
        if self._kept is not None:
            return self._kept
        self._check_fits("the Jacobian", self.rows, self.size)
        if self._columns is None:
            J = (
                self._products.by_columns()
                if self.method == "columns"
                else self._products.by_rows()
            )
            self._kept = J
            return J
        J = torch.empty(self.rows, self.size, dtype=self._vector.dtype, device=self._vector.device)
        for i, rows in enumerate(self._rows):
            self._write(rows.of(J), i)
        if J.numel() <= _KEPT:
            self._kept = J
        return J

    def _write(self, out: Tensor, block: int, begin: int = 0, end: int | None = None) -> None:
        """Fills `(samples, channels, n)`."""
        assert self._columns is not None
        if sum(part.width for part in self._columns) < self.size:
            out.zero_()
        for part in self._columns:
            part.write(out[..., part.start : part.stop], block, begin, end)

    def _check_fits(self, name: str, rows: int, columns: int) -> None:
        check_fits(
            name,
            (rows, columns),
            self._vector.dtype,
            self._vector.device,
            "use products with it, pull() and push(), or fewer residuals at a time",
        )

    def pull(self, u: Tensor) -> Tensor:
        """`J'u`, from shape `(N,)` to `(n,)`."""
        self._check("pull", u, self.rows)
        if self._kept is not None:
            return self._kept.T @ u
        if self._columns is not None:
            return _pulled(self._columns, u, self.size)
        self._linearization.check()
        return self._products.pull(u[None])[0]

    def push(self, v: Tensor) -> Tensor:
        """`J v`, from shape `(n,)` to `(N,)`."""
        self._check("push", v, self.size)
        if self._kept is not None:
            return self._kept @ v
        if self._columns is None:
            self._linearization.check()
            self._linearization.check_transposable()
            return self._products.push(v[None])[0].contiguous()
        result = v.new_zeros(self.rows)
        for part in self._columns:
            part.add_push(v[part.start : part.stop], result)
        return result

    def _check(self, name: str, u: Tensor, size: int) -> None:
        if u.shape != (size,):
            raise ValueError(f"{name} takes a vector of shape ({size},), got {tuple(u.shape)}")

    def normal_matrix(self) -> Tensor:
        """`J'J`, shape `(n, n)`, symmetric to the last bit.

        Raises:
            TooLarge: It does not fit into memory.
        """
        self._check_fits("J'J", self.size, self.size)
        result = self._vector_zeros(self.size, self.size)
        if self._kept is not None or self._columns is None or self.rows * self.size <= _KEPT:
            J = self.dense()
            if self.size <= 512:
                return mirror_(J.T @ J)
            add_gram(result, J.T)
            return mirror_(result)
        for part in self._parts():
            add_gram(result, part.T)
        return mirror_(result)

    def _parts(self) -> Iterator[Tensor]:
        """Some rows of `J` after the other, `(k, n)`, in any order."""
        if self._columns is None or self._kept is not None:
            yield self.dense()
            return
        for i, rows in enumerate(self._rows):
            step = max(1, _PART // (self.size * rows.channels))
            for begin in range(0, rows.samples, step):
                end = min(begin + step, rows.samples)
                shape = (end - begin, rows.channels, self.size)
                part = torch.empty(shape, dtype=self._vector.dtype, device=self._vector.device)
                self._write(part, i, begin, end)
                yield part.flatten(0, 1)

    def diagonal(self) -> Tensor:
        """The diagonal of `J'J`, shape `(n,)`."""
        if self._columns is None or self._kept is not None:
            return self.dense().square().sum(0)
        result = self._vector_zeros(self.size)
        for part in self._columns:
            for piece in part.pieces(max(1, _PART // self.rows)):
                result[piece.start : piece.stop] = piece.squares()
        return result

    def kernel(self, weights: Tensor | None = None) -> Tensor:
        """`J diag(weights) J'`, shape `(N, N)`; without forming `J` where that is cheaper.

        Args:
            weights: Shape `(n,)`, of any sign; ones by default.

        Raises:
            TooLarge: It does not fit into memory.
        """
        if weights is not None:
            self._check("kernel", weights, self.size)
        self._check_fits("JJ'", self.rows, self.rows)
        if self._columns is not None:
            return kernel(self._columns, self._rows, weights, self.residuals)
        J = self.dense()
        result = self._vector_zeros(self.rows, self.rows)
        add_gram(result, J, None if weights is None else J * weights)
        return mirror_(result)

    def change_to(self, evaluation: Evaluation) -> Tensor:
        """The change of the residuals to another point, as far as the outputs change: `(N,)`.

        The root of the curvature is that of this point: `Q'(z - z0)`.

        Args:
            evaluation: One with curvature, of the same loss at the other point.

        Raises:
            ValueError: It has no graph, or outputs of other shapes.
        """
        if evaluation.linearization is None:
            raise ValueError("the other evaluation has no graph: make it with curvature as well")
        there = OutputSpace(evaluation.linearization.graph).values
        here = self._residuals.space.values
        if [z.shape for z in there] != [z.shape for z in here]:
            raise ValueError(
                "the outputs at the other point have other shapes: "
                f"{[tuple(z.shape) for z in there]} and {[tuple(z.shape) for z in here]}"
            )
        changes = [(z - z0)[None] for z, z0 in zip(there, here, strict=True)]
        return self._products.collected(changes, 1)[0].contiguous()

    def _vector_zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self._vector.dtype, device=self._vector.device)


def _pulled(columns: Sequence[Columns], u: Tensor, size: int) -> Tensor:
    result = u.new_zeros(size)
    for part in columns:
        result[part.start : part.stop] = part.pull(u)
    return result


def _rows_of(residuals: Residuals) -> list[Rows]:
    """The rows of all blocks, by samples where their channels have an order."""
    found: list[Rows] = []
    start = 0
    for block in residuals.blocks:
        found.append(Rows(start, block.samples, block.channels, block.scale is None))
        start = found[-1].stop
    return found


def _narrowest(residuals: Residuals) -> torch.dtype:
    dtypes = {z.dtype for z in residuals.space.values}
    return torch.float32 if torch.float32 in dtypes else torch.float64
