"""Lines inside a box, to the minimizer of a model within the bounds."""

from __future__ import annotations

from math import inf, isfinite

import torch
from torch import Tensor

from torch_secondorder._optim.flat import Descent, Line
from torch_secondorder.globalization import Trial
from torch_secondorder.solvers._box_quadratic import FaceModel, ScaledIdentity, solve_in_box
from torch_secondorder.solvers._units import power_of_two


class BoundedLine(Line):
    """The objective along a direction from the current point, up to where the box ends.

    The whole step `t = 1` is in the box, and perhaps a longer one.

    Args:
        descent: See `Line`.
        direction: `d`.
        product: `B d` with the curvature `B` of the model that `d` comes from.
        slope: `g'd`.
        square: `d'd`.
        bend: `d'B d`.
        longest: The longest step.
    """

    def __init__(
        self,
        descent: Descent,
        direction: Tensor,
        product: Tensor,
        slope: float,
        square: float,
        bend: float,
        longest: float,
    ) -> None:
        super().__init__(descent, direction, slope, square)
        self.product, self.bend = product, bend
        self.start = Trial(0.0, descent.point.loss, slope, longest=longest)

    def __call__(self, t: float) -> Trial:
        """Evaluates the objective at `t d` from the current point, or at the longest step."""
        return super().__call__(min(t, self.start.longest))

    def _optimality(self, grad: Tensor, t: float) -> Tensor:
        objective = self._descent.objective
        assert objective.box is not None
        there = objective.box.moved(objective.position, self.direction, t)
        return objective.box.projected(there, grad)


def line_in_box(descent: Descent, model: FaceModel) -> BoundedLine | None:
    """The line to the minimizer of a model in the box; None where the model gives no descent.

    Args:
        descent: The step.
        model: The quadratic model at the current point.
    """
    point, objective = descent.point, descent.objective
    assert point.grad is not None and objective.box is not None
    low, high = objective.box.room(objective.position)
    face = solve_in_box(model, point.grad, low, high)
    if face is None:
        return None
    direction, product = face.step, face.slopes - point.grad
    reach = torch.where(direction < 0, low, high) / direction
    longest = torch.where(direction == 0, inf, reach).amin()
    # Products of steps and gradients may be beyond the range of float32.
    units = power_of_two(torch.stack((direction.abs().amax(), point.grad.abs().amax())))
    size, unit = units
    along, grad, image = direction / size, point.grad / unit, product / unit
    slope, square, bend, length, of_step, of_grad = descent.space.to_host(
        sums=(grad @ along, along @ along, image @ along), whole=(longest, *units)
    )
    slope, bend = slope * of_step * of_grad, bend * of_step * of_grad
    square *= of_step * of_step
    if not (-inf < slope < 0 and isfinite(square) and 0 < bend < inf):
        return None
    return BoundedLine(descent, direction, product, slope, square, bend, max(1.0, length))


def steepest_line_in_box(descent: Descent, *, searches: bool) -> BoundedLine | None:
    """The line of the first iteration, whose scale is not known yet; see `LineSearchOptimizer`.

    None where the numbers are beyond the range of their dtype.

    Args:
        descent: The step.
        searches: Whether there is a line search.
    """
    point, objective = descent.point, descent.objective
    assert point.grad is not None and objective.box is not None
    low, high = objective.box.room(objective.position)
    grad = point.grad
    # Entries at a bound that the loss falls towards do not move, and tell no scale.
    blocked = ((low == 0) & (grad > 0)) | ((high == 0) & (grad < 0))
    free = torch.where(blocked, 0, grad)
    (largest,) = descent.space.to_host(largest=(free,))
    if not largest:
        return None
    unit = free / largest
    square, total = descent.space.to_host(sums=(unit @ unit, unit.abs().sum()))
    length = first_length(descent, largest, square, total, searches=searches)
    return line_in_box(descent, ScaledIdentity(length, largest))


def first_length(
    descent: Descent, largest: float, square: float, total: float, *, searches: bool
) -> float:
    """The length of the first step along the negative gradient, over its largest entry.

    Without a search, the step is the same as in torch: the negative gradient, cut to a 1-norm of at
    most one. With a search, it goes to where the tangent meets a loss of zero, but no farther than
    the parameters are long.

    Args:
        descent: The step.
        largest: The largest entry of the gradient.
        square: The squared length of the gradient over its largest entry.
        total: Its 1-norm.
        searches: Whether there is a line search.
    """
    if not searches:
        return min(largest, 1 / total)
    loss = descent.point.loss
    length: float = max(1.0, descent.size) / square**0.5
    return min(length, 2 * abs(loss) / (largest * square)) if loss else length
