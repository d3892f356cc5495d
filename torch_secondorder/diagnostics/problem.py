"""Losses to diagnose: a model on batches, a closure, or a pure function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from math import isfinite
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from torch_secondorder._closure.validation import check_is_closure
from torch_secondorder._foundation.checks import check_choice
from torch_secondorder._objective.base import Evaluation, Objective
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import GaussNewton, Hessian, LinearOperator
from torch_secondorder.dataset import DatasetClosure
from torch_secondorder.dataset._loader import as_pair, length
from torch_secondorder.dataset._objective import objective_of
from torch_secondorder.dataset._operator import BatchSum, curvature_at

__all__ = ["Curvature", "Problem", "Source", "as_problem", "from_closure", "from_model"]

Curvature: TypeAlias = Literal["hessian", "ggn"]

_OPERATORS: dict[str, Callable[[Evaluation], LinearOperator]] = {
    "hessian": Hessian,
    "ggn": GaussNewton,
}


class Problem:
    """A loss at the current values of its parameters; made by `from_model` and `from_closure`.

    You can diagnose it any number of times, also after the parameters have changed.

    Args:
        make: Makes the objective, given the parameters' vector.
        params: The parameters, or their vector.
        names: Names of the parameters; by default their numbers.
        modules: Modules whose modes and gradients are restored.
        curvature: `"hessian"`, or `"ggn"` for the Gauss-Newton matrix, which is positive
            semidefinite if the loss is convex in the outputs.
        retain: Keeps the graph while products are computed. If False, the loss is evaluated again
            for every product (every eight, if they are computed together).

    Attributes:
        vector: The parameters' vector.
        names: The parameters' names.

    Raises:
        ValueError: `curvature` is unknown, or there is no parameter.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> problem = from_closure(lambda: x.square().sum(), [x])
    >>> problem.size, problem.names
    (2, ['0'])
    """

    def __init__(
        self,
        make: Callable[[ParameterVector], Objective],
        params: ParameterVector | Iterable[Tensor],
        names: Sequence[str] | None = None,
        modules: Sequence[nn.Module] = (),
        curvature: Curvature = "hessian",
        retain: bool = True,
    ) -> None:
        name: str = curvature
        if name == "gauss_newton":
            warnings.warn(
                "curvature='gauss_newton' is called 'ggn' now, as in NewtonCG; the old name will "
                "be gone in the next release",
                DeprecationWarning,
                stacklevel=3,
            )
            name = "ggn"
        check_choice("curvature", name, _OPERATORS)
        self.vector = params if isinstance(params, ParameterVector) else ParameterVector(params)
        count = len(self.vector.params)
        self.names = [str(i) for i in range(count)] if names is None else list(names)
        self.modules = list(modules)
        self.retain = retain
        self._make = make
        self._operator = _OPERATORS[name]

    @property
    def size(self) -> int:
        """`n`, the number of parameters, counted as real numbers."""
        return self.vector.size

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector in tensors shaped like the parameters, by their names.

        Args:
            vector: Shape `(n,)`: an eigenvector or standard errors, for instance.

        Raises:
            ValueError: The vector has another shape.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of shape ({self.size},), got {vector.shape}")
        pieces = self.vector.pieces(vector.to(self.vector.device, self.vector.dtype))
        return dict(zip(self.names, pieces, strict=True))

    def evaluate(self, stack: ExitStack) -> tuple[Evaluation, LinearOperator]:
        """Loss, gradient and curvature at the current parameters.

        Args:
            stack: Restores the buffers of modules at its end, also after an error.

        Raises:
            RuntimeError: The loss is not finite, there is no gradient, or no second derivative.
        """
        objective = stack.enter_context(self._make(self.vector))
        objective.abandon()
        evaluation = objective.evaluate(curvature=True)
        loss = evaluation.loss.item()
        if not isfinite(loss):
            raise RuntimeError(f"the loss is {loss} here, and has no curvature")
        operator = curvature_at(objective, evaluation, lambda e, _: self._operator(e))
        if not (self.retain or isinstance(operator, BatchSum)):
            operator = _Reevaluated(objective, self._operator, operator)
        return evaluation, operator


class _Reevaluated(LinearOperator):
    """A curvature that evaluates the loss again for every product, and keeps no graph."""

    def __init__(
        self,
        objective: Objective,
        kind: Callable[[Evaluation], LinearOperator],
        first: LinearOperator,
    ) -> None:
        self._objective, self._kind = objective, kind
        self.size, self.dtype, self.device = first.size, first.dtype, first.device

    def matvec(self, v: Tensor) -> Tensor:
        return self._kind(self._objective.evaluate(curvature=True)).matvec(v)

    def matmat(self, V: Tensor) -> Tensor:
        return self._kind(self._objective.evaluate(curvature=True)).matmat(V)


#: Arguments that diagnostics take.
Source: TypeAlias = Problem | FunctionalObjective | LinearOperator


def from_model(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Any,
    params: Iterable[Tensor] | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    curvature: Curvature = "hessian",
    retain: bool = True,
) -> Problem:
    """The loss of a model on one or several batches.

    The model keeps its mode: call `model.eval()` first to switch off dropout and to use the running
    statistics of norm layers.

    Args:
        model: The model.
        loss_fn: Takes the model's output and the targets, returns a scalar.
        batches: One pair `(inputs, targets)`, or an iterable of such pairs (a `DataLoader`), which
            is iterated over once and kept. Inputs are a tensor, a tuple or list of positional
            arguments, or a dict of keyword arguments. Two pairs are two batches: if the inputs and
            targets of your only batch are pairs themselves, put it into a list. Tensors are moved
            to the device of the model when used.
        params: The parameters of the curvature; by default all of the model that require a
            gradient.
        reduction: The reduction of `loss_fn` over a batch. With `"mean"` the losses are averaged,
            weighted by the batch lengths; with `"sum"` they are added. Either way the result is as
            if all data were one batch.
        curvature: See `Problem`.
        retain: See `Problem`; pass False if the graphs of all batches do not fit into memory.

    Returns:
        A problem to pass to the functions of this package.

    Raises:
        TypeError: `loss_fn` is not callable, or a batch is not a pair.
        ValueError: There is no batch, no parameter, or an argument is out of range.

    >>> model = nn.Linear(2, 1)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> problem = from_model(model, nn.functional.mse_loss, (x, y))
    >>> problem.size, problem.names
    (3, ['weight', 'bias'])
    """
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
        given = [batches] if _is_pair(batches) else batches
        pairs = [as_pair(batch, "from_closure") for batch in given]
    closure = DatasetClosure(
        model,
        loss_fn,
        pairs,
        reduction=reduction,
        count=lambda pair: length(pair) or 1,
        keep_graphs=len(pairs) if retain else 0,
        progress=False,
    )
    if not pairs:
        raise ValueError("there is no batch to compute a loss on: the batches are empty")
    named: list[tuple[str, Tensor]] = [
        (name, p) for name, p in model.named_parameters() if p.requires_grad
    ]
    if params is not None:
        names = {id(p): name for name, p in named}
        named = [(names.get(id(p), str(i)), p) for i, p in enumerate(params)]
    return Problem(
        # A single batch takes one evaluation for the gradient and the graph.
        partial(objective_of, closure if len(pairs) > 1 else partial(closure.loss, *pairs)),
        [p for _, p in named],
        [name for name, _ in named],
        [
            module
            for part in (model, loss_fn)
            if isinstance(part, nn.Module)
            for module in part.modules()
        ],
        curvature,
        retain,
    )


def from_closure(
    closure: Callable[[], Any],
    params: Iterable[Tensor],
    *,
    curvature: Curvature = "hessian",
    retain: bool = True,
) -> Problem:
    """The loss of a standard closure, as passed to an optimizer's `step`.

    Args:
        closure: Called without arguments, returns the loss; calling `loss.backward()` is optional.
            With a `DatasetClosure`, products need the memory of one batch. Other effects of the
            closure (on the mode of a model, or on gradients of parameters that are not in `params`)
            are not undone.
        params: The parameters of the curvature.
        curvature: See `Problem`.
        retain: See `Problem`.

    Returns:
        A problem to pass to the functions of this package.

    Raises:
        TypeError: The closure is not callable, or a parameter is not a tensor of numbers.
        ValueError: There is no parameter, or `curvature` is unknown.

    >>> w = torch.ones(2, requires_grad=True)
    >>> from_closure(lambda: (w**2).sum(), [w]).size
    2
    """
    check_is_closure(closure)
    return Problem(partial(objective_of, closure), params, curvature=curvature, retain=retain)


def as_problem(source: Any) -> Problem:
    """The problem of any source that has a loss.

    Raises:
        TypeError: The source has no loss.
    """
    if isinstance(source, Problem):
        return source
    if isinstance(source, FunctionalObjective):
        # Bound for each use, because an objective keeps the parameters' values at its creation.
        return Problem(
            lambda vector: source.bind(vector, source._regularization, None), source.vector
        )
    hint = "from_model(model, loss_fn, batches), from_closure(closure, params)"
    if isinstance(source, LinearOperator):
        raise TypeError(
            f"{type(source).__name__} is a matrix, and this needs a loss as well: pass {hint}, or "
            "a FunctionalObjective"
        )
    raise TypeError(
        f"cannot take the curvature of a {type(source).__name__}: pass {hint}, a "
        "FunctionalObjective or a LinearOperator"
    )


def _is_pair(batches: Any) -> bool:
    """True for one batch, a tuple or list of inputs and targets; False for several batches."""
    if not isinstance(batches, (tuple, list)) or len(batches) != 2:
        return False
    return not all(isinstance(batch, (tuple, list)) and len(batch) == 2 for batch in batches)
