"""Sequential quadratic programming with the curvature that a quasi-Newton method has learned.

At a point with gradient `g`, values `c` and Jacobian `J` of the constraints, the step `d` minimizes

    g'd + d'B d / 2  subject to  J d + c = 0, or <= 0 for inequalities,

where `B` is the learned Hessian of the Lagrangian. Only its inverse `H` is known, which is what the
dual problem needs (`solvers/_multiplier_quadratic.py`): with its solution `y`, as many numbers as
there are constraints, `d = -H (g + J'y)`. Nocedal and Wright 2006, "Numerical Optimization",
chapter 18.
"""

from __future__ import annotations

from math import inf, isfinite, nan, sqrt

import torch
from torch import Tensor

from torch_secondorder._objective.base import Evaluation, Objective
from torch_secondorder._optim.bounded_line import first_length
from torch_secondorder._optim.flat import Descent, Point
from torch_secondorder._optim.sequential_line import ConstrainedLine, Linearization, Step
from torch_secondorder._optim.sequential_merit import Merit
from torch_secondorder._optim.sequential_restoration import (
    Restoration,
    RestorationLine,
    first_scale,
    slope_of_violation,
    unmet_values,
)
from torch_secondorder._params.space import to_cpu
from torch_secondorder.constraints._lagrangian import violations
from torch_secondorder.constraints._program import Program
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.solvers._multiplier_quadratic import solve

# Multipliers may grow by this factor in an iteration: constraints whose linearizations contradict
# each other are violated as little as that allows.
_GROWTH = 100.0
_HUGE = 1e6
# A violation is stationary if a move as long as the parameters lessens it by no more than this.
_STATIONARY = 1e-6
_STILL = 1e-4  # a step this short, over the length of the parameters, is none
# Multipliers are refined by least squares once the Lagrangian's gradient is this many times its
# tolerance.
_NEAR = 1e4
# The tolerance of violations in float64 and in less, and in units of their rounding.
_TOLERANCE, _SHORT_TOLERANCE, _ROUNDING = 1e-9, 1e-5, 16.0
_BOUND_ROUNDS = 30
# So many equalities or more are samples of a smooth function, it seems, if the squared singular
# values of their scaled gradients are mostly below this share of the largest.
_SAMPLES, _SMALL = 8, 1e-3
# A step that ends this many times farther out than it began follows a loss without a minimum.
_FAR = 1e8


class SampledConstraints(Exception):
    """The equalities are too many for what they say, see `SequentialQuadratic`."""


class SequentialQuadratic:
    """The quadratic programs of one step of an optimizer.

    Args:
        program: The constraints, with multipliers and penalties.
        objective: The function that is minimized.

    Attributes:
        here: The constraints around the current point.
        step: The solution of the quadratic program there; None if it is not solved yet.
        estimates: The best multipliers there: those of the quadratic program, or at the end those
            of least squares.
        feasible: Whether the constraints hold there, and multipliers belong to active ones.
        violated: Whether constraints do not hold there.
        contradiction: Whether the violation there is stationary.
        restoration: The search for the least violation.
        turns: Whether restoration begins or ends there. What was learned is to be dropped then, and
            the program to be solved once more.
        unbounded: Whether the step has gone so far that the loss must fall without end.

    Raises:
        SampledConstraints: The program allows it, and most equalities nearly depend on the others,
            as the values of a network along a boundary do. The step that satisfies their
            linearizations is then far too long, and their multipliers are noise.
    """

    def __init__(self, program: Program, objective: Objective) -> None:
        self.program = program
        self.inequality = program.functions.inequality
        self.here = self.linearized(objective)
        if program.may_refuse and _are_samples(self.here, ~self.inequality):
            raise SampledConstraints
        self.step: Step | None = None
        self.estimates: Tensor | None = None
        self.feasible = self.violated = self.contradiction = self.unbounded = False
        self.restoration = Restoration(program)
        self.turns = False

    def linearized(self, objective: Objective) -> Linearization:
        """The constraints around the last evaluation, with one synchronization."""
        values, jacobian = self.program.linearized(objective)
        lengths = torch.linalg.vector_norm(jacobian, dim=1)
        values, lengths = to_cpu(values, lengths)
        return Linearization(values, jacobian, lengths)

    def evaluated(self, evaluation: Evaluation, objective: Objective) -> Point:
        """The start of a step; its gradient is not finite if the constraints are not.

        Args:
            evaluation: Just made.
            objective: What was evaluated.
        """
        self.here, self.step = self.linearized(objective), None
        grad = evaluation.grad
        grad_norm, loss = objective.vector.space.to_host(largest=(grad,), whole=(evaluation.loss,))
        return Point(loss, grad_norm if self.here.finite else nan, grad)

    def solve(self, descent: Descent, inverse: LinearOperator | None, *, searches: bool) -> None:
        """Solves the quadratic program at the current point, and judges the point by it.

        Afterwards `descent.point.grad_norm` is the largest entry of the Lagrangian's gradient, and
        during restoration that of half the squared violation's.

        Args:
            descent: The step.
            inverse: `H`; None if nothing was learned yet.
            searches: Whether there is a line search.
        """
        point, space, restoration = descent.point, descent.space, self.restoration
        assert point.grad is not None and self.program.multipliers is not None
        values = self.here.values
        violated = violations(values, self.inequality)
        size = torch.linalg.vector_norm(descent.objective.position).item()
        tolerance = self._tolerance(descent.objective, size)
        small = bool((violated <= tolerance).all())
        self.feasible = self.contradiction = self.turns = descent.feasible = False
        self.violated = not small
        if restoration.runs:
            if small or restoration.is_done(values):
                self._leave()
            else:
                self._restore(descent, inverse, max(1.0, size))
            return
        scale = 1.0 if inverse else _first_scale(descent, searches)
        self.step = step = self._solved(
            descent, point.grad, self.here, self.program.multipliers, inverse, scale
        )
        self.estimates = step.multipliers
        (grad_norm,) = space.to_host(largest=(self._optimality(descent, step.gradient),))
        near = descent.tolerance_grad < grad_norm <= _NEAR * descent.tolerance_grad
        if small and near:
            y = self._least_squares(descent, step.multipliers)
            gradient = self._lagrangian_gradient(point.grad, y)
            (refined,) = space.to_host(largest=(self._optimality(descent, gradient),))
            if refined <= descent.tolerance_grad:
                grad_norm, self.estimates = refined, y
        products = (self.estimates * values)[self.inequality].abs()
        complementary = not len(products) or products.max().item() <= (
            descent.tolerance_grad * max(1.0, abs(point.loss))
        )
        self.feasible = descent.feasible = small and complementary
        self.unbounded = size > _FAR * max(1.0, descent.size)
        descent.point = point._replace(grad_norm=grad_norm)
        if self.violated:
            size = max(1.0, size)
            still = step.square <= (_STILL * size) ** 2
            self.contradiction = still and self._is_stationary(descent, size)
            (of_loss,) = to_cpu(torch.linalg.vector_norm(point.grad))
            y = step.multipliers
            if not self.contradiction and restoration.is_due(self.here, y, of_loss.item(), size):
                self.restore()

    def line(self, descent: Descent) -> ConstrainedLine | None:
        """The line along the solution; None if it is no direction of descent."""
        step, program = self.step, self.program
        y, penalties = program.multipliers, program.penalties
        assert step is not None and y is not None and penalties is not None
        if not (0 < step.bend < inf and isfinite(step.square)):
            return None
        if self.restoration.runs:
            return RestorationLine(descent, self, step, Merit(self.inequality, y, y, penalties))
        # Where constraints contradict each other, no penalty may make up for growing multipliers.
        for change in (step.multipliers - y, torch.zeros_like(y)):
            merit = Merit(self.inequality, y, change, penalties)
            if merit.raise_penalties(
                self.here.values, step.along, step.slope, step.bend, step.curvatures
            ):
                return ConstrainedLine(descent, self, step, merit)
        return None

    def arrived(self) -> None:
        """Takes note of an accepted step of a quadratic program."""
        self.restoration.arrived(self.here.values)

    def restart(self) -> None:
        """Begins anew, without penalties."""
        assert self.program.penalties is not None and self.step is not None
        if self.restoration.runs:
            self.step = None
            return
        self.program.multipliers = self.step.multipliers
        self.program.penalties = torch.zeros_like(self.program.penalties)
        self.step = None

    def finish(self, descent: Descent | None) -> None:
        """Leaves the constraints of the last point in the program, with their multipliers."""
        self.program.values = self.here.values
        if self.contradiction:
            # Those that prove it: their combination of gradients is zero.
            unmet, y = unmet_values(self.here.values, self.inequality), self.program.multipliers
            assert y is not None
            self.program.multipliers = unmet * (y.abs().max() / unmet.abs().max())
        if descent is None or not descent.feasible:
            return
        if descent.point.grad_norm <= descent.tolerance_grad:
            self.program.multipliers = self.estimates

    # The quadratic program.

    def _solved(
        self,
        descent: Descent,
        grad: Tensor,
        around: Linearization,
        y: Tensor,
        inverse: LinearOperator | None,
        scale: float,
    ) -> Step:
        """Solves a quadratic program.

        Args:
            descent: The step.
            grad: The gradient of what is minimized, `(n,)`.
            around: Its constraints.
            y: Multipliers to start from.
            inverse: `H`; None for a multiple of the identity.
            scale: The multiple.
        """
        objective = descent.objective
        multiply = _Products(inverse, scale)
        rows, images = around.jacobian, multiply(around.jacobian)
        of_grad = multiply(grad[None])[0]
        values, start, m = around.values, y, len(y)
        inequality = self.inequality[:m]
        squared, of_rows, curvature = to_cpu(rows @ images.T, rows @ of_grad, grad @ of_grad)
        curvatures = squared.diagonal().clamp(min=0)
        limit = _limits(curvatures, curvature.item(), y)
        room = None if objective.box is None else objective.box.room(objective.position)
        for _ in range(_BOUND_ROUNDS):
            solution = solve(squared, values - of_rows, inequality, limit=limit, start=start)
            weights = solution.to(rows)
            direction = torch.addmv(of_grad, images.T, weights).neg_()
            if room is None:
                break
            # Bounds that the step would leave become rows of the quadratic program.
            added = _left(direction, room, rows[m:])
            if not len(added):
                break
            rows, images = torch.cat((rows, added)), torch.cat((images, multiply(added)))
            squared, of_rows = to_cpu(rows @ images.T, rows @ of_grad)
            reach = torch.where(added < 0, room[0].neg()[None], room[1][None])
            values = torch.cat((values, to_cpu(torch.where(added != 0, -reach, 0).sum(1))[0]))
            many = len(added)
            inequality = torch.cat((inequality, torch.ones(many, dtype=torch.bool)))
            limit = torch.cat((limit, torch.full((many,), inf, dtype=limit.dtype)))
            start = torch.cat((solution, torch.zeros(many, dtype=solution.dtype)))
        residual = torch.addmv(grad, rows[: len(weights)].T, weights)
        gradient = residual
        if room is not None:
            # Exactly to the bounds that hold it.
            held = rows[m : len(weights)].T @ (weights[m:] > 0).to(rows)
            direction = torch.where(held < 0, room[0], torch.where(held > 0, room[1], direction))
            direction = direction.clamp(*room)
            gradient = torch.addmv(grad, rows[:m].T, weights[:m])
        along, numbers = to_cpu(
            rows[:m] @ direction,
            torch.stack((grad @ direction, -(residual @ direction), direction @ direction)),
        )
        least = curvatures[curvatures > 0]
        curvatures = torch.where(
            curvatures > 0, curvatures, least.max() if len(least) else torch.ones_like(curvatures)
        )
        y = solution[:m]
        slope, bend, square = numbers.tolist()
        return Step(direction, y, residual, gradient, along, slope, bend, square, curvatures)

    def _lagrangian_gradient(self, grad: Tensor, y: Tensor) -> Tensor:
        rows = self.here.jacobian
        return torch.addmv(grad, rows.T, y.to(rows))

    def _optimality(self, descent: Descent, gradient: Tensor) -> Tensor:
        """The vector that is zero at a solution, from the gradient of the Lagrangian."""
        objective = descent.objective
        if objective.box is None:
            return gradient
        return objective.box.projected(objective.position, gradient)

    def _least_squares(self, descent: Descent, y: Tensor) -> Tensor:
        """The multipliers with the smallest gradient of the Lagrangian, of active constraints."""
        grad, objective = descent.point.grad, descent.objective
        assert grad is not None
        active = ~self.inequality | (y > 0)
        rows = self.here.jacobian[active.to(self.here.jacobian.device)]
        if objective.box is not None:
            # Along bounds that hold the step, the gradient need not be small.
            assert self.step is not None
            low, high = objective.box.room(objective.position)
            held = (low == 0) & (self.step.gradient > 0) | (high == 0) & (self.step.gradient < 0)
            rows, grad = torch.where(held, 0, rows), torch.where(held, 0, grad)
        squared, of_grad = to_cpu(rows @ rows.T, rows @ grad)
        refined = torch.zeros_like(y)
        refined[active] = solve(squared, -of_grad, self.inequality[active], start=y[active])
        return refined

    # Feasibility.

    def restore(self) -> None:
        """Begins a restoration, see `turns`."""
        assert self.step is not None
        self.program.multipliers = self.step.multipliers
        self.restoration.begin(self.here.values)
        self.turns = True

    def _leave(self) -> None:
        program = self.program
        assert program.multipliers is not None and program.penalties is not None
        program.multipliers = torch.zeros_like(program.multipliers)
        program.penalties = torch.zeros_like(program.penalties)
        self.restoration.end()
        self.turns = True

    def _restore(self, descent: Descent, inverse: LinearOperator | None, size: float) -> None:
        """Takes half the squared violation for the loss, without constraints."""
        here, program = self.here, self.program
        slope = slope_of_violation(here, self.inequality)
        scale = 1.0 if inverse else first_scale(here, self.inequality, slope, size)
        none = Linearization(here.values[:0], here.jacobian[:0], here.lengths[:0])
        assert program.multipliers is not None
        step = self._solved(descent, slope, none, program.multipliers[:0], inverse, scale)
        (step.along,) = to_cpu(here.jacobian @ step.direction)
        self.step = step
        (grad_norm,) = descent.space.to_host(largest=(self._optimality(descent, slope),))
        descent.point = descent.point._replace(grad_norm=grad_norm)
        self.contradiction = self._is_stationary(descent, size)

    def _tolerance(self, objective: Objective, size: float) -> Tensor:
        """The violation of each constraint that counts as none, `(m,)`."""
        tolerance = self.program.tolerance
        if tolerance is None:
            tolerance = _TOLERANCE if objective.precision < 1e-12 else _SHORT_TOLERANCE
        rounding = _ROUNDING * objective.precision * size * self.here.lengths
        return rounding.clamp(min=tolerance)

    def _is_stationary(self, descent: Descent, size: float) -> bool:
        """True if no small move lessens the squared violation, to first order."""
        unmet = unmet_values(self.here.values, self.inequality)
        most = max(_STATIONARY, _ROUNDING * descent.objective.precision)
        return self._slope_of(unmet, descent) * size <= most * (unmet @ unmet).item()

    def _slope_of(self, weights: Tensor, descent: Descent) -> float:
        """The length of `J'w`, within the bounds."""
        rows = self.here.jacobian
        slope = rows.T @ weights.to(rows)
        box, objective = descent.objective.box, descent.objective
        if box is not None:
            low, high = box.room(objective.position)
            slope = torch.where((low == 0) & (slope > 0) | (high == 0) & (slope < 0), 0, slope)
        length: float = torch.linalg.vector_norm(slope).item()
        return length


class _Products:
    """Products of rows with the inverse Hessian.

    Args:
        inverse: `H`; None for a multiple of the identity.
        scale: The multiple.
    """

    def __init__(self, inverse: LinearOperator | None, scale: float) -> None:
        self._inverse, self._scale = inverse, scale

    def __call__(self, rows: Tensor) -> Tensor:
        """`R H` for rows `R`, `(k, n)`."""
        if not len(rows):
            return rows
        if self._inverse is None:
            return rows * self._scale
        return self._inverse.matmat(rows.T).T


def _first_scale(descent: Descent, searches: bool) -> float:
    """The scale of the first step, as for a loss without constraints."""
    grad = descent.point.grad
    assert grad is not None
    (largest,) = descent.space.to_host(largest=(grad,))
    if not largest:
        return 1.0
    unit = grad / largest
    square, total = descent.space.to_host(sums=(unit @ unit, unit.abs().sum()))
    length = first_length(descent, largest, square, total, searches=searches)
    scale: float = length / largest
    return scale


def _are_samples(around: Linearization, which: Tensor) -> bool:
    """True if most of some constraints nearly depend on the others."""
    if which.count_nonzero() < _SAMPLES or not around.finite:
        return False
    rows, lengths = around.jacobian[which.to(around.jacobian.device)], around.lengths[which]
    (squared,) = to_cpu(rows @ rows.T)
    unit = torch.where(lengths > 0, 1 / lengths, 0)
    sizes = torch.linalg.eigvalsh(squared * unit * unit[:, None])
    return bool((sizes < _SMALL * sizes[-1]).double().mean() > 0.5)


def _limits(curvatures: Tensor, of_grad: float, y: Tensor) -> Tensor:
    """The largest multipliers, `(m,)`."""
    if not len(y):
        return y
    most = curvatures.max().item()
    natural = max(1.0, sqrt(max(of_grad, 0.0) / most) if most > 0 else 0.0)
    limit = _GROWTH * min(max(natural, y.abs().max().item()), _HUGE * natural)
    return torch.full_like(y, limit)


def _left(direction: Tensor, room: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """Rows for the bounds that a step leaves: signed rows of the identity.

    Args:
        direction: The step.
        room: The smallest and largest step within the bounds.
        rows: The bounds that have rows already.
    """
    low, high = room
    known = rows.sum(0) if len(rows) else torch.zeros_like(direction)
    below = ((direction < low) & (known >= 0)).nonzero().squeeze(1)
    above = ((direction > high) & (known <= 0)).nonzero().squeeze(1)
    added = direction.new_zeros(len(below) + len(above), len(direction))
    place = torch.arange(len(added), device=added.device)
    added[place, torch.cat((below, above))] = 1.0
    added[: len(below)] *= -1.0
    return added
