"""Base class of optimizers that see all parameters as one flat vector."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from math import isfinite, sqrt
from typing import Any, overload

import torch
from torch import Tensor

from torch_secondorder._closure.validation import STANDARD_CLOSURE
from torch_secondorder._foundation.types import Closure
from torch_secondorder._objective.base import Objective, Regularization
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.evaluation import Evaluation
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._optim.base import SecondOrderOptimizer, StepClosure, makes_state_only
from torch_secondorder._optim.descent import Descent, DescentInfo, Point
from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.present import Scaling
from torch_secondorder._optim.state import Number, Pieces, Vector, declare
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.dataset import DatasetClosure
from torch_secondorder.dataset._objective import objective_of

__all__ = ["FlatOptimizer"]


class _Master(Vector):
    """The position in work precision, where parameters are held in less."""

    of_vector = False  # it is dropped with its vector only, not when an optimizer begins anew

    def bind(self, name: str) -> None:
        """See `Field.bind`."""
        super().bind(name)
        self.small_names = ()

    def cut(self, optimizer: FlatOptimizer) -> Pieces:
        """See `ModelField.cut`; the parameters stand for a position that is missing."""
        vector = ParameterVector(optimizer._trainable)
        if not vector.needs_master:
            return {}, {}
        return {}, {self.name: (vector.read(self.get(optimizer)), None)}


class FlatOptimizer(SecondOrderOptimizer):
    """Base class of optimizers that see all parameters as one flat vector.

    One call of `step()` evaluates the closure, calls `_iterate` until something ends the step, and
    reports. The base class runs that loop, maps the groups to the vector (with their own `lr` and
    `weight_decay`; all other hyperparameters are read from the first group), handles a start that
    is not finite, decides when the step has converged, and carries the state through checkpoints,
    DDP and FSDP.

    A subclass implements:

    - `__init__`: checks its arguments and passes the hyperparameters on. `lr`, `max_iter`,
      `tolerance_grad`, `tolerance_change`, `weight_decay` and `maximize` have a meaning here; a
      hyperparameter that is left out has the default of `LBFGS`.
    - `_iterate`: one iteration. `descent.point` is the current point. A line search along a
      direction goes by way of `Line`, whose `accept` moves the parameters.
    - `_state_fields`: what it keeps from step to step, see `torch_secondorder._optim.state`.

    It may override `_forget`, `_evaluate`, `_begin` and `_finish`, and name the class of its report
    in `_info_type`.

    Args:
        params: See `SecondOrderOptimizer`.
        defaults: Hyperparameters.
    """

    _step_supports_amp_scaling = True  # else a `GradScaler` would not let itself be noticed
    _state_fields = declare(master=_Master(), largest_gradient=Number(0.0))
    _master: Tensor | None
    _largest_gradient: float  # at the starts of all steps
    _info_type: type[DescentInfo] = DescentInfo

    # For subclasses.

    @abstractmethod
    def _iterate(self, descent: Descent) -> StepStatus | None:
        """One iteration from `descent.point` on.

        Returns:
            The reason to end the step; None to go on. The loop itself ends the step where it has
            converged or the budget is spent.
        """

    def _forget(self, reason: str) -> None:
        """Drops state that belongs to a parameter vector: all declared vectors and matrices.

        Args:
            reason: A clause for the report.
        """
        for field in self._model_fields:
            if field.of_vector:
                field.set(self, field.initial)

    def _evaluate(self, objective: Objective) -> tuple[Evaluation, Point]:
        """Evaluates the objective at the start of a step, with one synchronization."""
        evaluation = objective.evaluate()
        grad = evaluation.grad
        grad_norm, loss = objective.vector.space.to_host(largest=(grad,), whole=(evaluation.loss,))
        return evaluation, Point(loss, grad_norm, grad)

    def _begin(self, descent: Descent) -> None:
        """Prepares the first iteration of a step."""

    def _finish(self, objective: Objective, descent: Descent | None) -> dict[str, Any]:
        """Ends a step.

        Args:
            objective: The function that was minimized.
            descent: The step; None if its start was not finite and nothing was done.

        Returns:
            Fields of the report besides those of `DescentInfo`.
        """
        if descent is None:
            self._forget("the loss or gradient at the start of a step was not finite")
        return {}

    # Steps.

    @overload  # type: ignore[override]
    def step(self, closure: StepClosure) -> Tensor: ...

    @overload
    def step(self, closure: StepClosure | None = None) -> Tensor | None: ...

    def step(self, closure: Any = None) -> Tensor | None:
        """Performs one step.

        Args:
            closure: The standard closure (zero the gradients, compute the loss, call `backward()`,
                return the loss), or a `FunctionalObjective`.

        Returns:
            The closure's loss at the start of the step, detached.

        Raises:
            RuntimeError: There is no closure, or no gradient reached the parameters.
            TypeError: The closure returned something else than a loss.
            ValueError: The closure's loss is not a scalar.
        """
        return self._run(closure)

    def _run(
        self,
        closure: Closure | FunctionalObjective | None,
        curvature_closure: Closure | None = None,
    ) -> Tensor | None:
        """See `step`.

        Args:
            closure: See `step`.
            curvature_closure: Another closure to take products with the curvature from.
        """
        if hasattr(self, "found_inf"):  # a GradScaler calls
            Scaling(self).refuse_closure()
        params, rates, decays = self._trained()
        if not params:
            result: Tensor | None = self._pass(closure)
            return result
        if closure is None:
            self._prepare_state()
            return None
        objective = self._objective(params, rates, decays, closure, curvature_closure)
        if self._named is None or self.state.get(params[0]) is not self._named:
            self._show_names(params)  # before there is a history, which would be copied
        # The objective notes a surrounding autocast for the closure; our sums are not to be cast.
        with torch.no_grad(), objective, ExitStack() as stack:
            for device_type in objective.autocast:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            loss = self._step(objective, max(map(float, rates)))
        if objective.vector.needs_master:
            self._master = objective.position
        return loss

    def _prepare_state(self) -> None:
        """Makes the state that `torch.distributed.checkpoint` asks for."""
        if not makes_state_only(self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.step() evaluates the loss more than once and needs a "
                f"closure:\n{STANDARD_CLOSURE}\nIn a loop that passes none, use AdaHessian or "
                "Sophia, which need none."
            )
        self._for_distributed = True
        self._show_names()

    def _step(self, objective: Objective, lr: float) -> Tensor:
        """One step on an objective; sets `self.info`, returns the closure's loss at the start.

        Args:
            objective: The function that is minimized.
            lr: The largest learning rate of the groups. The others are relative to it, by the
                scale of the vector.
        """
        evaluation, point = self._evaluate(objective)
        loss, grad_norm = point.loss, point.grad_norm
        # A copy: a closure may use one tensor for all its losses.
        returned = evaluation.closure_loss.clone()
        del evaluation
        if not (isfinite(loss) and isfinite(grad_norm) and isfinite(point.length)):
            objective.abandon()
            further = self._finish(objective, None)
            status, evaluations = StepStatus.NONFINITE_START, objective.evaluations
            self._info = self._info_type(status, loss, loss, grad_norm, 0, evaluations, **further)
            return returned
        self._largest_gradient = max(self._largest_gradient, grad_norm)
        group = self.param_groups[0]
        tolerance_grad = group.get("tolerance_grad")
        if tolerance_grad is None:
            tolerance_grad = 1e-7 * min(1.0, self._largest_gradient)
        tolerance_change = group.get("tolerance_change", 1e-9)
        descent = Descent(
            objective, point, lr, group.get("max_iter", 20), tolerance_grad, tolerance_change
        )
        del point  # a gradient, and perhaps a graph, that the iterations need not hold for long
        self._begin(descent)
        status = descent.run(self._iterate)
        further = self._finish(objective, descent)
        self._info = self._info_type(
            status,
            loss,
            descent.point.loss,
            descent.point.grad_norm,
            descent.count,
            objective.evaluations,
            step_length=descent.step_length,
            search_status=descent.search_status,
            nonfinite_trials=descent.nonfinite_trials,
            **further,
        )
        return returned

    def _trained(self) -> tuple[list[Tensor], list[Any], list[Any]]:
        """The trainable parameters, with the `lr` and `weight_decay` of each."""
        params, rates, decays = [], [], []
        for group in self.param_groups:
            lr, weight_decay = group["lr"], group["weight_decay"]
            for p in group["params"]:
                if p.requires_grad and p.numel():
                    params.append(p)
                    rates.append(lr)
                    decays.append(weight_decay)
        return params, rates, decays

    def _objective(
        self,
        params: Sequence[Tensor],
        rates: Sequence[Any],
        decays: Sequence[Any],
        closure: Closure | FunctionalObjective,
        curvature_closure: Closure | None,
    ) -> Objective:
        """The function that a step minimizes."""
        maximize = set()
        for group in self.param_groups:
            if group["params"]:
                maximize.add(bool(group["maximize"]))
            self._check_group(group)
        if len(maximize) > 1:
            values = [group["maximize"] for group in self.param_groups if group["params"]]
            raise ValueError(
                "maximize must be the same in all parameter groups: a line search needs one loss; "
                f"got {values}"
            )
        decays = tuple(map(float, decays))
        vector = self._current_vector(params, list(map(float, rates)))
        decay = decays[0] if len(set(decays)) == 1 else decays
        regularization, master = Regularization(maximize.pop(), decay), self._master
        if isinstance(closure, FunctionalObjective):
            if curvature_closure is not None:
                raise TypeError(
                    "a curvature_closure goes with a closure, not with a FunctionalObjective"
                )
            return closure.bind(vector, regularization, master)
        make = ClosureObjective.for_step
        if isinstance(closure, DatasetClosure) or isinstance(curvature_closure, DatasetClosure):
            make = objective_of
        return make(closure, vector, regularization, master, self._registry, curvature_closure)

    def _current_vector(self, params: Sequence[Tensor], rates: Sequence[float]) -> ParameterVector:
        """The vector of the trainable parameters; what was learned about another one is dropped."""
        scale = None
        if len(set(rates)) > 1:
            # Rounded: a scheduler that multiplies all rates leaves their ratios alone but for the
            # last digits.
            scale = [sqrt(float(f"{rate / max(rates):.9e}")) for rate in rates]
        if self._vector is None or not self._vector.matches(params, scale):
            if self._vector is not None:
                self._forget("the trainable parameters or their relative learning rates changed")
                self._master = None
            self._vector = ParameterVector(params, scale)
            for field in self._model_fields:  # others may be frozen than when it was loaded
                if isinstance(field, Vector) and not field.fits(self, self._vector):
                    field.set(self, None)
        return self._vector
