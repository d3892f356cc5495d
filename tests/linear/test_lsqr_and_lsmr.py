"""LSQR and LSMR against SciPy, dense solutions, and what theory says of their iterates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.rectangular import Counting, falls, gaussian, graded, with_singular_values
from torch_secondorder._params import space
from torch_secondorder.curvature import Diagonal
from torch_secondorder.linear import (
    KrylovResult,
    KrylovStatus,
    lsmr,
    lsqr,
    lstsq,
    norm_constrained,
    ridge,
)

Solver = Callable[..., KrylovResult]
SOLVERS = pytest.mark.parametrize("solver", [lsqr, lsmr])
SHAPES = pytest.mark.parametrize(("m", "n"), [(40, 20), (20, 40), (25, 25), (1, 6), (6, 1)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def with_scipy(solver: Solver, A: Tensor, b: Tensor, *arguments: Any) -> tuple[Any, int, int]:
    """SciPy's solution, its number for the ending, and its iterations."""
    theirs = getattr(scipy.sparse.linalg, solver.__name__)(A.numpy(), b.numpy(), *arguments)
    return theirs[0], theirs[1], theirs[2]


def augmented(A: Tensor, b: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """The least-squares problem that has the damping in the matrix."""
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    return torch.cat([A, damp * eye]), torch.cat([b, b.new_zeros(A.shape[1])])


@pytest.mark.parametrize("tolerance", [1e-4, 1e-10])
@pytest.mark.parametrize("damp", [0.0, 0.3])
@SHAPES
@SOLVERS
def test_iterations_and_results_are_those_of_scipy(
    solver: Solver, m: int, n: int, damp: float, tolerance: float, device: torch.device
) -> None:
    A, b = graded(m, n, 5.0), gaussian(m, seed=3)
    arguments = (damp, tolerance, tolerance, 1e8, 200)
    x, ending, iterations = with_scipy(solver, A, b, *arguments)
    result = solver(A.to(device), b.to(device), *arguments)
    assert abs(result.iterations - iterations) <= 1
    assert {1: "CONSISTENT", 2: "LEAST_SQUARES"}[ending] == result.status.name
    scale = float(np.linalg.norm(x))
    np.testing.assert_allclose(result.x.cpu().numpy(), x, atol=100 * tolerance * scale)


@pytest.mark.parametrize("damp", [0.0, 0.3])
@SOLVERS
def test_the_iterates_are_those_of_scipy(solver: Solver, damp: float, device: torch.device) -> None:
    A, b = graded(30, 20, 30.0), gaussian(30)
    for k in (1, 2, 3, 5, 9):
        arguments = (damp, 0.0, 0.0, 0.0, k)
        x, _, _ = with_scipy(solver, A, b, *arguments)
        result = solver(A.to(device), b.to(device), *arguments)
        assert result.status is KrylovStatus.MAX_ITERATIONS and result.iterations == k
        np.testing.assert_allclose(result.x.cpu().numpy(), x, rtol=1e-9, atol=1e-11)


def test_the_estimates_are_those_of_scipy() -> None:
    A, b = graded(30, 20, 30.0), gaussian(30)
    theirs = scipy.sparse.linalg.lsqr(A.numpy(), b.numpy(), 0.2, 0.0, 0.0, 0.0, 7, calc_var=True)
    ours = lsqr(A, b, 0.2, 0.0, 0.0, 0.0, 7, True)
    assert ours.operator_norm == pytest.approx(theirs[5])
    assert ours.condition == pytest.approx(theirs[6])
    assert ours.normal_residual_norm == pytest.approx(theirs[7])
    assert ours.norm == pytest.approx(theirs[8])
    assert ours.variance is not None
    np.testing.assert_allclose(ours.variance.numpy(), theirs[9], rtol=1e-10)
    theirs = scipy.sparse.linalg.lsmr(A.numpy(), b.numpy(), 0.0, 0.0, 0.0, 0.0, 7)
    assert lsmr(A, b, 0.0, 0.0, 0.0, 0.0, 7).condition == pytest.approx(theirs[6])


@pytest.mark.parametrize("damp", [0.0, 0.5])
@pytest.mark.parametrize("rank", [None, 3])
@SHAPES
@DTYPES
@SOLVERS
def test_the_dense_solution(
    solver: Solver,
    dtype: torch.dtype,
    m: int,
    n: int,
    rank: int | None,
    damp: float,
    device: torch.device,
) -> None:
    exact, b = graded(m, n, 10.0, rank=None if rank is None else min(rank, m, n)), gaussian(m)
    A, b = exact.to(device, dtype), b.to(device, dtype)
    result = solver(A, b, damp, 1e-12, 1e-12)
    double = dtype == torch.float64
    expected = ridge(A, b, damp**2).x if damp else lstsq(A, b, rcond=1e-5).x
    accuracy = 1e-8 if double else 2e-4
    torch.testing.assert_close(
        result.x, expected, rtol=accuracy, atol=accuracy * float(expected.norm())
    )
    assert result.status in (KrylovStatus.CONSISTENT, KrylovStatus.LEAST_SQUARES)
    assert result.x.dtype == dtype
    check_numbers(result, A, b, damp, 1e-13 if double else 1e-5)


def check_numbers(result: KrylovResult, A: Tensor, b: Tensor, damp: float, accuracy: float) -> None:
    """Compares what a result says of its `x` with what `x` is."""
    x, A, b = result.x.double(), A.double(), b.double()
    r = b - A @ x
    g = A.T @ r - damp**2 * x
    assert result.residual_norm == pytest.approx(float(r.norm()), rel=1e-5, abs=accuracy)
    assert result.normal_residual_norm == pytest.approx(
        float(g.norm()), rel=1e-2, abs=accuracy * 10
    )
    assert result.norm == pytest.approx(float(x.norm()), rel=1e-5)
    matrix, _ = augmented(A, b, damp)
    assert result.operator_norm <= 2 * float(torch.linalg.matrix_norm(matrix)) * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([lsqr, lsmr]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.1, 2.0]),
    st.integers(0, 10**6),
)
def test_a_solution_of_any_problem(solver: Solver, m: int, n: int, damp: float, seed: int) -> None:
    A, b = graded(m, n, 20.0, seed), gaussian(m, seed=seed + 1)
    result = solver(A, b, damp, 1e-13, 1e-13, 0.0, 200)
    expected = ridge(A, b, damp**2).x if damp else lstsq(A, b).x
    torch.testing.assert_close(result.x, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("damp", [0.0, 0.2])
def test_what_falls_and_what_grows(damp: float, device: torch.device) -> None:
    """`|r|` falls with both, `|A'r|` with LSMR; `|x|` grows with LSQR."""
    A, b = graded(30, 20, 50.0).to(device), gaussian(30).to(device)
    matrix, right = augmented(A, b, damp)
    found: dict[str, list[list[float]]] = {}
    for solver in (lsqr, lsmr):
        rows = []
        for k in range(1, 11):  # rounding spoils orthogonality later
            x = solver(A, b, damp, 0.0, 0.0, 0.0, k).x
            r = right - matrix @ x
            rows.append([float(t.norm()) for t in (r, matrix.T @ r, x)])
        found[solver.__name__] = [list(column) for column in zip(*rows, strict=True)]
    assert falls(found["lsqr"][0]) and falls(found["lsmr"][0])
    assert falls(found["lsmr"][1]) and (damp or not falls(found["lsqr"][1]))
    assert falls(found["lsqr"][2][::-1])
    pairs = list(zip(found["lsqr"], found["lsmr"], strict=True))
    assert all(a <= b * (1 + 1e-10) for a, b in zip(*pairs[0], strict=True))
    assert all(a >= b * (1 - 1e-10) for a, b in zip(*pairs[1], strict=True))


def test_the_iterates_of_lsqr_are_those_of_conjugate_gradients(device: torch.device) -> None:
    """CGLS: conjugate gradients on the normal equations, as Hestenes and Stiefel wrote them."""
    A, b = graded(30, 20, 50.0).to(device), gaussian(30).to(device)
    x, r = A.new_zeros(20), b
    s = p = A.T @ r
    for k in range(1, 9):
        q = A @ p
        step = (s @ s) / (q @ q)
        x, r = x + step * p, r - step * q
        new = A.T @ r
        p, s = new + (new @ new) / (s @ s) * p, new
        torch.testing.assert_close(lsqr(A, b, 0.0, 0.0, 0.0, 0.0, k).x, x, rtol=1e-9, atol=1e-11)


def test_lsmr_stops_sooner(device: torch.device) -> None:
    A, b = graded(200, 100, 1e3).to(device), gaussian(200).to(device)
    arguments = (A, b, 0.0, 1e-4, 1e-4, 0.0, 1000)
    first, second = lsmr(*arguments), lsqr(*arguments)
    assert first.status is second.status is KrylovStatus.LEAST_SQUARES
    assert first.iterations < second.iterations


@SOLVERS
def test_the_condition_is_estimated(solver: Solver, device: torch.device) -> None:
    A, b = graded(30, 10, 200.0).to(device), gaussian(30).to(device)
    result = solver(A, b, 0.0, 1e-14, 1e-14)
    # LSQR has the condition in the Frobenius norm, LSMR a lower bound of that in the other.
    frobenius = float(A.norm() * torch.linalg.pinv(A).norm())
    if solver is lsqr:
        assert 0.5 * frobenius <= result.condition <= 3 * frobenius
    else:
        assert 20 <= result.condition <= 201


def test_variances(device: torch.device) -> None:
    """The diagonal of the inverse of `A'A + damp^2 I`, from below, exact after `n` iterations."""
    A, b = graded(12, 5, 4.0).to(device), gaussian(12).to(device)
    for damp in (0.0, 0.7):
        matrix, _ = augmented(A, b, damp)
        exact = torch.linalg.inv(matrix.T @ matrix).diagonal()
        full = lsqr(A, b, damp, 1e-15, 1e-15, 0.0, 5, calc_var=True).variance
        part = lsqr(A, b, damp, 0.0, 0.0, 0.0, 3, calc_var=True).variance
        assert full is not None and part is not None
        torch.testing.assert_close(full, exact, rtol=1e-8, atol=0.0)
        assert bool((part < exact).all())
    assert lsqr(A, b).variance is None


# Endings.


@SOLVERS
def test_a_right_hand_side_of_zero(solver: Solver, device: torch.device) -> None:
    A = graded(6, 4, 2.0).to(device)
    result = solver(A, A.new_zeros(6))
    assert result.status is KrylovStatus.CONSISTENT and result.iterations == 0
    assert result.x.shape == (4,) and not result.x.any()


@SOLVERS
@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (3, 0)])
def test_a_zero_or_empty_matrix(
    solver: Solver, shape: tuple[int, int], device: torch.device
) -> None:
    b = torch.ones(shape[0], device=device)
    result = solver(torch.zeros(shape, device=device), b)
    assert result.status is KrylovStatus[("LEAST_SQUARES" if shape[0] else "CONSISTENT")]
    assert result.x.shape == shape[1:] and not result.x.any()
    assert result.residual_norm == pytest.approx(shape[0] ** 0.5) and result.iterations == 0


@SOLVERS
def test_an_ill_conditioned_matrix(solver: Solver, device: torch.device) -> None:
    A, b = graded(40, 20, 1e7).to(device), gaussian(40).to(device)
    result = solver(A, b, 0.0, 0.0, 0.0, 1e3)
    assert result.status is KrylovStatus.ILL_CONDITIONED and result.condition >= 1e3
    assert result.normal_residual_norm < float((A.T @ b).norm())
    longer = solver(A, b, 0.0, 0.0, 0.0, 0.0, max_iterations=result.iterations + 1)
    assert longer.iterations > result.iterations


@SOLVERS
def test_two_iterations_for_each_unknown_by_default(solver: Solver, device: torch.device) -> None:
    A, b = graded(80, 20, 1e12).to(device), gaussian(80).to(device)
    result = solver(A, b, 0.0, 0.0, 0.0, 0.0)
    assert result.status is KrylovStatus.MAX_ITERATIONS and result.iterations == 40


@pytest.mark.parametrize("spoil", [1, 2, 3, 6, 7])
@SOLVERS
def test_a_product_that_is_not_finite(solver: Solver, spoil: int, device: torch.device) -> None:
    A, b = graded(20, 10, 5.0).to(device), gaussian(20).to(device)
    result = solver(Counting(A, spoil), b)
    done = max((spoil - 2) // 2, 0)
    assert result.status is KrylovStatus.NONFINITE and result.iterations == done
    assert result.x.isfinite().all()
    if done:
        torch.testing.assert_close(result.x, solver(A, b, max_iterations=done).x)


@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("scales", [(1e-28, 1.0), (1e28, 1.0), (1.0, 1e-28), (1e-15, 1e-25)])
@SOLVERS
def test_squares_may_leave_the_range_of_the_dtype(
    solver: Solver, scales: tuple[float, float], damp: float, device: torch.device
) -> None:
    A, b = graded(20, 10, 5.0).float().to(device), gaussian(20).float().to(device)
    plain = solver(A, b, damp)
    of_A, of_b = scales
    result = solver(A * of_A, b * of_b, damp * of_A)
    assert result.status is plain.status and abs(result.iterations - plain.iterations) <= 1
    torch.testing.assert_close(result.x * of_A / of_b, plain.x, rtol=1e-3, atol=1e-4)
    assert result.residual_norm / of_b == pytest.approx(plain.residual_norm, rel=1e-4)
    assert result.operator_norm / of_A == pytest.approx(plain.operator_norm, rel=0.1)
    assert result.norm * of_A / of_b == pytest.approx(plain.norm, rel=1e-4)
    ball = norm_constrained(Counting(A * of_A), b * of_b, 0.5 * result.norm)
    expected = norm_constrained(A, b, 0.5 * result.norm * of_A / of_b)
    torch.testing.assert_close(ball.x * of_A / of_b, expected.x, rtol=1e-3, atol=1e-4)


# Costs.


@SOLVERS
def test_products_and_waits(
    solver: Solver, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    A, b = graded(30, 20, 5.0).to(device), gaussian(30).to(device)
    waits, to_host = [0], space.Space.to_host

    def counted(*arguments: Any, **more: Any) -> list[float]:
        waits[0] += 1
        return to_host(*arguments, **more)

    monkeypatch.setattr(space.Space, "to_host", counted)
    operator = Counting(A)
    result = solver(operator, b)
    assert result.iterations > 5
    # One of A' at the start, and two for the numbers of the result.
    assert operator.products == 2 * result.iterations + 3
    assert waits[0] == result.iterations + 3  # two at the start, one in the end


def test_nothing_of_the_arguments_changes(device: torch.device) -> None:
    A, b, x0 = graded(9, 5, 5.0).to(device), gaussian(9).to(device), gaussian(5).to(device)
    copies = [t.clone() for t in (A, b, x0)]
    for solver in (lsqr, lsmr):
        solver(A.requires_grad_(), b, 0.1, x0=x0)
        assert not solver(A, b).x.requires_grad
    assert all(torch.equal(t.detach(), copy) for t, copy in zip((A, b, x0), copies, strict=True))


def test_an_operator_may_return_what_it_was_given(device: torch.device) -> None:
    b = gaussian(5).to(device)
    before = b.clone()
    for solver in (lsqr, lsmr):
        result = solver((lambda v: v, lambda u: u), b)
        torch.testing.assert_close(result.x, before)
        assert torch.equal(b, before)


# Starts and preconditioners.


@pytest.mark.parametrize("damp", [0.0, 0.3])
@SOLVERS
def test_a_start(solver: Solver, damp: float, device: torch.device) -> None:
    A, b, x0 = graded(30, 20, 10.0), gaussian(30), gaussian(20, seed=5)
    arguments = (damp, 1e-12, 1e-12, 1e8, 100)
    theirs = getattr(scipy.sparse.linalg, solver.__name__)
    x = theirs(A.numpy(), b.numpy(), *arguments, x0=x0.numpy())[0]
    result = solver(A.to(device), b.to(device), *arguments, x0=x0.to(device))
    if damp and solver is lsmr:  # SciPy's takes its start in two ways at once there
        matrix, _ = augmented(A, b, damp)
        right = torch.cat([b, damp * x0])
        x = lstsq(matrix, right).x.numpy()
    np.testing.assert_allclose(result.x.cpu().numpy(), x, rtol=1e-7, atol=1e-8)
    exact = lstsq(A, b).x.to(device)
    again = solver(A.to(device), b.to(device), x0=exact)
    assert again.iterations <= 2
    torch.testing.assert_close(again.x, exact)


@SOLVERS
def test_a_preconditioner_from_the_right(solver: Solver, device: torch.device) -> None:
    """The scaling of columns by their lengths, or a triangular factor."""
    scales = torch.logspace(-3, 3, 20, dtype=torch.float64)
    A, b = (graded(60, 20, 3.0) * scales).to(device), gaussian(60).to(device)
    expected = lstsq(A, b).x
    plain = solver(A, b, 0.0, 1e-10, 1e-10, 0.0, 500)
    scaled = solver(A, b, 0.0, 1e-10, 1e-10, preconditioner=Diagonal(1 / A.norm(dim=0)))
    R = torch.linalg.qr(A)[1]
    inverse = (
        lambda z: torch.linalg.solve_triangular(R, z[:, None], upper=True)[:, 0],
        lambda u: torch.linalg.solve_triangular(R.T, u[:, None], upper=False)[:, 0],
    )
    exact = solver(A, b, 0.0, 1e-10, 1e-10, preconditioner=inverse)
    for result in (scaled, exact):
        torch.testing.assert_close(result.x, expected, rtol=1e-6, atol=1e-9)
    assert exact.iterations <= 2 < scaled.iterations < plain.iterations / 2
    x0 = expected + gaussian(20).to(device) * 1e-3
    again = solver(A, b, 0.0, 1e-10, 1e-10, preconditioner=inverse, x0=x0)
    torch.testing.assert_close(again.x, expected, rtol=1e-6, atol=1e-9)


def test_a_preconditioned_system_may_have_fewer_unknowns(device: torch.device) -> None:
    """Then the solution is sought in the range of the preconditioner."""
    A, P, b = graded(9, 6, 5.0).to(device), gaussian(6, 2).to(device), gaussian(9).to(device)
    result = lsqr(A, b, preconditioner=P)
    torch.testing.assert_close(result.x, P @ lstsq(A @ P, b).x, rtol=1e-5, atol=1e-7)


# Errors.

A32, B32 = torch.ones(3, 2), torch.ones(3)


FINE = (lambda v: A32 @ v, lambda u: A32.T @ u)


@SOLVERS
@pytest.mark.parametrize(
    ("A", "b", "arguments", "error", "message"),
    [
        (A32, B32, {"damp": -1.0}, ValueError, "damp must be a finite number of at least 0"),
        (A32, B32, {"atol": 1.0}, ValueError, r"atol must lie in \[0, 1\), got 1.0"),
        (A32, B32, {"btol": -0.1}, ValueError, r"btol must lie in \[0, 1\), got -0.1"),
        (A32, B32, {"conlim": -1}, ValueError, "conlim must be a finite number of at least 0"),
        (A32, B32, {"max_iterations": 0}, ValueError, "max_iterations must be an integer of at"),
        (A32, B32.int(), {}, TypeError, "b must be float32 or float64, got torch.int32"),
        (A32, [1.0], {}, TypeError, "b must be a tensor, got list"),
        (A32, B32, {"x0": [1.0]}, TypeError, "x0 must be a tensor, got list"),
        (A32, B32, {"x0": B32[:2].double()}, ValueError, "x0 must be torch.float32 on cpu, as b"),
        (A32, B32, {"x0": B32}, ValueError, r"x0 must have shape \(2,\), got \(3,\)"),
        (A32, B32[:2], {}, ValueError, r"b must have shape \(3,\), got \(2,\)"),
        (A32, A32, {}, ValueError, r"b must have shape \(3,\), got \(3, 2\)"),
        (A32, B32.double(), {}, ValueError, "A and b must have one dtype and device, got torch.f"),
        (A32, B32 * torch.inf, {}, ValueError, "b must be finite, but its norm is inf"),
        (FINE, B32 * torch.nan, {"x0": B32[:2]}, ValueError, "b must be finite, but its norm is"),
        (A32[0], B32, {}, ValueError, r"A must be a matrix of shape \(m, n\), got shape \(2,\)"),
        ("A", B32, {}, TypeError, "A must be a tensor, a pair of functions .* got str"),
        (A32, B32, {"preconditioner": 2}, TypeError, "A must be a tensor, a pair of .* got int"),
    ],
)  # fmt: skip
def test_errors(
    solver: Solver,
    A: Any,
    b: Any,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        solver(A, b, **arguments)


@SOLVERS
@pytest.mark.parametrize(
    ("product", "transposed", "error", "message"),
    [
        (B32[:2], B32[:2], ValueError, r"A.matvec must return shape \(3,\) here, got \(2,\)"),
        (B32, B32[:2].double(), ValueError, "A.rmatvec must return torch.float32 on cpu, as b is"),
        (B32.double(), B32[:2], ValueError, "A.matvec must return .* as b is, got torch.float64"),
        (B32, 3.0, TypeError, "A.rmatvec must return a tensor, got float"),
        (None, B32[:2], TypeError, "A.matvec must return a tensor, got NoneType"),
    ],
)  # fmt: skip
def test_products_that_are_wrong(
    solver: Solver, product: Any, transposed: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        solver((lambda v: product, lambda u: transposed), B32)


@SOLVERS
def test_a_transpose_that_changes_its_shape(solver: Solver) -> None:
    sizes = iter([2, 3])
    with pytest.raises(ValueError, match=r"A.rmatvec must return shape \(2,\) here, got \(3,\)"):
        solver((lambda v: 2 * B32, lambda u: torch.ones(next(sizes))), torch.tensor([1.0, 0, 0]))


def test_it_prints_as_a_table() -> None:
    A = with_singular_values(5, 3, [3.0, 2.0, 1.0])
    text = str(lsqr(A, gaussian(5)))
    assert text.startswith("KrylovResult\n  x                     [")
    assert "  status                LEAST_SQUARES: x is a least-squares solution" in text
    assert "variance" not in text
