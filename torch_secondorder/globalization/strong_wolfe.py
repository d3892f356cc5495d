"""Strong Wolfe line search: the brackets of Moré and Thuente, safeguarded cubic interpolation."""

from __future__ import annotations

from dataclasses import dataclass
from math import copysign, inf, isfinite, nan, sqrt

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder.globalization.line_search import (
    COLLAPSED,
    INDISTINCT,
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


@dataclass(frozen=True, slots=True)
class StrongWolfe:
    """A step at which the strong Wolfe conditions hold.

    These are sufficient decrease, ``phi(t) <= phi(0) + c1 t phi'(0)``, and a flat enough slope,
    ``|phi'(t)| <= c2 |phi'(0)|``. Where losses differ by no more than rounding, the first is read
    off the slope (`SearchStatus.APPROXIMATE_WOLFE`). Otherwise an optimizer would stall at a loss
    whose changes are below rounding, although its gradient is still accurate.

    The default `c2` is below the customary 0.9: as a line search in L-BFGS over 26 classical
    problems it saves 2% of the evaluations, and on networks nothing changes (measured; 0.65 and
    below cost more than they save).

    Args:
        c1: Sufficient decrease, in (0, 1).
        c2: Curvature, in (0, 1), at least `c1`.
        extrapolation: How far one step may go beyond the last, as a multiple of the last advance;
            above 1.
        max_evaluations: Budget of evaluations.

    Raises:
        ValueError: If an argument is out of its range.

    Reference:
        J. J. Moré, D. J. Thuente, *Line search algorithms with guaranteed sufficient decrease*,
        ACM TOMS 20 (1994) 286-307. Different here: a non-finite trial becomes the far end of the
        bracket; of losses within rounding of each other only the slopes are interpolated; the cubic
        is used throughout, kept off the ends of the interval, where the paper mixes in quadratic
        and secant steps; steps grow up to tenfold, not fivefold. In L-BFGS over 18 classical
        problems from six starts each, the last two saved 2% of the evaluations.

    Example:
        >>> phi = lambda t: Trial(t, (t - 3.0) ** 2, 2 * (t - 3.0))
        >>> result = StrongWolfe(c2=0.1)(phi, phi(0.0), 1.0, precision=2.2e-16)
        >>> result.status.name, round(result.trial.t, 6), result.evaluations
        ('WOLFE', 3.0, 2)
    """

    c1: float = 1e-4
    c2: float = 0.75
    extrapolation: float = 9.0
    max_evaluations: int = 25

    def __post_init__(self) -> None:
        check_number("c1", self.c1, above=0, below=1)
        check_number("c2", self.c2, above=0, below=1)
        if self.c2 < self.c1:
            raise ValueError(f"c2 must be at least c1 = {self.c1!r}, got {self.c2!r}")
        check_number("extrapolation", self.extrapolation, above=1, below=inf)
        check_integer("max_evaluations", self.max_evaluations)

    def __call__(self, phi: Phi, start: Trial, t0: float, *, precision: float) -> SearchResult:
        """Search along `phi`; see `LineSearch`."""
        allowance = ROUNDING * precision * abs(start.loss)
        flat = -self.c2 * start.slope
        # On a parabola, sufficient decrease is a slope of at most this.
        gentle = min(flat, (2.0 * self.c1 - 1.0) * start.slope)

        def accept(trial: Trial, sufficient: bool) -> SearchStatus | None:
            if abs(trial.slope) <= flat:
                if sufficient:
                    return SearchStatus.WOLFE
                if abs(trial.loss - start.loss) <= allowance and trial.slope <= gentle:
                    return SearchStatus.APPROXIMATE_WOLFE
            elif (
                trial.t >= start.longest
                and trial.slope < 0.0
                and (sufficient or abs(trial.loss - start.loss) <= allowance)
            ):
                return SearchStatus.LONGEST
            return None

        return run_search(
            self._propose(start, t0, allowance),
            accept,
            phi,
            start,
            t0,
            precision,
            fraction=self.c1,
            max_evaluations=self.max_evaluations,
        )

    def _propose(self, start: Trial, t: float, allowance: float) -> Proposals:
        """Bracket a minimum, then shrink the bracket (Moré & Thuente, sections 2 to 4).

        `best` is their alpha_l, the lowest point so far, at which the loss falls towards `far`;
        `far` is their alpha_u, unknown at first.
        """
        sufficient = self.c1 * start.slope
        longest, shortest = min(LONGEST * t, start.longest), SHORTEST * t
        t = min(t, longest)
        best, far = start, None
        auxiliary, walls, overshoots = True, 0, 0
        width = earlier_width = inf
        while t >= shortest:
            trial = yield t
            if not trial.finite:
                walls += 1
                far, width, earlier_width = trial, inf, inf
                if _collapsed(best, far, COLLAPSED):
                    return None
                t = retreat(best.t, trial.t, walls)
                continue
            walls = 0
            decreased = trial.loss <= start.loss + trial.t * sufficient
            if decreased and trial.slope >= 0.0:
                auxiliary = False
            elif decreased and trial.slope < sufficient and trial.t >= longest:
                return SearchStatus.UNBOUNDED
            # Until the loss has decreased sufficiently and then turned upward, the search works on
            # psi(t) = phi(t) - phi(0) - c1 t phi'(0): a minimum of it satisfies both conditions.
            tilt = sufficient if auxiliary and trial.loss <= best.loss and not decreased else 0.0
            low, new = _tilted(best, tilt), _tilted(trial, tilt)
            passed = _passed(low, new, allowance)
            higher = passed and new.loss > low.loss
            overshoots = overshoots + 1 if higher else 0
            if passed:
                t = _between(low, new, overshoots, allowance)
            else:
                t = _beyond(low, new, far, self._reach(best, trial, far, longest), allowance)
            kink = abs(trial.slope) > 0.9 * _steepest(best, far)
            if higher:
                far = trial
            else:
                best, far = trial, best if passed else far
            if far is None:
                continue
            if _collapsed(best, far, COLLAPSED if kink else INDISTINCT):
                return None
            if far.finite:
                # The bracket must shrink by a third in two steps, or it is halved.
                if abs(far.t - best.t) >= 0.66 * earlier_width:
                    t = best.t + 0.5 * (far.t - best.t)
                earlier_width, width = width, abs(far.t - best.t)
        return None

    def _reach(self, best: Trial, trial: Trial, far: Trial | None, longest: float) -> float:
        """The farthest that the next step may go beyond `trial`, seen from `best`."""
        if far is not None and far.finite:
            return trial.t + 0.66 * (far.t - trial.t)
        reach = min(trial.t + self.extrapolation * (trial.t - best.t), longest)
        if far is None:
            return reach
        midway = 0.5 * (trial.t + far.t)  # `far` is a wall of non-finite values
        return min(reach, midway) if far.t > trial.t else max(reach, midway)


def _collapsed(best: Trial, far: Trial, width: float) -> bool:
    return abs(far.t - best.t) <= width * max(far.t, best.t)


def _steepest(best: Trial, far: Trial | None) -> float:
    """The steepest end of the bracket; inside it slopes are flatter, unless it holds a kink."""
    return max(abs(best.slope), abs(far.slope) if far is not None and far.finite else 0.0)


def _tilted(trial: Trial, tilt: float) -> Trial:
    if tilt == 0.0:
        return trial
    return Trial(trial.t, trial.loss - tilt * trial.t, trial.slope - tilt)


def _passed(best: Trial, trial: Trial, allowance: float) -> bool:
    """True if a minimum lies between the two: the slope turned, or the loss clearly rose."""
    turned = (trial.slope > 0.0) != (best.slope > 0.0)
    return turned or trial.loss - best.loss > allowance


def _between(best: Trial, trial: Trial, overshoots: int, allowance: float) -> float:
    """A step between the two, not too near to either."""
    step = _secant(best, trial) if _unresolved(best, trial, allowance) else _cubic(best, trial)
    # The first time a cubic may be trusted from a tenth of the interval on. If trials were too long
    # several times in a row, the minimum is orders of magnitude nearer, and cubics through a huge
    # loss always say two thirds.
    length = trial.t - best.t
    margin = 0.1 if best.t == 0.0 else 1e-3
    nearest = best.t + margin ** max(1, overshoots) * length
    farthest = best.t + (1.0 - margin if overshoots < 2 else 0.5 ** (overshoots - 1)) * length
    return _guarded(step, nearest, farthest)


def _beyond(best: Trial, trial: Trial, far: Trial | None, reach: float, allowance: float) -> float:
    """A step beyond `trial`, up to `reach`."""
    step = _secant(best, trial) if _unresolved(best, trial, allowance) else _cubic(best, trial)
    if abs(trial.slope) >= abs(best.slope):  # it gets steeper: what is behind says nothing
        step = _cubic(trial, far) if far is not None and far.finite else reach
    elif not (step - trial.t) * (reach - trial.t) > 0.0:  # no minimum beyond the trial
        step = reach
    return _guarded(step, trial.t + 0.01 * (reach - trial.t), reach)


def _unresolved(a: Trial, b: Trial, allowance: float) -> bool:
    return abs(a.loss - b.loss) <= allowance


def _secant(a: Trial, b: Trial) -> float:
    """The zero of the line through the slopes at `a` and `b`; nan if the slopes are equal."""
    bend = b.slope - a.slope
    return b.t - b.slope * ((b.t - a.t) / bend) if bend else nan


def _cubic(a: Trial, b: Trial) -> float:
    """The minimizer of the cubic through losses and slopes at `a` and `b`; nan if it has none.

    Nocedal & Wright 2006, equation 3.59, with slopes scaled so that squares do not overflow.
    """
    chord = 3.0 * ((b.loss - a.loss) / (b.t - a.t))
    scale = max(abs(chord), abs(a.slope), abs(b.slope))
    if not 0.0 < scale < inf:
        return nan
    left, right = a.slope / scale, b.slope / scale
    d1 = left + right - chord / scale
    square = d1 * d1 - left * right
    if square < 0.0:
        return nan
    d2 = copysign(sqrt(square), b.t - a.t)
    bend = right - left + 2.0 * d2
    return b.t - (b.t - a.t) * ((right + d2 - d1) / bend) if bend else nan


def _guarded(step: float, low: float, high: float) -> float:
    """`step` moved between two bounds (in either order), the middle if it is not finite."""
    if not isfinite(step):
        return 0.5 * (low + high)
    return min(max(step, low), high) if low < high else min(max(step, high), low)
