"""Damped least squares: every solver against the dense formulas, and against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_secondorder._foundation import memory
from torch_secondorder.curvature import ResidualJacobian
from torch_secondorder.solvers import DampedLeastSquares
from torch_secondorder.solvers import damped_least_squares as module
from torch_secondorder.solvers.damped_least_squares import suited_solver

SOLVERS = ("primal", "dual", "cg")
CPU = torch.device("cpu")


@dataclass
class DenseJacobian(ResidualJacobian):
    """A matrix in the place of a `ResidualJacobian`."""

    J: Tensor
    residuals: Tensor
    rest_gradient: Tensor | None = None
    rest_diagonal: Any = 0.0

    @property
    def rows(self) -> int:
        return self.J.shape[0]

    @property
    def size(self) -> int:
        return self.J.shape[1]

    @property
    def grad(self) -> Tensor:
        rest = 0.0 if self.rest_gradient is None else self.rest_gradient
        return self.J.T @ self.residuals + rest

    def dense(self) -> Tensor:
        return self.J

    def pull(self, u: Tensor) -> Tensor:
        return self.J.T @ u

    def push(self, v: Tensor) -> Tensor:
        return self.J @ v

    def diagonal(self) -> Tensor:
        return self.J.square().sum(0)

    def normal_matrix(self) -> Tensor:
        return self.J.T @ self.J

    def kernel(self, weights: Tensor | None = None) -> Tensor:
        return self.J @ self.J.T if weights is None else (self.J * weights) @ self.J.T


def problem(
    rows: int = 9,
    size: int = 5,
    *,
    rank: int | None = None,
    rest: str = "none",
    dtype: torch.dtype = torch.float64,
    device: torch.device = CPU,
    seed: int = 0,
) -> DenseJacobian:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    J = draw(rows, size)
    if rank is not None:
        J = draw(rows, rank) @ draw(rank, size)
    q = draw(size)
    return {
        "none": lambda: DenseJacobian(J, draw(rows)),
        "gradient": lambda: DenseJacobian(J, draw(rows), q),
        "decay": lambda: DenseJacobian(J, draw(rows), q, 0.3),
        "decays": lambda: DenseJacobian(J, draw(rows), q, draw(size).square()),
    }[rest]()


def oracle(
    j: DenseJacobian, damping: float, metric: Tensor | None = None, center: Tensor | None = None
) -> Tensor:
    n = j.size
    rest = torch.zeros(n).to(j.J) + j.rest_diagonal
    A = j.J.T @ j.J + torch.diag(rest)
    D = torch.eye(n).to(j.J) if metric is None else torch.diag(metric)
    c = torch.zeros(n).to(j.J) if center is None else center
    return torch.linalg.solve(A + damping * D, damping * D @ c - j.grad)


def system(j: DenseJacobian, solver: Any) -> DampedLeastSquares:
    return DampedLeastSquares.of(j, j.grad, solver)  # type: ignore[arg-type]


def precise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Iterative, "tolerance", 1e-14)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rest", ["none", "gradient", "decay", "decays"])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("solver", [*SOLVERS, "cholesky"])
def test_steps_are_those_of_the_dense_formula(
    solver: str,
    shape: tuple[int, int],
    rest: str,
    scaled: bool,
    center: bool,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    precise(monkeypatch)
    if solver == "cholesky":
        monkeypatch.setattr(module, "_SMALL", -1)
    j = problem(*shape, rest=rest, device=device)
    generator = torch.Generator().manual_seed(7)
    n = j.size
    metric = torch.rand(n, generator=generator).double().add(0.1).to(device) if scaled else None
    middle = torch.randn(n, generator=generator).double().to(device) if center else None
    solves = system(j, "primal" if solver == "cholesky" else solver)
    for damping in (3.0, 0.1, 1e-3, 3.0):
        step = solves.solve(damping, metric, middle)
        x = oracle(j, damping, metric, middle)
        torch.testing.assert_close(step.x, x, rtol=1e-8, atol=1e-10)
        rest_diagonal = torch.zeros(n).to(j.J) + j.rest_diagonal
        bend = (j.J @ x).square().sum() + (rest_diagonal * x * x).sum()
        D = torch.ones_like(x) if metric is None else metric
        near = {"rel": 1e-6, "abs": 1e-9}
        assert step.slope == pytest.approx(float(j.grad @ x), **near)
        assert step.decrease == pytest.approx(float(-(j.grad @ x) - 0.5 * bend), **near)
        assert step.length == pytest.approx(float(x.norm()), **near)
        assert step.curvature == pytest.approx(float(bend / (D * x * x).sum()), **near)
    assert solves.finite


@given(
    rows=st.integers(1, 12),
    size=st.integers(1, 12),
    logarithm=st.floats(-8, 4),
    seed=st.integers(0, 10**6),
    scaled=st.booleans(),
)
def test_solvers_agree(rows: int, size: int, logarithm: float, seed: int, scaled: bool) -> None:
    j = problem(rows, size, seed=seed, rest="gradient")
    metric = torch.linspace(0.5, 2.0, size).double() if scaled else None
    damping = 10.0**logarithm
    primal, dual = (system(j, name).solve(damping, metric) for name in ("primal", "dual"))
    scale = float(primal.x.norm()) + float(j.grad.norm())
    # The rest gradient has a part outside of the range of J', which is divided by the damping.
    error = 1e-13 / min(damping, 1.0) * max(1.0, float(j.J.square().sum()))
    torch.testing.assert_close(primal.x, dual.x, rtol=0, atol=error * scale)


@pytest.mark.parametrize("solver", [*SOLVERS, "cholesky"])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_a_jacobian_without_full_rank(
    solver: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    precise(monkeypatch)
    if solver == "cholesky":
        monkeypatch.setattr(module, "_SMALL", -1)
    j = problem(*shape, rank=2, device=device)
    minimal = -torch.linalg.pinv(j.J) @ j.residuals
    solves = system(j, "primal" if solver == "cholesky" else solver)
    for damping in (1e-5, 1e-7):
        step = solves.solve(damping)
        torch.testing.assert_close(step.x, minimal, rtol=1e-3, atol=1e-3)
    for damping in (1e-12, 1e-15, 1e-18):  # rounding takes part, but the residuals fall
        step = solves.solve(damping)
        assert step.decrease > 0
        after = (j.J @ step.x + j.residuals).norm()
        least = (j.J @ minimal + j.residuals).norm()
        assert float(after - least) < 1e-3 * float(j.residuals.norm())


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_zero_residuals_give_no_step(solver: str) -> None:
    j = problem()
    j.residuals = torch.zeros_like(j.residuals)
    step = system(j, solver).solve(0.1)
    assert step.x.abs().max() == 0.0
    assert (step.slope, step.decrease, step.length) == (0.0, 0.0, 0.0)


def test_a_zero_jacobian_gives_no_step() -> None:
    j = problem()
    j.J = torch.zeros_like(j.J)
    for solver in SOLVERS:
        step = system(j, solver).solve(0.1)
        assert step.x.abs().max() == 0.0


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("solver", SOLVERS)
def test_squares_of_gradients_that_are_out_of_range(solver: str, scale: float) -> None:
    torch.manual_seed(0)
    # Singular values near one, times the scale.
    A = torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64))[0]
    r = torch.randn(8, dtype=torch.float64)
    j = DenseJacobian((scale * A).float(), (scale * r).float())
    step = DampedLeastSquares.of(j, j.grad, solver).solve(0.1 * scale**2)
    torch.testing.assert_close(step.x, (-(A.T @ r) / 1.1).float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("small", [True, False])
def test_ill_conditioned_jacobians_keep_their_digits(
    small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The condition number of the normal equations would be 1e18."""
    if not small:
        monkeypatch.setattr(module, "_SMALL", -1)
    generator = torch.Generator().manual_seed(3)
    left, _ = torch.linalg.qr(torch.randn(40, 10, generator=generator).double())
    right, _ = torch.linalg.qr(torch.randn(10, 10, generator=generator).double())
    values = torch.logspace(0, -9, 10).double()
    solution = torch.randn(10, generator=generator).double()
    j = DenseJacobian(left * values @ right.T, torch.zeros(40).double())
    j.residuals = -(j.J @ solution)
    solves = system(j, "primal")
    step = solves.solve(1e-30)
    assert solves.factorization == "qr"
    assert float((step.x - solution).norm() / solution.norm()) < 1e-5
    # Exact, in the basis of singular vectors.
    damping = 1e-14
    step = solves.solve(damping)
    exact = right @ (values**2 / (values**2 + damping) * (right.T @ solution))
    assert float((step.x - exact).norm() / exact.norm()) < (1e-7 if small else 1e-3)


def test_factorizations_are_made_anew_but_the_matrix_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    j = problem()
    counts = {"normal_matrix": 0, "kernel": 0, "dense": 0}
    for name in counts:
        method = getattr(DenseJacobian, name)

        def counted(self: Any, *args: Any, name: str = name, method: Any = method) -> Tensor:
            counts[name] += 1
            return method(self, *args)

        monkeypatch.setattr(DenseJacobian, name, counted)
    monkeypatch.setattr(module, "_SMALL", -1)
    metric = torch.linspace(1, 2, 5).double()
    for solver in ("primal", "dual"):
        solves = system(j, solver)
        assert solves.finite
        for damping in (1.0, 2.0, 3.0):
            solves.solve(damping)
    assert counts["normal_matrix"] == counts["kernel"] == 1
    solves = system(j, "dual")
    for damping in (1.0, 2.0, 3.0):
        solves.solve(damping, metric)
    assert counts["kernel"] == 2


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_jacobians_that_are_not_finite(solver: str) -> None:
    for value in (float("nan"), float("inf")):
        j = problem()
        j.J[1, 2] = value
        assert not system(j, solver).finite


def test_geodesic_corrections_solve_the_same_system() -> None:
    j = problem(rest="decays")
    bend = torch.randn(9, generator=torch.Generator().manual_seed(5)).double()
    metric = torch.linspace(1, 2, 5).double()
    expected = oracle(DenseJacobian(j.J, bend, None, j.rest_diagonal), 0.2, metric)
    for solver in ("primal", "dual"):
        found = system(j, solver).accelerate(0.2, metric, bend)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_steps_within_bounds(scaled: bool) -> None:
    j = problem(rest="decay")
    metric = torch.linspace(0.2, 5.0, 5).double() if scaled else None
    solves = system(j, "primal")
    free = solves.solve(0.1, metric)
    wide = torch.full_like(free.x, 100.0)
    inside = solves.solve_in(0.1, metric, -wide, wide)
    torch.testing.assert_close(inside.x, free.x, rtol=1e-9, atol=1e-12)
    assert inside.slope == pytest.approx(free.slope)
    assert inside.decrease == pytest.approx(free.decrease)
    assert inside.length == pytest.approx(free.length)
    assert inside.curvature == pytest.approx(free.curvature)
    low, high = -0.3 * free.x.abs(), 0.3 * free.x.abs()
    step = solves.solve_in(0.1, metric, low, high)
    assert bool(((step.x >= low) & (step.x <= high)).all())
    # The conditions of first order: the damped slopes vanish or push against a bound.
    D = torch.ones(5).double() if metric is None else metric
    slopes = j.grad + j.J.T @ (j.J @ step.x) + (j.rest_diagonal + 0.1 * D) * step.x
    for x, slope, a, b in zip(step.x, slopes, low, high, strict=True):
        assert abs(slope) < 1e-9 or (x == a and slope > 0) or (x == b and slope < 0)
    model = j.grad @ step.x + 0.5 * (j.J @ step.x).square().sum() + 0.15 * step.x @ step.x
    assert step.decrease == pytest.approx(-float(model))


def test_the_solver_is_chosen_by_size_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert suited_solver(100, 99, torch.float64, CPU) == "primal"
    assert suited_solver(99, 100, torch.float64, CPU) == "dual"
    assert suited_solver(100_000, 100_000, torch.float64, CPU) == "cg"
    assert suited_solver(10**9, 5000, torch.float64, CPU) == "primal"
    monkeypatch.setattr(memory, "free_memory", lambda device: 2.0**27)
    assert suited_solver(9000, 9000, torch.float64, CPU) == "cg"
    with pytest.raises(ValueError, match=r"primal system .* 3 x 9,000 x 9,000 .*solver='cg'"):
        module._check_fits("primal", 9000, 9000, torch.float64, CPU)
    with pytest.raises(ValueError, match=r"primal system .*solver='dual'"):
        module._check_fits("primal", 10, 9000, torch.float64, CPU)
    with pytest.raises(ValueError, match=r"dual system .*solver='primal'"):
        module._check_fits("dual", 9000, 10, torch.float64, CPU)


def test_bad_arguments() -> None:
    j = problem()
    with pytest.raises(ValueError, match="solver must be one of 'auto', 'primal'"):
        system(j, "lu")
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping must be"):
            system(j, "primal").solve(damping)
    assert system(j, "auto").name == "primal"
    assert system(problem(5, 9), "auto").name == "dual"


def test_the_iterative_solver_counts() -> None:
    step = system(problem(), "cg").solve(0.1)
    assert 1 <= step.iterations <= 5


@pytest.mark.parametrize(("kind", "way"), [("primal", "qr"), ("dual", "eigen"), ("sums", "eigen")])
def test_factors_that_turn_out_not_to_be_of_a_positive_definite_matrix(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of few digits may, when refinement fails and the matrix is factorized anew."""

    class Failing:
        def solve(self, right: Tensor) -> None:
            return None

    monkeypatch.setattr(module, "cholesky", lambda *_: Failing())
    monkeypatch.setattr(module, "_SMALL", -1)
    j, damping = problem(), 0.1
    if kind == "sums":
        solves: Any = module._OfSums(j, j.grad)  # type: ignore[arg-type]
        x, _ = solves._solve(damping, None, damping, solves._right_side(None))
    else:
        solves = system(j, kind)
        x = solves.solve(damping).x
    assert solves.factorization == way
    torch.testing.assert_close(x, oracle(j, damping), rtol=1e-10, atol=0)
