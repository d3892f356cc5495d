"""Base class of optimizers that see all parameters as one flat vector, and the course of a step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from torch_secondorder._closure.validation import STANDARD_CLOSURE
from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder._foundation.types import Closure, ParamsT
from torch_secondorder._objective.base import Evaluation, Objective, Regularization
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._optim.base import SecondOrderOptimizer, StepClosure, makes_state_only
from torch_secondorder._optim.info import StepInfo, StepStatus
from torch_secondorder._optim.manifolds import manifold_of
from torch_secondorder._optim.present import Scaling
from torch_secondorder._optim.state import Number, Pieces, Vector, declare
from torch_secondorder._params.bounds import BoxMaker, check_bounds, no_bounds
from torch_secondorder._params.vector import SHORT, ParameterVector
from torch_secondorder.constraints._program import Program
from torch_secondorder.dataset import DatasetClosure
from torch_secondorder.dataset._objective import objective_of
from torch_secondorder.globalization import SearchStatus, Trial


@dataclass(frozen=True, slots=True)
class DescentInfo(StepInfo):
    """Report of one step of a flat-vector optimizer; `LBFGS` and the others add to it.

    Attributes:
        step_length: The last accepted step, as a multiple of its direction.
        search_status: How the last line search ended; None without one.
        nonfinite_trials: Evaluations with a non-finite loss or gradient, stepped back from.
    """

    step_length: float = 0.0
    search_status: SearchStatus | None = None
    nonfinite_trials: int = 0


@dataclass(frozen=True, slots=True)
class BoundedInfo(DescentInfo):
    """Report of one step of an optimizer that takes bounds.

    Attributes:
        projected_grad_norm: Largest absolute entry of the projected gradient, which is zero at a
            minimum within bounds; None without bounds. It is what `tolerance_grad` is about then.
        active_bounds: The number of entries at a bound at the end; None without bounds.
        start_projected: Whether the step began outside of the bounds, and went to the nearest point
            within them first; None without bounds.
    """

    projected_grad_norm: float | None = None
    active_bounds: int | None = None
    start_projected: bool | None = None


class Point(NamedTuple):
    """An evaluated point, with its numbers on the host.

    Attributes:
        loss: The loss.
        grad_norm: The largest absolute entry of the gradient, with bounds of the projected one.
        grad: The gradient. A trial may come without it, for it takes the memory of a vector.
        evaluation: The evaluation, where its graph is needed.
        length: The Euclidean norm of the gradient, for optimizers that need it.
        ambient: That of a trial on a manifold, where `grad` is by the step: the gradient by the
            parameters.
        size: The Euclidean norm of the parameters, at the start of a step; None elsewhere.
    """

    loss: float
    grad_norm: float
    grad: Tensor | None
    evaluation: Evaluation | None = None
    length: float = 0.0
    ambient: Tensor | None = None
    size: float | None = None


class Descent:
    """One call of `step()`: its settings, its current point, and the record of its iterations.

    Args:
        objective: The function that is minimized, at the start.
        point: The start, where loss and gradient are finite.
        lr: The learning rate.
        max_iter: Most iterations.
        tolerance_grad: The step ends once no entry of the gradient is larger.
        tolerance_change: The step ends once an iteration changes both the loss and the parameters
            by no more than this, relative to their size.

    Attributes:
        point: The current point.
        max_eval: Most evaluations, as of the second iteration.
        patience: Iterations without a new lowest loss or gradient after which the step ends: what
            is left then is rounding error.
        count: Iterations so far.
        step_length: The last accepted step, as a multiple of its direction.
        search_status: The outcome of the last line search.
        nonfinite_trials: Trials that were not finite.
        feasible: Whether constraints hold; where they do not, a step has not converged.
    """

    def __init__(
        self,
        objective: Objective,
        point: Point,
        lr: float,
        max_iter: int,
        tolerance_grad: float,
        tolerance_change: float,
    ) -> None:
        self.objective = objective
        self.space = objective.vector.space
        self.point = point
        self.lr = lr
        self.max_iter = max_iter
        self.max_eval: float = inf
        self.tolerance_grad = tolerance_grad
        self.tolerance_change = tolerance_change
        self.patience: float = 10
        self.count = 0
        self.step_length = 0.0
        self.search_status: SearchStatus | None = None
        self.nonfinite_trials = 0
        self.feasible = True
        size = point.size
        if size is None:
            (size,) = self.space.to_host(norms=(torch.linalg.vector_norm(objective.position),))
        #: The Euclidean norm of the parameters at the start.
        self.size = size
        # The larger of the relative changes of loss and parameters in the last iteration.
        self._change = inf
        self._stalled = 0  # iterations since the lowest loss or gradient
        self._lowest_loss, self._lowest_gradient = point.loss, point.grad_norm

    def run(self, iterate: Callable[[Descent], StepStatus | None]) -> StepStatus:
        """Iterates until something ends the step.

        Args:
            iterate: One iteration from `point` on; returns the reason to end the step, or None.
        """
        status = None
        while status is None:
            status = self._ending() or iterate(self)
        return status

    def _ending(self) -> StepStatus | None:
        """The reason to end the step at the current point, if there is one."""
        if self.feasible and self.point.grad_norm <= self.tolerance_grad:
            return StepStatus.CONVERGED_GRADIENT
        if not self.lr:
            return StepStatus.ZERO_LEARNING_RATE
        if self.feasible and self._change <= self.tolerance_change:
            return StepStatus.CONVERGED_CHANGE
        if self._stalled >= self.patience:
            return StepStatus.STALLED
        if self.count >= self.max_iter:
            return StepStatus.MAX_ITERATIONS
        evaluations = self.objective.evaluations - self.objective.examinations
        if self.count and evaluations >= self.max_eval:
            return StepStatus.MAX_EVALUATIONS
        return None

    def arrive(self, point: Point, t: float, moved: float, *, held: bool = False) -> None:
        """Records an iteration, after the objective has moved.

        Args:
            point: The new current point.
            t: The step length, as a multiple of the direction.
            moved: The distance that the parameters have moved.
            held: Whether a damping or a trust radius has kept the step short. A small change says
                nothing then.
        """
        if point.ambient is not None:
            point = self._landed(point)
        loss, grad_norm, before = point.loss, point.grad_norm, self.point.loss
        if held:
            self._change = inf
        else:
            of_loss = abs(before - loss) / abs(loss) if loss else inf if before else 0.0
            self._change = max(of_loss, moved / self.size if self.size else inf)
        improved = loss < self._lowest_loss or grad_norm < self._lowest_gradient
        self._stalled = 0 if improved or held else self._stalled + 1
        self._lowest_loss = min(loss, self._lowest_loss)
        self._lowest_gradient = min(grad_norm, self._lowest_gradient)
        self.point = point
        self.step_length = t
        self.count += 1

    def _landed(self, point: Point) -> Point:
        """A trial on a manifold as the base of the next steps."""
        objective, evaluation = self.objective, point.evaluation
        assert objective.manifold is not None and point.ambient is not None
        grad = objective.manifold.tangent(objective.position, point.ambient)
        if evaluation is not None:
            evaluation.put_on(objective.manifold, objective.position, None)
        norm = torch.linalg.vector_norm(grad)
        grad_norm, length = self.space.to_host(largest=(grad,), norms=(norm,))
        length = self.space.true_norm(grad, grad_norm, length)
        return Point(point.loss, grad_norm, grad, evaluation, length)


#: One iteration of a step; returns the reason to end the step, or None.
Iterate: TypeAlias = Callable[[Descent], "StepStatus | None"]


@dataclass(slots=True)
class Candidate:
    """A trial point on a `Line`, with the pair that a quasi-Newton method learns by going there.

    The pair is the step `t d` and the difference `y` of the gradients.

    Attributes:
        point: The point; None once the search cannot accept it any more.
        y: `y`, if it is short enough to be kept.
        y_y: `y'y`.
        y_d: `y'd`.
    """

    point: Point | None
    y: Tensor | None
    y_y: float
    y_d: float


class Line:
    """The objective along a direction `d` from the current point, for a line search.

    A call evaluates a trial, with one synchronization; its payload is a `Candidate`. Only the
    newest trial and the one with the lowest loss keep their gradients: a search accepts one of
    these.

    Args:
        descent: The step; the line begins at its current point.
        direction: `d`.
        slope: `g'd` with the gradient `g` at the current point.
        square: `d'd`.

    Attributes:
        start: The current point as a trial.
        bottomless: Whether a trial had a loss of minus infinity.
    """

    #: Powell's constant: the smallest share of the expected curvature that a corrected pair has.
    least_curvature = 0.2

    def __init__(self, descent: Descent, direction: Tensor, slope: float, square: float) -> None:
        point = descent.point
        assert point.grad is not None
        self.direction, self.slope, self.square = direction, slope, square
        manifold, position = descent.objective.manifold, descent.objective.position
        longest = inf if manifold is None else manifold.longest(position, direction)
        self.start = Trial(0.0, point.loss, slope, longest=longest)
        self.bottomless = False
        self._descent, self._before = descent, point.grad
        self._short = descent.objective.vector.is_short
        self._lowest_loss = point.loss
        self._lowest: Candidate | None = None
        self._newest: Candidate | None = None
        # `B d` and `d'B d` with the curvature `B` that the direction comes from, if they are not
        # `-g` and `-g'd`.
        self.product: Tensor | None = None
        self.bend = -slope

    @property
    def precision(self) -> float:
        """The rounding error of the losses, relative to them."""
        return self._descent.objective.noise

    def __call__(self, t: float) -> Trial:
        """Evaluates the objective at `t d` from the current point."""
        if self._newest is not None and self._newest is not self._lowest:
            self._newest.point = None
        self._newest = None
        direction, before = self.direction, self._before
        evaluation = self._descent.objective.trial(direction, t)
        grad = evaluation.grad
        if self._short:
            y = grad - before
            y_y, y_d = y.dot(y), y.dot(direction)
        else:
            y, (y_y, y_d) = None, _products_of_difference(grad, before, direction)
        slope, y_y_, y_d_, grad_norm, loss = self._descent.space.to_host(
            sums=(grad.dot(direction), y_y, y_d),
            largest=(self._optimality(grad, t),),
            whole=(evaluation.loss,),
        )
        if loss == -inf:
            self.bottomless = True
        point = Point(loss, grad_norm, grad, ambient=evaluation.ambient)
        candidate = self._newest = Candidate(point, y, y_y_, y_d_)
        if not isfinite(grad_norm):
            slope = inf
        elif loss < self._lowest_loss and isfinite(loss) and isfinite(slope):
            if self._lowest is not None:
                self._lowest.point = None
            self._lowest_loss, self._lowest = loss, candidate
        return Trial(t, loss, slope, candidate)

    def _optimality(self, grad: Tensor, t: float) -> Tensor:
        """The vector that is zero at a minimum: the gradient, or within bounds its projection."""
        return grad

    def accept(self, trial: Trial) -> Candidate:
        """Moves the objective to a trial, which becomes the current point.

        Args:
            trial: A trial of this line.
        """
        t: float = trial.t
        candidate: Candidate = trial.payload
        if candidate.point is None:  # a search of the user's own may accept any trial
            candidate = self(t).payload
        assert candidate.point is not None
        self._descent.objective.accept(self.direction, t)
        self._descent.arrive(candidate.point, t, t * sqrt(self.square))
        return candidate


def starting_point(objective: Objective, evaluation: Evaluation) -> Point:
    """The point where a step begins, with one synchronization."""
    measured = grad = evaluation.grad
    if objective.box is not None:
        measured = objective.box.projected(objective.position, grad)
    grad_norm, size, loss = objective.vector.space.to_host(
        largest=(measured,),
        norms=(torch.linalg.vector_norm(objective.position),),
        whole=(evaluation.loss,),
    )
    return Point(loss, grad_norm, grad, size=size)


def _products_of_difference(a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """`y'y` and `y'd` for `y = a - b`, without a vector for `y`."""
    # Pieces that lie in cache; on a device each costs four launches.
    size = SHORT if a.device.type == "cpu" else max(SHORT, -(-len(a) // 16))
    room, y_y, y_d = a.new_empty(size), a.new_zeros(()), a.new_zeros(())
    for one, other, along in zip(a.split(size), b.split(size), d.split(size), strict=True):
        y = torch.sub(one, other, out=room[: len(one)])
        y_y, y_d = y_y + y @ y, y_d + y @ along
    return y_y, y_d


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

    - `__init__`: checks its own arguments and passes the hyperparameters on. `lr`, `max_iter`,
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
    #: Whether groups may have bounds; the report is a `BoundedInfo` then.
    _takes_bounds = False
    _box_maker: BoxMaker | None = None
    #: Whether a step takes constraints into account that `Constrained` gives it.
    _takes_constraints = False
    _program: Program | None = None
    #: Whether a step stays on manifolds; `Projected` gives them, by the `id` of the parameters.
    _takes_manifolds = False
    _charts: Mapping[int, Any] | None = None
    #: Gets each step and its iteration before the first one; returns the iteration to run.
    _observe: Callable[[Descent, Iterate], Iterate] | None = None

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if "max_iter" in defaults:
            check_integer("max_iter", defaults["max_iter"], whole_floats=True)
        if "tolerance_change" in defaults:
            check_number("tolerance_change", defaults["tolerance_change"], low=0.0)
        check_integer("max_eval", defaults.get("max_eval"), optional=True, whole_floats=True)
        check_number("tolerance_grad", defaults.get("tolerance_grad"), low=0.0, optional=True)
        super().__init__(params, defaults)

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
        return evaluation, starting_point(objective, evaluation)

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
                f"closure:\n{STANDARD_CLOSURE}\nIn a loop that passes none, use SOAP, "
                "Shampoo, KFAC, AdaHessian or Sophia, which need none"
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
        outside = objective.box is not None and objective.project()
        evaluation, point = self._evaluate(objective)
        loss, grad_norm = point.loss, point.grad_norm
        # A copy: a closure may use one tensor for all its losses.
        returned = evaluation.closure_loss.clone()
        del evaluation
        if not (isfinite(loss) and isfinite(grad_norm) and isfinite(point.length)):
            objective.abandon()
            if outside:
                objective.return_to_entry()
            further = self._finish(objective, None)
            if objective.box is not None:
                further["start_projected"] = outside
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
        iterate = self._iterate if self._observe is None else self._observe(descent, self._iterate)
        status = descent.run(iterate)
        further = self._finish(objective, descent)
        grad_norm = descent.point.grad_norm
        if objective.box is not None:
            grad_norm, active = self._measured(objective, descent.point)
            further |= {
                "projected_grad_norm": descent.point.grad_norm,
                "active_bounds": active,
                "start_projected": outside,
            }
        self._info = self._info_type(
            status,
            loss,
            descent.point.loss,
            grad_norm,
            descent.count,
            objective.evaluations,
            step_length=descent.step_length,
            search_status=descent.search_status,
            nonfinite_trials=descent.nonfinite_trials,
            **further,
        )
        return returned

    def _measured(self, objective: Objective, point: Point) -> tuple[float, int]:
        """The largest entry of the gradient, and the number of entries at a bound."""
        assert objective.box is not None and point.grad is not None
        grad_norm, active = objective.vector.space.to_host(
            largest=(point.grad,), whole=(objective.box.active(objective.position),)
        )
        return grad_norm, int(active)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `SecondOrderOptimizer.add_param_group`; bounds are checked as well."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group.get("bounds") is not None:
            try:
                self._check_takes_bounds()
                check_bounds(group)
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise

    def _check_takes_bounds(self) -> None:
        name = type(self).__name__
        if not self._takes_bounds:
            raise no_bounds(name)
        if self._sharded:
            raise ValueError(
                f"{name} takes no bounds for sharded parameters: leave the bounds or fully_shard "
                "out (DistributedDataParallel is fine)"
            )

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
        maximize, bounded = set(), False
        for group in self.param_groups:
            if group["params"]:
                maximize.add(bool(group["maximize"]))
            self._check_group(group)
            bounded = bounded or group.get("bounds") is not None
        if len(maximize) > 1:
            values = [group["maximize"] for group in self.param_groups if group["params"]]
            raise ValueError(
                "maximize must be the same in all parameter groups: a line search needs one loss; "
                f"got {values}"
            )
        decays = tuple(map(float, decays))
        vector = self._current_vector(params, list(map(float, rates)))
        box = None
        if bounded:
            self._check_takes_bounds()
            self._box_maker = self._box_maker or BoxMaker()
            box = self._box_maker(self.param_groups, vector)
        decay = decays[0] if len(set(decays)) == 1 else decays
        regularization, master = Regularization(maximize.pop(), decay), self._master
        if isinstance(closure, FunctionalObjective):
            if curvature_closure is not None:
                raise TypeError(
                    "a curvature_closure goes with a closure, not with a FunctionalObjective"
                )
            objective: Objective = closure.bind(vector, regularization, master)
        else:
            make = ClosureObjective.for_step
            if isinstance(closure, DatasetClosure) or isinstance(curvature_closure, DatasetClosure):
                make = objective_of
            objective = make(
                closure, vector, regularization, master, self._registry, curvature_closure
            )
        objective.box = box
        if self._charts:
            objective.manifold = manifold_of(vector, self._charts, self._program)
        return objective

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
