"""The Jacobian of the residuals of a loss by the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import MissingSecondDerivative, Overwritten
from torch_secondorder._foundation.checks import check_choice
from torch_secondorder._objective.base import Evaluation
from torch_secondorder.curvature._graph_jacobian import Rejected, graph_columns
from torch_secondorder.curvature._jacobian_kernel import add_gram, mirror_
from torch_secondorder.curvature._local_jacobian import (
    JacobianMethod,
    LocalJacobian,
    check_size,
    rows_of,
)
from torch_secondorder.curvature._output_space import OutputSpace
from torch_secondorder.curvature._residuals import Residuals

__all__ = ["JacobianMethod", "ResidualJacobian"]

# How far the gradient of the residuals may be off, beside a bound of its norm.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 3e-4}
# Residuals that differ by less say nothing of samples that are mixed up.
_SPREAD = 1e-3
# Graphs of so many structures are remembered.
_REMEMBERED = 64
# Elements of the columns of all ranks that are sent at a time.
_PART = 2**24


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
        self._ranks, self._params = linearization.ranks, linearization.vector.params
        self._device = linearization.vector.device
        self.size = linearization.size
        self._kept: Tensor | None = None
        try:
            self._attach(method)
        except Overwritten:
            if not linearization.renew():
                raise
            self._attach(method)

    def _attach(self, method: JacobianMethod | None) -> None:
        ranks = self._ranks
        self._residuals = Residuals(self._linearization.graph)
        counts = ranks.gather([row.stop for row in rows_of(self._residuals)[-1:]], self._device)
        self._counts = [count for (count,) in counts]
        self.rows = sum(self._counts)
        if not self.rows:
            raise ValueError("there is no residual: the outputs of the loss are empty")
        self.finite = not ranks.any(not self._residuals.finite, self._device)
        self.reason = ""
        found: LocalJacobian | None = None
        if method in (None, "graph"):
            found, self.reason = self._by_graph()
            if method == "graph" and found is None:
                raise ValueError(
                    f'method="graph" does not work for this loss: {self.reason}. Leave the method '
                    "out, for rows or columns to be made by vectorized passes"
                )
            method = "graph"
        if found is None:
            if method is None or method == "graph":
                method = "columns" if self._columns_are_cheaper() else "rows"
            rows = rows_of(self._residuals)
            found = LocalJacobian(self._linearization, self._residuals, method, rows)
        assert method is not None
        self.method: JacobianMethod = method
        self._local = found
        self.residuals = self._gathered(found.ordered())

    def _by_graph(self) -> tuple[LocalJacobian | None, str]:
        """The Jacobian from the graph, or the reason why it does not come from there."""
        if not self.finite:
            return None, "residuals that are not finite"
        plans = self._linearization.registry.jacobians
        if len(plans) > _REMEMBERED:
            plans.clear()
        space, blocks = self._residuals.space, self._residuals.blocks
        vector, device = self._linearization.vector, self._device
        for again in (False, True):
            found, reason = None, "an operation on another rank"
            try:
                columns, rows = graph_columns(
                    space.tensors, blocks, space.params, vector, plans, again=again
                )
                found = LocalJacobian(self._linearization, self._residuals, "graph", rows, columns)
            except Rejected as rejected:
                reason = str(rejected)
            if self._ranks.any(found is None, device):
                return None, reason
            assert found is not None
            if not self._ranks.any(not self._agrees(found), device):
                return found, ""
        return None, "samples that depend on one another"

    def _agrees(self, found: LocalJacobian) -> bool:
        """True if the Jacobian, times the residuals, is the gradient."""
        r, gradient = found.ordered(), self._evaluation.ambient
        gradient = self._evaluation.grad if gradient is None else gradient
        rest = self.rest_gradient
        if rest is not None:
            gradient = gradient - rest
        if self._ranks.count > 1:
            # The error is that of the mean over the ranks, in place of this rank's.
            own = found.pull(r)
            gradient = gradient - self._ranks.average(own) + own
        error, bound = found.error(r, gradient)
        alike = torch.stack([_alike(r[:, None]), *(_alike(rows.of(r)) for rows in found.rows)])
        read = torch.stack([error, bound, alike.any().to(error)]).tolist()
        tolerance = _TOLERANCE[_narrowest([r, *self._residuals.space.values, *self._params])]
        if read[0] <= tolerance * read[1] and not read[2]:
            return True
        # Weights that are all the same show nothing: sums of rows are right whatever they are. And
        # the closure may have changed its gradient, for instance clipped it.
        u = torch.arange(found.count, dtype=r.dtype, device=r.device).mul_(2.4).sin_()
        error, bound = found.error(u, found.by_backward(u))
        return bool(error <= tolerance * bound)

    def _columns_are_cheaper(self) -> bool:
        # A double-vjp takes two passes.
        cheaper = 2 * self.size < self.rows
        if cheaper:
            try:
                self._linearization.check_transposable()
            except MissingSecondDerivative:
                cheaper = False
        return not self._ranks.any(not cheaper, self._device)

    # What is not in the residuals.

    @cached_property
    def rest_gradient(self) -> Tensor | None:
        """The gradient of what is not in the residuals, `(n,)`, weight decay included.

        None for zero.
        """
        parts = self._residuals.rest_gradient()
        decay = self._linearization.decay_gradient()
        if not self._ranks.any(parts is not None, self._device):
            return decay
        vector = self._linearization.vector
        rest = vector.gather(parts if parts is not None else [None] * len(vector.params))
        rest = vector.scaled(self._ranks.average_(rest))
        return rest if decay is None else rest + decay

    @cached_property
    def _rest_parts(self) -> Sequence[Tensor | None] | None:
        return self._residuals.rest_diagonal()

    @cached_property
    def rest_is_diagonal(self) -> bool:
        """True if `rest_diagonal` is all the curvature of the terms that bypass the outputs."""
        more = self._residuals.bypassed and self._rest_parts is None
        return not self._ranks.any(more, self._device)

    @cached_property
    def rest_diagonal(self) -> Tensor | float:
        """The diagonal of the curvature of what is not in the residuals: `(n,)`, or zero.

        Weight decay, and terms of the loss that bypass the outputs such as a penalty on weights.
        """
        parts = self._rest_parts
        result: Tensor | float = 0.0
        vector = self._linearization.vector
        if self._ranks.any(parts is not None, self._device):
            rest = vector.gather(parts if parts is not None else [None] * len(vector.params))
            result = vector.scaled(vector.scaled(self._ranks.average_(rest)))
        slots = self._linearization.slots()
        if any(slot.decay for slot in slots):
            result = result + vector.expand([slot.decay for slot in slots])
        return result

    # The matrix and products with it.

    def dense(self) -> Tensor:
        """`J`, shape `(N, n)`; it may be kept and returned again, so do not write into it.

        Raises:
            TooLarge: It does not fit into memory.
        """
        if self._ranks.count == 1:
            return self._local.dense()
        if self._kept is None:
            self._check_fits("the Jacobian", self.rows, self.size)
            self._kept = self._gathered(self._local.dense())
        return self._kept

    def pull(self, u: Tensor) -> Tensor:
        """`J'u`, from shape `(N,)` to `(n,)`."""
        self._check("pull", u, self.rows)
        if self._ranks.count == 1:
            return self._local.pull(u)
        own = self._local.pull(u[self._own])
        return self._ranks.average_(own).mul_(self._ranks.count**0.5)

    def push(self, v: Tensor) -> Tensor:
        """`J v`, from shape `(n,)` to `(N,)`."""
        self._check("push", v, self.size)
        return self._gathered(self._local.push(v))

    def normal_matrix(self) -> Tensor:
        """`J'J`, shape `(n, n)`, symmetric to the last bit.

        Raises:
            TooLarge: It does not fit into memory.
        """
        self._check_fits("J'J", self.size, self.size)
        return self._ranks.average_(self._local.normal_matrix())

    def diagonal(self) -> Tensor:
        """The diagonal of `J'J`, shape `(n,)`."""
        return self._ranks.average_(self._local.diagonal())

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
        if self._ranks.count == 1:
            return self._local.kernel(weights)
        like = self.residuals
        result = like.new_zeros(self.rows, self.rows)
        for begin, part in self._all_columns():
            scale = None if weights is None else weights[begin : begin + part.shape[1]]
            add_gram(result, part, None if scale is None else part * scale)
        return mirror_(result)

    def _all_columns(self) -> Iterator[tuple[int, Tensor]]:
        """Some columns after the other, with the rows of all ranks."""
        step = max(1, _PART // self.rows)
        for begin in range(0, self.size, step):
            yield begin, self._gathered(self._local.between(begin, min(begin + step, self.size)))

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
        changes = [z - z0 for z, z0 in zip(there, here, strict=True)]
        return self._gathered(self._local.collected(changes))

    # Ranks.

    @property
    def _own(self) -> slice:
        """The rows of this rank."""
        begin = sum(self._counts[: self._ranks.own])
        return slice(begin, begin + self._counts[self._ranks.own])

    def _gathered(self, own: Tensor) -> Tensor:
        """The rows of all ranks, each divided by the square root of the number of ranks."""
        if self._ranks.count == 1:
            return own
        result = own.new_zeros(self.rows, *own.shape[1:])
        result[self._own] = own
        return self._ranks.average_(result).mul_(self._ranks.count**0.5)

    def _check(self, name: str, u: Tensor, size: int) -> None:
        if u.shape != (size,):
            raise ValueError(f"{name} takes a vector of shape ({size},), got {tuple(u.shape)}")

    def _check_fits(self, name: str, rows: int, columns: int) -> None:
        vector = self._linearization.vector
        check_size(name, rows, columns, vector.dtype, vector.device)


def _alike(r: Tensor) -> Tensor:
    """True if residuals `(samples, channels)` have the same size for all samples in a channel."""
    sizes = r.abs()
    largest = sizes.amax(0)
    alike = largest - sizes.amin(0) <= _SPREAD * largest
    # A channel of zeros may be one without a Jacobian, as of masked outputs.
    return (alike & ((largest > 0) | (largest.sum() == 0))).any() & (len(r) > 1)


def _narrowest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of least precision."""
    return max((t.dtype for t in tensors), key=lambda dtype: torch.finfo(dtype).eps)
