"""The interface of line searches, and the loop that they share.

A line search sees one function of one number, ``phi(t) = f(x + t d)``, through Python floats. It
knows no tensors and no optimizers. Each search is a generator that proposes a step and is sent the
trial made there. `run_search` does the rest for all of them: it calls ``phi``, counts, tests for
acceptance, keeps the best point and ends when the budget is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import Enum
from math import inf, isfinite
from typing import Any, Protocol, TypeAlias

from torch_secondorder._foundation.checks import check_number


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluated point of ``phi(t) = f(x + t d)``.

    Attributes:
        t: The step.
        loss: ``phi(t)``; may be nan or infinite.
        slope: ``phi'(t)``, the directional derivative; may be nan or infinite.
        payload: Whatever the caller wants back with the accepted point; a search never looks at it.
        longest: Of the start: the longest step that the line allows, for instance up to a bound.
            ``phi`` answers a longer one with the trial at this one.

    >>> start = Trial(t=0.0, loss=1.0, slope=-2.0)
    >>> start.payload is None, start.longest
    (True, inf)
    """

    t: float
    loss: float
    slope: float
    payload: Any = None
    longest: float = inf

    @property
    def finite(self) -> bool:
        """True if both the loss and the slope are finite."""
        return isfinite(self.loss) and isfinite(self.slope)


Phi: TypeAlias = Callable[[float], Trial]


class SearchStatus(Enum):
    """The reason why a line search stopped; the value says it in a sentence.

    Attributes:
        accepted: Whether the trial is a step to take; if not, it is the start.
    """

    accepted: bool

    WOLFE = "The Wolfe conditions hold."
    APPROXIMATE_WOLFE = "Slopes meet the Wolfe conditions; the loss did not rise beyond rounding."
    ARMIJO = "The loss decreased sufficiently."
    APPROXIMATE_ARMIJO = "By the slope it decreases enough; the loss did not rise beyond rounding."
    IMPROVED = "No point met the conditions; the best one found lowers the loss."
    UNBOUNDED = "The loss still falls at the longest step allowed; the best point was taken."
    LONGEST = "The loss decreased, and it still falls at the end of the line, which is at a bound."
    FIXED = "The step was taken without a search."
    NO_DECREASE = "No step with a lower loss was found; the start is returned.", False
    NOT_DESCENT = "The loss does not fall along the direction, or the start is not finite.", False
    NONFINITE = (
        "Every trial was non-finite, down to the shortest step; the start is returned.",
        False,
    )

    def __new__(cls, sentence: str, accepted: bool = True) -> SearchStatus:
        """Makes a member whose value is its sentence alone."""
        member = object.__new__(cls)
        member._value_ = sentence
        member.accepted = accepted
        return member


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The outcome of a line search.

    Attributes:
        trial: The accepted point (one that ``phi`` returned), or the start when none was better.
        status: Why the search stopped.
        evaluations: Number of calls of ``phi``.
        nonfinite: How many of these gave a non-finite loss or slope.

    >>> from torch_secondorder.globalization import Armijo
    >>> def phi(t):
    ...     return Trial(t, (t - 1) ** 2, 2 * (t - 1))
    >>> result = Armijo()(phi, phi(0.0), 1.0, precision=2.2e-16)
    >>> result.trial.t, result.evaluations, result.status.name
    (1.0, 1, 'ARMIJO')
    """

    trial: Trial
    status: SearchStatus
    evaluations: int
    nonfinite: int


def falls_without_end(slope: float, result: SearchResult) -> bool:
    """Tells whether the loss falls as steeply at the longest step allowed as at the start.

    Args:
        slope: The slope at the start of the line.
        result: The result of the search.

    Returns:
        Whether it does, which means that the loss has no lower bound there.

    >>> end = Trial(9.0, -9.0, -1.0)
    >>> falls_without_end(-1.0, SearchResult(end, SearchStatus.UNBOUNDED, 5, 0))
    True
    """
    unbounded = result.status is SearchStatus.UNBOUNDED
    return unbounded and result.trial.slope <= _AS_STEEP * slope


class LineSearch(Protocol):
    """Anything that finds a step; the classes here are frozen dataclasses without state.

    >>> from torch_secondorder.globalization import StrongWolfe
    >>> def phi(t):
    ...     return Trial(t, (t - 1) ** 2, 2 * (t - 1))
    >>> search: LineSearch = StrongWolfe()
    >>> result = search(phi, phi(0.0), 0.5, precision=2.2e-16)
    >>> result.trial.loss < 0.5
    True
    """

    def __call__(self, phi: Phi, start: Trial, t0: float, *, precision: float) -> SearchResult:
        """Search along ``phi`` from ``start``, trying ``t0`` first.

        Args:
            phi: Evaluates the loss and the slope at a step.
            start: The point at ``t = 0``, already evaluated. Steps beyond ``start.longest`` are in
                vain: ``phi`` answers them with the trial there.
            t0: The first step to try, positive.
            precision: Machine epsilon of the arithmetic behind ``phi`` (1.2e-7 for float32).

        Raises:
            ValueError: If ``t0`` is not positive and finite, or ``precision`` is not in [0, 1).
        """


Proposals: TypeAlias = Generator[float, Trial, SearchStatus | None]
"""Yields steps, is sent trials, returns UNBOUNDED, or None when there is nowhere left to look."""

Accept: TypeAlias = Callable[[Trial, bool], SearchStatus | None]
"""Takes a finite trial and whether its decrease is sufficient; returns None to go on."""

SHORTEST = 1e-20
"""A first step scaled down by this much that is still non-finite ends the search."""

LONGEST = 1e10
"""A first step scaled up by this much ends the search."""

_AS_STEEP = 0.999

COLLAPSED = 1e-3
"""Relative width at which a bracket is given up: what is left in it is a kink or a jump."""

INDISTINCT = 1e-9
"""Relative width at which a bracket is given up even if slopes in it still shrink."""

ROUNDING = 4.0
"""Units of relative precision by which two nearby losses may differ by rounding alone.

Measured on float32 mean losses over 20,000 samples: errors have a standard deviation of 0.5 units,
and those of 200 neighbouring points differ by up to 2.6.
"""


def run_search(
    proposals: Proposals,
    accept: Accept,
    phi: Phi,
    start: Trial,
    t0: float,
    precision: float,
    *,
    fraction: float,
    max_evaluations: int,
    uphill: bool = False,
) -> SearchResult:
    """Evaluate what `proposals` asks for until `accept` takes a trial, or the end.

    Args:
        proposals: The steps to try, beginning with `t0`; sent every trial, non-finite ones too.
        accept: The status with which a finite trial ends the search, or None to go on.
        phi: The function searched.
        start: The point at ``t = 0``.
        t0: The first step.
        precision: Machine epsilon of the arithmetic behind `phi`.
        fraction: A decrease is sufficient if it is at least this fraction of what the slope at the
            start promises. The loss must have fallen at all: where the promise is lost in rounding,
            equality proves nothing.
        max_evaluations: Budget of calls of `phi`.
        uphill: Whether the loss may rise along the line.

    Returns:
        The accepted trial; without one, the best trial below the start's loss, or else the start.

    Raises:
        ValueError: If `t0` is not positive and finite, or `precision` is not in [0, 1).
    """
    if not (0.0 < t0 < inf and 0.0 <= precision < 1.0):
        check_number("t0", t0, above=0)
        check_number("precision", precision, low=0, below=1)
    start_loss, slope = start.loss, start.slope
    if not (isfinite(start_loss) and isfinite(slope) and (uphill or slope < 0.0)):
        return SearchResult(start, SearchStatus.NOT_DESCENT, 0, 0)
    best, ending = start, None
    evaluations = nonfinite = 0
    t = next(proposals)
    while True:
        trial = phi(t)
        evaluations += 1
        loss = trial.loss
        if not (isfinite(loss) and isfinite(trial.slope)):
            nonfinite += 1
        else:
            sufficient = loss <= start_loss + fraction * trial.t * slope and loss < start_loss
            status = accept(trial, sufficient)
            if status is not None:
                return SearchResult(trial, status, evaluations, nonfinite)
            if loss < best.loss:
                best = trial
        if evaluations == max_evaluations:
            break
        try:
            proposed = proposals.send(trial)
        except StopIteration as stop:
            ending = stop.value
            break
        if not 0.0 < proposed < inf or proposed == t:  # rounded to an end of the bracket
            break
        t = proposed
    if best is not start:
        return SearchResult(best, ending or SearchStatus.IMPROVED, evaluations, nonfinite)
    hopeless = nonfinite == evaluations
    status = SearchStatus.NONFINITE if hopeless else SearchStatus.NO_DECREASE
    return SearchResult(start, status, evaluations, nonfinite)


def retreat(inside: float, outside: float, count: int) -> float:
    """A step between the two after `count` trials in a row that were too long.

    The distance shrinks by 2, 4, 8, ...: gently at first, for the right step is mostly near, yet a
    dozen trials get from 1 to 1e-20.
    """
    return inside + (outside - inside) * 0.5**count
