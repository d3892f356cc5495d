"""MINRES against dense solutions, and its certificates of negative curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.dense_operators import (
    Dense,
    Identity,
    check_numbers,
    rotation,
    spectrum,
    symmetric,
    vector_of,
)
from torch_secondorder._params import space
from torch_secondorder.solvers.base import SolveStatus
from torch_secondorder.solvers.minres import MINRES, MinresScalars

OFF = MINRES(stop_at_negative_curvature=False, tolerance=1e-10, max_iterations=1000)
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_regular_systems(size: int, negative: bool, device: torch.device) -> None:
    a = symmetric(spectrum(size, negative=negative)).to(device)
    b = vector_of(size).to(device)
    operator = Dense(a)
    result = OFF(operator, b)
    assert result.status is SolveStatus.CONVERGED
    # Long runs compute the residual once in the end.
    assert result.products == operator.products == result.iterations + (result.iterations >= 50)
    torch.testing.assert_close(result.x, torch.linalg.solve(a, b), rtol=1e-7, atol=1e-7)
    assert result.residual_norm <= OFF.tolerance
    check_numbers(result, a, b)


@pytest.mark.parametrize("seed", range(8))
def test_the_true_residual_is_as_small_as_was_asked_for(seed: int, device: torch.device) -> None:
    """By recursion alone it would be up to 300 times as large at a condition of 1e7."""
    eigenvalues = torch.logspace(-7, 0, 40, dtype=torch.float64)
    a, b = symmetric(eigenvalues, seed).to(device), vector_of(40, seed).to(device)
    operator = Dense(a)
    result = MINRES(2000, 1e-8)(operator, b)
    assert result.status is SolveStatus.CONVERGED
    assert (b - a @ result.x).norm() <= 1.01e-8 * b.norm()
    assert result.products == operator.products == result.iterations + 1
    check_numbers(result, a, b)


def test_without_a_tolerance_rounding_is_the_goal(device: torch.device) -> None:
    a, b = symmetric(spectrum(10)).to(device), vector_of(10).to(device)
    result = MINRES(tolerance=0.0)(Dense(a), b)
    assert result.status is SolveStatus.CONVERGED and result.iterations < 30
    check_numbers(result, a, b)


def test_the_iterates_are_those_of_scipy(device: torch.device) -> None:
    a, b = symmetric(spectrum(30, negative=True)), vector_of(30)
    for k in (1, 2, 3, 5, 9):
        ours = MINRES(k, 0.0, stop_at_negative_curvature=False)(Dense(a.to(device)), b.to(device))
        theirs, _ = scipy.sparse.linalg.minres(a.numpy(), b.numpy(), rtol=0.0, maxiter=k)
        assert ours.status is SolveStatus.MAX_ITERATIONS and ours.iterations == k
        np.testing.assert_allclose(ours.x.cpu().numpy(), theirs, rtol=1e-8, atol=1e-9)
        check_numbers(ours, a.to(device), b.to(device))


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("size", [3, 20, 60])
def test_singular_consistent_systems(size: int, negative: bool, device: torch.device) -> None:
    a = symmetric(spectrum(size, negative=negative, zeros=True)).to(device)
    b = a @ vector_of(size).to(device)
    result = OFF(Dense(a), b)
    assert result.status is SolveStatus.CONVERGED
    shortest = torch.linalg.pinv(a, rtol=1e-10) @ b  # b has nothing in the null space, nor has x
    torch.testing.assert_close(result.x, shortest, rtol=1e-6, atol=1e-6)
    check_numbers(result, a, b)


@pytest.mark.parametrize("share", [1.0, 1e-2])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("size", [2, 6, 20, 60])
@pytest.mark.parametrize("dtype", DTYPES)
def test_singular_inconsistent_systems(
    dtype: torch.dtype, size: int, negative: bool, share: float, device: torch.device
) -> None:
    """The smallest residual is what of `b` lies in the null space."""
    q, eigenvalues = rotation(size, 0), spectrum(size, negative=negative, zeros=True)
    inside, null = q[:, eigenvalues != 0], q[:, 0]
    b = inside @ vector_of(inside.shape[1])
    b = b / torch.linalg.vector_norm(b) + share * null
    a, b = symmetric(eigenvalues).to(device, dtype), b.to(device, dtype)
    result = MINRES(1000, stop_at_negative_curvature=False)(Dense(a), b)
    assert result.status is SolveStatus.SINGULAR
    residual = torch.linalg.vector_norm(b.double() - a.double() @ result.x.double())
    accuracy = 1e-3 if dtype == torch.float32 else 1e-6
    assert float(residual) == pytest.approx(share, rel=accuracy)
    assert result.residual_norm == pytest.approx(share / math.hypot(1.0, share), rel=accuracy)
    assert torch.linalg.vector_norm(result.x) <= 1e8


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_semidefinite_systems_show_no_negative_curvature(
    zeros: bool, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    """Zero curvature with rounding is no certificate, be the system consistent or not."""
    a = symmetric(spectrum(25, zeros=zeros), seed).to(device, dtype)
    b = vector_of(25, seed).to(device, dtype)
    result = MINRES(1000)(Dense(a), b)
    assert result.status is (SolveStatus.SINGULAR if zeros else SolveStatus.CONVERGED)
    assert MINRES(1000)(Dense(a), a @ b).status is SolveStatus.CONVERGED


@pytest.mark.parametrize("stop", [False, True])
def test_nothing_is_left_of_a_product(stop: bool, device: torch.device) -> None:
    b = vector_of(4).to(device)
    zeros = torch.zeros(4, 4, dtype=torch.float64, device=device)
    result = MINRES(stop_at_negative_curvature=stop)(Dense(zeros), b)
    assert result.status is SolveStatus.SINGULAR
    assert not result.x.any() and result.residual_norm == 1.0 and result.decrease == 0.0


def first_residual_that_bends_down(a: Tensor, b: Tensor) -> int:
    """The number of the first minimal residual with `r'A r <= 0`, by dense least squares."""
    basis = torch.zeros(len(b), 0, dtype=b.dtype)
    r, power = b, b
    for k in range(len(b)):
        if r @ (a @ r) <= 0:
            return k
        power = power - basis @ (basis.T @ power)
        power = power - basis @ (basis.T @ power)
        basis = torch.cat([basis, (power / power.norm())[:, None]], dim=1)
        image = torch.linalg.qr(a @ basis)[0]
        r = b - image @ (image.T @ b)
        power = a @ basis[:, -1]
    return -1


@given(
    size=st.integers(2, 12),
    negatives=st.integers(1, 4),
    size_of_negatives=st.floats(0.05, 3.0),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_negative_curvature_is_found_when_it_first_shows(
    size: int, negatives: int, size_of_negatives: float, seed: int
) -> None:
    eigenvalues = torch.linspace(0.5, 4.0, size, dtype=torch.float64)
    eigenvalues[: min(negatives, size - 1)] *= -size_of_negatives
    a, b = symmetric(eigenvalues, seed), vector_of(size, seed)
    result = MINRES(tolerance=1e-9)(Dense(a), b)
    check_numbers(result, a, b)
    assert result.status is SolveStatus.NEGATIVE_CURVATURE
    assert result.iterations == first_residual_that_bends_down(a, b)
    assert result.products == result.iterations + 1
    p = result.negative_direction
    torch.testing.assert_close(p, b - a @ result.x, rtol=1e-8, atol=1e-8)
    assert p @ b > 0


@given(
    size=st.integers(2, 15),
    lowest=st.floats(-2.0, -1e-3) | st.floats(1e-3, 1.0),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=40)
def test_until_then_the_quadratic_falls_and_x_grows(size: int, lowest: float, seed: int) -> None:
    """Liu and Roosta 2022, theorem 3.11; what MINRES has over other residual methods."""
    a = symmetric(torch.linspace(lowest, 3.0, size, dtype=torch.float64), seed)
    b = vector_of(size, seed)
    last = MINRES(tolerance=1e-7)(Dense(a), b).iterations
    results = [MINRES(k, 1e-7)(Dense(a), b) for k in range(1, last + 1)]
    decreases = [0.0, *(r.decrease for r in results)]
    lengths = [0.0, *(float(r.x.norm()) for r in results)]
    residuals = [1.0, *(r.residual_norm for r in results)]
    slack = 1 - 1e-9
    assert all(q >= slack * p for p, q in pairwise(decreases))
    assert all(q >= slack * p for p, q in pairwise(lengths))
    assert all(slack * q <= p for p, q in pairwise(residuals))


def test_a_false_alarm_is_seen_through(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors have the last word, not the scalars."""
    monkeypatch.setattr(MinresScalars, "curvature", property(lambda self: -1.0))
    a, b = symmetric(spectrum(20)).to(device), vector_of(20).to(device)
    for m in (None, Dense(torch.eye(20, dtype=torch.float64, device=device))):
        assert MINRES()(Dense(a), b, preconditioner=m).status is SolveStatus.CONVERGED


@pytest.mark.parametrize("lowest", [-1e-14, -1e-15, 0.0])
def test_curvature_lost_in_rounding_ends_the_solve(lowest: float, device: torch.device) -> None:
    """A step along it would be 1e14 long, and up the quadratic as likely as down."""
    a = symmetric(torch.tensor([lowest, 3.0], dtype=torch.float64)).to(device)
    b = vector_of(2).to(device)
    result = MINRES()(Dense(a), b)
    assert result.status is SolveStatus.SINGULAR
    assert result.decrease > 0 and torch.linalg.vector_norm(result.x) < 100
    check_numbers(result, a, b)


def test_zero_curvature_of_an_indefinite_matrix_is_a_certificate(device: torch.device) -> None:
    a = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=device)
    b = torch.tensor([1.0, 0.0], device=device)
    result = MINRES()(Dense(a), b)
    assert result.status is SolveStatus.NEGATIVE_CURVATURE
    assert torch.equal(result.negative_direction, b) and result.negative_curvature == 0.0
    solved = MINRES(stop_at_negative_curvature=False)(Dense(a), b)
    assert solved.status is SolveStatus.CONVERGED
    torch.testing.assert_close(solved.x, torch.tensor([0.0, 1.0], device=device))


@pytest.mark.parametrize("kind", ["definite", "indefinite", "consistent", "inconsistent"])
@pytest.mark.parametrize("seed", range(3))
def test_preconditioned(kind: str, seed: int, device: torch.device) -> None:
    size = 30
    eigenvalues = spectrum(size, negative=kind == "indefinite", zeros=kind.endswith("consistent"))
    a = symmetric(eigenvalues, seed).to(device)
    m = symmetric(torch.logspace(-2, 2, size, dtype=torch.float64), seed + 10).to(device)
    b = vector_of(size, seed).to(device)
    if kind == "consistent":
        b = a @ b
    result = OFF(Dense(a), b, preconditioner=Dense(m))
    check_numbers(result, a, b, relative=1e-6 if kind == "inconsistent" else 1e-9)
    if kind == "inconsistent":
        assert result.status is SolveStatus.SINGULAR
        root = torch.linalg.cholesky(m).T  # r'M r = |root r|^2
        best = torch.linalg.lstsq(
            (root @ a).cpu(), (root @ b).cpu(), rcond=1e-10, driver="gelsd"
        ).solution.to(device)
        smallest = torch.linalg.vector_norm(root @ (b - a @ best))
        reached = torch.linalg.vector_norm(root @ (b - a @ result.x))
        torch.testing.assert_close(reached, smallest, rtol=1e-5, atol=0)
    else:
        assert result.status is SolveStatus.CONVERGED
        assert torch.linalg.vector_norm(b - a @ result.x) <= 2e-10 * torch.linalg.vector_norm(b)


def test_the_iterates_with_a_preconditioner_are_those_of_scipy(device: torch.device) -> None:
    a, b = symmetric(spectrum(30)), vector_of(30)
    m = symmetric(torch.logspace(-1, 1, 30, dtype=torch.float64), 3)
    for k in (1, 3, 8):
        ours = MINRES(k, 0.0)(Dense(a.to(device)), b.to(device), preconditioner=Dense(m.to(device)))
        theirs, _ = scipy.sparse.linalg.minres(
            a.numpy(), b.numpy(), M=m.numpy(), rtol=0.0, maxiter=k
        )
        np.testing.assert_allclose(ours.x.cpu().numpy(), theirs, rtol=1e-8, atol=1e-9)
        check_numbers(ours, a.to(device), b.to(device))


@pytest.mark.parametrize("seed", range(5))
def test_negative_curvature_with_a_preconditioner(seed: int, device: torch.device) -> None:
    a = symmetric(spectrum(20, negative=True), seed).to(device)
    m = symmetric(torch.logspace(-1, 1, 20, dtype=torch.float64), seed + 10).to(device)
    b = vector_of(20, seed).to(device)
    result = MINRES()(Dense(a), b, preconditioner=Dense(m))
    assert result.status is SolveStatus.NEGATIVE_CURVATURE
    check_numbers(result, a, b)
    torch.testing.assert_close(
        result.negative_direction, m @ (b - a @ result.x), rtol=1e-8, atol=1e-8
    )


def test_a_good_preconditioner_saves_iterations(device: torch.device) -> None:
    a = symmetric(spectrum(60)).to(device)
    b = vector_of(60).to(device)
    inverse = torch.linalg.inv(a)
    assert MINRES()(Dense(a), b, preconditioner=Dense(inverse)).iterations == 1
    assert MINRES()(Dense(a), b).iterations > 20


def test_warm_start(device: torch.device) -> None:
    a, b = symmetric(spectrum(20, negative=True)).to(device), vector_of(20).to(device)
    exact = torch.linalg.solve(a, b)
    x0 = exact + 1e-3 * vector_of(20, 8).to(device)
    before = x0.clone()
    operator = Dense(a)
    result = OFF(operator, b, x0=x0)
    assert result.status is SolveStatus.CONVERGED and torch.equal(x0, before)
    assert result.products == operator.products == result.iterations + 1
    torch.testing.assert_close(result.x, exact, rtol=1e-6, atol=1e-6)
    check_numbers(result, a, b)
    at_once = OFF(Dense(a), b, x0=exact)
    assert (at_once.status, at_once.iterations) == (SolveStatus.CONVERGED, 0)
    assert torch.equal(at_once.x, exact) and at_once.x is not exact
    check_numbers(at_once, a, b)


@pytest.mark.parametrize("start", [False, True])
def test_a_zero_right_hand_side(start: bool, device: torch.device) -> None:
    operator = Dense(symmetric(spectrum(4)).to(device))
    b = torch.zeros(4, dtype=torch.float64, device=device)
    result = MINRES()(operator, b, x0=b + 1 if start else None)
    assert result.status is SolveStatus.CONVERGED and not result.x.any()
    assert (result.residual_norm, result.decrease, result.iterations) == (0.0, 0.0, 0)


@pytest.mark.parametrize("negative", [False, True])
def test_float32(negative: bool, device: torch.device) -> None:
    exact = symmetric(spectrum(50, negative=negative))
    a, b = exact.to(device, torch.float32), vector_of(50).to(device, torch.float32)
    solver = MINRES(2000, tolerance=1e-5, stop_at_negative_curvature=False)
    result = solver(Dense(a), b)
    assert result.x.dtype == torch.float32
    assert result.status is SolveStatus.CONVERGED
    residual = torch.linalg.vector_norm(b - a @ result.x) / torch.linalg.vector_norm(b)
    assert residual <= 2e-4
    certified = MINRES()(Dense(a), b)
    if negative:
        assert certified.status is SolveStatus.NEGATIVE_CURVATURE
        p = certified.negative_direction.double()
        quotient = float(p @ (a.double() @ p) / (p @ p))
        assert certified.negative_curvature == pytest.approx(quotient, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e15])
def test_the_scales_of_a_and_b_do_not_matter(scale: float, device: torch.device) -> None:
    # Of a larger condition rounding decides how many iterations it takes.
    a = symmetric(torch.logspace(-1, 1, 20)).to(device, torch.float32)
    b = vector_of(20).to(device, torch.float32)
    plain = MINRES(tolerance=1e-4)(Dense(a), b)
    other = MINRES(tolerance=1e-4)(Dense(a * scale), b / scale**0.5)
    assert other.iterations == pytest.approx(plain.iterations, abs=2)
    torch.testing.assert_close(other.x * scale**1.5, plain.x, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("spoil", [1, 4])
def test_a_product_that_is_not_finite(spoil: int, value: float, device: torch.device) -> None:
    a, b = symmetric(spectrum(20)).to(device), vector_of(20).to(device)
    result = MINRES()(Dense(a, spoil, value), b)
    assert result.status is SolveStatus.NONFINITE
    assert (result.iterations, result.products) == (spoil - 1, spoil)
    check_numbers(result, a, b)
    if spoil > 1:
        assert torch.equal(result.x, MINRES(spoil - 1)(Dense(a), b).x)
    eye = torch.eye(20, dtype=torch.float64, device=device)
    assert (
        MINRES()(Dense(a), b, preconditioner=Dense(eye, spoil, value)).status
        is SolveStatus.NONFINITE
    )


def test_a_start_whose_product_is_not_finite(device: torch.device) -> None:
    a, b = symmetric(spectrum(5)).to(device), vector_of(5).to(device)
    result = MINRES()(Dense(a, 1), b, x0=b)
    assert result.status is SolveStatus.NONFINITE and torch.equal(result.x, b)


def test_nothing_given_is_written_to(device: torch.device) -> None:
    b = vector_of(5).to(device).requires_grad_()
    before = b.detach().clone()
    result = MINRES()(Identity(), b, preconditioner=Identity(), x0=2 * b)
    assert result.status is SolveStatus.CONVERGED and not result.x.requires_grad
    torch.testing.assert_close(result.x, before)
    assert torch.equal(b.detach(), before)
    torch.testing.assert_close(MINRES()(Identity(), b).x, before)
    torch.testing.assert_close(MINRES()(Identity(), b, preconditioner=Identity()).x, before)


def test_the_device_is_waited_for_once_per_iteration(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = 0

    to_host = space.Space.to_host

    def counting(self: space.Space, **scalars: Sequence[Tensor]) -> list[float]:
        nonlocal waits
        waits += 1
        return to_host(self, **scalars)

    monkeypatch.setattr(space.Space, "to_host", counting)
    a, b = symmetric(spectrum(20)).to(device), vector_of(20).to(device)
    for m in (None, Dense(torch.eye(20, dtype=torch.float64, device=device))):
        waits = 0
        result = MINRES()(Dense(a), b, preconditioner=m)
        assert waits == result.iterations + 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MINRES(0), "max_iterations must be an integer of at least 1, got 0"),
        (lambda: MINRES(2.5), "max_iterations must be an integer of at least 1, got 2.5"),
        (lambda: MINRES(tolerance=1.0), r"tolerance must lie in \[0, 1\), got 1.0"),
        (lambda: MINRES(tolerance=math.nan), r"tolerance must lie in \[0, 1\), got nan"),
        (lambda: MINRES(tolerance=-1e-3), r"tolerance must lie in \[0, 1\), got -0.001"),
        (lambda: MINRES()(Identity(), torch.ones(4)), r"b must have shape \(5,\), got \(4,\)"),
        (
            lambda: MINRES()(Identity(), torch.ones(5), x0=torch.ones(5, 1)),
            r"x0 must have shape \(5,\), got \(5, 1\)",
        ),
        (
            lambda: MINRES()(Identity(), torch.full((5,), math.nan)),
            "b must be finite, but its norm is nan",
        ),
        (
            lambda: MINRES()(Identity(), torch.ones(5), x0=torch.full((5,), math.inf)),
            "x0 must be finite",
        ),
        (
            lambda: MINRES()(Identity(), torch.ones(5), preconditioner=Dense(-torch.eye(5))),
            "the preconditioner is not positive definite: u'M u is -5.0",
        ),
        (
            lambda: MINRES()(
                Dense(torch.diag(torch.arange(1.0, 6.0))),
                torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]),
                preconditioner=Dense(torch.tensor([3.0, -1.0, 1.0, 1.0, 1.0]).diag()),
            ),
            "the preconditioner is not positive definite: u'M u is -",
        ),
        (
            lambda: MINRES()(Identity(), torch.ones(5), preconditioner=Dense(torch.zeros(5, 5))),
            "the preconditioner is not positive definite: u'M u is 0.0",
        ),
        (
            lambda: MINRES()(Identity(), torch.ones(5), preconditioner=Dense(torch.eye(4))),
            "the preconditioner is of size 4, the operator of 5",
        ),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
