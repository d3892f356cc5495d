"""The second-order model of a loss along a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder.diagnostics._point import opened
from torch_secondorder.diagnostics.problem import Problem, Source, as_problem

__all__ = ["SecondOrderModel", "second_order_model"]


@dataclass(frozen=True, slots=True)
class SecondOrderModel:
    """The parabola `value + slope t + curvature t^2 / 2`, a model of the loss at a distance `t d`.

    Attributes:
        direction: `d`, shape `(n,)`, not normalized.
        value: The loss here.
        slope: `g'd`.
        curvature: `d'H d`; divided by `d'd` it lies between the extreme eigenvalues.
        step: The `t` that minimizes the parabola, or None if it has no minimum. Along the negative
            gradient it is the best learning rate for the next step, `g'g / g'H g`.
        reason: A sentence that says why there is no step; None if there is one.

    >>> from torch_secondorder import FunctionalObjective
    >>> saddle = FunctionalObjective(lambda w: -(w**2).sum(), torch.tensor([1.0]))
    >>> along = second_order_model(saddle)
    >>> along.curvature, along.step
    (-8.0, None)
    """

    direction: Tensor
    value: float
    slope: float
    curvature: float
    step: float | None
    reason: str | None

    def __call__(self, t: float) -> float:
        """The value of the parabola at `t`."""
        return self.value + t * (self.slope + 0.5 * t * self.curvature)

    @property
    def decrease(self) -> float | None:
        """The decrease of the parabola at `step`, None without one."""
        return None if self.step is None else -0.5 * self.step * self.slope


def second_order_model(
    source: Source, direction: Tensor | Sequence[Tensor] | None = None
) -> SecondOrderModel:
    """The second-order Taylor polynomial of a loss along a direction, with one product.

    Args:
        source: A `Problem` (see `from_model`, `from_closure`) or a `FunctionalObjective`.
        direction: Shape `(n,)`, or tensors shaped like the parameters; by default the negative
            gradient.

    Returns:
        The parabola, and the step to its minimum.

    Raises:
        TypeError: The source is of another kind; a bare operator has no gradient.
        ValueError: The direction is of another shape or not finite.
        RuntimeError: The loss, the gradient or the product is not finite, or has no derivative.

    >>> from torch_secondorder import FunctionalObjective
    >>> parabola = FunctionalObjective(lambda w: 2 * (w**2).sum(), torch.tensor([3.0, 4.0]))
    >>> along = second_order_model(parabola)
    >>> along.value, along.slope, along.step, along(along.step)
    (50.0, -400.0, 0.25, 0.0)
    """
    problem = as_problem(source)
    given = None if direction is None else _flat(problem, direction)
    with opened(problem, False, 1, "second-order model") as point:
        assert point.value is not None and point.grad is not None
        if not torch.isfinite(point.grad).all():
            raise RuntimeError(f"the loss is {point.value:g} here, but its gradient is not finite")
        d = -point.grad if given is None else given
        # In float64, because these are sums over many parameters.
        wide = d.double()
        slope = float(point.grad.double() @ wide)
        curvature = float((point.operator @ d).double() @ wide)
        step, reason = _lowest(slope, curvature, bool(wide.any()))
        return SecondOrderModel(d, point.value, slope, curvature, step, reason)


def _lowest(slope: float, curvature: float, moves: bool) -> tuple[float | None, str | None]:
    if not moves:
        return None, "The direction is zero: the loss is stationary here, or the given one is zero."
    if curvature > 0:
        step = -slope / curvature
        if math.isfinite(step):
            return step, None
    if curvature < 0:
        return None, "The curvature is negative along the direction: the parabola has no minimum."
    return None, "The curvature is zero along the direction: the parabola has no minimum."


def _flat(problem: Problem, direction: Tensor | Sequence[Tensor]) -> Tensor:
    vector = problem.vector
    if isinstance(direction, Tensor):
        if direction.shape != (problem.size,):
            raise ValueError(
                f"direction must have shape ({problem.size},) or be a list of tensors shaped like "
                f"the parameters, got shape {tuple(direction.shape)}"
            )
        flat = direction.detach().to(vector.device, vector.dtype)
    else:
        shapes = [tuple(t.shape) for t in direction]
        expected = [tuple(p.shape) for p in vector.params]
        if shapes != expected:
            raise ValueError(f"direction must have the shapes {expected}, got {shapes}")
        flat = vector.gather(list(direction))
    if not torch.isfinite(flat).all():
        raise ValueError("direction must be finite")
    return flat
