"""Rules for damping and trust radius, and the operators that go with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.dense_operators import Dense, symmetric, vector_of
from torch_secondorder.curvature import Damped, Diagonal
from torch_secondorder.globalization import MarquardtDamping, NielsenDamping, TrustRegion

NAN, INF = math.nan, math.inf
POSITIVE = st.floats(1e-20, 1e20)
RATIOS = st.floats(allow_nan=True, allow_infinity=True)


@pytest.mark.parametrize(
    ("gain_ratio", "gradient_ratio", "factor"),
    [
        (-3.0, 1.0, 1.5),
        (0.0, 0.0, 1.5),
        (0.2499, 1.0, 1.5),
        (NAN, 1.0, 1.5),
        (-INF, 1.0, 1.5),
        (0.25, 1.0, 1.0),
        (0.5, 1e-3, 1.0),
        (0.75, 1.0, 1.0),
        (0.7501, 1.0, 2 / 3),
        (1.0, 5.0, 2 / 3),
        (INF, 1.0, 2 / 3),
        (1.0, 0.1, 0.1),  # no slower than the gradient
        (1.0, 0.0, 0.0),
        (1.0, NAN, 2 / 3),
        (1.0, INF, 2 / 3),
    ],
)
def test_the_damping(gain_ratio: float, gradient_ratio: float, factor: float) -> None:
    rule = MarquardtDamping()
    expected = max(2.0 * factor, rule.smallest)
    assert rule.updated(2.0, gain_ratio, gradient_ratio) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("gain_ratio", "length", "radius"),
    [
        (-1.0, 2.0, 0.5),
        (0.2499, 2.0, 0.5),
        (NAN, 2.0, 0.5),
        (-INF, 2.0, 0.5),
        (0.1, 0.4, 0.1),  # shorter than the radius: shrinks to where it was
        (0.25, 2.0, 2.0),
        (0.75, 2.0, 2.0),
        (0.7501, 2.0, 4.0),
        (INF, 2.0, 4.0),
        (1.0, 1.99, 4.0),
        (1.0, 1.9, 2.0),  # not held back
    ],
)
def test_the_radius(gain_ratio: float, length: float, radius: float) -> None:
    assert TrustRegion().updated(2.0, gain_ratio, length) == pytest.approx(radius, rel=1e-15)


def test_bounds_hold() -> None:
    rule = MarquardtDamping(initial=1.0, smallest=0.5, largest=2.0)
    assert rule.updated(1.9, 0.0) == rule.raised(1.9) == 2.0
    assert rule.updated(0.6, 1.0) == 0.5
    assert TrustRegion(largest=3.0).updated(2.0, 1.0, 2.0) == 3.0


def test_bounds_are_relative_to_the_beginning() -> None:
    rule = MarquardtDamping(smallest=0.5, largest=2.0)
    assert rule.updated(1.9e-30, 0.0, 1.0, 1e-30) == rule.raised(1.9e-30, 1, 1e-30) == 2e-30
    assert rule.updated(0.6e-30, 1.0, 1.0, 1e-30) == 0.5e-30
    assert TrustRegion(largest=3.0).updated(2e30, 1.0, 2e30, 1e30) == pytest.approx(3e30)


@pytest.mark.parametrize(
    ("curvature", "damping"), [(INF, 2 / 3), (2.0, 2 / 3), (0.5, 0.5), (0.01, 0.1), (-1.0, 0.1)]
)
def test_damping_above_the_curvature_falls_fast(curvature: float, damping: float) -> None:
    rule = MarquardtDamping()
    assert rule.updated(1.0, 1.0, 1.0, 1.0, curvature) == pytest.approx(damping)
    assert rule.updated(1.0, 0.5, 1.0, 1.0, curvature) == 1.0
    assert rule.updated(1.0, 0.1, 1.0, 1.0, curvature) == 1.5


def test_where_rules_begin() -> None:
    for scale in (1e-30, 1.0, 1e30):
        assert MarquardtDamping().begun(scale) == pytest.approx(0.03 * scale)
        assert TrustRegion().begun(scale) == pytest.approx(10 * scale)
        assert MarquardtDamping(initial=3.0).begun(scale) == 3.0
        assert TrustRegion(initial=3.0).begun(scale) == 3.0


@given(damping=POSITIVE, gain_ratio=RATIOS, gradient_ratio=st.floats(0, 1e10))
def test_the_damping_stays_in_bounds_and_goes_the_right_way(
    damping: float, gain_ratio: float, gradient_ratio: float
) -> None:
    rule = MarquardtDamping()
    updated = rule.updated(damping, gain_ratio, gradient_ratio)
    assert rule.smallest <= updated <= rule.largest
    if not gain_ratio >= rule.poor:
        assert updated > damping or updated == rule.largest
    elif gain_ratio > rule.good:
        assert updated < damping or updated == rule.smallest
    else:
        assert updated == damping


@given(damping=POSITIVE, ratios=st.tuples(RATIOS, RATIOS))
def test_better_steps_are_never_damped_more(damping: float, ratios: tuple[float, float]) -> None:
    rule = MarquardtDamping()
    ordered = sorted((-INF if math.isnan(ratio) else ratio) for ratio in ratios)
    worse, better = (rule.updated(damping, ratio) for ratio in ordered)
    assert worse >= better


@given(
    damping=st.just(0.0) | st.floats(1e-300, 1e300),
    increase=st.floats(1.001, 1e300),
    times=st.integers(1, 10**6),
)
def test_raised_many_times_is_largest_and_no_error(
    damping: float, increase: float, times: int
) -> None:
    rule = MarquardtDamping(increase=increase, smallest=1e-300, largest=1e300)
    raised = rule.raised(damping, times)
    assert max(damping, rule.smallest) < raised <= rule.largest or raised == rule.largest
    assert rule.raised(damping, times + 1) >= raised
    try:
        power = increase**times
    except OverflowError:
        power = INF
    expected = min(max(damping, rule.smallest) * power, rule.largest)
    assert raised == pytest.approx(expected, rel=1e-9)


# Nielsen's rule.


@pytest.mark.parametrize(
    ("gain_ratio", "factor"),
    [(1.0, 1 / 3), (5.0, 1 / 3), (0.9, 1 - 0.8**3), (0.5, 1.0), (0.25, 1.125), (0.0, 2.0)],
)
def test_nielsens_damping(gain_ratio: float, factor: float) -> None:
    assert NielsenDamping().updated(2.0, gain_ratio) == pytest.approx(2.0 * factor, rel=1e-12)


@pytest.mark.parametrize("gain_ratio", [-1.0, NAN, -INF])
def test_nielsens_damping_grows_after_a_failure(gain_ratio: float) -> None:
    assert NielsenDamping().updated(2.0, gain_ratio) == 4.0


@pytest.mark.parametrize(
    ("gain_ratio", "gradient_ratio", "factor"),
    [(1.0, 0.1, 0.1), (1.0, 0.9, 1 / 3), (0.9, 0.1, 0.488), (1.0, 0.0, 1e-3), (1.0, NAN, 1 / 3)],
)
def test_nielsens_damping_falls_with_the_gradient(
    gain_ratio: float, gradient_ratio: float, factor: float
) -> None:
    found = NielsenDamping().updated(2.0, gain_ratio, gradient_ratio)
    assert found == pytest.approx(2.0 * factor, rel=1e-12)


def test_nielsens_damping_after_rejected_steps() -> None:
    rule, damping = NielsenDamping(), 1.0
    for failures, expected in enumerate((2.0, 8.0, 64.0, 1024.0), 1):
        damping = rule.rejected(damping, failures)
        assert damping == expected
    assert rule.rejected(1.0, 10**6) == rule.largest
    assert MarquardtDamping().rejected(1.0, 1) == pytest.approx(1.5**3)


def test_nielsens_damping_stays_in_bounds() -> None:
    rule = NielsenDamping(initial=2.0, smallest=0.5, largest=2.0)
    assert rule.begun(7.0) == 2.0
    assert rule.updated(0.6, 1.0) == 0.5
    assert rule.updated(1.9, -1.0) == rule.rejected(1.9, 3) == 2.0
    assert NielsenDamping().begun(7.0) == pytest.approx(7e-3)


def test_raised_by_the_number_of_failures() -> None:
    rule = MarquardtDamping(increase=2.0)
    assert [rule.raised(3.0, times) for times in range(4)] == [3.0, 6.0, 12.0, 24.0]
    assert rule.raised(3.0) == 6.0


@given(radius=POSITIVE, gain_ratio=RATIOS, share=st.floats(1e-3, 1.0))
def test_the_radius_stays_in_bounds_and_goes_the_right_way(
    radius: float, gain_ratio: float, share: float
) -> None:
    rule, length = TrustRegion(), share * radius
    updated = rule.updated(radius, gain_ratio, length)
    assert 0 < updated <= rule.largest
    if not gain_ratio >= rule.poor:
        assert updated == rule.shrink * length
    elif gain_ratio > rule.good and share >= 0.99:
        assert updated > radius or updated == rule.largest
    else:
        assert updated == radius


@given(radius=POSITIVE, share=st.floats(1e-3, 1.0), ratios=st.tuples(RATIOS, RATIOS))
def test_better_steps_are_never_trusted_less(
    radius: float, share: float, ratios: tuple[float, float]
) -> None:
    rule = TrustRegion()
    ordered = sorted((-INF if math.isnan(ratio) else ratio) for ratio in ratios)
    worse, better = (rule.updated(radius, ratio, share * radius) for ratio in ordered)
    assert worse <= better


@pytest.mark.parametrize("rule", [MarquardtDamping(), NielsenDamping(), TrustRegion()])
def test_rules_are_values(rule: MarquardtDamping | NielsenDamping | TrustRegion) -> None:
    assert rule == type(rule)() and hash(rule) == hash(type(rule)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.initial = 3.0  # type: ignore[misc]


# Operators.


def test_a_diagonal(device: torch.device) -> None:
    entries = vector_of(5).to(device)
    operator = Diagonal(entries)
    assert operator.size == 5 and operator.dtype == entries.dtype
    assert operator.device == entries.device
    v, several = vector_of(5, 1).to(device), torch.stack([entries, entries + 1], dim=1)
    torch.testing.assert_close(operator @ v, entries.diag() @ v)
    torch.testing.assert_close(operator @ several, entries.diag() @ several)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_damped_operator(dtype: torch.dtype, damping: float, device: torch.device) -> None:
    a = symmetric(vector_of(5)).to(device, dtype)
    inner = Dense(a)
    inner.dtype, inner.device = dtype, a.device
    operator = Damped(inner, damping)
    assert (operator.size, operator.dtype, operator.device) == (5, dtype, a.device)
    eye = torch.eye(5, dtype=dtype, device=device)
    one_by_one = torch.stack([operator @ e for e in eye], dim=1)
    torch.testing.assert_close(one_by_one, a + damping * eye)
    torch.testing.assert_close(operator @ eye, a + damping * eye)
    assert inner.products == 10 and one_by_one.dtype == dtype


def test_the_damping_is_that_at_the_time_of_the_product() -> None:
    v = torch.tensor([3.0, 4.0])
    operator = Damped(Diagonal(torch.tensor([1.0, 2.0])), 10.0)
    assert (operator @ v).tolist() == [33.0, 48.0]
    operator.damping = 0.0
    assert (operator @ v).tolist() == [3.0, 8.0]
    assert v.tolist() == [3.0, 4.0]


class Itself(Diagonal):
    """The identity that gives its argument away."""

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return v

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        return V


def test_damping_writes_to_nothing_that_was_given() -> None:
    v = torch.ones(2)
    operator = Damped(Itself(v), 1.0)
    assert (operator @ v).tolist() == [2.0, 2.0] and v.tolist() == [1.0, 1.0]
    assert (operator @ v[:, None]).tolist() == [[2.0], [2.0]] and v.tolist() == [1.0, 1.0]


DAMPING = "initial must be a finite number above 0 or None, got "
BOUNDS = "bounds are relative to the damping to begin with, 0 < smallest <= 1 <= largest, got "
FACTORS = r"decrease must lie in \(0, 1\) and increase above 1, got "
RADIUS = "initial must be a finite number above 0 or None, got "
LARGEST = "largest must be a finite number of at least 1, got "
SHRINK = r"shrink must lie in \(0, 1\) and grow above 1, got "
ACCEPT = "gain ratios need 0 <= accept < poor < good, got "
SHAPES = r"this operator multiplies shapes \(2,\) and \(2, k\), got "


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MarquardtDamping(initial=0.0), DAMPING + "0.0"),
        (lambda: MarquardtDamping(initial=NAN), DAMPING + "nan"),
        (lambda: MarquardtDamping(initial=INF), DAMPING + "inf"),
        (lambda: MarquardtDamping(smallest=2.0), BOUNDS + "2.0 and 1e[+]20"),
        (lambda: MarquardtDamping(smallest=0.0), BOUNDS),
        (lambda: MarquardtDamping(largest=0.5), BOUNDS + "1e-20 and 0.5"),
        (lambda: MarquardtDamping(largest=INF), BOUNDS),
        (lambda: NielsenDamping(initial=0.0), DAMPING + "0.0"),
        (lambda: NielsenDamping(smallest=2.0), BOUNDS + "2.0 and 1e[+]20"),
        (lambda: NielsenDamping(share=0.0), "share must be a finite number above 0, got 0.0"),
        (lambda: NielsenDamping(decrease=1.0), r"decrease must lie in \(0, 1\), got 1.0"),
        (lambda: NielsenDamping(good=0.0), "good must be a finite number above 0, got 0.0"),
        (lambda: MarquardtDamping(increase=1.0), FACTORS + "0.66.* and 1.0"),
        (lambda: MarquardtDamping(increase=INF), FACTORS),
        (lambda: MarquardtDamping(decrease=1.0), FACTORS + "1.0 and 1.5"),
        (lambda: MarquardtDamping(decrease=0.0), FACTORS),
        (lambda: MarquardtDamping(decrease=NAN), FACTORS),
        (lambda: MarquardtDamping(poor=0.75), "gain ratios need 0 < poor < good, got 0.75 and"),
        (lambda: MarquardtDamping(poor=0.0), "gain ratios need 0 < poor < good, got 0.0 and"),
        (lambda: MarquardtDamping(good=NAN), "gain ratios need 0 < poor < good, got 0.25 and"),
        (lambda: TrustRegion(initial=0.0), RADIUS + "0.0"),
        (lambda: TrustRegion(initial=NAN), RADIUS + "nan"),
        (lambda: TrustRegion(initial=INF), RADIUS + "inf"),
        (lambda: TrustRegion(largest=0.5), LARGEST + "0.5"),
        (lambda: TrustRegion(largest=INF), LARGEST),
        (lambda: TrustRegion(shrink=0.0), SHRINK + "0.0 and 2.0"),
        (lambda: TrustRegion(shrink=1.0), SHRINK),
        (lambda: TrustRegion(grow=1.0), SHRINK + "0.25 and 1.0"),
        (lambda: TrustRegion(grow=NAN), SHRINK),
        (lambda: TrustRegion(accept=-0.1), ACCEPT + "-0.1, 0.25, 0.75"),
        (lambda: TrustRegion(accept=0.25), ACCEPT),
        (lambda: TrustRegion(poor=0.75), ACCEPT),
        (lambda: TrustRegion(good=NAN), ACCEPT),
        (lambda: Diagonal(torch.ones(2)) @ torch.ones(3), SHAPES + r"\(3,\)"),
        (lambda: Diagonal(torch.ones(2)) @ torch.ones(1, 2), SHAPES + r"\(1, 2\)"),
        (lambda: Damped(Diagonal(torch.ones(2)), 1.0) @ torch.ones(2, 1, 1), SHAPES),
        (lambda: Damped(Diagonal(torch.ones(2)), 1.0) @ torch.tensor(1.0), SHAPES + r"\(\)"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
