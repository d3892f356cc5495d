"""The two simplest line searches: backtracking, and none at all."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder.globalization.line_search import (
    ROUNDING,
    SHORTEST,
    Phi,
    Proposals,
    SearchResult,
    SearchStatus,
    Trial,
    retreat,
    run_search,
)


@dataclass(frozen=True, slots=True)
class Armijo:
    """Backtracking until the loss has decreased sufficiently, ``phi(t) <= phi(0) + c1 t phi'(0)``.

    The next step minimizes the parabola through the start and the failed trial, kept between a
    tenth and `shrink` of that trial (Nocedal & Wright 2006, section 3.5). Steps never grow beyond
    the first one.

    Where the losses differ by no more than rounding, the same condition is read off the slope
    instead: on a parabola it is ``phi'(t) <= (2 c1 - 1) phi'(0)``. The slope must then have changed
    by a tenth, so that a step too short to show anything is not mistaken for a good one.

    Args:
        c1: Fraction of the decrease that the slope at the start promises, in (0, 1).
        shrink: Largest factor between one trial and the next, in (0, 1).
        max_evaluations: Budget of evaluations.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> phi = lambda t: Trial(t, (t - 0.1) ** 2, 2 * (t - 0.1))
        >>> result = Armijo()(phi, phi(0.0), 1.0, precision=2.2e-16)
        >>> result.status.name, round(result.trial.t, 3), result.evaluations
        ('ARMIJO', 0.1, 2)
    """

    c1: float = 1e-4
    shrink: float = 0.5
    max_evaluations: int = 25

    def __post_init__(self) -> None:
        check_number("c1", self.c1, above=0, below=1)
        check_number("shrink", self.shrink, above=0, below=1)
        check_integer("max_evaluations", self.max_evaluations)

    def __call__(self, phi: Phi, start: Trial, t0: float, *, precision: float) -> SearchResult:
        """Search along `phi`; see `LineSearch`."""
        allowance = ROUNDING * precision * abs(start.loss)
        steepest, gentle = 0.9 * start.slope, (2.0 * self.c1 - 1.0) * start.slope

        def accept(trial: Trial, sufficient: bool) -> SearchStatus | None:
            if sufficient:
                return SearchStatus.ARMIJO
            unresolved = abs(trial.loss - start.loss) <= allowance
            least = -inf if trial.t >= start.longest else steepest
            if unresolved and least <= trial.slope <= gentle:
                return SearchStatus.APPROXIMATE_ARMIJO
            return None

        return run_search(
            self._propose(start, min(t0, start.longest), allowance),
            accept,
            phi,
            start,
            t0,
            precision,
            fraction=self.c1,
            max_evaluations=self.max_evaluations,
        )

    def _propose(self, start: Trial, t: float, allowance: float) -> Proposals:
        first, walls = t, 0
        while t >= SHORTEST * first:
            trial = yield t
            if not trial.finite:
                walls += 1
                t = retreat(0.0, t, walls)
                continue
            walls = 0
            unresolved = abs(trial.loss - start.loss) <= allowance
            if unresolved and trial.slope < 0.9 * start.slope:
                return None  # this step is too short to tell, and the next ones are shorter
            shrunk = self.shrink * t
            # How far the loss lies above the tangent at the start: the parabola's bend.
            excess = trial.loss - start.loss - t * start.slope
            if not unresolved and 0.0 < excess < inf:
                parabola = -0.5 * start.slope * t * (t / excess)
                shrunk = min(max(parabola, 0.1 * t), shrunk)
            t = shrunk
        return None


@dataclass(frozen=True, slots=True)
class FixedStep:
    """No search: the first step is taken as it is, whatever the loss there, higher ones included.

    Only where the loss or slope is not finite is the step shortened, until both are. The direction
    need not be one of descent.

    Example:
        >>> phi = lambda t: Trial(t, (t - 0.1) ** 2, 2 * (t - 0.1))
        >>> FixedStep()(phi, phi(0.0), 1.0, precision=2.2e-16).trial.t
        1.0
    """

    def __call__(self, phi: Phi, start: Trial, t0: float, *, precision: float) -> SearchResult:
        """Take the step `t0`; see `LineSearch`."""
        return run_search(
            self._propose(min(t0, start.longest)),
            lambda trial, sufficient: SearchStatus.FIXED,
            phi,
            start,
            t0,
            precision,
            fraction=0.0,
            max_evaluations=25,
            uphill=True,
        )

    def _propose(self, t: float) -> Proposals:
        first, walls = t, 0
        while t >= SHORTEST * first:
            yield t
            walls += 1
            t = retreat(0.0, t, walls)
        return None
