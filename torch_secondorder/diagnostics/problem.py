"""A loss in one or several parts, to be looked at where its parameters stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from math import isfinite
from typing import Literal

from torch import Tensor, nn

from torch_secondorder._closure.replay import ModuleRegistry
from torch_secondorder._foundation.checks import check_choice
from torch_secondorder._objective.base import Objective
from torch_secondorder._objective.evaluation import Evaluation
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import GaussNewton, Hessian, LinearOperator
from torch_secondorder.dataset import BatchSum, curvature_at

__all__ = ["Curvature", "Problem"]

Curvature = Literal["hessian", "gauss_newton"]

_OPERATORS: dict[str, Callable[[Evaluation], LinearOperator]] = {
    "hessian": Hessian,
    "gauss_newton": GaussNewton,
}


class Problem:
    """A loss at the place where its parameters stand; made by `from_model` and `from_closure`.

    It can be looked at any number of times, also after the parameters have moved.

    Args:
        makers: Make the objective of each part, given what is known of the modules called.
        weights: The loss is the sum of the parts times these.
        params: The parameters, or their vector.
        names: What to call them.
        modules: Those whose mode is put back.
        curvature: `"hessian"`, or `"gauss_newton"` for a matrix that is positive semidefinite where
            the loss is convex in the outputs.
        retain: Whether the graphs of all parts are kept while products are taken; else each part
            is evaluated again for every product (for every eight, where they come together).

    Attributes:
        vector: The parameters' vector.
        names: The parameters' names, or their numbers.

    Raises:
        ValueError: `curvature` is unknown, or there is no part.
    """

    def __init__(
        self,
        makers: Sequence[Callable[[ParameterVector, ModuleRegistry], Objective]],
        weights: Sequence[float],
        params: ParameterVector | Iterable[Tensor],
        names: Sequence[str] | None = None,
        modules: Sequence[nn.Module] = (),
        curvature: Curvature = "hessian",
        retain: bool = True,
    ) -> None:
        check_choice("curvature", curvature, _OPERATORS)
        if not makers:
            raise ValueError("there is no batch to compute a loss on: the batches are empty")
        self.vector = params if isinstance(params, ParameterVector) else ParameterVector(params)
        count = len(self.vector.params)
        self.names = [str(i) for i in range(count)] if names is None else list(names)
        self.modules = list(modules)
        self.retain = retain
        self._makers, self._weights = list(makers), list(weights)
        self._operator = _OPERATORS[curvature]

    @property
    def size(self) -> int:
        """`n`, the number of parameters as real numbers."""
        return self.vector.size

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector as tensors shaped like the parameters, by their names.

        Args:
            vector: Shape `(n,)`: an eigenvector, say, or standard errors.

        Raises:
            ValueError: The vector has another shape.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of shape ({self.size},), got {vector.shape}")
        pieces = self.vector.pieces(vector.to(self.vector.device, self.vector.dtype))
        return dict(zip(self.names, pieces, strict=True))

    def evaluations(self, stack: ExitStack) -> Iterator[tuple[float, Evaluation, LinearOperator]]:
        """Evaluates the parts one by one: weight, loss and gradient, curvature.

        Args:
            stack: Where to leave what puts the buffers of modules back, also after an error.

        Raises:
            RuntimeError: A loss is not finite, there is no gradient, or no second derivative.
        """
        registry = ModuleRegistry()
        for maker, weight in zip(self._makers, self._weights, strict=True):
            objective = maker(self.vector, registry)
            # Left in the reverse order, so that the first one has the last word on the buffers; an
            # abandoned objective leaves them as they were before it.
            stack.enter_context(objective)
            objective.abandon()
            evaluation = objective.evaluate(curvature=True)
            loss = evaluation.loss.item()
            if not isfinite(loss):
                raise RuntimeError(f"the loss is {loss} here, and has no curvature")
            operator = curvature_at(objective, evaluation, lambda e, _: self._operator(e))
            if not self.retain and not isinstance(operator, BatchSum):
                operator = _Remade(objective, self._operator, operator)
            yield weight, evaluation, operator


class _Remade(LinearOperator):
    """A curvature whose graph is made anew for every product, and freed after it."""

    def __init__(
        self,
        objective: Objective,
        kind: Callable[[Evaluation], LinearOperator],
        first: LinearOperator,
    ) -> None:
        self._objective, self._kind = objective, kind
        self.size, self.dtype, self.device = first.size, first.dtype, first.device

    def _made(self) -> LinearOperator:
        return self._kind(self._objective.evaluate(curvature=True))

    def matvec(self, v: Tensor) -> Tensor:
        return self._made().matvec(v)

    def matmat(self, V: Tensor) -> Tensor:
        return self._made().matmat(V)
