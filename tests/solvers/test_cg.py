"""Conjugate gradients against dense solutions and a plain reference, and what they add to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.dense_operators import (
    EXACT,
    Dense,
    Identity,
    check_numbers,
    metric,
    spectrum,
    symmetric,
    vector_of,
)
from torch_secondorder._params import space
from torch_secondorder.curvature import Diagonal
from torch_secondorder.solvers import CG, SolveStatus

SIZES = [1, 2, 7, 40]


def quadratic(a: Tensor, b: Tensor, x: Tensor) -> float:
    return float(x @ (a @ x) / 2 - b @ x)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_against_a_dense_solution(size: int, preconditioned: bool, device: torch.device) -> None:
    a, b = symmetric(spectrum(size)).to(device), vector_of(size).to(device)
    operator = Dense(a)
    m = Dense(metric(size).to(device)) if preconditioned else None
    result = EXACT(operator, b, preconditioner=m)
    assert result.status is SolveStatus.CONVERGED and result.residual_norm <= 1e-10
    assert result.products == operator.products == result.iterations + result.iterations // 50
    torch.testing.assert_close(result.x, torch.linalg.solve(a, b), rtol=1e-7, atol=1e-7)
    assert result.length == 0.0 and result.iterates == ()
    check_numbers(result, a, b)


@given(
    size=st.integers(1, 15),
    iterations=st.integers(1, 8),
    preconditioned=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=40)
def test_each_iterate_is_the_best_of_its_krylov_space(
    size: int, iterations: int, preconditioned: bool, seed: int
) -> None:
    a = symmetric(torch.linspace(0.5, 4.0, size, dtype=torch.float64), seed)
    b = vector_of(size, seed)
    m = metric(size, seed + 1) if preconditioned else torch.eye(size, dtype=torch.float64)
    result = CG(iterations, 1e-9)(Dense(a), b, preconditioner=Dense(m) if preconditioned else None)
    check_numbers(result, a, b)
    columns = [m @ b / (m @ b).norm()]
    while len(columns) < result.iterations:
        v = m @ (a @ columns[-1])
        for _ in range(2):
            q = torch.stack(columns, dim=1)
            v = v - q @ (q.T @ v)
        columns.append(v / v.norm())
    q = torch.stack(columns, dim=1)
    best = q @ torch.linalg.solve(q.T @ a @ q, q.T @ b)
    torch.testing.assert_close(result.x, best, rtol=1e-5, atol=1e-5 * float(best.norm()))
    assert result.status in (SolveStatus.CONVERGED, SolveStatus.MAX_ITERATIONS)


def test_a_good_preconditioner_saves_iterations(device: torch.device) -> None:
    a, b = symmetric(spectrum(60)).to(device), vector_of(60).to(device)
    assert CG()(Dense(a), b, preconditioner=Dense(torch.linalg.inv(a))).iterations == 1
    assert CG()(Dense(a), b).iterations > 20


# Starts.


@pytest.mark.parametrize("preconditioned", [False, True])
def test_warm_start(preconditioned: bool, device: torch.device) -> None:
    a, b = symmetric(spectrum(20)).to(device), vector_of(20).to(device)
    m = Dense(metric(20).to(device)) if preconditioned else None
    exact = torch.linalg.solve(a, b)
    x0 = exact + 1e-3 * vector_of(20, 8).to(device)
    before = x0.clone()
    operator = Dense(a)
    result = CG(500, 1e-8)(operator, b, x0=x0, preconditioner=m)
    assert result.status is SolveStatus.CONVERGED and torch.equal(x0, before)
    assert result.products == operator.products == result.iterations + 1
    assert result.iterations <= CG(500, 1e-8)(Dense(a), b, preconditioner=m).iterations
    torch.testing.assert_close(result.x, exact, rtol=1e-4, atol=1e-4)
    check_numbers(result, a, b)
    at_once = CG()(Dense(a), b, x0=exact, preconditioner=m)
    assert (at_once.status, at_once.iterations) == (SolveStatus.CONVERGED, 0)
    check_numbers(at_once, a, b)


@given(
    sign=st.sampled_from([-1.0, 0.0, 1.0]),
    exponent=st.floats(-8, 8),
    seed=st.integers(0, 1000),
    iterations=st.integers(1, 4),
)
@settings(deadline=None, max_examples=40)
def test_a_start_is_scaled_to_the_least_along_it(
    sign: float, exponent: float, seed: int, iterations: int
) -> None:
    a, b = symmetric(spectrum(8), seed), vector_of(8, seed)
    x0 = sign * 10**exponent * vector_of(8, seed + 1)
    result = CG(iterations, 0.0)(Dense(a), b, x0=x0)
    check_numbers(result, a, b)
    along = float(b @ x0) / float(x0 @ (a @ x0)) if sign else 0.0
    start = max(along, 0.0) * x0
    assert quadratic(a, b, start) <= 0.0
    if along <= 0:
        torch.testing.assert_close(result.x, CG(iterations, 0.0)(Dense(a), b).x)
    # What CG gains from there is what it gains on the system of the correction.
    rest = CG(iterations, 0.0)(Dense(a), b - a @ start)
    torch.testing.assert_close(result.x, start + rest.x, rtol=1e-7, atol=1e-7)
    assert result.decrease >= -quadratic(a, b, start) * (1 - 1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_start_of_no_use_is_dropped(value: float, device: torch.device) -> None:
    a = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64, device=device).diag()
    b = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64, device=device)
    plain = CG()(Dense(a), b)
    for operator, x0 in (
        (Dense(a), torch.tensor([1.0, 0.0, 9.0]).to(b)),  # of negative curvature
        (Dense(a), torch.tensor([1.0, value, 0.0]).to(b)),
        (Dense(a, 1, value), b),
    ):
        result = CG()(operator, b, x0=x0)
        assert torch.equal(result.x, plain.x) and result.products == plain.products + 1
        check_numbers(result, a, b)


@pytest.mark.parametrize("start", [False, True])
def test_a_zero_right_hand_side(start: bool, device: torch.device) -> None:
    b = torch.zeros(4, dtype=torch.float64, device=device)
    result = CG()(Dense(symmetric(spectrum(4)).to(device)), b, x0=b + 1 if start else None)
    assert result.status is SolveStatus.CONVERGED and not result.x.any()
    assert (result.residual_norm, result.decrease, result.iterations) == (0.0, 0.0, 0)


# Ends.


def reference(
    a: Tensor, b: Tensor, progress: float, slack: float, recompute: int
) -> tuple[int, SolveStatus]:
    """Martens' rule on the solver's own iterates, with quadratic and residual computed from `x`.

    Not on those of another implementation: where rounding has spoilt the conjugacy of directions
    (from some 40 iterations on in these systems), two sequences differ by a few iterations, in
    amounts that depend on how the machine sums. They have to agree up to there only.
    """
    phis = [0.0]
    for i, textbook in enumerate(textbook_iterates(a, b), 1):
        # The same iterations bit for bit, up to the i-th.
        x = CG(i, tolerance=0.0, recompute=recompute)(Dense(a), b).x
        if i <= 20:
            torch.testing.assert_close(x, textbook, rtol=1e-6, atol=1e-9)
        phis.append(quadratic(a, b, x))
        size = float((b - a @ x).norm() / b.norm())
        k = max(10, math.ceil(0.1 * i))
        if size <= 1e-6:
            return i, SolveStatus.CONVERGED
        if size <= slack and i > k and (phis[i] - phis[i - k]) / phis[i] < k * progress:
            return i, SolveStatus.SLOW_PROGRESS
    raise AssertionError


def textbook_iterates(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    x, r = torch.zeros_like(b), b
    p, square = r, r @ r
    while True:
        image = a @ p
        alpha = square / (p @ image)
        x, r = x + alpha * p, r - alpha * image
        square, old = r @ r, square
        p = r + square / old * p
        yield x


@pytest.mark.parametrize("slack", [math.inf, 0.5, 0.03, 1e-3])
@pytest.mark.parametrize("progress", [0.0, 1e-6, 5e-4, 1e-2])
def test_it_stops_where_the_quadratic_has_stopped_falling(
    progress: float, slack: float, device: torch.device
) -> None:
    a, b = symmetric(torch.logspace(-2, 1, 90, dtype=torch.float64)), vector_of(90)
    a, b = a.to(device), b.to(device)
    iteration, status = reference(a, b, progress, slack, recompute=0)
    result = CG(1000, progress=progress, slack=slack, recompute=0)(Dense(a), b)
    assert (result.status, result.iterations) == (status, iteration)
    check_numbers(result, a, b)


def test_martens_looks_back_further_in_long_runs() -> None:
    a, b = symmetric(torch.logspace(-3.5, 1, 300, dtype=torch.float64)), vector_of(300)
    iteration, status = reference(a, b, 1e-5, math.inf, recompute=50)
    assert status is SolveStatus.SLOW_PROGRESS and iteration > 120
    result = CG(1000, progress=1e-5)(Dense(a), b)
    assert (result.status, result.iterations) == (status, iteration)


@pytest.mark.parametrize("radius", [None, 1e9])
def test_iterates_are_kept_at_growing_distances(radius: float | None, device: torch.device) -> None:
    a = symmetric(torch.logspace(-3, 1, 60, dtype=torch.float64)).to(device)
    b = vector_of(60).to(device)
    result = CG(31, keep_iterates=True)(Dense(a), b, radius=radius)
    places = [5, 7, 9, 11, 15, 19, 25]
    assert places == [math.ceil(5 * 1.3**j) for j in range(7)] and len(result.iterates) == 7
    for place, iterate in zip(places, result.iterates, strict=True):
        torch.testing.assert_close(iterate.x, CG(place)(Dense(a), b).x)
        assert iterate.decrease == pytest.approx(-quadratic(a, b, iterate.x), rel=1e-10)
    decreases = [*(it.decrease for it in result.iterates), result.decrease]
    assert all(p < q for p, q in pairwise(decreases))


@pytest.mark.parametrize("spoil", [0, 6])
def test_the_solution_is_not_among_the_iterates(spoil: int, device: torch.device) -> None:
    a, b = symmetric(spectrum(20)).to(device), vector_of(20).to(device)
    for iterations, kept in ((4, 0), (5, 0), (6, 1), (7, 1), (8, 2)):
        result = CG(iterations, keep_iterates=True)(Dense(a, spoil), b)
        assert len(result.iterates) == (0 if spoil else kept)
        assert all(not torch.equal(it.x, result.x) for it in result.iterates)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_in_float32_the_true_residual_is_looked_at(
    preconditioned: bool, device: torch.device
) -> None:
    a = symmetric(torch.logspace(-4, 0, 200, dtype=torch.float64), 1).to(device, torch.float32)
    b = vector_of(200).to(device, torch.float32)
    m = Dense(metric(200).to(b)) if preconditioned else None

    def true(x: Tensor) -> float:
        return float((b.double() - a.double() @ x.double()).norm() / b.double().norm())

    drifted = CG(1500, recompute=0)(Dense(a), b, preconditioner=m)
    assert drifted.status is SolveStatus.CONVERGED and true(drifted.x) > 100 * 1e-6
    for recompute in (50, 10):
        operator = Dense(a)
        result = CG(1500, recompute=recompute)(operator, b, preconditioner=m)
        assert result.status is SolveStatus.MAX_ITERATIONS
        assert operator.products == result.products == 1500 + 1500 // recompute
        assert result.residual_norm == pytest.approx(true(result.x), rel=0.2)
        assert true(result.x) < 2 * true(drifted.x)  # and it has stayed where it can be
        # Where there is a solution to be had in float32, it is found, and said to be found.
        easy = CG(1500, recompute=recompute)(Dense(a), a @ b, preconditioner=m)
        assert easy.status is SolveStatus.CONVERGED and true(easy.x) != easy.residual_norm
        left = (a @ b).double() - a.double() @ easy.x.double()
        assert float(left.norm() / (a @ b).double().norm()) <= 2e-6


# What is not finite, is written to, is waited for, is refused.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoil", [1, 4])
@pytest.mark.parametrize("radius", [None, 1e3])
def test_a_product_that_is_not_finite(
    spoil: int, value: float, radius: float | None, device: torch.device
) -> None:
    a, b = symmetric(spectrum(20)).to(device), vector_of(20).to(device)
    solved = CG(spoil - 1)(Dense(a), b).x if spoil > 1 else torch.zeros_like(b)
    result = CG()(Dense(a, spoil, value), b, radius=radius)
    assert result.status is SolveStatus.NONFINITE and result.products == spoil
    assert result.iterations == spoil - 1 and torch.equal(result.x, solved)
    check_numbers(result, a, b)
    eye = Dense(torch.eye(20, dtype=torch.float64, device=device), spoil, value)
    result = CG()(Dense(a), b, preconditioner=eye, radius=radius)
    assert result.status is SolveStatus.NONFINITE and result.iterations == spoil - 1
    check_numbers(result, a, b)


@pytest.mark.parametrize("spoil", [3, 4])
def test_a_true_residual_that_is_not_finite(spoil: int, device: torch.device) -> None:
    a, b = symmetric(spectrum(20)).to(device), vector_of(20).to(device)
    result = CG(recompute=3)(Dense(a, spoil), b)
    assert result.status is SolveStatus.NONFINITE and result.iterations == 2
    check_numbers(result, a, b)


def test_nothing_given_is_written_to(device: torch.device) -> None:
    b = vector_of(5).to(device).requires_grad_()
    before = b.detach().clone()
    for solver in (CG(), CG(recompute=1), CG(keep_iterates=True)):
        for m in (None, Identity()):
            for x0 in (None, 2 * b, -b):
                result = solver(Identity(), b, preconditioner=m, x0=x0)
                assert result.status is SolveStatus.CONVERGED and not result.x.requires_grad
                torch.testing.assert_close(result.x, before)
                assert torch.equal(b.detach(), before) and result.x is not b
    held = CG()(Identity(), b, preconditioner=Identity(), radius=0.5)
    torch.testing.assert_close(held.x, 0.5 * before / before.norm())
    assert torch.equal(b.detach(), before)


class Transfers(TorchDispatchMode):
    """Counts numbers that leave for the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("radius", [None, 1e9])
@pytest.mark.parametrize("negative", [False, True])
def test_the_device_is_waited_for_once_per_iteration(
    negative: bool, radius: float | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, numbers = 0, 0

    to_host = space.Space.to_host

    def counting(self: space.Space, **scalars: Sequence[Tensor]) -> list[float]:
        nonlocal waits, numbers
        found = to_host(self, **scalars)
        waits, numbers = waits + 1, numbers + len(found)
        return found

    monkeypatch.setattr(space.Space, "to_host", counting)
    eigenvalues = spectrum(20)
    if negative:
        eigenvalues[0] = -0.02
    a, b = symmetric(eigenvalues).to(device), vector_of(20).to(device)
    for m in (None, Dense(torch.eye(20, dtype=torch.float64, device=device))):
        waits = numbers = 0
        with Transfers() as transfers:
            solver = CG(recompute=5, keep_iterates=True, progress=1e-9)
            result = solver(Dense(a), b, preconditioner=m, radius=radius)
        assert result.iterations > 2
        more = 0 if not negative else 1 if radius else 2
        assert waits == result.iterations + 2 + more
        if device.type == "cpu":
            assert transfers.count == numbers


ONES, BAD = torch.ones(5), Dense(-torch.eye(5))
LATER = (Dense(torch.arange(1.0, 6.0).diag()), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CG(0), "max_iterations must be an integer of at least 1, got 0"),
        (lambda: CG(2.5), "max_iterations must be an integer of at least 1, got 2.5"),
        (lambda: CG(recompute=-1), "recompute must be an integer of at least 0, got -1"),
        (lambda: CG(tolerance=1.0), r"tolerance must lie in \[0, 1\), got 1.0"),
        (lambda: CG(tolerance=math.nan), r"tolerance must lie in \[0, 1\), got nan"),
        (lambda: CG(progress=-1e-3), r"progress must lie in \[0, 1\), got -0.001"),
        (lambda: CG(slack=0.0), "slack must be above 0, got 0.0"),
        (lambda: CG(slack=math.nan), "slack must be above 0, got nan"),
        (lambda: CG()(Identity(), torch.ones(4)), r"b must have shape \(5,\), got \(4,\)"),
        (
            lambda: CG()(Identity(), ONES, x0=ONES[:, None]),
            r"x0 must have shape \(5,\), got \(5, 1",
        ),
        (
            lambda: CG()(Identity(), ONES, preconditioner=Dense(torch.eye(4))),
            "the preconditioner is of size 4, the operator of 5",
        ),
        (lambda: CG()(Identity(), ONES / 0), "b must be finite, but its norm is inf"),
        (lambda: CG()(Identity(), ONES * math.nan), "b must be finite, but its norm is nan"),
        (
            lambda: CG()(Identity(), ONES, x0=ONES, radius=1.0),
            "a trust radius needs a start at zero: leave x0 out",
        ),
        (lambda: CG()(Identity(), ONES, radius=-1.0), "must be at least 0 and finite, got -1.0"),
        (lambda: CG()(Identity(), ONES, radius=math.nan), "must be at least 0 and finite, got nan"),
        (
            lambda: CG()(Identity(), ONES, preconditioner=BAD),
            "the preconditioner is not positive definite: r'P r is -5.0",
        ),
        (
            lambda: CG()(Identity(), ONES, preconditioner=Dense(torch.zeros(5, 5))),
            "the preconditioner is not positive definite: r'P r is 0.0",
        ),
        (
            lambda: CG()(*LATER, preconditioner=Dense(torch.tensor([3.0, -1, 1, 1, 1]).diag())),
            "the preconditioner is not positive definite: r'P r is -",
        ),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_underflows_is_no_error_of_the_preconditioner(device: torch.device) -> None:
    b = torch.full((3,), 1e-18, device=device)
    m = Diagonal(torch.full((3,), 1e-12, device=device))
    result = CG()(Diagonal(torch.ones(3, device=device)), b, preconditioner=m)
    assert result.status is SolveStatus.NONFINITE and not result.x.any()
