"""The line search of Hager and Zhang, as in CG_DESCENT."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from math import inf
from typing import TypeAlias

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder.globalization.line_search import (
    COLLAPSED,
    LONGEST,
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

_Bracket: TypeAlias = tuple[Trial, Trial]
"""`a` before `b`: a falling slope and a loss below the ceiling at `a`, a rising slope at `b`."""


@dataclass(frozen=True, slots=True)
class HagerZhang:
    """A step at which the weak Wolfe conditions hold, or their approximation by slopes.

    The conditions are ``phi(t) <= phi(0) + delta t phi'(0)`` and ``phi'(t) >= sigma phi'(0)``. The
    approximation, ``(2 delta - 1) phi'(0) >= phi'(t) >= sigma phi'(0)`` at a loss of at most
    ``phi(0) + eps_k``, can be decided to full precision near a minimum, where differences of
    losses cancel. The paper takes ``eps_k = 1e-6 |phi(0)|``. In float64 that would let each step
    raise the loss by nine digits more than rounding explains; here ``eps_k`` is what rounding
    explains at the precision of the losses, and no more.

    Args:
        delta: Sufficient decrease, in (0, 0.5).
        sigma: Curvature, in (0, 1), at least `delta`.
        rho: Factor between steps while the loss falls, above 1.
        theta: Where an interval is cut after a rise of the loss, in (0, 1).
        gamma: A double secant step must shrink the bracket to this fraction, in (0, 1), or it is
            halved.
        max_evaluations: Budget of evaluations.

    Raises:
        ValueError: If an argument is out of its range.

    Reference:
        W. W. Hager, H. Zhang, *A new conjugate gradient method with guaranteed descent and an
        efficient line search*, SIAM J. Optim. 16 (2005) 170-192; *Algorithm 851: CG_DESCENT*, ACM
        TOMS 32 (2006) 113-137. B0-B3, U0-U3 and S1-S4 below are their names. Different here: a
        non-finite trial bounds the interval from above; bisections that keep moving the far end cut
        by 2, 4, 8, ...

    Example:
        >>> phi = lambda t: Trial(t, (t - 3.0) ** 2, 2 * (t - 3.0))
        >>> result = HagerZhang(sigma=0.1)(phi, phi(0.0), 8.0, precision=2.2e-16)
        >>> result.status.name, round(result.trial.t, 6), result.evaluations
        ('WOLFE', 3.0, 2)
    """

    delta: float = 0.1
    sigma: float = 0.9
    rho: float = 5.0
    theta: float = 0.5
    gamma: float = 0.66
    max_evaluations: int = 25

    def __post_init__(self) -> None:
        check_number("delta", self.delta, above=0, below=0.5)
        check_number("sigma", self.sigma, above=0, below=1)
        if self.sigma < self.delta:
            raise ValueError(f"sigma must be at least delta = {self.delta!r}, got {self.sigma!r}")
        check_number("rho", self.rho, above=1, below=inf)
        check_number("theta", self.theta, above=0, below=1)
        check_number("gamma", self.gamma, above=0, below=1)
        check_integer("max_evaluations", self.max_evaluations)

    def __call__(self, phi: Phi, start: Trial, t0: float, *, precision: float) -> SearchResult:
        """Search along `phi`; see `LineSearch`."""
        ceiling = start.loss + ROUNDING * precision * abs(start.loss)
        steepest = self.sigma * start.slope
        gentle = (2.0 * self.delta - 1.0) * start.slope

        def accept(trial: Trial, sufficient: bool) -> SearchStatus | None:
            if trial.slope >= steepest:
                if sufficient:
                    return SearchStatus.WOLFE
                if trial.loss <= ceiling and trial.slope <= gentle:
                    return SearchStatus.APPROXIMATE_WOLFE
            elif trial.t >= start.longest and (sufficient or trial.loss <= ceiling):
                return SearchStatus.LONGEST
            return None

        return run_search(
            self._propose(start, t0, ceiling),
            accept,
            phi,
            start,
            t0,
            precision,
            fraction=self.delta,
            max_evaluations=self.max_evaluations,
        )

    def _propose(self, start: Trial, t0: float, ceiling: float) -> Proposals:
        found = yield from self._bracket(start, t0, ceiling)
        if isinstance(found, SearchStatus) or found is None:
            return found
        a, b = found
        halvings = 1
        while b.t - a.t > COLLAPSED * b.t:
            width = b.t - a.t
            a, b = yield from self._secant_squared(a, b, ceiling)
            if b.t - a.t > self.gamma * width:
                # `b` replaced several times in a row: the minimum is orders of magnitude nearer.
                middle = yield retreat(a.t, b.t, halvings)
                a, b = yield from self._update(a, b, middle, ceiling)
                halvings = halvings + 1 if b is middle else 1
        return None

    def _bracket(
        self, start: Trial, t: float, ceiling: float
    ) -> Generator[float, Trial, _Bracket | SearchStatus | None]:
        """B0-B3: grow the step until the slope rises or the loss does."""
        longest, shortest = min(LONGEST * t, start.longest), SHORTEST * t
        t = min(t, longest)
        a, wall, walls = start, None, 0
        while t >= shortest and (wall is None or wall - a.t > COLLAPSED * wall):
            trial = yield t
            if not trial.finite:
                wall, walls = t, walls + 1
                t = retreat(a.t, t, walls)
                continue
            walls = 0
            if trial.slope >= 0.0:
                return a, trial
            if trial.loss > ceiling:
                return (yield from self._halve(start, trial, ceiling))
            if t >= longest:
                return SearchStatus.UNBOUNDED
            a = trial
            t = min(self.rho * t, longest)
            if wall is not None:
                t = min(t, 0.5 * (a.t + wall))
        return None

    def _update(
        self, a: Trial, b: Trial, c: Trial, ceiling: float
    ) -> Generator[float, Trial, _Bracket]:
        """U1-U3 for a `c` inside (a, b)."""
        if c.finite and c.slope >= 0.0:
            return a, c
        if c.finite and c.loss <= ceiling:
            return c, b
        return (yield from self._halve(a, c, ceiling))

    def _halve(self, a: Trial, b: Trial, ceiling: float) -> Generator[float, Trial, _Bracket]:
        """U3: `b` lies above the ceiling or is not finite; cut until its slope rises."""
        walls = 0
        while b.t - a.t > COLLAPSED * b.t:
            if b.finite:
                walls = 0
                t = (1.0 - self.theta) * a.t + self.theta * b.t
            else:
                walls += 1
                t = retreat(a.t, b.t, walls)
            trial = yield t
            if trial.finite and trial.slope >= 0.0:
                return a, trial
            if trial.finite and trial.loss <= ceiling:
                a = trial
            else:
                b = trial
        return a, b

    def _secant_squared(
        self, a: Trial, b: Trial, ceiling: float
    ) -> Generator[float, Trial, _Bracket]:
        """S1-S4: a secant step, and a second one from the end that it replaced."""
        t = _secant(a, b)
        if not a.t < t < b.t:  # U0
            return a, b
        c = yield t
        low, high = yield from self._update(a, b, c, ceiling)
        if c is high:
            t = _secant(b, high)
        elif c is low:
            t = _secant(a, low)
        else:
            return low, high
        if not low.t < t < high.t:
            return low, high
        c = yield t
        return (yield from self._update(low, high, c, ceiling))


def _secant(a: Trial, b: Trial) -> float:
    """The zero of the line through the slopes at `a` and `b`; `b` if the slopes are equal."""
    bend = b.slope - a.slope
    return (a.t * b.slope - b.t * a.slope) / bend if bend else b.t
