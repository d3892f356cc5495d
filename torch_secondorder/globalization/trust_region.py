"""The radius within which a quadratic model is trusted."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from torch_secondorder._foundation.checks import check_number

__all__ = ["TrustRegion"]


# The first radius, as a multiple of the step along the gradient.
_MULTIPLE = 10.0


@dataclass(frozen=True, slots=True)
class TrustRegion:
    """The textbook's rule (Nocedal and Wright 2006, algorithm 4.1).

    Args:
        initial: The first radius, in the units of the parameters; by default a multiple of the step
            along the gradient that minimizes the first model, so that steps depend neither on the
            unit of the loss nor on those of the parameters.
        shrink: Factor after a step that gained too little.
        grow: Factor after a good step that the radius kept short.
        poor: Gain ratio below which the radius shrinks.
        good: Gain ratio above which it may grow.
        accept: Gain ratio above which a step is taken.
        largest: The largest radius, relative to the first one.

    Raises:
        ValueError: A number is out of range.

    >>> rule = TrustRegion()
    >>> rule.updated(1.0, gain_ratio=0.9, length=1.0), rule.updated(1.0, gain_ratio=0.9, length=0.5)
    (2.0, 1.0)
    >>> rule.updated(1.0, gain_ratio=-3.0, length=0.8)
    0.2
    """

    initial: float | None = None
    shrink: float = 0.25
    grow: float = 2.0
    poor: float = 0.25
    good: float = 0.75
    accept: float = 1e-4
    largest: float = 1e20

    def __post_init__(self) -> None:
        check_number("initial", self.initial, above=0, optional=True)
        check_number("largest", self.largest, low=1)
        if not 0.0 < self.shrink < 1.0 < self.grow < inf:
            raise ValueError(
                f"shrink must lie in (0, 1) and grow above 1, got {self.shrink!r} and {self.grow!r}"
            )
        if not 0.0 <= self.accept < self.poor < self.good:
            raise ValueError(
                "gain ratios need 0 <= accept < poor < good, got "
                f"{self.accept!r}, {self.poor!r}, {self.good!r}"
            )

    def begun(self, length: float) -> float:
        """The first radius, given the length of the model's step along the gradient."""
        return _MULTIPLE * length if self.initial is None else self.initial

    def updated(self, radius: float, gain_ratio: float, length: float, start: float = 1.0) -> float:
        """The radius for the next model.

        Args:
            radius: The radius of the last model.
            gain_ratio: The decrease of the loss over the predicted one; may be NaN.
            length: The length of the last step, in the norm of the radius.
            start: The first radius.
        """
        if not gain_ratio >= self.poor:
            return self.shrink * min(radius, length)
        if gain_ratio > self.good and length >= 0.99 * radius:
            return min(self.grow * radius, self.largest * start)
        return radius
