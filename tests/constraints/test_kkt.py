"""The certificate of a constrained minimum: each condition, estimates, curvature, words."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.constrained_problems import CONSTRAINED_BY_NAME
from torch_secondorder import kkt_residuals
from torch_secondorder.constraints import KKTReport
from torch_secondorder.constraints._estimates import estimated_multipliers

ROOT2, ROOT3 = math.sqrt(2.0), math.sqrt(3.0)

#: Minima of problems in the table, exact.
MINIMA: dict[str, tuple[float, ...]] = {
    "hs6": (1, 1),
    "hs7": (0, ROOT3),
    "hs9": (-3, -4),
    "hs10": (0, 1),
    "hs12": (2, 3),
    "hs14": ((math.sqrt(7) - 1) / 2, (math.sqrt(7) + 1) / 4),
    "hs15": (0.5, 2),
    "hs18": (math.sqrt(250), math.sqrt(2.5)),
    "hs22": (1, 1),
    "hs23": (1, 1),
    "hs24": (3, ROOT3),
    "hs27": (-1, 1, 0),
    "hs28": (0.5, -0.5, 0.5),
    "hs29": (4, 2 * ROOT2, 2),
    "hs31": (1 / ROOT3, ROOT3, 0),
    "hs34": (math.log(math.log(10)), math.log(10), 10),
    "hs35": (4 / 3, 7 / 9, 4 / 9),
    "hs36": (20, 11, 15),
    "hs37": (24, 12, 12),
    "hs39": (1, 1, 0, 0),
    "hs42": (2, 2, 0.6 * ROOT2, 0.8 * ROOT2),
    "hs43": (0, 1, 2, -1),
    "hs48": (1, 1, 1, 1, 1),
    "hs50": (1, 1, 1, 1, 1),
    "hs51": (1, 1, 1, 1, 1),
    "hs52": tuple(v / 349 for v in (-33, 11, 180, -158, 11)),
    "hs53": tuple(v / 43 for v in (-33, 11, 27, -5, 11)),
    "hs76": (3 / 11, 23 / 11, 0, 6 / 11),
}
#: Multipliers by hand: equalities, then inequalities without bounds.
MULTIPLIERS: dict[str, tuple[float, ...]] = {
    "hs6": (0,),
    "hs12": (0.5,),
    "hs15": (700, 0),
    "hs22": (2 / 3, 2 / 3),
    "hs35": (2 / 9,),
    "hs42": (-2, 5 / ROOT2 - 1),
    "hs43": (1, 0, 2),
}


def tensor(*values: float, device: torch.device | str = "cpu", dtype: Any = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or torch.float64, device=device, requires_grad=True)


def certified(name: str, x: Tensor, bounds: str = "rows", **more: Any) -> KKTReport:
    """The report on a problem of the table, with its bounds as rows or as bounds."""
    problem = CONSTRAINED_BY_NAME[name]
    inequalities = problem.inequalities
    if bounds == "rows":
        if len(problem.all_inequalities(x)):
            inequalities = problem.all_inequalities
    elif problem.low is not None or problem.high is not None:
        more["bounds"] = (problem.low, problem.high)
    return kkt_residuals(
        lambda: problem.function(x),
        [x],
        None if problem.equalities is None else (lambda: problem.equalities(x)),
        None if inequalities is None else (lambda: inequalities(x)),
        **more,
    )


def ball(x: Tensor, target: Tensor, **more: Any) -> KKTReport:
    """The report on the point of a unit ball that is nearest to a target."""
    return kkt_residuals(
        lambda: (x - target.detach()).square().sum() / 2,
        [x],
        inequalities={"ball": lambda: (x.square().sum() - 1) / 2},
        **more,
    )


# At minima.


@pytest.mark.parametrize("name", MINIMA)
@pytest.mark.parametrize("bounds", ["rows", "bounds"])
def test_residuals_vanish_at_known_minima(name: str, bounds: str) -> None:
    report = certified(name, tensor(*MINIMA[name]), bounds, second_order=True)
    assert report.largest < 1e-11, report
    assert report.summary.startswith("all conditions hold")
    assert report.verdict == "minimum", report.summary
    assert report.estimated and report.satisfied(1e-11)
    assert report.loss == pytest.approx(CONSTRAINED_BY_NAME[name].minimum, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("name", MULTIPLIERS)
def test_estimates_are_the_multipliers(name: str) -> None:
    report = certified(name, tensor(*MINIMA[name]), "bounds")
    found = torch.cat([y.reshape(-1) for y in report.multipliers.values()])
    torch.testing.assert_close(found, torch.tensor(MULTIPLIERS[name], dtype=torch.float64))


def test_multipliers_of_bounds_are_the_slopes_there() -> None:
    problem = CONSTRAINED_BY_NAME["hs36"]
    x = tensor(*MINIMA["hs36"])
    rows, held = certified("hs36", x, "rows"), certified("hs36", x, "bounds")
    ((slopes,),) = [held.bound_multipliers.values()]
    assert problem.high is not None
    # The rows: the constraint, three lower bounds, three upper ones.
    torch.testing.assert_close(-slopes, rows.multipliers["inequalities"][4:])
    assert slopes.lt(0).tolist() == [True, True, False]
    assert rows.bound_multipliers == {}


def test_the_pages_example(device: torch.device) -> None:
    A = torch.tensor([[2.0, 0], [1, 1], [0, 1]], dtype=torch.float64, device=device)
    b = torch.tensor([2.0, 1, 2.8], dtype=torch.float64, device=device)
    x = tensor(0.6, 0.8, device=device)
    report = kkt_residuals(
        lambda: (A @ x - b).square().sum() / 2, [x], None, lambda: x.square().sum() - 1
    )
    assert report.largest < 1e-14
    assert report.multipliers["inequalities"].item() == pytest.approx(1.0, abs=1e-13)
    assert report.active == ("inequalities",) and report.rank == 1 and not report.dependent


def test_float32_has_its_own_tolerance(device: torch.device) -> None:
    x = tensor(0.6, 0.8, device=device, dtype=torch.float32)
    report = ball(x, 2 * x, second_order=True)
    assert report.tolerance == pytest.approx(1e-3, rel=0.1)
    assert report.largest < 1e-6 and report.satisfied() and report.verdict == "minimum"
    x = tensor(0.6, 0.8 + 1e-4, device=device, dtype=torch.float32)
    assert ball(x, tensor(1.2, 1.6, device=device, dtype=torch.float32)).satisfied()


def test_a_problem_without_constraints_is_a_gradient() -> None:
    x = tensor(1.0, -2.0)
    report = kkt_residuals(lambda: (x**2).sum(), [x])
    assert (report.stationarity, report.worst) == (4.0, "stationarity")
    assert report.multipliers == {} and report.where["stationarity"] == "parameter 0[1]"
    assert report.relative["stationarity"] == 1.0
    x = tensor(0.0, 0.0)
    report = kkt_residuals(lambda: (x**2).sum(), [x], second_order=True)
    assert report.largest == 0.0 and report.curvature == 2.0
    assert report.summary.startswith("all conditions hold; a strict local minimum")


# Away from minima: each condition by itself.


def test_a_point_that_is_not_stationary() -> None:
    report = ball(tensor(0.8, 0.6), tensor(1.2, 1.6))
    assert report.worst == "stationarity" and report.feasibility < 1e-15
    assert report.signs == report.complementarity == 0.0
    # The slope that is left is tangential: (-.4, -1) less its part along (.8, .6).
    y = 0.4 * 0.8 + 1.0 * 0.6
    assert report.multipliers["ball"].item() == pytest.approx(y)
    assert report.stationarity == pytest.approx(1.0 - 0.6 * y)
    assert "the Lagrangian is not stationary: its slope is 0.448 at parameter 0[1]" in (
        report.summary
    )
    assert "the loss can still be lowered along the constraints" in report.summary
    assert not report.satisfied()


def test_a_point_that_is_not_feasible() -> None:
    x = tensor(0.66, 0.88)
    report = ball(x, tensor(1.2, 1.6))
    assert report.worst == "feasibility" and report.stationarity < 1e-14
    assert report.complementarity == report.signs == 0.0
    assert report.feasibility == pytest.approx(0.105)
    assert "the inequality 'ball' is violated by 0.105: it is 0.105 and has to be zero or less" in (
        report.summary
    )
    assert "contradict" not in report.summary
    equal = kkt_residuals(
        lambda: (x**2).sum(), [x], {"sums": lambda: torch.stack([x[0], x.sum() - 2])}
    )
    assert "the equality 'sums[0]' is violated by 0.66: it is 0.66 and has to be zero" in (
        equal.summary
    )
    assert "also violated" not in report.summary


def test_a_multiplier_of_the_wrong_sign() -> None:
    # At the maximum over the circle the slope is along the constraint's gradient.
    report = ball(tensor(0.6, 0.8), tensor(0.3, 0.4), multipliers={"ball": -0.5})
    assert report.worst == "signs" and report.signs == 0.5 and report.stationarity < 1e-15
    assert report.where["signs"] == "ball" and not report.estimated
    assert "the multiplier of the inequality 'ball' is -0.5 and must not be negative" in (
        report.summary
    )
    # An estimate has the right sign, so that the slope is what stays.
    estimate = ball(tensor(0.6, 0.8), tensor(0.3, 0.4))
    assert estimate.worst == "stationarity" and estimate.signs == 0.0
    # An equality may have any sign.
    x = tensor(0.6, 0.8)
    equal = kkt_residuals(
        lambda: (x - x.detach() / 2).square().sum() / 2,
        [x],
        {"circle": lambda: (x.square().sum() - 1) / 2},
        multipliers={"circle": -0.5},
    )
    assert equal.largest < 1e-15


def test_a_multiplier_of_a_constraint_with_slack() -> None:
    x = tensor(0.3, 0.4)
    report = ball(x, 2 * x, multipliers=torch.ones(1))
    assert report.worst == "complementarity" and report.stationarity < 1e-15
    assert report.complementarity == 0.375 and report.feasibility == 0.0
    assert (
        "the inequality 'ball' has a slack of 0.375 and a multiplier of 1, whose product 0.375 has "
        "to be zero"
    ) in report.summary
    assert ball(x, x, multipliers=torch.zeros(1)).largest == 0.0


def test_words_tell_a_bad_multiplier_from_a_bad_point() -> None:
    report = ball(tensor(0.6, 0.8), tensor(1.2, 1.6), multipliers={"ball": 1.5})
    assert "that is due to the multipliers, not to the point: estimated ones leave" in (
        report.summary
    )
    report = ball(tensor(0.8, 0.6), tensor(1.2, 1.6), multipliers={"ball": 0.92})
    assert "due to the multipliers" not in report.summary


def test_words_list_everything_that_is_violated() -> None:
    report = ball(tensor(1.0, 1.0), tensor(3.0, 1.0), multipliers={"ball": -1.0})
    assert "; also violated: " in report.summary and "signs" in report.summary
    assert "feasibility 0.5, signs 0.5 (relative)" in report.summary


def test_bounds_hold_slopes_and_can_be_violated() -> None:
    x = tensor(0.0, 2.0, 0.5)
    target = torch.tensor([-1.0, 3.0, 0.5], dtype=torch.float64)

    def report(**more: Any) -> KKTReport:
        return kkt_residuals(lambda: (x - target).square().sum() / 2, [("w", x)], **more)

    found = report(bounds=(0.0, 2.0))
    assert found.largest == 0.0 and found.bound_multipliers["w"].tolist() == [1.0, -1.0, 0.0]
    # A slope that leads inside counts, and one towards a bound as far as that is.
    assert report(bounds=(-0.25, 2.5)).stationarity == 0.5
    assert report(bounds=(None, 2.0)).where["stationarity"] == "w[0]"
    outside = report(bounds=(0.5, 2.0))
    assert outside.worst == "feasibility" and outside.feasibility == 0.5
    assert outside.summary.startswith("w[0] is out of its bounds by 0.5")


def test_infeasible_constraints_are_called_that() -> None:
    x = tensor(0.0)
    report = kkt_residuals(
        lambda: x.square().sum(), [x], None, {"low": lambda: 1 - x, "high": lambda: x + 1}
    )
    assert "the constraints contradict each other here: to the first order no step" in (
        report.summary
    )
    report = kkt_residuals(lambda: x.sum(), [x], {"circle": lambda: x.square() + 1})
    assert "contradict" in report.summary
    # An equality may be violated on either side.
    x = tensor(0.0)
    report = kkt_residuals(lambda: x.sum(), [x], {"one": lambda: x - 1}, {"high": lambda: x + 1})
    assert "contradict" in report.summary
    # Between two that exclude each other either one can be lessened, but not both.
    x = tensor(0.5)
    report = kkt_residuals(
        lambda: x.square().sum(), [x], None, {"low": lambda: 1 - x, "high": lambda: x + 1}
    )
    assert "contradict" in report.summary
    report = kkt_residuals(lambda: x.square().sum(), [x], None, {"low": lambda: 1 - x})
    assert report.feasibility == 0.5 and "contradict" not in report.summary
    # A constraint that holds, or a bound, may be in the way.
    x = tensor(0.6, 0.8)
    line = {"circle": lambda: x.square().sum() - 1, "plane": lambda: 0.6 * x[0] + 0.8 * x[1] - 2}
    report = kkt_residuals(lambda: x.sum(), [x], line)
    assert report.feasibility == 1.0 and "contradict" in report.summary
    # That comes first, even where another number is larger.
    less: dict[str, Any] = line | {"plane": lambda: 0.06 * x[0] + 0.08 * x[1] - 0.2}
    report = kkt_residuals(lambda: 1e3 * x[0], [x], less)
    assert report.worst == "stationarity"
    assert report.summary.startswith("the equality 'plane' is violated by 0.1: it is -0.1 and has")
    assert "also violated: stationarity" in report.summary
    x.data.copy_(torch.tensor([0.8, 0.6]))
    assert "contradict" not in kkt_residuals(lambda: x.sum(), [x], line).summary
    x = tensor(1.0, 0.0)
    sums: dict[str, Any] = {"sum": lambda: x.sum() - 3}
    report = kkt_residuals(lambda: x.sum(), [x], sums, bounds=(None, torch.tensor([1.0, 0.0])))
    assert "contradict" in report.summary
    report = kkt_residuals(lambda: x.sum(), [x], sums, bounds=(None, torch.tensor([1.0, 9.0])))
    assert "contradict" not in report.summary
    # Rounding contradicts nothing.
    x = tensor(0.0)
    report = kkt_residuals(
        lambda: x.square().sum(), [x], None, {"low": lambda: 1e-9 - x, "high": lambda: x + 1e-9}
    )
    assert report.satisfied() and "contradict" not in report.summary


# Scales.


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 100.0))
def test_the_units_of_a_steep_constraint_do_not_matter(seed: int, unit: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_()
    rows = 300 * torch.randn(3, 4, dtype=torch.float64, generator=generator)
    slope = torch.randn(4, dtype=torch.float64, generator=generator)

    def report(factor: float) -> KKTReport:
        return kkt_residuals(lambda: slope @ x, [x], None, lambda: factor * (rows @ x))

    first, scaled = report(1.0), report(unit)
    if unit > 0.2:
        assert scaled.relative == pytest.approx(first.relative, rel=1e-6, abs=1e-11)
    torch.testing.assert_close(
        unit * scaled.multipliers["inequalities"], first.multipliers["inequalities"],
        rtol=1e-6, atol=1e-10,
    )  # fmt: skip
    assert scaled.stationarity == pytest.approx(first.stationarity, rel=1e-6, abs=1e-10)


def test_relative_numbers_by_hand() -> None:
    x = tensor(2.0)
    report = kkt_residuals(
        lambda: (100 * x).sum(),
        [x],
        {"h": lambda: 50 * (x - 1)},
        {"g": lambda: 3 - 4 * x},
        multipliers={"h": torch.tensor([-10.0]), "g": torch.tensor([-2.0])},
    )
    assert (report.stationarity, report.feasibility) == (100 - 500 + 8, 50) or (
        report.stationarity == 392.0
    )
    assert report.signs == 2.0 and report.complementarity == 10.0
    assert report.relative == pytest.approx(
        {
            "stationarity": 392 / 500,
            "feasibility": 50 / 50,
            "signs": 8 / 500,
            "complementarity": 10 / 200,
        }
    )
    assert report.largest == 1.0 and report.worst == "feasibility"


# Estimates.


def by_enumeration(J: Tensor, g: Tensor, slack: Tensor, inequality: Tensor) -> float:
    """The least sum of squares over all sets of multipliers that are zero."""
    m = len(J)
    least = math.inf
    for chosen in itertools.product([False, True], repeat=m):
        on = torch.tensor(chosen) | ~inequality
        stacked = torch.cat([J.T, slack.diag()])[:, on]
        right = torch.cat([-g, torch.zeros_like(slack)])
        y = torch.linalg.lstsq(stacked, right[:, None], driver="gelsd").solution[:, 0]
        if bool((y < -1e-12)[inequality[on]].any()):
            continue
        least = min(least, float((stacked @ y - right).square().sum()))
    return least


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_estimates_are_least_squares(seed: int, m: int, n: int, twice: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(m, n, dtype=torch.float64, generator=generator)
    if twice:  # dependent
        J[-1] = J[0]
    g = torch.randn(n, dtype=torch.float64, generator=generator)
    inequality = torch.rand(m, generator=generator) < 0.6
    slack = torch.rand(m, dtype=torch.float64, generator=generator).mul(2).sub(1).clamp(min=0)
    slack = torch.where(inequality, slack, 0.0)
    y = estimated_multipliers(J, g, slack, inequality, None, 2e-16)
    assert bool((y[inequality] >= 0).all())
    found = float((g + J.T @ y).square().sum() + (slack * y).square().sum())
    assert found == pytest.approx(by_enumeration(J, g, slack, inequality), rel=1e-8, abs=1e-12)


def test_estimates_are_accurate_for_badly_scaled_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    J = torch.randn(6, 40, dtype=torch.float64, generator=generator)
    J[1] = J[0] + 1e-5 * J[1]
    J *= torch.logspace(-6, 6, 6, dtype=torch.float64)[:, None]
    wanted = torch.rand(6, dtype=torch.float64, generator=generator) / J.norm(dim=1)
    inequality = torch.tensor([False, False, True, True, True, True])
    y = estimated_multipliers(J, -J.T @ wanted, torch.zeros(6).double(), inequality, None, 2e-16)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=0)


def test_estimates_do_not_blame_what_bounds_hold() -> None:
    # The slope at the bound is 5 and is the bound's; the multiplier is that of the free entry.
    x = tensor(0.0, 1.0)
    report = kkt_residuals(
        lambda: 8 * x[0] - 3 * x[1], [x], None, {"sum": lambda: x.sum() - 1}, bounds=(0.0, None)
    )
    assert report.multipliers["sum"].item() == pytest.approx(3.0)
    assert report.largest < 1e-12 and report.bound_multipliers["parameter 0"][0] == 11.0
    # With the free entry at its bound too, some multiplier lets all slopes lead outside.
    x = tensor(0.0, 0.0)
    report = kkt_residuals(lambda: x[0] - x[1], [x], {"sum": lambda: x.sum()}, bounds=(0.0, None))
    assert report.largest < 1e-12 and report.multipliers["sum"].item() >= 1.0 - 1e-12


def test_an_inactive_constraint_gets_no_multiplier() -> None:
    x = tensor(0.6, 0.8)
    report = kkt_residuals(
        lambda: (x - 2 * x.detach()).square().sum() / 2,
        [x],
        None,
        {"ball": lambda: (x.square().sum() - 1) / 2, "larger": lambda: (x.square().sum() - 2) / 2},
    )
    assert report.multipliers["larger"].item() == 0.0
    assert report.active == ("ball",)


# Degenerate constraints.


def test_dependent_constraints_are_reported() -> None:
    x = tensor(0.6, 0.8)
    report = kkt_residuals(
        lambda: (x - 2 * x.detach()).square().sum() / 2,
        [x],
        {"circle": lambda: (x.square().sum() - 1) / 2},
        {"again": lambda: x.square().sum() - 1},
        second_order=True,
    )
    assert report.largest < 1e-12 and report.rank == 1 and report.dependent
    assert "the gradients of the 2 active constraints have rank 1" in report.summary
    assert report.verdict == "minimum"
    y = report.multipliers
    assert (y["circle"] + 2 * y["again"]).item() == pytest.approx(1.0)


def test_a_weakly_active_constraint() -> None:
    x = tensor(0.0, 0.0)

    def report(sign: float, second: float) -> KKTReport:
        return kkt_residuals(
            lambda: x[0] ** 2 + second * x[1] ** 2 + x[0] * x[1] * 0,
            [x],
            None,
            {"half": lambda: sign * x[0]},
            second_order=True,
        )

    found = report(1.0, 1.0)
    assert found.verdict == "minimum" and found.active == ("half",)
    assert found.multipliers["half"].item() == 0.0
    # Negative curvature along the constraint, and off it on the side that it allows.
    assert report(1.0, -1.0).verdict == "saddle"


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_negative_curvature_on_the_side_that_a_weak_constraint_allows(sign: float) -> None:
    x = tensor(0.0, 0.0)
    report = kkt_residuals(
        lambda: x[1] ** 2 - x[0] ** 2, [x], None, {"half": lambda: sign * x[0]}, second_order=True
    )
    assert report.verdict == "saddle" and report.curvature == -2.0
    assert report.direction["parameter 0"].tolist() == [-sign, 0.0]
    # A bound does the same.
    bounds = (None, 0.0) if sign > 0 else (0.0, None)
    report = kkt_residuals(lambda: x[1] ** 2 - x[0] ** 2, [x], bounds=bounds, second_order=True)
    assert report.verdict == "saddle"
    assert report.direction["parameter 0"].tolist() == [-sign, 0.0]


def test_weak_constraints_on_both_sides_leave_it_undecided() -> None:
    x = tensor(0.0, 0.0)
    report = kkt_residuals(
        lambda: x[0] * x[1] + x[1] ** 2, [x], None, {"cone": lambda: -x}, second_order=True
    )
    assert report.verdict == "undecided" and report.curvature is not None and report.curvature < 0
    assert "undecided to the second order" in report.summary


@pytest.mark.parametrize("bounded", [False, True])
def test_curvature_along_all_active_constraints_decides_where_that_off_them_does_not(
    bounded: bool,
) -> None:
    # The lowest curvature, -4, is along (1, -1, 0), which the cone does not allow on either side.
    x = tensor(0.0, 0.0, 0.0)
    options: dict[str, Any] = {"inequalities": {"cone": lambda: -x[:2]}}
    if bounded:
        options = {"bounds": (torch.tensor([0.0, 0.0, -1.0]), None)}
    report = kkt_residuals(lambda: 4 * x[0] * x[1] - x[2] ** 2, [x], second_order=True, **options)
    assert report.verdict == "saddle" and report.curvature == -2.0
    assert report.direction["parameter 0"].abs().tolist() == [0.0, 0.0, 1.0]


def test_a_constraint_that_repeats_a_bound_is_dependent() -> None:
    x = tensor(0.0, 0.0)
    report = kkt_residuals(
        lambda: x[0] + x[1] ** 2, [x], {"again": lambda: x[0]}, bounds=(0.0, None)
    )
    assert report.largest < 1e-15 and report.dependent and report.rank == 0


# Second order.


def test_a_saddle_is_told_from_a_minimum() -> None:
    # The nearest and the farthest point of a circle, both stationary.
    x = tensor(-0.6, -0.8)
    target = torch.tensor([0.3, 0.4], dtype=torch.float64)

    def report() -> KKTReport:
        return kkt_residuals(
            lambda: (x - target).square().sum() / 2,
            [("point", x)],
            {"circle": lambda: (x.square().sum() - 1) / 2},
            second_order=True,
        )

    found = report()
    assert found.satisfied(1e-12) and found.verdict == "saddle"
    # Hessian 1 + y, with y = -1.5.
    assert found.curvature == pytest.approx(-0.5)
    assert abs(found.direction["point"] @ x.detach()) < 1e-12
    assert "no minimum: the Lagrangian has curvature -0.5 along the constraints" in found.summary
    assert "point[0]" in found.summary
    x.data.neg_()
    found = report()
    assert found.verdict == "minimum" and found.curvature == pytest.approx(0.5)
    x.data.mul_(1.1)
    found = report()
    assert found.verdict is None and "the lowest curvature of the Lagrangian" in found.summary


def test_a_vertex_needs_no_curvature() -> None:
    x = tensor(0.0, 0.0)
    report = kkt_residuals(
        lambda: x.sum() - x.square().sum(), [x], bounds=(0.0, None), second_order=True
    )
    assert report.verdict == "minimum" and report.curvature is None and report.direction == {}
    assert "leave no direction" in report.summary
    x.data.fill_(0.1)
    report = kkt_residuals(
        lambda: x.sum(), [x], {"both": lambda: x * 1.0}, second_order=True, multipliers=None
    )
    assert "leave no direction to measure curvature in" in report.summary


@pytest.mark.parametrize("shift", [2.0, -0.5])
@pytest.mark.parametrize("bounded", [False, True])
def test_many_parameters_agree_with_a_dense_oracle(shift: float, bounded: bool) -> None:
    n, m = 320, 4
    generator = torch.Generator().manual_seed(3)
    J = torch.randn(m, n, dtype=torch.float64, generator=generator)
    H = torch.randn(n, n, dtype=torch.float64, generator=generator)
    H = H @ H.T / n + shift * torch.eye(n, dtype=torch.float64)
    x = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    slope = J.T @ torch.ones(m, dtype=torch.float64)
    free = torch.ones(n, dtype=torch.bool)
    options: dict[str, Any] = {}
    if bounded:
        free[:5] = False
        slope[:5] -= 3.0
        high = torch.full((n,), math.inf, dtype=torch.float64)
        high[:5] = 0.0
        options["bounds"] = (None, high)
    report = kkt_residuals(
        lambda: slope @ x + x @ H @ x / 2, [x], lambda: J @ x, second_order=True, **options
    )
    Z = torch.linalg.qr(J[:, free].T, mode="complete")[0][:, m:]
    lowest = torch.linalg.eigvalsh(Z.T @ H[free][:, free] @ Z)[0].item()
    assert report.largest < 1e-11
    assert report.curvature == pytest.approx(lowest, rel=1e-2)
    assert report.verdict == ("minimum" if lowest > 0 else "saddle")
    v = report.direction["parameter 0"]
    assert (J @ v).abs().max() < 1e-10 and v.norm().item() == pytest.approx(1.0)
    assert bool((v[~free] == 0).all())


def test_curvature_of_the_constraints_counts() -> None:
    # The loss alone curves downwards along the circle.
    x = tensor(1.0, 0.0)
    report = kkt_residuals(
        lambda: -3 * x[0] - x[1] ** 2,
        [x],
        None,
        {"circle": lambda: x.square().sum() - 1},
        second_order=True,
    )
    assert report.multipliers["circle"].item() == pytest.approx(1.5)
    assert report.curvature == pytest.approx(-2 + 2 * 1.5) and report.verdict == "minimum"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(0, 5), st.floats(-1.0, 3.0))
def test_verdicts_agree_with_the_critical_cone(seed: int, n: int, k: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    A, H = randn(k, n), randn(n, n)
    H = (H + H.T) / 2 + shift * torch.eye(n, dtype=torch.float64)
    y = randn(k).clamp(min=0)  # half of them weakly active
    x = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    report = kkt_residuals(
        lambda: x @ H @ x / 2 - (y @ A) @ x,
        [x],
        None,
        (lambda: A @ x) if k else None,
        multipliers=y if k else None,
        second_order=True,
    )
    assert report.largest < 1e-12
    strong, weak = A[y > 0], A[y == 0]
    rank = min(len(strong), n)
    basis = torch.linalg.qr(strong.T, mode="complete")[0][:, rank:]
    cone = basis @ randn(n - rank, 2000)
    cone = cone[:, (weak @ cone <= 0).all(0)]
    curvatures = (cone * (H @ cone)).sum(0)
    if report.verdict == "minimum":
        assert bool((curvatures >= -1e-9).all())
    if report.verdict == "saddle":
        v = report.direction["parameter 0"]
        assert bool(((strong @ v).abs() < 1e-9).all() and (weak @ v < 1e-6).all())
        assert float(v @ H @ v) == pytest.approx(report.curvature) and report.curvature < 0


# Prices.


def test_a_multiplier_is_a_price() -> None:
    """The least loss under `c = t`, solved again for several `t`, has the slope `-y`."""
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    H = H @ H.T + torch.eye(5, dtype=torch.float64)
    b = torch.randn(5, dtype=torch.float64, generator=generator)
    A = torch.randn(2, 5, dtype=torch.float64, generator=generator)

    def solved(t: Tensor) -> Tensor:
        system = torch.cat([torch.cat([H, A.T], 1), torch.cat([A, torch.zeros(2, 2).double()], 1)])
        return torch.linalg.solve(system, torch.cat([b, t]))[:5]

    def least(t: Tensor) -> float:
        x = solved(t)
        return float(x @ H @ x / 2 - b @ x)

    x = solved(torch.zeros(2).double()).requires_grad_()
    report = kkt_residuals(lambda: x @ H @ x / 2 - b @ x, [x], lambda: A @ x)
    for i, y in enumerate(report.multipliers["equalities"].tolist()):
        t = torch.zeros(2).double()
        t[i] = 1e-4
        assert (least(t) - least(-t)) / 2e-4 == pytest.approx(-y, rel=1e-6)


# Reports.


def test_a_report_prints_and_converts() -> None:
    report = certified("hs76", tensor(*MINIMA["hs76"]), second_order=True)
    text = str(report)
    assert text.startswith("KKTReport: all conditions hold")
    for word in ("stationarity", "complementarity", "estimated by least squares", "active"):
        assert word in text
    found = report.as_dict()
    json.dumps(found)
    assert found["largest"] == report.largest and len(found["multipliers"]["inequalities"]) == 7
    assert text.endswith("and 5 with slack and no multiplier")
    with pytest.raises(AttributeError):
        report.loss = 1.0  # type: ignore[misc]


def test_a_report_shows_the_constraints_that_matter_first() -> None:
    x = torch.linspace(-1, 1, 40, dtype=torch.float64).requires_grad_()
    y = {"sum": torch.tensor(0.0), "fall": torch.zeros(40)}
    y["fall"][33], y["fall"][7] = 2.29, -0.5
    report = kkt_residuals(
        lambda: x.square().sum(),
        [x],
        {"sum": lambda: x.sum()},
        {"fall": lambda: x - 1},
        multipliers=y,
    )
    assert report.equalities == ("sum",) and report.active == ("fall[39]",)
    lines = str(report).splitlines()
    rows = [line.split() for line in lines[lines.index("  multipliers, given") + 2 :]]
    assert [row[0] for row in rows[:4]] == ["fall[33]", "fall[7]", "sum", "fall[39]"]
    assert [row[-1] for row in rows[2:4]] == ["equality", "active"]
    assert lines[-1] == "    and 37 with slack and no multiplier" and len(rows) == 5
    many = kkt_residuals(lambda: x.sum(), [x], lambda: x, multipliers=torch.arange(40.0))
    assert str(many).endswith("and 28 more")
    assert str(many).count("equality") == 12
    idle = kkt_residuals(lambda: (x - x.detach()).square().sum(), [x], None, lambda: x - 2)
    assert "constraint " not in str(idle)
    assert str(idle).endswith("and 40 with slack and no multiplier")
