"""Runs of an optimizer on a function, and the results made of them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._optim.flat import Descent, FlatOptimizer, Iterate
from torch_secondorder._optim.info import StepInfo, StepStatus
from torch_secondorder.minimization._bounds import Bound
from torch_secondorder.minimization._gradients import Counts, Function
from torch_secondorder.minimization._methods import Method, Settings
from torch_secondorder.minimization.result import OptimizeResult, ending

#: Gets the point and the value after an iteration.
Report: TypeAlias = Callable[[Any, float], None]

# The accuracy of gradients, as a power of the machine epsilon.
_POWERS = {"2-point": 1 / 2, "3-point": 2 / 3}
# The smallest default tolerances. Gradients are resolved to a few hundred times their accuracy,
# changes to a few times the machine epsilon.
_LEAST_GTOL, _GTOL, _LARGEST_GTOL = 1e-7, 700.0, 1e-2
_LEAST_FTOL, _FTOL = 1e-9, 4.0


class Problem:
    """A minimization: the function, a copy of the start that moves, and the results made of it.

    Args:
        leaves: The leaves of `x0`.
        structure: The structure of `x0`; None for one tensor.
        function: The function, with a value that autograd can differentiate.
        counts: Calls of the user's functions, where it counts them itself.
        jac: Where the gradient comes from.
        limits: The bounds of each leaf; None for none.

    Attributes:
        params: The copy, leaves of autograd.
        function: See above.
    """

    def __init__(
        self,
        leaves: Sequence[Tensor],
        structure: Any,
        function: Function,
        counts: Counts,
        jac: Any,
        limits: Sequence[tuple[Bound, Bound]] | None,
    ) -> None:
        self.params = [
            leaf.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            for leaf in leaves
        ]
        self.function = function
        self.limits = limits
        self._structure = structure
        self._counts = counts
        self._counts_itself = jac is not None
        #: The largest machine epsilon of the leaves.
        self.eps = max(torch.finfo(leaf.dtype).eps for leaf in leaves)
        #: The default of `gtol`, and of `ftol`.
        self.gtol = self.default_gtol(jac)
        self.ftol = max(_LEAST_FTOL, _FTOL * self.eps)
        #: Evaluations of the function for one gradient.
        self.cost = 1
        if isinstance(jac, str):
            size = sum(leaf.numel() * (1 + leaf.is_complex()) for leaf in leaves)
            self.cost += size * (1 + (jac == "3-point"))

    def default_gtol(self, jac: Any) -> float:
        """The default of `gtol` for gradients that come from `jac`."""
        accuracy = self.eps ** _POWERS.get(jac, 1.0) if isinstance(jac, str) else self.eps
        return min(max(_LEAST_GTOL, _GTOL * accuracy), _LARGEST_GTOL)

    def tree(self, leaves: Sequence[Any] | None = None) -> Any:
        """A tree like `x0`, by default of the parameters."""
        leaves = self.params if leaves is None else leaves
        structure = self._structure
        return leaves[0] if structure is None else pytree.tree_unflatten(list(leaves), structure)

    def leaves(self, tree: Any) -> list[Tensor]:
        """The leaves of a tree like `x0`."""
        return [tree] if self._structure is None else pytree.tree_leaves(tree)

    def groups(self) -> list[Any]:
        """The parameters, in groups with their bounds if there are any."""
        if self.limits is None:
            return [p for p in self.params if p.numel()]
        pairs = zip(self.params, self.limits, strict=True)
        return [
            {"params": [p], "bounds": None if bounds == (None, None) else bounds}
            for p, bounds in pairs
            if p.numel()
        ]

    def result(
        self,
        status: StepStatus,
        leaves: Sequence[Tensor],
        value: float,
        gradients: Sequence[Tensor | None],
        done: tuple[int, int, int],
        info: StepInfo | None,
    ) -> OptimizeResult:
        """The result of the whole.

        Args:
            status: The way it ended.
            leaves: The point.
            value: The function there.
            gradients: The gradient there; None for zeros.
            done: Iterations, evaluations and second derivatives.
            info: The report of the optimizer.
        """
        counts, (nit, evaluations, products) = self._counts, done
        jac = [
            torch.zeros_like(p) if g is None else g.detach()
            for p, g in zip(self.params, gradients, strict=True)
        ]
        return OptimizeResult(
            x=self.tree(leaves),
            fun=value,
            jac=self.tree(jac),
            **ending(status),
            nit=nit,
            nfev=counts.functions if self._counts_itself else evaluations,
            njev=counts.gradients if self._counts_itself else evaluations,
            nhev=products,
            info=info,
        )

    def nothing_to_move(self, fun: Callable[..., Any], jac: Any) -> OptimizeResult:
        """The result where all tensors are empty."""
        found = fun(self.tree([p.detach() for p in self.params]))
        value = float(found[0] if jac is True else found)
        info = StepInfo(StepStatus.NOTHING_TO_TRAIN, value, value, None, evaluations=1)
        self._counts.functions, none = 1, [None] * len(self.params)
        leaves = [p.detach() for p in self.params]
        return self.result(info.status, leaves, value, none, (0, 1, 0), info)


def takes_result(callback: Callable[..., Any]) -> bool:
    """True for a callback whose only argument is called `intermediate_result`."""
    try:
        names = list(inspect.signature(callback).parameters)
    except (TypeError, ValueError):  # of some built-in functions there is none
        names = []
    return names == ["intermediate_result"]


def report_to(callback: Callable[..., Any]) -> Report:
    """A function of `x` and the value that calls a callback in the way that its signature asks."""
    if takes_result(callback):
        return lambda x, fun: callback(intermediate_result=OptimizeResult(x=x, fun=fun))
    return lambda x, _: callback(x)


# Optimizers of which one step makes all iterations.


class _Course:
    """Follows the only step of a `FlatOptimizer`: default tolerances, the callback, the end."""

    def __init__(
        self,
        problem: Problem,
        optimizer: FlatOptimizer,
        settings: Settings,
        callback: Callable[..., Any] | None,
    ) -> None:
        self._problem, self._optimizer, self._settings = problem, optimizer, settings
        self._report = None if callback is None else report_to(callback)
        self.descent: Descent | None = None

    def observe(self, descent: Descent, iterate: Iterate) -> Iterate:
        """See `FlatOptimizer._observe`."""
        self.descent, settings = descent, self._settings
        if settings.tolerance_grad is None:
            largest = self._optimizer._largest_gradient  # so far, which is that of the start
            descent.tolerance_grad = self._problem.gtol * min(1.0, largest)
        if self._report is None:
            return iterate
        report = self._report

        def reported(descent: Descent) -> StepStatus | None:
            before = descent.count
            status = iterate(descent)
            if descent.count > before:
                try:
                    with torch.enable_grad():
                        report(self._point(descent), descent.point.loss)
                except StopIteration:
                    return StepStatus.STOPPED
            return status

        return reported

    def _point(self, descent: Descent) -> Any:
        objective = descent.objective
        pieces = iter(objective.vector.split(objective.position.clone()))
        params = self._problem.params
        return self._problem.tree([next(pieces) if p.numel() else p.detach() for p in params])

    def gradients(self) -> list[Tensor | None] | None:
        """The gradient where the step ended; None if it was not kept."""
        descent = self.descent
        if descent is None or descent.point.grad is None:
            return None
        pieces = iter(descent.objective.vector.split(descent.point.grad))
        return [next(pieces) if p.numel() else None for p in self._problem.params]


def descend(
    problem: Problem,
    method: Method,
    settings: Settings,
    callback: Callable[..., Any] | None,
    compile: bool | Mapping[str, Any],
) -> OptimizeResult:
    """Minimizes by one step of an optimizer."""
    most = settings.max_eval or sys.maxsize
    change = settings.tolerance_change
    numbers = {
        "max_iter": settings.max_iter,
        "max_eval": max(most // problem.cost, 1),
        "tolerance_grad": settings.tolerance_grad,
        "tolerance_change": problem.ftol if change is None else change,
    }
    optimizer = method.make(problem.groups(), numbers, settings.arguments)
    assert isinstance(optimizer, FlatOptimizer)
    optimizer.param_groups[0].update(numbers)
    course = _Course(problem, optimizer, settings, callback)
    optimizer._observe = course.observe
    optimizer.step(FunctionalObjective(problem.function, problem.tree(), compile=compile))
    info = optimizer.info
    assert info is not None and info.loss_after is not None
    gradients, evaluations = course.gradients(), info.evaluations
    if gradients is None:  # it takes the memory of a vector, and some optimizers make it anew
        evaluations += 1
        with torch.enable_grad():
            value = problem.function(problem.tree())
            gradients = list(torch.autograd.grad(value, problem.params, allow_unused=True))
    details = info.as_dict()
    products = details.get("hessians", details.get("products", 0))
    leaves = [p.detach() for p in problem.params]
    done = (info.iterations, evaluations, products)
    return problem.result(info.status, leaves, info.loss_after, gradients, done, info)


# Optimizers that make one update in each step.


class _Updates:
    """Steps of an optimizer that makes one update in each, and what they have met.

    Args:
        problem: The minimization.
        optimizer: The optimizer of its parameters.

    Attributes:
        evaluations: So far.
        products: Products with the Hessian, likewise.
    """

    def __init__(self, problem: Problem, optimizer: Any) -> None:
        self._problem, self._optimizer = problem, optimizer
        self.evaluations = self.products = 0

    def evaluate(self, *, step: bool) -> tuple[float, float]:
        """The value and the largest entry of the gradient at the parameters, which a step moves."""
        if step:
            value = self._optimizer.step(self._closure).item()
            self.products += self._optimizer.info.as_dict().get("products", 0)
        else:
            with torch.enable_grad():
                value = self._closure().item()
        gradients = [p.grad for p in self._problem.params if p.numel()]
        return value, max(g.abs().max().item() for g in gradients if g is not None)

    def _closure(self) -> Tensor:
        self.evaluations += 1
        self._optimizer.zero_grad()
        value = self._problem.function(self._problem.tree()).reshape(())
        value.backward()
        return value


def update_repeatedly(
    problem: Problem, method: Method, settings: Settings, callback: Callable[..., Any] | None
) -> OptimizeResult:
    """Minimizes by steps of an optimizer, one for each iteration."""
    optimizer = method.make(problem.groups(), settings.arguments)
    updates = _Updates(problem, optimizer)
    report = None if callback is None else report_to(callback)
    gtol, most = settings.tolerance_grad, settings.max_eval or sys.maxsize
    assert settings.max_iter is not None
    status, nit = None, 0
    while True:
        before = [p.detach().clone() for p in problem.params]
        if nit >= settings.max_iter:
            status = StepStatus.MAX_ITERATIONS
        elif nit and updates.evaluations * problem.cost >= most:
            status = StepStatus.MAX_EVALUATIONS
        # A step evaluates the point where it begins; the last one moves nothing.
        value, norm = updates.evaluate(step=status is None)
        if gtol is None:
            gtol = problem.gtol * min(1.0, norm)
        if not (isfinite(value) and isfinite(norm)):
            status = StepStatus.NONFINITE_TRIALS if nit else StepStatus.NONFINITE_START
        elif norm <= gtol:
            status = StepStatus.CONVERGED_GRADIENT
        if report is not None and nit:
            try:
                # A copy, for this is the result if it is the last one.
                report(problem.tree([x.clone() for x in before]), value)
            except StopIteration:
                status = StepStatus.STOPPED
        if status is not None:
            break
        nit += 1
    gradients = [p.grad for p in problem.params]
    counts = (nit, updates.evaluations, updates.products)
    return problem.result(status, before, value, gradients, counts, optimizer.info)
