"""Damping of steps, adapted by how far the quadratic model can be trusted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from torch_secondorder._foundation.checks import check_number
from torch_secondorder._foundation.deprecation import renamed

__all__ = ["DampingRule", "MarquardtDamping", "NielsenDamping"]


# The first damping, as a share of the curvature along the gradient.
_SHARE = 0.03
# The largest reduction of a damping with the gradient.
_FALL = 1e-3
# The largest reduction of a damping that alone decides the length of steps.
_RELIEF = 0.1


class DampingRule(ABC):
    """Base class of the rules for a damping: a multiple of a metric that is added to a curvature.

    Attributes:
        initial: The first damping, in the units of the curvature; None for a share of the one that
            is met first, so that steps do not depend on the unit of the loss.
        smallest: The smallest damping, relative to the first one.
        largest: The largest damping, relative to the first one.

    >>> rule: DampingRule = MarquardtDamping()
    >>> rule.updated(1.0, gain_ratio=0.99) < 1.0  # the model was right: less damping
    True
    """

    __slots__ = ()

    initial: float | None
    smallest: float
    largest: float

    def begun(self, curvature: float) -> float:
        """The first damping, given the curvature along the gradient."""
        return self.relative(curvature) if self.initial is None else self.initial

    @abstractmethod
    def relative(self, curvature: float) -> float:
        """The default for the first damping, given the curvature along the gradient."""

    @abstractmethod
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

    @abstractmethod
    def raised(self, damping: float, times: int = 1, start: float = 1.0) -> float:
        """The damping after a number of failures in a row."""

    @abstractmethod
    def rejected(self, damping: float, failures: int, start: float = 1.0) -> float:
        """The damping for the next system at a point where steps were rejected.

        Args:
            damping: The damping of the last system.
            failures: Steps rejected in a row.
            start: The first damping.
        """

    def _raised_by(self, damping: float, base: float, power: int, start: float) -> float:
        """A damping times a power, within the limits."""
        smallest, largest = self.smallest * start, self.largest * start
        try:
            factor = base**power
        except OverflowError:  # where a product would be infinite, a power raises
            return largest
        return min(max(damping, smallest) * factor, largest)

    def _check_limits(self) -> None:
        check_number("initial", self.initial, above=0, optional=True)
        if not 0.0 < self.smallest <= 1.0 <= self.largest < inf:
            raise ValueError(
                "bounds are relative to the damping to begin with, 0 < smallest <= 1 <= largest, "
                f"got {self.smallest!r} and {self.largest!r}"
            )


@dataclass(frozen=True, slots=True)
class MarquardtDamping(DampingRule):
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

    >>> rule = MarquardtDamping()
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
        self._check_limits()
        if not 0.0 < self.decrease < 1.0 < self.increase < inf:
            raise ValueError(
                f"decrease must lie in (0, 1) and increase above 1, got {self.decrease!r} and "
                f"{self.increase!r}"
            )
        if not 0.0 < self.poor < self.good:
            raise ValueError(
                f"gain ratios need 0 < poor < good, got {self.poor!r} and {self.good!r}"
            )

    def relative(self, curvature: float) -> float:
        """See `DampingRule.relative`."""
        return _SHARE * curvature

    def updated(
        self,
        damping: float,
        gain_ratio: float,
        gradient_ratio: float = 1.0,
        start: float = 1.0,
        curvature: float = inf,
    ) -> float:
        """See `DampingRule.updated`."""
        if not gain_ratio >= self.poor:
            return self.raised(damping, 1, start)
        if gain_ratio > self.good:
            lowered = min(
                damping * min(self.decrease, gradient_ratio), max(curvature, _RELIEF * damping)
            )
            return max(lowered, self.smallest * start)
        return damping

    def raised(self, damping: float, times: int = 1, start: float = 1.0) -> float:
        """See `DampingRule.raised`."""
        return self._raised_by(damping, self.increase, times, start)

    def rejected(self, damping: float, failures: int, start: float = 1.0) -> float:
        """See `DampingRule.rejected`."""
        return self.raised(damping, 2 + failures, start)


@dataclass(frozen=True, slots=True)
class NielsenDamping(DampingRule):
    """The rule of Nielsen: a smooth function of the gain ratio, with growing factors on failure.

    After a step with gain ratio `rho` the damping is multiplied by `max(1/3, 1 - (2 rho - 1)^3)`.
    At a point where steps are rejected it is multiplied by 2, 4, 8, and so on. One thing is added:
    where the model is all but exact and the gradient falls by more than a third, near a solution,
    the damping falls with it, which convergence of second order needs (Fan and Yuan 2005).

    References: Nielsen 1999, "Damping parameter in Marquardt's method"; Madsen, Nielsen and
    Tingleff 2004, "Methods for non-linear least squares problems".

    Args:
        initial: The first damping, in the units of the curvature; by default a share of the
            largest curvature along a coordinate.
        share: That share; use a smaller one where the start is close to a solution.
        decrease: The largest reduction by the gain ratio, below one.
        smallest: The smallest damping, relative to the first one.
        largest: The largest damping, relative to the first one.
        good: Gain ratio above which the damping falls with the gradient.

    Raises:
        ValueError: A number is out of range.

    >>> rule = NielsenDamping()
    >>> rule.updated(3.0, gain_ratio=1.0), rule.updated(3.0, gain_ratio=0.5)
    (1.0, 3.0)
    >>> rule.rejected(3.0, failures=1), rule.rejected(6.0, failures=2)
    (6.0, 24.0)
    """

    initial: float | None = None
    share: float = 1e-3
    decrease: float = 1.0 / 3.0
    smallest: float = 1e-20
    largest: float = 1e20
    good: float = 0.95

    def __post_init__(self) -> None:
        self._check_limits()
        check_number("good", self.good, above=0)
        check_number("share", self.share, above=0)
        check_number("decrease", self.decrease, above=0, below=1)

    def relative(self, curvature: float) -> float:
        """See `DampingRule.relative`."""
        return self.share * curvature

    def updated(
        self,
        damping: float,
        gain_ratio: float,
        gradient_ratio: float = 1.0,
        start: float = 1.0,
        curvature: float = inf,
    ) -> float:
        """See `DampingRule.updated`; the curvature does not count."""
        if not gain_ratio > 0.0:
            return self.raised(damping, 1, start)
        factor = max(self.decrease, 1.0 - (2.0 * min(gain_ratio, 1.0) - 1.0) ** 3)
        if gain_ratio > self.good:
            factor = min(factor, max(gradient_ratio, _FALL))
        return min(max(damping * factor, self.smallest * start), self.largest * start)

    def raised(self, damping: float, times: int = 1, start: float = 1.0) -> float:
        """See `DampingRule.raised`."""
        return self._raised_by(damping, 2.0, times, start)

    def rejected(self, damping: float, failures: int, start: float = 1.0) -> float:
        """See `DampingRule.rejected`."""
        return self.raised(damping, failures, start)


if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, {"LevenbergMarquardt": "MarquardtDamping"})
