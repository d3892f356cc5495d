"""Sequential quadratic programming with the curvature that a quasi-Newton method has learned.

At a point with gradient `g`, values `c` and Jacobian `J` of the constraints, the step `d` minimizes

    g'd + d'B d / 2  subject to  J d + c = 0, or <= 0 for inequalities,

where `B` is the learned Hessian of the Lagrangian. Only its inverse `H` is known, which is what the
dual problem needs (`solvers/_multiplier_quadratic.py`): with its solution `y`, as many numbers as
there are constraints, `d = -H (g + J'y)`. Nocedal and Wright 2006, "Numerical Optimization",
chapter 18.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt

import torch
from torch import Tensor

from torch_secondorder._objective.base import Evaluation, Objective
from torch_secondorder._optim.bounded_line import first_length
from torch_secondorder._optim.flat import Candidate, Descent, Line, Point
from torch_secondorder._optim.sequential_merit import Merit
from torch_secondorder.constraints._lagrangian import violations
from torch_secondorder.constraints._program import Program
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.globalization import Trial
from torch_secondorder.solvers._multiplier_quadratic import solve

# Multipliers may grow by this factor in an iteration: constraints whose linearizations contradict
# each other are violated as little as that allows.
_GROWTH = 100.0
# Multipliers larger than this, times their natural size, belong to constraints that contradict each
# other if nothing lessens the violation.
_HUGE = 1e6
# A violation is stationary if a move as long as the parameters lessens it by no more than this.
_STATIONARY = 1e-6
_DEPENDENT = 1e-4  # the length of a combination of gradients that counts as zero
_LESSENED = 0.5  # the share of the violations that is left of a step that lessens them
_STILL = 1e-4  # a step this short, over the length of the parameters, is none
# Multipliers are refined by least squares once the Lagrangian's gradient is this many times its
# tolerance.
_NEAR = 1e4
# The tolerance of violations in float64 and in less, and in units of their rounding.
_TOLERANCE, _SHORT_TOLERANCE, _ROUNDING = 1e-9, 1e-5, 16.0
_BOUND_ROUNDS = 30
_COARSE = 0.5
# So many equalities or more are samples of a smooth function, it seems, if the squared singular
# values of their scaled gradients are mostly below this share of the largest.
_SAMPLES, _SMALL = 8, 1e-3
# A step that ends this many times farther out than it began follows a loss without a minimum.
_FAR = 1e8


@dataclass(slots=True)
class Linearization:
    """The constraints around a point.

    Attributes:
        values: `c`, `(m,)`, float64 on the CPU.
        jacobian: `J`, `(m, n)`, in the work space.
        lengths: Of the rows of `J`, `(m,)`, float64 on the CPU; not finite if `J` is not.
    """

    values: Tensor
    jacobian: Tensor
    lengths: Tensor

    @property
    def finite(self) -> bool:
        """True if values and Jacobian are finite."""
        return bool((self.values.isfinite() & self.lengths.isfinite()).all())


@dataclass(slots=True)
class Step:
    """The solution of the quadratic program at a point.

    Attributes:
        direction: `d`, `(n,)`.
        multipliers: Of the constraints, `(m,)`, float64 on the CPU.
        residual: `-B d`, the gradient of the Lagrangian with the multipliers of bounds, `(n,)`.
        gradient: The gradient of the Lagrangian of the constraints alone, `(n,)`.
        along: `J d`, `(m,)`, float64 on the CPU.
        slope: `g'd`.
        bend: `d'B d`.
        square: `d'd`.
        curvatures: `a'H a` for the gradients `a` of the constraints, `(m,)`, all above zero.
        limited: Whether a multiplier is as large as it may be: the linearizations contradict.
    """

    direction: Tensor
    multipliers: Tensor
    residual: Tensor
    gradient: Tensor
    along: Tensor
    slope: float
    bend: float
    square: float
    curvatures: Tensor
    limited: bool


@dataclass(slots=True)
class ConstrainedCandidate(Candidate):
    """A trial with the constraints around it."""

    around: Linearization


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
        stuck: Whether constraints do not hold there, their linearizations contradict each other,
            and the step does not help.
        contradiction: Whether the violation there is stationary.
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
        self.feasible = self.stuck = self.contradiction = self.unbounded = False

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

        Afterwards `descent.point.grad_norm` is the largest entry of the Lagrangian's gradient.

        Args:
            descent: The step.
            inverse: `H`; None if nothing was learned yet.
            searches: Whether there is a line search.
        """
        self.step = step = self._solved(descent, inverse, searches)
        point, space = descent.point, descent.space
        assert point.grad is not None and self.program.multipliers is not None
        values = self.here.values
        violated = violations(values, self.inequality)
        size = torch.linalg.vector_norm(descent.objective.position).item()
        tolerance = self._tolerance(descent.objective, size)
        small = bool((violated <= tolerance).all())
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
        self.feasible = small and complementary
        self.stuck = not small and step.limited and not self._lessens(step)
        self.unbounded = size > _FAR * max(1.0, descent.size)
        self.contradiction = not small and self._is_stationary(
            descent, step, violated, tolerance, max(1.0, size)
        )
        descent.point = point._replace(grad_norm=grad_norm)
        descent.feasible = self.feasible

    def line(self, descent: Descent) -> ConstrainedLine | None:
        """The line along the solution; None if it is no direction of descent."""
        step, program = self.step, self.program
        y, penalties = program.multipliers, program.penalties
        assert step is not None and y is not None and penalties is not None
        if not (0 < step.bend < inf and isfinite(step.square)):
            return None
        # Where constraints contradict each other, no penalty may make up for growing multipliers.
        for change in (step.multipliers - y, torch.zeros_like(y)):
            merit = Merit(self.inequality, y, change, penalties)
            if merit.raise_penalties(
                self.here.values, step.along, step.slope, step.bend, step.curvatures
            ):
                return ConstrainedLine(descent, self, step, merit)
        return None

    def restart(self) -> None:
        """Begins anew, without penalties."""
        assert self.program.penalties is not None and self.step is not None
        self.program.multipliers = self.step.multipliers
        self.program.penalties = torch.zeros_like(self.program.penalties)
        self.step = None

    def finish(self, descent: Descent | None) -> None:
        """Leaves the constraints of the last point in the program, with their multipliers."""
        self.program.values = self.here.values
        if descent is None or not descent.feasible:
            return
        if descent.point.grad_norm <= descent.tolerance_grad:
            self.program.multipliers = self.estimates

    # The quadratic program.

    def _solved(self, descent: Descent, inverse: LinearOperator | None, searches: bool) -> Step:
        objective, point = descent.objective, descent.point
        grad, y = point.grad, self.program.multipliers
        assert grad is not None and y is not None
        multiply = _Products(inverse, 1.0 if inverse else _first_scale(descent, searches))
        rows, images = self.here.jacobian, multiply(self.here.jacobian)
        of_grad = multiply(grad[None])[0]
        values, inequality, start = self.here.values, self.inequality, y
        m = len(values)
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
        limited = bool((y.abs() >= (1 - 1e-6) * limit[:m]).any())
        slope, bend, square = numbers.tolist()
        found = direction, y, residual, gradient, along
        return Step(*found, slope, bend, square, curvatures, limited)

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

    def _tolerance(self, objective: Objective, size: float) -> Tensor:
        """The violation of each constraint that counts as none, `(m,)`."""
        tolerance = self.program.tolerance
        if tolerance is None:
            tolerance = _TOLERANCE if objective.precision < 1e-12 else _SHORT_TOLERANCE
        rounding = _ROUNDING * objective.precision * size * self.here.lengths
        return rounding.clamp(min=tolerance)

    def _is_stationary(
        self, descent: Descent, step: Step, violated: Tensor, tolerance: Tensor, size: float
    ) -> bool:
        """True if no small move lessens the violation, to first order."""
        values = self.here.values
        unmet = torch.where(violated > tolerance, values, 0)
        stationary = self._slope_of(unmet, descent) * size <= _STATIONARY * (unmet @ unmet).item()
        if stationary and step.square <= (_STILL * size) ** 2:
            return True
        if self._lessens(step):
            return False
        # Multipliers that have grown beyond bounds prove a contradiction (Farkas).
        y = step.multipliers
        sizes = y.abs() * self.here.lengths
        if self._slope_of(y, descent) > _DEPENDENT * sizes.sum().item():
            return False
        assert descent.point.grad is not None
        (of_loss,) = to_cpu(torch.linalg.vector_norm(descent.point.grad))
        if not sizes.max().item() > _HUGE * max(of_loss.item(), 1e-300):
            return False
        gained = -(y @ step.along).item()
        return gained <= 1e-3 * (y @ values).item() and bool((y * unmet).sum() > 0)

    def _lessens(self, step: Step) -> bool:
        """True if the step lessens the sum of the violations much, to first order."""
        after = violations(self.here.values + step.along, self.inequality).sum().item()
        return after < _LESSENED * violations(self.here.values, self.inequality).sum().item()

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


class ConstrainedLine(Line):
    """The merit function along the solution of a quadratic program, up to its end.

    The losses and slopes of its trials are those of the merit function; the pair that is learned is
    that of the Lagrangian with the new multipliers.

    Args:
        descent: See `Line`.
        owner: The quadratic programs.
        step: The solution.
        merit: The terms of the merit function along the line.
    """

    least_curvature = 0.3

    def __init__(
        self, descent: Descent, owner: SequentialQuadratic, step: Step, merit: Merit
    ) -> None:
        super().__init__(descent, step.direction, step.slope, step.square)
        self.product, self.bend = step.residual.neg(), step.bend
        self._before = step.gradient
        self._owner, self._step, self._merit = owner, step, merit
        values = owner.here.values
        loss = descent.point.loss + merit.terms(values, 0.0)
        self._lowest_loss = loss
        self.slope = step.slope + merit.slope(values, step.along, 0.0)
        self.start = Trial(0.0, loss, self.slope, longest=1.0)

    @property
    def precision(self) -> float:
        """The rounding error of the merit function, relative to its value at the start."""
        owner, merit, objective = self._owner, self._merit, self._descent.objective
        precision, loss = objective.vector.precision, abs(self.start.loss)
        if not loss:
            return precision
        y = self._step.multipliers
        weights = y.abs() + merit.penalties * owner.here.values.abs()
        counted = ~owner.inequality | (y > 0)
        size = torch.linalg.vector_norm(objective.position).item()
        terms = size * (weights * owner.here.lengths)[counted].sum().item()
        # A merit function that is rounding alone is as coarse as a line search takes it.
        relative: float = min(precision * (1.0 + terms / loss), _COARSE)
        return relative

    def __call__(self, t: float) -> Trial:
        """Evaluates the merit function at `t`, at most one."""
        t = min(t, 1.0)
        if self._newest is not None and self._newest is not self._lowest:
            self._newest.point = None
        self._newest = None
        objective, direction, step = self._descent.objective, self.direction, self._step
        evaluation = objective.trial(direction, t)
        grad, around = evaluation.grad, self._owner.linearized(objective)
        rows = around.jacobian
        gradient = torch.addmv(grad, rows.T, step.multipliers.to(rows))
        y = gradient - self._before
        numbers = torch.stack((grad @ direction, y @ y, y @ direction, gradient.abs().amax()))
        along, numbers, of_loss = to_cpu(rows @ direction, numbers, evaluation.loss)
        (slope, y_y, y_d, grad_norm), loss = numbers.tolist(), of_loss.item()
        if loss == -inf:
            self.bottomless = True
        candidate = ConstrainedCandidate(Point(loss, grad_norm, grad), y, y_y, y_d, around)
        self._newest = candidate
        if not (isfinite(grad_norm) and isfinite(loss) and around.finite):
            return Trial(t, nan, inf, candidate)
        merit = loss + self._merit.terms(around.values, t)
        slope += self._merit.slope(around.values, along, t)
        if merit < self._lowest_loss and isfinite(merit) and isfinite(slope):
            if self._lowest is not None:
                self._lowest.point = None
            self._lowest_loss, self._lowest = merit, candidate
        return Trial(t, merit, slope, candidate)

    def accept(self, trial: Trial) -> Candidate:
        """See `Line.accept`; multipliers and penalties are kept as well."""
        candidate = super().accept(trial)
        assert isinstance(candidate, ConstrainedCandidate)
        program, merit = self._owner.program, self._merit
        program.multipliers = merit.multipliers + trial.t * merit.change
        program.penalties = merit.penalties
        self._owner.here, self._owner.step = candidate.around, None
        return candidate


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


def to_cpu(*tensors: Tensor) -> list[Tensor]:
    """Tensors as float64 on the CPU, with one wait."""
    if tensors[0].is_cpu:
        return [tensor.double() for tensor in tensors]
    dtype = torch.float64 if tensors[0].device.type != "mps" else torch.float32
    whole = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors]).cpu().double()
    parts = whole.split([tensor.numel() for tensor in tensors])
    return [part.reshape(like.shape) for part, like in zip(parts, tensors, strict=True)]
