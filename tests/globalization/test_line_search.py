"""Line searches against a table of univariate problems, and against random ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_secondorder.globalization import (
    Armijo,
    FixedStep,
    HagerZhang,
    LineSearch,
    SearchResult,
    SearchStatus,
    StrongWolfe,
    Trial,
    resolve_line_search,
)

DOUBLE = 2.2e-16
SINGLE = 1.2e-7
INF, NAN = math.inf, math.nan

Function = Callable[[float], tuple[float, float]]

SEARCHES: dict[str, Any] = {
    "strong_wolfe": StrongWolfe(),
    "hager_zhang": HagerZhang(),
    "armijo": Armijo(),
    "fixed": FixedStep(),
}
WOLFE = ["strong_wolfe", "hager_zhang"]
DESCENDING = [*WOLFE, "armijo"]


@dataclass
class Recorder:
    """A phi that remembers its trials and gives each its own payload."""

    function: Function
    trials: list[Trial] = field(default_factory=list)

    def __call__(self, t: float) -> Trial:
        trial = Trial(t, *self.function(t), payload=object())
        self.trials.append(trial)
        return trial


def search_along(
    search: Any, function: Function, t0: float = 1.0, precision: float = DOUBLE
) -> SearchResult:
    """Search from t = 0, and check everything that every result owes to its caller."""
    start = Trial(0.0, *function(0.0), payload="start")
    phi = Recorder(function)
    result: SearchResult = search(phi, start, t0, precision=precision)
    trial, status = result.trial, result.status

    assert result.evaluations == len(phi.trials) <= getattr(search, "max_evaluations", 25)
    assert result.nonfinite == sum(not seen.finite for seen in phi.trials)
    assert all(0.0 < seen.t < INF for seen in phi.trials)
    assert len({seen.t for seen in phi.trials}) == len(phi.trials), "evaluated a step twice"
    for i, seen in enumerate(phi.trials):
        if not seen.finite:  # nothing beyond it, as seen from the lowest point
            sides = {later.t < seen.t for later in phi.trials[i + 1 :]}
            from_beyond = any(before.finite and before.t > seen.t for before in phi.trials[:i])
            assert sides <= {True} or (from_beyond and sides == {False})
    if not status.accepted:
        assert trial is start
        return result
    assert any(trial is seen for seen in phi.trials)
    assert trial.finite
    allowance = 4.0 * precision * abs(start.loss)
    rise = trial.loss - start.loss
    c1, c2 = wolfe_constants(search)
    if status is SearchStatus.WOLFE:
        assert trial.loss <= start.loss + c1 * trial.t * start.slope
        assert trial.slope >= c2 * start.slope
        assert isinstance(search, HagerZhang) or trial.slope <= -c2 * start.slope
    elif status is SearchStatus.APPROXIMATE_WOLFE:
        assert rise <= allowance
        assert c2 * start.slope <= trial.slope <= (2.0 * c1 - 1.0) * start.slope
    elif status is SearchStatus.ARMIJO:
        assert trial.loss <= start.loss + c1 * trial.t * start.slope
    elif status is SearchStatus.APPROXIMATE_ARMIJO:
        assert abs(rise) <= allowance
        assert trial.slope <= (2.0 * c1 - 1.0) * start.slope
    elif status is not SearchStatus.FIXED:
        assert status in (SearchStatus.IMPROVED, SearchStatus.UNBOUNDED)
        assert rise < 0.0
        assert trial.loss == min(seen.loss for seen in phi.trials if seen.finite)
    return result


def wolfe_constants(search: Any) -> tuple[float, float]:
    first, second = ("delta", "sigma") if isinstance(search, HagerZhang) else ("c1", "c2")
    return getattr(search, first, NAN), getattr(search, second, NAN)


# The six functions of Moré and Thuente (1994), section 5, with their mu and eta.


def more_thuente_1(t: float) -> tuple[float, float]:
    return -t / (t * t + 2.0), (t * t - 2.0) / (t * t + 2.0) ** 2


def more_thuente_2(t: float) -> tuple[float, float]:
    s = t + 0.004
    return s**5 - 2.0 * s**4, 5.0 * s**4 - 8.0 * s**3


def more_thuente_3(t: float) -> tuple[float, float]:
    beta, waves = 0.01, 39.0
    if t <= 1.0 - beta:
        value, slope = 1.0 - t, -1.0
    elif t >= 1.0 + beta:
        value, slope = t - 1.0, 1.0
    else:
        value, slope = (t - 1.0) ** 2 / (2.0 * beta) + beta / 2.0, (t - 1.0) / beta
    angle = waves * math.pi * t / 2.0
    value += 2.0 * (1.0 - beta) / (waves * math.pi) * math.sin(angle)
    return value, slope + (1.0 - beta) * math.cos(angle)


def yanai(beta1: float, beta2: float) -> Function:
    gamma1 = math.sqrt(1.0 + beta1**2) - beta1
    gamma2 = math.sqrt(1.0 + beta2**2) - beta2

    def function(t: float) -> tuple[float, float]:
        left, right = math.hypot(1.0 - t, beta2), math.hypot(t, beta1)
        return gamma1 * left + gamma2 * right, gamma1 * (t - 1.0) / left + gamma2 * t / right

    return function


MORE_THUENTE: dict[str, tuple[Function, float, float]] = {
    "1": (more_thuente_1, 1e-3, 0.1),
    "2": (more_thuente_2, 0.1, 0.1),
    "3": (more_thuente_3, 0.1, 0.1),
    "4": (yanai(0.001, 0.001), 1e-3, 1e-3),
    "5": (yanai(0.01, 0.001), 1e-3, 1e-3),
    "6": (yanai(0.001, 0.01), 1e-3, 1e-3),
}


def quadratic(t: float) -> tuple[float, float]:
    return 3.0 + (t - 1.0) ** 2, 2.0 * (t - 1.0)


def steep(t: float) -> tuple[float, float]:
    return 1.0 - t + 5e11 * t * t, -1.0 + 1e12 * t


def steep_quartic(t: float) -> tuple[float, float]:
    return -t + 1e12 * t**4, -1.0 + 4e12 * t**3


def flat(t: float) -> tuple[float, float]:
    return 1.0 - 1e-12 * math.tanh(t), -1e-12 * (1.0 - math.tanh(t) ** 2)


def far_quartic(t: float) -> tuple[float, float]:
    s = t * 1e-4 - 1.0
    return s**4, 4e-4 * s**3


def kink(t: float) -> tuple[float, float]:
    return abs(t - 0.3), math.copysign(1.0, t - 0.3)


def lopsided_kink(t: float) -> tuple[float, float]:
    return (0.3 - t, -1.0) if t < 0.3 else (50.0 * (t - 0.3), 50.0)


def exponential_wall(t: float) -> tuple[float, float]:
    if t > 1.0:
        return INF, INF
    rise = math.exp(600.0 * t)
    return rise - 1e3 * t, 600.0 * rise - 1e3


def log_barrier(t: float) -> tuple[float, float]:
    if t >= 0.9:
        return INF, NAN
    return -2.0 * t - 0.1 * math.log(0.9 - t), -2.0 + 0.1 / (0.9 - t)


def falling_to_nan(t: float) -> tuple[float, float]:
    return (NAN, NAN) if t > 0.3 else (-t, -1.0)


def nan_slope(t: float) -> tuple[float, float]:
    return (t - 0.2) ** 2, NAN if t > 0.5 else 2.0 * (t - 0.2)


def finite_near_zero(t: float) -> tuple[float, float]:
    return (-INF, -1.0) if t > 1e-9 else (-t, -1.0)


def nan_island(t: float) -> tuple[float, float]:
    if 0.2 < t < 0.8:
        return NAN, NAN
    return (t - 0.1) ** 2 - 1e-3 * t, 2.0 * (t - 0.1) - 1e-3


def nan_gap(t: float) -> tuple[float, float]:
    return (NAN, NAN) if 1.0 < t < 5.0 else (abs(t - 2.0), -1.0 if t < 2.0 else 1.0)


def wave(t: float) -> tuple[float, float]:
    """At t = 1 higher than the start and falling."""
    return -math.sin(1.6 * math.pi * t), -1.6 * math.pi * math.cos(1.6 * math.pi * t)


def linear(t: float) -> tuple[float, float]:
    return 5.0 - t, -1.0


def negative_exponential(t: float) -> tuple[float, float]:
    return (-math.exp(t), -math.exp(t)) if t < 700.0 else (-INF, -INF)


def wrong_slope(t: float) -> tuple[float, float]:
    return 1.0 + t, -1.0


PROBLEMS: dict[str, Function] = {
    **{f"more_thuente_{name}": function for name, (function, _, _) in MORE_THUENTE.items()},
    **{
        function.__name__: function
        for function in (
            quadratic,
            steep,
            steep_quartic,
            flat,
            far_quartic,
            kink,
            lopsided_kink,
            exponential_wall,
            log_barrier,
            falling_to_nan,
            nan_slope,
            finite_near_zero,
            nan_island,
            nan_gap,
            wave,
            linear,
            negative_exponential,
            wrong_slope,
        )
    },
}
STEPS = [1e-3, 0.1, 1.0, 10.0, 1e3]
UNSOLVABLE = {
    "lopsided_kink": {SearchStatus.IMPROVED, SearchStatus.WOLFE},  # the weak conditions hold
    "kink": {SearchStatus.IMPROVED, SearchStatus.WOLFE},
    "nan_gap": {SearchStatus.IMPROVED, SearchStatus.WOLFE},
    "falling_to_nan": {SearchStatus.IMPROVED},
    "finite_near_zero": {SearchStatus.IMPROVED},
    "linear": {SearchStatus.UNBOUNDED},
    "negative_exponential": {SearchStatus.UNBOUNDED, SearchStatus.IMPROVED},
    "wrong_slope": {SearchStatus.NO_DECREASE},
}
MET = {SearchStatus.WOLFE, SearchStatus.APPROXIMATE_WOLFE}


@pytest.mark.parametrize("t0", STEPS)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_on_every_problem(name: str, problem: str, t0: float) -> None:
    result = search_along(SEARCHES[name], PROBLEMS[problem], t0)
    if name in WOLFE:
        assert result.status in UNSOLVABLE.get(problem, MET)
    elif problem == "wrong_slope":
        expected = SearchStatus.FIXED if name == "fixed" else SearchStatus.NO_DECREASE
        assert result.status is expected
    else:
        assert result.status.accepted


@pytest.mark.parametrize("t0", STEPS)
@pytest.mark.parametrize("problem", MORE_THUENTE)
@pytest.mark.parametrize("name", WOLFE)
def test_the_tight_tolerances_of_more_and_thuente(name: str, problem: str, t0: float) -> None:
    function, mu, eta = MORE_THUENTE[problem]
    search = StrongWolfe(c1=mu, c2=eta) if name == "strong_wolfe" else HagerZhang(mu, eta)
    result = search_along(search, function, t0)
    assert result.status in MET
    assert result.evaluations <= (14 if name == "strong_wolfe" else 25)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_good_first_step_costs_one_evaluation(name: str) -> None:
    result = search_along(SEARCHES[name], quadratic, 0.9)
    assert (result.trial.t, result.evaluations, result.nonfinite) == (0.9, 1, 0)


@pytest.mark.parametrize(
    ("name", "problem", "t0", "most"),
    [
        ("strong_wolfe", steep, 1.0, 6),
        ("hager_zhang", steep, 1.0, 2),
        ("strong_wolfe", far_quartic, 1.0, 6),
        ("hager_zhang", far_quartic, 1.0, 8),
        ("strong_wolfe", exponential_wall, 1.0, 8),
        ("hager_zhang", exponential_wall, 1.0, 12),
        ("hager_zhang", steep_quartic, 1.0, 20),
        ("strong_wolfe", steep_quartic, 1.0, 10),
        ("strong_wolfe", log_barrier, 1e3, 8),
        ("hager_zhang", log_barrier, 1e3, 9),
        ("hager_zhang", wave, 1.0, 3),
        ("strong_wolfe", wave, 1.0, 3),
        ("armijo", steep, 1.0, 13),
        ("armijo", log_barrier, 1e3, 6),
        ("strong_wolfe", linear, 1.0, 12),
        ("hager_zhang", linear, 1.0, 16),
        ("strong_wolfe", kink, 1.0, 14),
        ("hager_zhang", kink, 1.0, 14),
    ],
)
def test_few_evaluations(name: str, problem: Function, t0: float, most: int) -> None:
    search = StrongWolfe(c2=0.9) if name == "strong_wolfe" else SEARCHES[name]
    assert search_along(search, problem, t0).evaluations <= most


def test_a_quadratic_is_solved_by_its_first_interpolation() -> None:
    result = search_along(StrongWolfe(c2=0.01), quadratic, 10.0)
    assert result.trial.t == pytest.approx(1.0)
    assert result.evaluations == 2
    result = search_along(Armijo(c1=0.4), quadratic, 3.0)
    assert result.trial.t == pytest.approx(1.0)
    assert result.evaluations == 2


def test_the_second_secant_of_hager_and_zhang() -> None:
    """On a slope that bends down, the first secant falls right of the minimum, the second left."""

    def function(t: float) -> tuple[float, float]:
        return t**1.5 / 1.5 - 0.3 * t, math.sqrt(t) - 0.3

    assert search_along(HagerZhang(delta=0.45, sigma=0.5), function, 0.5).evaluations == 3


@pytest.mark.parametrize("theta", [0.25, 0.5])
def test_the_cut_of_hager_and_zhang_after_a_rise(theta: float) -> None:
    assert search_along(HagerZhang(theta=theta), wave, 1.0).trial.t == theta


@pytest.mark.parametrize("name", DESCENDING)
@pytest.mark.parametrize(
    ("loss", "slope"),
    [(1.0, 0.0), (1.0, 2.0), (NAN, -1.0), (INF, -1.0), (1.0, NAN), (1.0, -INF), (-INF, -1.0)],
)
def test_a_start_without_descent_costs_nothing(name: str, loss: float, slope: float) -> None:
    result = search_along(SEARCHES[name], lambda _: (loss, slope))
    assert result.status is SearchStatus.NOT_DESCENT
    assert result.evaluations == 0


def test_a_fixed_step_asks_only_for_a_finite_start() -> None:
    assert search_along(FixedStep(), lambda t: (t, 1.0)).status is SearchStatus.FIXED
    assert search_along(FixedStep(), lambda t: (NAN, 1.0)).status is SearchStatus.NOT_DESCENT


@pytest.mark.parametrize("t0", [1e-3, 1.0, 1e3])
def test_a_fixed_step_may_raise_the_loss_but_not_to_infinity(t0: float) -> None:
    assert search_along(FixedStep(), quadratic, t0).trial.t == t0
    assert search_along(FixedStep(), log_barrier, t0).trial.t < 0.9


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("t0", STEPS)
def test_nothing_finite(name: str, t0: float) -> None:
    result = search_along(SEARCHES[name], lambda t: (0.0, -1.0) if t == 0.0 else (INF, NAN), t0)
    assert result.status is SearchStatus.NONFINITE
    assert result.evaluations == result.nonfinite <= 12


@pytest.mark.parametrize("name", ["strong_wolfe", "hager_zhang", "armijo"])
@pytest.mark.parametrize("budget", [1, 2, 3])
def test_a_spent_budget_returns_the_best_point(name: str, budget: int) -> None:
    search = type(SEARCHES[name])(max_evaluations=budget)
    assert search_along(search, wrong_slope).status is SearchStatus.NO_DECREASE
    result = search_along(search, log_barrier, 1e3)
    assert result.evaluations == budget
    assert result.status is SearchStatus.NONFINITE
    if name != "armijo":
        result = search_along(search, linear)
        assert result.evaluations == budget
        assert result.status is SearchStatus.IMPROVED


@pytest.mark.parametrize("t0", STEPS)
@pytest.mark.parametrize("problem", [kink, lopsided_kink])
def test_a_kink_is_closed_in(problem: Function, t0: float) -> None:
    """The strong conditions hold nowhere."""
    result = search_along(StrongWolfe(), problem, t0)
    assert result.status is SearchStatus.IMPROVED
    assert result.trial.loss < 0.01


@pytest.mark.parametrize("name", WOLFE)
def test_a_step_beyond_the_first_is_found(name: str) -> None:
    assert search_along(SEARCHES[name], far_quartic, 1e-3).trial.t > 100.0


@pytest.mark.parametrize("name", DESCENDING)
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4, 3e-5, 1e-5, 1e-6])
@pytest.mark.parametrize("t0", [0.1, 1.0, 1.9, 5.0])
def test_float32_losses_near_a_minimum(name: str, distance: float, t0: float) -> None:
    """Below a distance of 1e-4 the parabola is lost in the rounding of a loss of one."""

    def function(t: float) -> tuple[float, float]:
        s = np.float32(distance) * (np.float32(t) - np.float32(1.0))
        noise = np.float32(math.sin(1e4 * (t + 3.0))) * np.float32(SINGLE)
        return float(np.float32(1.0) + s * s + noise), float(2 * np.float32(distance) * s)

    result = search_along(SEARCHES[name], function, t0, SINGLE)
    assert result.status.accepted
    assert result.evaluations <= 4
    if name in WOLFE:
        assert abs(result.trial.slope) < 2.0 * distance**2 * (4.0 if t0 == 5.0 else 1.0)
    if distance < 1e-5:
        assert result.status.name.startswith(("APPROXIMATE", "WOLFE", "ARMIJO"))


@pytest.mark.parametrize("name", DESCENDING)
def test_the_allowance_follows_the_precision(name: str) -> None:
    """A rise of one part in ten million: rounding in float32, a worse point in float64."""

    def function(t: float) -> tuple[float, float]:
        return (1.0, -1e-9) if t == 0.0 else (1.0 + 1e-7, -1e-10)

    approximate = search_along(SEARCHES[name], function, 1.0, SINGLE).status
    assert approximate.name.startswith("APPROXIMATE")
    assert search_along(SEARCHES[name], function, 1.0).status is SearchStatus.NO_DECREASE


@pytest.mark.parametrize("name", DESCENDING)
def test_the_allowance_is_a_few_units_of_rounding(name: str) -> None:
    def function(t: float) -> tuple[float, float]:
        return (1.0, -1e-9) if t == 0.0 else (1.0 + 8.0 * SINGLE, -1e-10)

    assert search_along(SEARCHES[name], function, 1.0, SINGLE).status is SearchStatus.NO_DECREASE


@pytest.mark.parametrize("name", DESCENDING)
def test_an_equal_loss_is_no_decrease(name: str) -> None:
    """1e-30 is lost when added to one, so that sufficient decrease reads 1 <= 1."""
    flatter = search_along(SEARCHES[name], lambda t: (1.0, -1e-30 if t == 0.0 else -5e-31))
    assert flatter.status.name.startswith("APPROXIMATE")
    unchanged = search_along(SEARCHES[name], lambda t: (1.0, -1e-30))
    assert unchanged.status is SearchStatus.NO_DECREASE
    assert unchanged.evaluations == 1 or name != "armijo"


@pytest.mark.parametrize("search", [StrongWolfe(c1=0.3), HagerZhang(delta=0.3), Armijo(c1=0.3)])
def test_sufficient_decrease_is_read_off_the_slope(search: Any) -> None:
    """The line from -1 to 1 through slopes promises 0.3 of the decrease at a slope of 0.4."""

    def ending_in(slope: float) -> SearchStatus:
        return search_along(search, lambda t: (1.0, -1.0 if t == 0.0 else slope)).status

    assert ending_in(0.39).name.startswith("APPROXIMATE")
    assert ending_in(0.41) is SearchStatus.NO_DECREASE


def test_unresolved_losses_are_not_interpolated() -> None:
    def function(t: float) -> tuple[float, float]:
        return 1.0 + SINGLE * math.cos(50.0 * t), 1e-10 * (t - 1.0)

    result = search_along(StrongWolfe(), function, 5.0, SINGLE)
    assert result.trial.t == pytest.approx(1.0)
    assert result.evaluations == 2


def test_a_decrease_that_is_too_small_brackets_a_better_one() -> None:
    """The loss keeps falling, but slower than sufficient decrease wants it to beyond t = 0.2."""

    def function(t: float) -> tuple[float, float]:
        decay = math.exp(-10.0 * t)
        return 0.1 * (decay - 1.0) - 0.01 * t, -decay - 0.01

    result = search_along(StrongWolfe(c1=0.4), function, 1.0)
    assert result.status is SearchStatus.WOLFE
    assert result.evaluations <= 3


@pytest.mark.parametrize("name", DESCENDING)
def test_a_visible_decrease_is_not_approximate(name: str) -> None:
    assert not search_along(SEARCHES[name], quadratic, 0.5).status.name.startswith("APPROX")


@pytest.mark.parametrize("name", DESCENDING)
def test_extreme_magnitudes_raise_nothing(name: str) -> None:
    def huge(t: float) -> tuple[float, float]:
        return (1e308, -1e308) if t == 0.0 else (-1e308, 1e308)

    def tiny(t: float) -> tuple[float, float]:
        return 5e-324 * (t > 2.0), -5e-324 if t < 1.0 else 5e-324

    for function in (huge, tiny):
        for t0 in (5e-324, 1e-300, 1.0, 1e300):
            search_along(SEARCHES[name], function, t0)


coefficients = st.floats(-1e3, 1e3, allow_subnormal=False)


@st.composite
def random_functions(draw: st.DrawFn) -> Function:
    """Quartics over a squared pole, perhaps with a hole of nan or infinity."""
    a = draw(st.tuples(coefficients, st.floats(-1e3, -1e-6), *[coefficients] * 3))
    pole = draw(st.none() | st.floats(0.01, 100.0))
    hole = draw(st.none() | st.tuples(st.floats(1e-6, 10.0), st.floats(1.0, 1e9)))
    inside = draw(st.sampled_from([NAN, INF, -INF]))

    def function(t: float) -> tuple[float, float]:
        if hole is not None and hole[0] < t < hole[0] * hole[1]:
            return inside, draw_free_slope
        value = a[0] + t * (a[1] + t * (a[2] + t * (a[3] + t * a[4])))
        slope = a[1] + t * (2.0 * a[2] + t * (3.0 * a[3] + t * 4.0 * a[4]))
        if pole is not None:
            if t == pole:
                return NAN, NAN
            u = 1.0 / (pole - t)
            value, slope = value + u * u, slope + 2.0 * u * u * u
        return value, slope

    draw_free_slope = draw(st.sampled_from([NAN, 0.0, -1.0]))
    return function


@pytest.mark.parametrize("name", DESCENDING)
@given(function=random_functions(), t0=st.floats(1e-8, 1e8), precision=st.sampled_from([0.0, 1e-7]))
@settings(max_examples=300, deadline=None)
def test_random_functions(name: str, function: Function, t0: float, precision: float) -> None:
    result = search_along(SEARCHES[name], function, t0, precision)
    start = function(0.0)[0]
    assert result.trial.loss <= start + 4.0 * precision * abs(start)


@given(
    curvature=st.floats(1e-6, 1e6),
    minimum=st.floats(1e-3, 1e3),
    bend=st.floats(0.0, 10.0),
    t0=st.floats(1e-3, 1e3),
    name=st.sampled_from(WOLFE),
)
@settings(max_examples=300, deadline=None)
def test_convex_functions_are_always_solved(
    curvature: float, minimum: float, bend: float, t0: float, name: str
) -> None:
    def function(t: float) -> tuple[float, float]:
        s = t / minimum - 1.0
        value = curvature * (s * s + bend * s**4)
        return value, curvature * (2.0 * s + 4.0 * bend * s**3) / minimum

    assert search_along(SEARCHES[name], function, t0).status in MET


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("t0", [0.0, -1.0, NAN, INF])
def test_bad_first_step(name: str, t0: float) -> None:
    with pytest.raises(ValueError, match=f"t0 must be a finite number above 0, got {t0!r}"):
        SEARCHES[name](Recorder(quadratic), Trial(0.0, 1.0, -1.0), t0, precision=DOUBLE)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("precision", [-1e-16, 1.0, NAN])
def test_bad_precision(name: str, precision: float) -> None:
    with pytest.raises(ValueError, match=rf"precision must lie in \[0, 1\).* got {precision!r}"):
        SEARCHES[name](Recorder(quadratic), Trial(0.0, 1.0, -1.0), 1.0, precision=precision)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StrongWolfe(c1=0.0), r"c1 must lie in \(0, 1\), got 0.0"),
        (lambda: StrongWolfe(c2=1.0), r"c2 must lie in \(0, 1\), got 1.0"),
        (lambda: StrongWolfe(c2=NAN), r"c2 must lie in \(0, 1\), got nan"),
        (lambda: StrongWolfe(c1=0.5, c2=0.4), r"c2 must be at least c1 = 0.5, got 0.4"),
        (lambda: StrongWolfe(extrapolation=1.0), r"extrapolation must lie in \(1, inf\), got 1.0"),
        (lambda: StrongWolfe(max_evaluations=0), r"max_evaluations must be .* 1, got 0"),
        (lambda: StrongWolfe(c1="big"), r"c1 must lie in \(0, 1\), got 'big'"),  # type: ignore[arg-type]
        (lambda: HagerZhang(delta=0.5), r"delta must lie in \(0, 0.5\), got 0.5"),
        (lambda: HagerZhang(sigma=-1.0), r"sigma must lie in \(0, 1\), got -1.0"),
        (lambda: HagerZhang(delta=0.3, sigma=0.2), r"sigma must be at least delta = 0.3, got 0.2"),
        (lambda: HagerZhang(rho=1), r"rho must lie in \(1, inf\), got 1"),
        (lambda: HagerZhang(theta=1.5), r"theta must lie in \(0, 1\), got 1.5"),
        (lambda: HagerZhang(gamma=0.0), r"gamma must lie in \(0, 1\), got 0.0"),
        (lambda: HagerZhang(max_evaluations=-3), r"max_evaluations must be .* 1, got -3"),
        (lambda: Armijo(c1=2.0), r"c1 must lie in \(0, 1\), got 2.0"),
        (lambda: Armijo(shrink=1.0), r"shrink must lie in \(0, 1\), got 1.0"),
        (lambda: Armijo(max_evaluations=2.5), r"max_evaluations must be .* 1, got 2.5"),  # type: ignore[arg-type]
    ],
)
def test_bad_parameters(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_resolving_names() -> None:
    assert resolve_line_search(None) == FixedStep()
    assert resolve_line_search("strong_wolfe") == StrongWolfe()
    assert resolve_line_search("hager_zhang") == HagerZhang()
    assert resolve_line_search("armijo") == resolve_line_search("backtracking") == Armijo()


def test_resolving_passes_instances_and_functions_through() -> None:
    def own(phi: Any, start: Trial, t0: float, *, precision: float) -> SearchResult:
        return SearchResult(start, SearchStatus.NO_DECREASE, 0, 0)

    mine: LineSearch = Armijo(c1=0.2)
    assert resolve_line_search(mine) is mine
    assert resolve_line_search(own) is own


def test_resolving_what_is_no_line_search() -> None:
    known = "'strong_wolfe', 'hager_zhang', 'armijo', 'backtracking'"
    with pytest.raises(ValueError, match=f"one of {known}, or .* None, got 'wolf'"):
        resolve_line_search("wolf")
    for spec in (3, StrongWolfe):
        with pytest.raises(TypeError, match=r"line_search must be one of .* an instance such as"):
            resolve_line_search(spec)  # type: ignore[arg-type]


def test_statuses_read_as_sentences() -> None:
    assert len({status.value for status in SearchStatus}) == len(SearchStatus)
    assert all(status.value[0].isupper() and status.value[-1] == "." for status in SearchStatus)


def test_the_records_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Trial(0.0, 1.0, -1.0).t = 2.0  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        StrongWolfe().c1 = 0.5  # type: ignore[misc]
