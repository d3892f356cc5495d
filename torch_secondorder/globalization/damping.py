"""Levenberg-Marquardt damping, adapted by how far the quadratic model can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

__all__ = ["LevenbergMarquardt"]


@dataclass(frozen=True, slots=True)
class LevenbergMarquardt:
    """The rule of Levenberg and Marquardt, with the constants of Martens 2010, section 4.1.

    Where the loss fell by less than `poor` of what the model promised, or to no number at all, the
    damping grows; where it fell by more than `good` of that, it shrinks. Near a minimum where the
    gradient falls faster than the damping would, the damping falls with it, for only then is the
    convergence that of Newton's method (Fan and Yuan 2005, "On the quadratic convergence of the
    Levenberg-Marquardt method without nonsingularity assumption").

    Args:
        initial: The damping to begin with.
        increase: Factor of growth, above one.
        decrease: Factor of shrinking, below one.
        poor: Gain ratio below which it grows.
        good: Gain ratio above which it shrinks.
        smallest: Least damping.
        largest: Most damping.

    Raises:
        ValueError: A number is out of range.

    >>> rule = LevenbergMarquardt()
    >>> rule.updated(1.0, gain_ratio=0.1), rule.updated(1.0, gain_ratio=float("nan"))
    (1.5, 1.5)
    """

    initial: float = 1.0
    increase: float = 1.5
    decrease: float = 2.0 / 3.0
    poor: float = 0.25
    good: float = 0.75
    smallest: float = 1e-20
    largest: float = 1e20

    def __post_init__(self) -> None:
        if not 0.0 < self.smallest <= self.initial <= self.largest < inf:
            raise ValueError(
                "the damping must be positive and finite, with smallest <= initial <= largest, got "
                f"{self.smallest!r}, {self.initial!r}, {self.largest!r}"
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

    def updated(self, damping: float, gain_ratio: float, gradient_ratio: float = 1.0) -> float:
        """The damping for the next system.

        Args:
            damping: That of the last one.
            gain_ratio: What the loss fell by over what the model promised; may be NaN.
            gradient_ratio: The gradient's norm after the step over the one before it.
        """
        if not gain_ratio >= self.poor:
            return self.raised(damping)
        if gain_ratio > self.good:
            return max(damping * min(self.decrease, gradient_ratio), self.smallest)
        return damping

    def raised(self, damping: float, times: int = 1) -> float:
        """The damping after so many failures in a row."""
        try:
            factor = self.increase**times
        except OverflowError:  # where a product would be infinite, a power raises
            return self.largest
        return min(max(damping, self.smallest) * factor, self.largest)
