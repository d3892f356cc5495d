"""Levenberg-Marquardt damping, adapted by how far the quadratic model can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from torch_secondorder._foundation.checks import check_number

__all__ = ["LevenbergMarquardt"]


# The first damping, as a share of the curvature along the gradient.
_SHARE = 0.03
# The largest reduction of a damping that alone decides the length of steps.
_RELIEF = 0.1


@dataclass(frozen=True, slots=True)
class LevenbergMarquardt:
    """The rule of Levenberg and Marquardt, with the constants of Martens 2010, section 4.1.

    If the loss fell by less than `poor` of the predicted decrease, or is not finite, the damping
    grows; if it fell by more than `good` of it, the damping shrinks. Near a minimum, where the
    gradient falls faster than that, the damping falls with the gradient: convergence is quadratic
    only then (Fan and Yuan 2005, "On the quadratic convergence of the Levenberg-Marquardt method
    without nonsingularity assumption"). If the damping is larger than the curvature along a good
    step, it alone decides the step's length, and falls to a tenth or to that curvature.

    Args:
        initial: The first damping, in the units of the curvature; by default a share of the
            curvature along the first gradient, `|A g| / |g|`, so that steps do not depend on the
            unit of the loss.
        increase: Factor of growth, above one.
        decrease: Factor of shrinking, below one.
        poor: Gain ratio below which it grows.
        good: Gain ratio above which it shrinks.
        smallest: The smallest damping, relative to the first one.
        largest: The largest damping, relative to the first one.

    Raises:
        ValueError: A number is out of range.

    >>> rule = LevenbergMarquardt()
    >>> rule.updated(1.0, gain_ratio=0.1), rule.updated(1.0, gain_ratio=float("nan"))
    (1.5, 1.5)
    """

    initial: float | None = None
    increase: float = 1.5
    decrease: float = 2.0 / 3.0
    poor: float = 0.25
    good: float = 0.75
    smallest: float = 1e-20
    largest: float = 1e20

    def __post_init__(self) -> None:
        check_number("initial", self.initial, above=0, optional=True)
        if not 0.0 < self.smallest <= 1.0 <= self.largest < inf:
            raise ValueError(
                "bounds are relative to the damping to begin with, 0 < smallest <= 1 <= largest, "
                f"got {self.smallest!r} and {self.largest!r}"
            )
        if not 0.0 < self.decrease < 1.0 < self.increase < inf:
            raise ValueError(
                f"decrease must lie in (0, 1) and increase above 1, got {self.decrease!r} and "
                f"{self.increase!r}"
            )
        if not 0.0 < self.poor < self.good:
            raise ValueError(
                f"gain ratios need 0 < poor < good, got {self.poor!r} and {self.good!r}"
            )

    def begun(self, curvature: float) -> float:
        """The first damping, given the curvature along the gradient."""
        return self.relative(curvature) if self.initial is None else self.initial

    def relative(self, curvature: float) -> float:
        """The default for the first damping, given the curvature along the gradient."""
        return _SHARE * curvature

    def updated(
        self,
        damping: float,
        gain_ratio: float,
        gradient_ratio: float = 1.0,
        start: float = 1.0,
        curvature: float = inf,
    ) -> float:
        """The damping for the next system.

        Args:
            damping: The damping of the last system.
            gain_ratio: The decrease of the loss over the predicted one; may be NaN.
            gradient_ratio: The gradient's norm after the step over the one before it.
            start: The first damping.
            curvature: The undamped curvature along the step.
        """
        if not gain_ratio >= self.poor:
            return self.raised(damping, 1, start)
        if gain_ratio > self.good:
            lowered = min(
                damping * min(self.decrease, gradient_ratio), max(curvature, _RELIEF * damping)
            )
            return max(lowered, self.smallest * start)
        return damping

    def raised(self, damping: float, times: int = 1, start: float = 1.0) -> float:
        """The damping after a number of failures in a row."""
        smallest, largest = self.smallest * start, self.largest * start
        try:
            factor = self.increase**times
        except OverflowError:  # where a product would be infinite, a power raises
            return largest
        return min(max(damping, smallest) * factor, largest)
