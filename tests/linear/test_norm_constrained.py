"""Least squares within a ball: its conditions, its multiplier, both routes, and its gradients."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.rectangular import Counting, gaussian, graded, with_singular_values
from torch_secondorder.linear import (
    KrylovStatus,
    NormConstrainedResult,
    lstsq,
    norm_constrained,
    ridge,
)

SHAPES = [(9, 4), (4, 9), (5, 5)]


def check_conditions(
    result: NormConstrainedResult, A: Tensor, b: Tensor, radius: float, accuracy: float = 1e-12
) -> None:
    """The conditions of Karush, Kuhn and Tucker, and what the result says of them."""
    x, multiplier = result.x.double(), float(result.multiplier)
    A, b = A.double(), b.double()
    gradient = A.T @ (A @ x - b) + multiplier * x
    magnitude = float(torch.linalg.matrix_norm(A, 2))
    scale = magnitude * (float(b.norm()) + magnitude * float(x.norm())) or 1.0
    assert float(gradient.norm()) <= accuracy * scale
    assert multiplier >= 0.0
    assert float(x.norm()) <= radius * (1 + accuracy)
    assert multiplier * abs(float(x.norm()) - radius) <= accuracy * scale
    assert float(result.norm) == pytest.approx(float(x.norm()), rel=1e-6)
    residual = float((A @ x - b).norm())
    assert float(result.residual_norm) == pytest.approx(residual, rel=1e-5, abs=accuracy * scale)
    steepest = float((A.T @ b).norm()) or 1.0
    assert float(result.stationarity) == pytest.approx(
        float(gradient.norm()) / steepest, abs=accuracy * scale / steepest
    )
    assert 0.0 <= float(result.feasibility) <= accuracy
    assert 0.0 <= float(result.complementarity) <= accuracy * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1e-6, 0.3, 0.999, 1.001, 50.0])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_conditions_hold(
    m: int, n: int, rank: int | None, share: float, dtype: torch.dtype, device: torch.device
) -> None:
    A, b = graded(m, n, 100.0, rank=rank).to(device, dtype), gaussian(m, seed=3).to(device, dtype)
    shortest = lstsq(A, b)
    radius = share * float(shortest.norm)
    result = norm_constrained(A, b, radius)
    check_conditions(result, A, b, radius, 1e-12 if dtype == torch.float64 else 3e-6)
    assert (float(result.multiplier) > 0) == (share < 1)
    assert result.status is None and result.iterations <= 6
    assert result.x.dtype == dtype and result.x.device.type == device.type
    if share > 1:
        torch.testing.assert_close(result.x, shortest.x)
    elif dtype == torch.float64:
        penalized = ridge(A, b, float(result.multiplier))
        torch.testing.assert_close(result.x, penalized.x, rtol=1e-8, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.floats(1.0, 1e4),
    st.floats(1e-4, 1e3),
    st.sampled_from([1e-100, 1.0, 1e100]),
    st.integers(0, 10**6),
)
def test_the_conditions_hold_for_any_problem(
    m: int, n: int, condition: float, radius: float, scale: float, seed: int
) -> None:
    A, b = graded(m, n, condition, seed), gaussian(m, seed=seed + 1)
    result = norm_constrained(A * scale, b, radius / scale)
    assert float(result.norm) <= radius / scale * (1 + 1e-13)
    unscaled = NormConstrainedResult(
        result.x * scale,
        result.multiplier / scale / scale,
        result.residual_norm,
        result.norm * scale,
        result.iterations,
        result.stationarity,
        result.feasibility,
        result.complementarity,
    )
    check_conditions(unscaled, A, b, radius)


def test_squares_may_leave_the_range_of_the_dtype(device: torch.device) -> None:
    A, b = graded(7, 4, 20.0).to(device), gaussian(7).to(device)
    for equality in (False, True):
        expected = norm_constrained(A, b, 0.3, equality=equality)
        for scale in (1e-200, 1e200):
            result = norm_constrained(A, b * scale, 0.3 * scale, equality=equality)
            torch.testing.assert_close(result.x / scale, expected.x)
            torch.testing.assert_close(result.multiplier, expected.multiplier)
            torch.testing.assert_close(result.residual_norm / scale, expected.residual_norm)
            assert float(result.stationarity) <= 1e-13 and float(result.complementarity) <= 1e-13


def test_the_certificate_tells_of_a_wrong_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are made from `x` and the multiplier, not by the method."""
    A, b = graded(7, 4, 20.0), gaussian(7)
    module = importlib.import_module("torch_secondorder.linear.norm_constrained")
    solve = module.solve_secular

    def spoil(share: float, factor: float) -> None:
        def spoiled(*arguments: Any, **more: Any) -> Any:
            found = solve(*arguments, **more)
            return found._replace(x=share * found.x, multiplier=factor * found.multiplier)

        monkeypatch.setattr(module, "solve_secular", spoiled)

    spoil(1.0, 2.0)
    assert float(norm_constrained(A, b, 0.3).stationarity) > 0.1
    spoil(0.5, 1.0)
    short = norm_constrained(A, b, 0.3)
    assert float(short.feasibility) == 0.0 and float(short.complementarity) > 1e-3
    assert float(norm_constrained(A, b, 0.3, equality=True).feasibility) == pytest.approx(0.5)
    spoil(2.0, 1.0)
    assert float(norm_constrained(A, b, 0.3).feasibility) == pytest.approx(1.0)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_general_solver_finds_no_better_point(m: int, n: int) -> None:
    A, b, radius = graded(m, n, 10.0), gaussian(m, seed=3), 0.2
    result = norm_constrained(A, b, radius)
    found = scipy.optimize.minimize(
        lambda x: 0.5 * np.sum((A.numpy() @ x - b.numpy()) ** 2),
        np.full(n, 0.01),
        jac=lambda x: A.numpy().T @ (A.numpy() @ x - b.numpy()),
        constraints={"type": "ineq", "fun": lambda x: radius**2 - x @ x, "jac": lambda x: -2 * x},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(result.x.numpy(), found.x, atol=1e-6)


def test_the_multiplier_says_what_a_larger_radius_gains(device: torch.device) -> None:
    A, b = graded(8, 5, 30.0).to(device), gaussian(8).to(device)
    radius, h = 0.4 * float(lstsq(A, b).norm), 1e-5
    radii = torch.tensor([radius - h, radius, radius + h], dtype=A.dtype, device=device)
    result = norm_constrained(A, b, radii)
    gain = -(result.residual_norm[2] ** 2 - result.residual_norm[0] ** 2) / 2
    change = (radii[2] ** 2 - radii[0] ** 2) / 2
    torch.testing.assert_close(gain / change, result.multiplier[1], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("columns", [1, 3])
def test_right_hand_sides_and_radii_in_one_call(columns: int, device: torch.device) -> None:
    A, B = graded(7, 5, 20.0).to(device), gaussian(7, columns, seed=3).to(device)
    radii = torch.tensor([0.1, 0.5, 1e3], dtype=A.dtype, device=device)[:columns]
    for result, right, bounds in (
        (norm_constrained(A, B, radii), B, radii),
        (norm_constrained(A, B, 0.5), B, radii * 0 + 0.5),
        (norm_constrained(A, B[:, 0], radii), B[:, :1].expand(-1, columns), radii),
    ):
        assert result.x.shape == (5, columns) and result.multiplier.shape == (columns,)
        assert result.stationarity.shape == result.feasibility.shape == (columns,)
        for k in range(columns):
            alone = norm_constrained(A, right[:, k], float(bounds[k]))
            assert alone.multiplier.shape == alone.complementarity.shape == torch.Size()
            torch.testing.assert_close(result.x[:, k], alone.x)
            torch.testing.assert_close(result.multiplier[k], alone.multiplier)


# With equality.


@pytest.mark.parametrize("share", [0.3, 1.5, 1e4])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_norm_is_that_of_the_radius(
    m: int, n: int, rank: int | None, share: float, device: torch.device
) -> None:
    A, b = graded(m, n, 10.0, rank=rank).to(device), gaussian(m, seed=3).to(device)
    shortest = lstsq(A, b)
    radius = share * float(shortest.norm)
    result = norm_constrained(A, b, radius, equality=True)
    x, multiplier = result.x, float(result.multiplier)
    assert float(x.norm()) == pytest.approx(radius, rel=1e-12)
    gradient = A.T @ (A @ x - b) + multiplier * x
    assert float(gradient.norm()) <= 1e-12 * (1 + radius)
    assert float(result.feasibility) <= 1e-13 and float(result.complementarity) == 0.0
    # That is what makes a stationary point the global minimum on the sphere.
    curvature = A.T @ A + multiplier * torch.eye(n, dtype=A.dtype, device=device)
    assert float(torch.linalg.eigvalsh(curvature)[0]) >= -1e-12
    if share < 1:
        assert multiplier > 0
    elif shortest.rank < n:
        assert multiplier == 0.0
        assert float(result.residual_norm) == pytest.approx(float(shortest.residual_norm), abs=1e-9)
    else:
        assert multiplier < 0


def test_a_null_space_along_an_axis(device: torch.device) -> None:
    for wide in (torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 2.0]])):
        A = wide.double().to(device)
        result = norm_constrained(A, A.new_ones(1), 3.0, equality=True)
        assert float(result.norm) == pytest.approx(3.0)
        assert float(result.residual_norm) <= 1e-15 and float(result.multiplier) == 0.0


@pytest.mark.parametrize("radius", [1.0, 3.0])
@pytest.mark.parametrize("nudge", [0.0, 1e-17, 1e-8])
def test_the_hard_case_of_the_sphere(nudge: float, radius: float, device: torch.device) -> None:
    """The gradient has (nearly) nothing along the last singular vector, which fills up `x`."""
    A = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64, device=device))
    b = A.new_tensor([1.0, 0.25, nudge])
    result = norm_constrained(A, b, radius, equality=True)
    assert float(result.multiplier) == pytest.approx(-0.25, abs=1e-7)
    assert float(result.norm) == pytest.approx(radius, rel=1e-14)
    assert float(result.stationarity) <= 1e-14
    assert abs(float(result.x[2])) > 0.5


def test_a_right_hand_side_of_zero(device: torch.device) -> None:
    A = graded(6, 4, 10.0).to(device)
    inside = norm_constrained(A, A.new_zeros(6), 2.0)
    assert not inside.x.any() and float(inside.multiplier) == 0.0
    on_sphere = norm_constrained(A, A.new_zeros(6), 2.0, equality=True)
    assert float(on_sphere.norm) == pytest.approx(2.0)
    assert float(on_sphere.residual_norm) == pytest.approx(0.2)  # twice the least singular value
    assert float(on_sphere.multiplier) == pytest.approx(-0.01)


@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (3, 0)])
def test_a_zero_or_empty_matrix(shape: tuple[int, int], device: torch.device) -> None:
    A, b = torch.zeros(shape, device=device), torch.ones(shape[0], device=device)
    result = norm_constrained(A, b, 2.0)
    assert result.x.shape == shape[1:] and not result.x.any()
    assert float(result.multiplier) == float(result.stationarity) == 0.0
    if shape[1]:
        assert float(norm_constrained(A, b, 2.0, equality=True).norm) == pytest.approx(2.0)
    free = norm_constrained(Counting(A), b, 2.0)
    assert torch.equal(free.x, result.x) and free.iterations == 0


# Matrix-free.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 3.0])
@pytest.mark.parametrize(("m", "n", "rank"), [(60, 40, 40), (40, 60, 40), (50, 50, 8)])
def test_an_operator_gives_the_solution_of_its_matrix(
    m: int, n: int, rank: int, share: float, dtype: torch.dtype, device: torch.device
) -> None:
    A = graded(m, n, 100.0, rank=rank).to(device, dtype)
    b = gaussian(m, seed=3).to(device, dtype)
    radius = share * float(lstsq(A, b, rcond=1e-4).norm)
    dense = norm_constrained(A, b, radius, rcond=1e-4)
    operator = Counting(A)
    result = norm_constrained(operator, b, radius)
    double = dtype == torch.float64
    check_conditions(result, A, b, radius, 1e-9 if double else 2e-5)
    accuracy = 1e-6 if double else 2e-2
    torch.testing.assert_close(result.x, dense.x, rtol=accuracy, atol=accuracy * float(dense.norm))
    multiplier = float(dense.multiplier)
    assert float(result.multiplier) == pytest.approx(multiplier, rel=accuracy, abs=1e-3 * accuracy)
    assert result.status in (KrylovStatus.LEAST_SQUARES, KrylovStatus.CONSISTENT)
    assert result.iterations <= min(m, n)
    # Two a step, one at the start, and three for the numbers of the result.
    assert operator.products == 2 * result.iterations + 4
    assert result.x.dtype == dtype


def test_a_small_ball_takes_few_steps(device: torch.device) -> None:
    A, b = graded(300, 200, 1e6).to(device), gaussian(300).to(device)
    radius = 5.0
    result = norm_constrained((lambda v: A @ v, lambda u: A.T @ u), b, radius, atol=1e-6)
    assert result.iterations < 60
    few = norm_constrained(Counting(A), b, radius, max_iterations=3)
    assert few.status is KrylovStatus.MAX_ITERATIONS and few.iterations == 3
    assert float(few.norm) <= radius * (1 + 1e-12)
    assert float(few.residual_norm) > float(result.residual_norm)


def test_unknowns_may_have_any_shape(device: torch.device) -> None:
    A, b = graded(12, 12, 10.0).to(device), gaussian(12).to(device)
    result = norm_constrained(
        (lambda v: (A @ v.flatten()).view(2, 6), lambda u: (A.T @ u.flatten()).view(3, 4)),
        b.view(2, 6),
        0.5,
    )
    assert result.x.shape == (3, 4)
    torch.testing.assert_close(
        result.x.flatten(), norm_constrained(A, b, 0.5).x, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("spoil", [1, 2, 5, 6])
def test_a_product_that_is_not_finite(spoil: int, device: torch.device) -> None:
    A, b = graded(20, 10, 10.0).to(device), gaussian(20).to(device)
    result = norm_constrained(Counting(A, spoil), b, 0.1)
    assert result.status is KrylovStatus.NONFINITE
    assert result.iterations == max((spoil - 2) // 2, 0)
    assert result.x.isfinite().all() and float(result.norm) <= 0.1 * (1 + 1e-12)


# Gradients.


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(("m", "n"), [(4, 3), (3, 4)])
def test_it_can_be_differentiated_twice(
    m: int, n: int, rank: int | None, device: torch.device
) -> None:
    A, B = graded(m, n, 5.0, rank=rank).to(device), gaussian(m, 2, seed=3).to(device)
    norms = lstsq(A, B, rcond=1e-8).norm
    radii = norms * A.new_tensor([0.3, 2.0 if rank is None else 0.6])
    inputs = (A.requires_grad_(), B.requires_grad_(), radii.requires_grad_())

    def results(A: Tensor, B: Tensor, radii: Tensor) -> tuple[Tensor, ...]:
        result = norm_constrained(A, B, radii, rcond=1e-8)
        return result.x, result.multiplier, result.residual_norm, result.norm

    assert torch.autograd.gradcheck(results, inputs)
    assert torch.autograd.gradgradcheck(results, inputs)


def test_the_envelope_theorem(device: torch.device) -> None:
    """The gradient of the lowest value by the radius is minus the multiplier times the radius."""
    A, b = graded(6, 4, 10.0).to(device), gaussian(6).to(device)
    radius = torch.tensor(0.3, dtype=A.dtype, device=device, requires_grad=True)
    result = norm_constrained(A, b, radius)
    (slope,) = torch.autograd.grad(result.residual_norm**2 / 2, radius)
    torch.testing.assert_close(slope, (-result.multiplier * radius).detach())
    constant = norm_constrained(A, b, 0.3)
    assert torch.equal(constant.x, result.x) and not result.stationarity.requires_grad


def test_a_solution_inside_has_the_gradient_of_the_minimum_norm(device: torch.device) -> None:
    A, b = graded(6, 4, 10.0).to(device), gaussian(6).to(device).requires_grad_()
    result = norm_constrained(A, b, 1e3)
    (found,) = torch.autograd.grad(result.x.sum(), b)
    torch.testing.assert_close(found, torch.linalg.pinv(A).sum(0))
    assert not result.multiplier.requires_grad


def test_a_negative_multiplier_has_no_gradient(device: torch.device) -> None:
    A, b = graded(6, 4, 10.0).to(device).requires_grad_(), gaussian(6).to(device)
    with pytest.raises(ValueError, match="with equality=True there are no derivatives where"):
        norm_constrained(A, b, 1e3, equality=True)
    short = norm_constrained(A, b, 0.1, equality=True)
    assert short.x.requires_grad


def test_it_prints_as_a_table() -> None:
    A = with_singular_values(5, 3, [3.0, 2.0, 1.0])
    text = str(norm_constrained(A, gaussian(5), 0.25))
    assert text.startswith("NormConstrainedResult\n  x                [")
    assert "norm             0.25\n" in text and "status" not in text
    free = norm_constrained(Counting(A), gaussian(5), 0.25)
    assert "status           LEAST_SQUARES: x is a least-squares solution" in str(free)
    assert free.as_dict()["status"] == "LEAST_SQUARES"


A32, B32 = torch.ones(3, 2), torch.ones(3)
FREE = Counting(A32)


@pytest.mark.parametrize(
    ("A", "b", "arguments", "error", "message"),
    [
        (A32, B32, {"radius": 0.0}, ValueError, "radius must be a finite number above 0, got 0.0"),
        (A32, B32, {"radius": torch.zeros(2)}, ValueError, "all entries of radius must be finite"),
        (A32, B32, {"radius": torch.ones(1, 1)}, ValueError, "radius must be a number or have"),
        (A32, B32, {"rcond": 2.0}, ValueError, r"rcond must lie in \[0, 1\)"),
        (A32, B32[:2], {}, ValueError, r"b must have shape \(3,\) or \(3, k\)"),
        (A32[:, :0], B32, {"equality": True}, ValueError, "needs an unknown, but A has no columns"),
        (FREE, B32, {"equality": True}, ValueError, "equality=True needs a dense matrix"),
        (FREE, B32, {"radius": -1.0}, ValueError, "radius must be a finite number above 0"),
        (FREE, B32, {"radius": torch.ones(2)}, ValueError, "radius must be a finite number above"),
        (FREE, B32, {"atol": 1.0}, ValueError, r"atol must lie in \[0, 1\), got 1.0"),
        (FREE, B32, {"max_iterations": 0}, ValueError, "max_iterations must be an integer of at"),
        (FREE, B32 * torch.nan, {}, ValueError, "b must be finite, but its norm is nan"),
        (FREE, B32.half(), {}, TypeError, "b must be float32 or float64, got torch.float16"),
        (FREE, [1.0], {}, TypeError, "b must be a tensor, got list"),
        (3.0, B32, {}, TypeError, "A must be a tensor, a pair of functions .* got float"),
    ],
)  # fmt: skip
def test_errors(
    A: Any, b: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        norm_constrained(A, b, **{"radius": 1.0, **arguments})
