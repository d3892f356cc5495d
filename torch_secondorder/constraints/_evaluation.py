"""Loss, constraints and their derivatives at the parameters as they stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._autograd.backward_hook import patched_backward
from torch_secondorder._closure.validation import check_is_closure, scalar
from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._foundation.subclasses import plain
from torch_secondorder._objective.base import Objective, Regularization
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.constraints._functions import ConstraintFunctions
from torch_secondorder.constraints._rows import jacobian_rows
from torch_secondorder.dataset import DatasetClosure
from torch_secondorder.dataset._objective import objective_of
from torch_secondorder.diagnostics import Problem
from torch_secondorder.diagnostics._point import keep_model, keep_random_state


@dataclass(frozen=True, slots=True)
class FirstOrder:
    """Values and first derivatives; the tensors are float64, on the CPU where that is needed.

    Attributes:
        loss: The loss that is minimized.
        position: The parameters, `(n,)`.
        grad: Its gradient, `(n,)`.
        values: The constraints, `(m,)`.
        jacobian: `(m, n)`.
        precision: The machine epsilon that they were computed with.
    """

    loss: float
    position: Tensor
    grad: Tensor
    values: Tensor
    jacobian: Tensor
    precision: float


class ConstrainedLoss:
    """A loss and the constraints beside it, in any number of evaluations.

    The constraints are evaluated inside the closure, where it first calls `backward()`: they may
    depend on what the closure has computed.

    Args:
        source: A closure, a `DatasetClosure` or a `FunctionalObjective`.
        params: The parameters, or their vector.
        functions: The constraints; None for none.
        regularization: What the optimizer adds to the loss.

    Attributes:
        vector: The parameters' vector.

    Raises:
        TypeError: The source is not callable.
    """

    def __init__(
        self,
        source: Any,
        vector: ParameterVector,
        functions: ConstraintFunctions | None,
        regularization: Regularization,
    ) -> None:
        if not isinstance(source, (FunctionalObjective, DatasetClosure)):
            check_is_closure(source)
        self.vector = vector
        self._source, self._functions = source, functions
        self._regularization = regularization
        self._sign = -1.0 if regularization.maximize else 1.0
        self._places: list[int | None] = []
        if isinstance(source, FunctionalObjective):
            where = {id(leaf): i for i, leaf in reversed(list(enumerate(source._leaves)))}
            self._places = [where.get(id(p)) for p in vector.params]
        # Of the evaluation that runs: the multipliers of the term that joins the loss, or None
        # where values and Jacobian are recorded.
        self._multipliers: Tensor | None = None
        self._recorded: tuple[Tensor, Tensor] | None = None

    def first_order(self) -> FirstOrder:
        """Evaluates loss and constraints with first derivatives; everything is restored.

        Raises:
            RuntimeError: A number is not finite, or there is no gradient.
        """
        self._multipliers = self._recorded = None
        with ExitStack() as stack:
            keep_random_state(stack, self.vector.devices)
            keep_model(stack, self._problem())
            objective = stack.enter_context(self._make(self.vector))
            objective.abandon()
            evaluation = objective.evaluate()
            loss, grad = evaluation.loss.item(), evaluation.grad
            # Without constraints there is no row.
            recorded = self._recorded or (grad.new_zeros(0), grad.new_zeros(0, len(grad)))
            values, rows = map(objective.ranks.average, recorded)
            found = FirstOrder(
                loss,
                wide(objective.position),
                wide(grad),
                wide(values),
                wide(rows),
                objective.precision,
            )
        self._check(found)
        return found

    def lagrangian(self, multipliers: Tensor) -> Problem:
        """The Lagrangian as a problem to diagnose.

        Args:
            multipliers: `(m,)`.
        """
        self._multipliers = multipliers
        return self._problem()

    def _problem(self) -> Problem:
        modules = self._source.model.modules() if isinstance(self._source, DatasetClosure) else ()
        return Problem(self._make, self.vector, modules=list(modules))

    def _make(self, vector: ParameterVector) -> Objective:
        source = self._source
        if isinstance(source, FunctionalObjective):
            amended = source.with_function(partial(self._of_function, source.function))
            return amended.bind(vector, self._regularization, None)
        if isinstance(source, DatasetClosure):
            source = source.amended(self._of_batch)
        else:
            source = partial(self._of_closure, source)
        return objective_of(source, vector, self._regularization)

    def _check(self, found: FirstOrder) -> None:
        if not isfinite(found.loss):
            raise RuntimeError(f"the loss is {found.loss} here, and nothing can be said about it")
        if not bool(found.grad.isfinite().all()):
            raise RuntimeError("the gradient of the loss is not finite here")
        for what, finite in (
            ("value", found.values.isfinite()),
            ("gradient", found.jacobian.isfinite().all(1)),
        ):
            if not bool(finite.all()):
                assert self._functions is not None
                name = self._functions.name(int(finite.int().argmin()))
                raise RuntimeError(f"the {what} of the constraint {name} is not finite here")

    # Evaluations with constraints.

    def _of_closure(self, closure: Callable[[], Any]) -> Tensor:
        taken: list[Tensor | None] = []

        def backward(loss: Tensor, gradient: Tensor | None = None, *args: Any, **more: Any) -> None:
            if not taken:  # the constraints count once in an evaluation
                taken.append(self._take((), self.vector.params))
                if taken[0] is not None:
                    loss, gradient = plain(loss), plain(gradient)
                    if gradient is not None:
                        loss, gradient = (loss * gradient).sum(), None
                    loss = loss + taken[0]
            loss.backward(gradient, *args, **more)

        with patched_backward(backward):
            loss = scalar(closure())
        if taken:
            return loss if taken[0] is None else loss + taken[0].detach()
        return self._sum(loss, self._take((), self.vector.params))  # the caller differentiates it

    def _of_function(self, function: Callable[[Any], Tensor], tree: Any) -> Tensor:
        loss = scalar(function(tree))
        leaves = pytree.tree_leaves(tree)
        params = [None if place is None else leaves[place] for place in self._places]
        return self._sum(loss, self._take((tree,), params))

    def _of_batch(
        self, compute: Callable[[], Tensor], weight: float, share: float, last: bool
    ) -> Tensor:
        return self._sum(compute(), self._take((), self.vector.params, share), share / weight)

    def _take(
        self, tree: tuple[Any, ...], params: Sequence[Tensor | None], share: float = 1.0
    ) -> Tensor | None:
        """The term that joins the loss; None if the constraints were recorded instead."""
        if self._functions is None:
            return None
        used = [p for p in params if p is not None]
        with torch.enable_grad():
            values = self._functions(*tree, params=used)
        if self._multipliers is not None:
            return self._sign * (self._multipliers.to(values) @ values)
        found = iter(jacobian_rows(values, used))
        parts = [None if p is None else next(found) for p in params]
        rows = self.vector.gather(parts, (len(values),)) * share
        values = values.detach() * share
        if self._recorded is not None:
            values, rows = self._recorded[0] + values, self._recorded[1] + rows
        self._recorded = values, rows
        return None

    def _sum(self, loss: Tensor, term: Tensor | None, factor: float = 1.0) -> Tensor:
        return loss if term is None else loss + factor * term


def wide(tensor: Tensor) -> Tensor:
    """A detached tensor in float64; on the CPU if its device has none."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
