"""Exact minimizers of dense quadratics, by the conditions that characterize them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_secondorder.solvers import DenseQuadratic, DenseStep, solve_trust_region
from torch_secondorder.solvers.dense import Diagonalized, Factorized

KINDS = [Diagonalized, Factorized]
both_kinds = pytest.mark.parametrize("kind", KINDS)
RADII = [1e-3, 1.0, 1e3]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_eigenvalues(values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix, and its eigenvectors as columns."""
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2, basis


def assert_global_minimizer(step: DenseStep, H: Tensor, g: Tensor, radius: float) -> None:
    """The conditions of Moré and Sorensen 1983, lemma 2.1, which are necessary and sufficient."""
    x, multiplier = step.x, step.multiplier
    size = float(H.abs().max()) or 1.0
    assert multiplier >= 0
    assert step.length == pytest.approx(float(x.norm()), rel=1e-12)
    assert step.length <= radius * (1 + 1e-9)
    stationary = H @ x + multiplier * x + g
    assert float(stationary.norm()) <= 1e-8 * (float(g.norm()) + size * step.length)
    assert float(torch.linalg.eigvalsh(H)[0]) + multiplier >= -1e-10 * max(size, multiplier)
    if multiplier > 1e-10 * size:  # a large singular matrix gets a little less than that
        assert step.held
        assert step.length == pytest.approx(radius, rel=1e-8)
    decrease = -float(g @ x + x @ H @ x / 2)
    assert step.decrease == pytest.approx(decrease, rel=1e-8, abs=1e-14 * size * radius**2)


CASES = {
    "indefinite": lambda n: (torch.linspace(-2.0, 3.0, n), 1.0),
    "negative": lambda n: (torch.linspace(-3.0, -1.0, n), 1.0),
    "positive": lambda n: (torch.logspace(-3.0, 3.0, n), 1.0),
    "hard": lambda n: (torch.linspace(-1.0, 3.0, n), 0.0),
    "nearly hard": lambda n: (torch.linspace(-1.0, 3.0, n), 1e-9),
    "singular": lambda n: (torch.linspace(0.0, 3.0, n), 1.0),
    "singular, consistent": lambda n: (torch.linspace(0.0, 3.0, n), 0.0),
    "zero": lambda n: (torch.zeros(n), 1.0),
    "one eigenvalue": lambda n: (-torch.ones(n), 1.0),
}


@both_kinds
@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("name", CASES)
def test_a_step_within_a_radius_is_the_global_minimizer(
    name: str, n: int, radius: float, kind: type[DenseQuadratic], device: torch.device
) -> None:
    values, first = CASES[name](n)
    H, basis = with_eigenvalues(values.double())
    components = normal(n, seed=1)
    components[0] = first
    g = basis @ components
    if n == 1 and not first:
        g = torch.ones(1, dtype=torch.float64)
    H, g = H.to(device), g.to(device)
    assert_global_minimizer(kind(H, g, 1e-10).within(radius), H, g, radius)


@both_kinds
@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-10, 10), min_size=1, max_size=12),
    radius=st.floats(1e-3, 1e3),
    seed=st.integers(0, 100),
)
def test_any_quadratic(
    kind: type[DenseQuadratic], values: list[float], radius: float, seed: int
) -> None:
    rounded = torch.tensor(values, dtype=torch.float64).mul(16).round().div(16)
    H, _ = with_eigenvalues(rounded.sort().values, seed)
    g = normal(len(values), seed=seed + 1)
    assert_global_minimizer(kind(H, g, 1e-10).within(radius), H, g, radius)


@both_kinds
def test_the_hard_case_is_completed_along_the_lowest_eigenvector(
    kind: type[DenseQuadratic],
) -> None:
    H = torch.diag(torch.tensor([-2.0, 1.0, 4.0], dtype=torch.float64))
    g = torch.tensor([0.0, 3.0, 6.0], dtype=torch.float64)
    step = kind(H, g, 1e-10).within(3.0)
    assert step.hard_case and step.held
    assert step.multiplier == pytest.approx(2.0)
    # (H + 2 I) x = -g in the other coordinates.
    expected = torch.tensor([math.sqrt(9 - 1 - 1), -1.0, -1.0], dtype=torch.float64)
    x = step.x * torch.tensor([float(step.x[0].sign()), 1.0, 1.0])
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    # A smaller radius is reached without it.
    assert not kind(H, g, 1e-10).within(0.5).hard_case


@both_kinds
def test_a_flat_direction_without_a_slope_is_left_alone(kind: type[DenseQuadratic]) -> None:
    H, basis = with_eigenvalues(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    g = basis @ torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    step = kind(H, g, 1e-10).within(100.0)
    expected = -basis @ torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(step.x, expected, rtol=1e-4, atol=1e-4)
    assert not step.held and not step.hard_case


@both_kinds
@pytest.mark.parametrize("lowest", [-1.0, 0.5])
def test_a_damped_step(kind: type[DenseQuadratic], lowest: float) -> None:
    values = torch.linspace(lowest, 3.0, 30, dtype=torch.float64)
    H, _ = with_eigenvalues(values)
    g = normal(30, seed=1)
    step = kind(H, g, 1e-10).damped(0.25)
    lift = max(0.0, -lowest)
    assert step.multiplier == pytest.approx(0.25 + lift, rel=1e-3)
    shifted = H + step.multiplier * torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(step.x, -torch.linalg.solve(shifted, g), rtol=1e-8, atol=1e-8)
    assert step.decrease == pytest.approx(-float(g @ step.x + step.x @ H @ step.x / 2))


@both_kinds
def test_a_step_that_damping_holds(kind: type[DenseQuadratic]) -> None:
    H, g = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert kind(H, g, 1e-10).damped(3.0).held
    assert not kind(H, g, 1e-10).damped(0.1).held


def test_a_modified_step_changes_the_signs_of_negative_eigenvalues() -> None:
    values = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
    H, basis = with_eigenvalues(values)
    g = normal(3, seed=1)
    step = Diagonalized(H, g, 1e-10).modified()
    torch.testing.assert_close(step.x, -basis @ ((basis.T @ g) / values.abs()))


def test_a_large_modified_matrix_has_an_indefinite_one_lifted() -> None:
    H, _ = with_eigenvalues(torch.linspace(-1.0, 3.0, 30, dtype=torch.float64))
    g = normal(30, seed=1)
    step = Factorized(H, g, 1e-10).modified()
    assert step.multiplier == pytest.approx(2.0, rel=1e-3)
    lifted = H + step.multiplier * torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(step.x, -torch.linalg.solve(lifted, g))


@both_kinds
@pytest.mark.parametrize("name", CASES)
def test_a_modified_step_goes_down(kind: type[DenseQuadratic], name: str) -> None:
    values, _ = CASES[name](20)
    H, _ = with_eigenvalues(values.double())
    g = normal(20, seed=1)
    step = kind(H, g, 1e-10).modified()
    assert bool(step.x.isfinite().all())
    assert float(g @ step.x) < 0
    if name == "positive":
        torch.testing.assert_close(step.x, -torch.linalg.solve(H, g))


@both_kinds
def test_further_steps_come_from_the_same_matrix(kind: type[DenseQuadratic]) -> None:
    H, _ = with_eigenvalues(torch.linspace(-1.0, 3.0, 25, dtype=torch.float64))
    g, other = normal(25, seed=1), normal(25, seed=2)
    quadratic = kind(H * 1e3, g * 1e-3, 1e-10)
    for step in (quadratic.within(1e-7), quadratic.damped(10.0)):
        shifted = H * 1e3 + step.multiplier * torch.eye(25, dtype=torch.float64)
        torch.testing.assert_close(step.next_from(other), -torch.linalg.solve(shifted, other))


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("matrix_unit", "grad_unit"), [(1e-25, 1e-25), (1e12, 1e-12), (1e25, 1e25)]
)
def test_units(
    kind: type[DenseQuadratic], matrix_unit: float, grad_unit: float, dtype: torch.dtype
) -> None:
    H, _ = with_eigenvalues(torch.linspace(-1.0, 3.0, 10, dtype=torch.float64))
    g = normal(10, seed=1)
    plain = kind(H, g, 1e-10).within(0.5)
    length = 0.5 * grad_unit / matrix_unit
    quadratic = kind((H * matrix_unit).to(dtype), (g * grad_unit).to(dtype), 1e-10)
    step = quadratic.within(length)
    relative = 1e-3 if dtype == torch.float32 else 1e-7
    assert step.length == pytest.approx(length, rel=relative)
    assert step.multiplier == pytest.approx(plain.multiplier * matrix_unit, rel=relative)
    assert step.decrease == pytest.approx(plain.decrease * grad_unit * length / 0.5, rel=relative)
    expected = plain.x * (length / 0.5)
    error = float((step.x.double() - expected).norm())
    assert error <= relative * float(expected.norm())
    assert quadratic.smallest_eigenvalue == pytest.approx(-matrix_unit, rel=relative)


@both_kinds
@pytest.mark.parametrize(
    ("values", "definiteness"),
    [
        ([0.5, 1.0], "positive definite"),
        ([0.0, 1.0], "singular"),
        ([0.0, 0.0], "singular"),
        ([-1e-3, 1.0], "indefinite"),
    ],
)
def test_definiteness(kind: type[DenseQuadratic], values: list[float], definiteness: str) -> None:
    H = torch.diag(torch.tensor(values, dtype=torch.float64))
    quadratic = kind(H, torch.ones(2, dtype=torch.float64), 1e-10)
    assert quadratic.definiteness == definiteness
    if kind is Factorized and definiteness == "positive definite":
        assert quadratic.smallest_eigenvalue is None
    else:
        assert quadratic.smallest_eigenvalue == pytest.approx(values[0], abs=1e-12)


def test_a_lowest_eigenvalue_that_few_lanczos_steps_do_not_find() -> None:
    values = torch.cat([torch.linspace(-1e-5, 1e-4, 250), torch.linspace(1.0, 2.0, 50)]).double()
    H, _ = with_eigenvalues(values)
    quadratic = Factorized(H, normal(300, seed=1), 1e-10)
    assert quadratic.definiteness == "indefinite"
    assert_global_minimizer(quadratic.within(1.0), H, normal(300, seed=1), 1.0)


def test_the_curvature_along_the_gradient() -> None:
    H = torch.diag(torch.tensor([-3.0, 4.0], dtype=torch.float64))
    g = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert DenseQuadratic.of(H, g).along_gradient() == pytest.approx(5 / math.sqrt(2))
    assert DenseQuadratic.of(H, 0 * g).along_gradient() == 0.0


@both_kinds
@pytest.mark.parametrize("radius", [1e-120, 1e-158])
@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0])
def test_a_radius_whose_square_underflows(
    kind: type[DenseQuadratic], radius: float, scale: float
) -> None:
    H = scale * torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    g = torch.tensor([3.0, 0.0, -4.0], dtype=torch.float64)
    step = kind(H, g, 1e-10).within(radius)
    assert step.x.tolist() == pytest.approx((g * (-radius / 5.0)).tolist(), rel=1e-6)


@both_kinds
def test_without_a_slope_the_step_is_a_lowest_eigenvector(kind: type[DenseQuadratic]) -> None:
    H = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    step = kind(H, torch.zeros(3, dtype=torch.float64), 1e-10).within(0.5)
    assert step.hard_case and step.x.abs().tolist() == pytest.approx([0.0, 0.5, 0.0], abs=1e-9)


def test_the_size_decides_about_the_kind() -> None:
    for n, kind in ((128, Diagonalized), (129, Factorized)):
        H = torch.eye(n, dtype=torch.float64)
        assert type(DenseQuadratic.of(H, H[0])) is kind


@pytest.mark.parametrize(
    ("H", "g", "radius", "message"),
    [
        (
            torch.eye(2),
            torch.ones(3),
            1.0,
            r"H must have shape \(n, n\) and g \(n,\), got \(2, 2\)",
        ),
        (torch.ones(0, 0), torch.ones(0), 1.0, r"got \(0, 0\) and \(0,\)"),
        (torch.eye(2), torch.ones(2), 0.0, "radius"),
        (torch.eye(2), torch.ones(2), math.nan, "radius"),
        (torch.eye(2) * math.nan, torch.ones(2), 1.0, "H has entries that are not finite"),
        (torch.eye(2), torch.tensor([1.0, math.inf]), 1.0, "g has entries that are not finite"),
    ],
)
def test_errors(H: Tensor, g: Tensor, radius: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_trust_region(H, g, radius)


@pytest.mark.parametrize(
    ("H", "g", "found"),
    [
        (torch.eye(2), torch.ones(2, dtype=torch.float64), "torch.float32 and torch.float64"),
        (torch.eye(2, dtype=torch.int64), torch.ones(2).long(), "torch.int64 and torch.int64"),
        (torch.eye(2).half(), torch.ones(2).half(), "torch.float16 and torch.float16"),
        ([[1.0]], [1.0], "got list and list"),
    ],
)
def test_types(H: Any, g: Any, found: str) -> None:
    with pytest.raises(TypeError, match=f"tensors of one dtype.*{found}"):
        solve_trust_region(H, g, 1.0)
    with pytest.raises(TypeError, match=f"tensors of one dtype.*{found}"):
        DenseQuadratic.of(H, g)


def test_a_tolerance_out_of_range() -> None:
    with pytest.raises(ValueError, match="tolerance"):
        DenseQuadratic.of(torch.eye(2), torch.ones(2), tolerance=0.0)


def test_squares_beyond_float32() -> None:
    """A radius far beyond the length that the gradient suggests: only the curvature counts."""
    H = torch.diag(torch.tensor([-1e30, 1e30]))
    step = solve_trust_region(H, torch.zeros(2), 0.25)
    assert step.hard_case
    assert step.decrease == pytest.approx(0.5 * 1e30 * 0.25**2, rel=1e-5)
    assert step.length == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", RADII)
def test_no_gradient_and_many_unknowns(radius: float, dtype: torch.dtype) -> None:
    """The first multiplier is not close enough to the lowest eigenvalue for the hard case."""
    for seed in range(4):
        H, _ = with_eigenvalues(-torch.linspace(0.1, 1.1, 130, dtype=torch.float64), seed)
        step = solve_trust_region(H.to(dtype), torch.zeros(130, dtype=dtype), radius)
        assert step.hard_case
        assert step.length == pytest.approx(radius, rel=1e-5)
        assert step.decrease == pytest.approx(0.55 * radius**2, rel=2e-3)
