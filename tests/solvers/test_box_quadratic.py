"""Quadratics in a box, against the enumeration of all faces."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_secondorder.curvature import InverseBFGS, InverseBroyden
from torch_secondorder.solvers import _box_quadratic as box
from torch_secondorder.solvers._box_quadratic import (
    CompactBFGS,
    Face,
    FaceModel,
    InverseOnFaces,
    ScaledIdentity,
    solve_in_box,
)
from torch_secondorder.solvers._boxed_dense import BoxedQuadratic, MatrixOnFaces

INF = math.inf


class Quadratic(NamedTuple):
    """A quadratic `g'd + d'B d / 2` in a box."""

    matrix: Tensor
    grad: Tensor
    low: Tensor
    high: Tensor

    def value(self, step: Tensor) -> float:
        return float(self.grad @ step + 0.5 * step @ self.matrix @ step)

    def residual(self, step: Tensor) -> float:
        """How far the conditions of first order are from being met."""
        slopes = self.grad + self.matrix @ step
        return float((torch.clamp(step - slopes, self.low, self.high) - step).abs().max())


def enumerated(q: Quadratic) -> Tensor:
    """The minimizer of a convex quadratic: the best point of all faces that lies in the box."""
    best = torch.zeros_like(q.grad)
    for face in itertools.product((0, 1, 2), repeat=len(q.grad)):
        kind = torch.tensor(face)
        step = torch.where(kind == 1, q.low, torch.where(kind == 2, q.high, 0))
        free = (kind == 0).nonzero().squeeze(1)
        if not step.isfinite().all():
            continue
        if len(free):
            right = (q.grad + q.matrix @ step)[free]
            step[free] = torch.linalg.solve(q.matrix[free][:, free], -right)
        inside = ((step >= q.low - 1e-12) & (step <= q.high + 1e-12)).all()
        if inside and q.value(step) < q.value(best):
            best = step
    return best


def random_quadratic(seed: int, n: int, condition: float) -> Quadratic:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    basis = torch.linalg.qr(draw(n, n)).Q
    values = torch.logspace(0, math.log10(condition), n, dtype=torch.float64)
    matrix = (basis * values) @ basis.T
    low, high, grad = -draw(n).abs(), draw(n).abs(), 3 * draw(n)
    low[draw(n) < -0.7], high[draw(n) < -0.7] = 0.0, 0.0  # at a bound; some cannot move
    low[draw(n) < -0.9], high[draw(n) < -0.9] = -INF, INF
    return Quadratic((matrix + matrix.T) / 2, grad, low, high)


seeds = st.integers(0, 10_000)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=st.integers(1, 5), condition=st.sampled_from([1.0, 1e2, 1e5]))
def test_solution_is_the_best_of_all_faces(seed: int, n: int, condition: float) -> None:
    q = random_quadratic(seed, n, condition)
    face = solve_in_box(MatrixOnFaces(q.matrix), q.grad, q.low, q.high)
    if face is None:
        assert q.residual(torch.zeros(n, dtype=torch.float64)) == 0.0
        return
    assert ((face.step >= q.low) & (face.step <= q.high)).all()
    torch.testing.assert_close(face.step, enumerated(q), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(face.slopes, q.grad + q.matrix @ face.step, rtol=1e-7, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(2, 5))
def test_faces_one_after_the_other_lead_to_the_same_solution(seed: int, n: int) -> None:
    q = random_quadratic(seed, n, 1e3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(box, "_PATIENCE", 0)
        face = solve_in_box(MatrixOnFaces(q.matrix), q.grad, q.low, q.high)
    wanted = enumerated(q)
    if face is None:
        assert not wanted.any()
        return
    torch.testing.assert_close(face.step, wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(face.slopes, q.grad + q.matrix @ face.step, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("faces", [1, 2, 5])
def test_every_face_on_the_way_lowers_the_quadratic(
    faces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(box, "_PATIENCE", 0)
    monkeypatch.setattr(box, "_MOST_FACES", faces)
    for seed in range(20):
        q = random_quadratic(seed, 30, 1e4)
        face = solve_in_box(MatrixOnFaces(q.matrix), q.grad, q.low, q.high)
        if face is not None:
            assert ((face.step >= q.low) & (face.step <= q.high)).all()
            assert q.value(face.step) < 0.0
            torch.testing.assert_close(face.slopes, q.grad + q.matrix @ face.step)


@pytest.mark.parametrize(("n", "condition"), [(60, 1e2), (60, 1e6), (200, 1e4)])
def test_larger_boxes(n: int, condition: float) -> None:
    for seed in range(5):
        q = random_quadratic(seed, n, condition)
        face = solve_in_box(MatrixOnFaces(q.matrix), q.grad, q.low, q.high)
        assert face is not None
        assert q.residual(face.step) < 1e-7


class Counted:
    """A model that counts its faces."""

    def __init__(self, model: FaceModel) -> None:
        self.model, self.faces = model, 0

    def minimize_on_face(self, grad: Tensor, fixed: Tensor, values: Tensor) -> Face | None:
        self.faces += 1
        return self.model.minimize_on_face(grad, fixed, values)


def test_few_faces_are_needed_whatever_the_size() -> None:
    for n in (10, 100, 400):
        generator = torch.Generator().manual_seed(n)
        # The obstacle problem: a stretched string over a random floor.
        matrix = 2 * torch.eye(n, dtype=torch.float64)
        matrix -= torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
        matrix -= torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
        grad = torch.randn(n, dtype=torch.float64, generator=generator)
        low = torch.zeros(n, dtype=torch.float64)
        model = Counted(MatrixOnFaces(matrix))
        face = solve_in_box(model, grad, low, torch.full_like(low, INF))
        assert face is not None and model.faces <= 20


def test_entries_that_cannot_move_do_not(device: torch.device) -> None:
    zero = torch.zeros(2, dtype=torch.float64, device=device)
    matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64, device=device)
    low, high = torch.tensor([[0.0, -9.0], [0.0, 9.0]], dtype=torch.float64, device=device)
    for sign in (-1.0, 1.0):
        face = solve_in_box(MatrixOnFaces(matrix), zero + sign, low, high)
        assert face is not None
        torch.testing.assert_close(face.step, zero + torch.tensor([0.0, -sign / 2]).to(zero))


def test_no_descent_where_the_conditions_hold() -> None:
    low, high = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    face = solve_in_box(MatrixOnFaces(torch.eye(3, dtype=torch.float64)), high, low, high)
    assert face is None or not face.step.any()


@pytest.mark.parametrize("grad", [INF, math.nan])
def test_no_step_from_numbers_that_are_not_finite(grad: float) -> None:
    low, high = torch.full((2,), -1.0), torch.full((2,), INF)
    face = solve_in_box(MatrixOnFaces(torch.eye(2)), torch.tensor([grad, 1.0]), low, high)
    assert face is None or not bool(torch.isfinite(face.slopes).all())


def test_a_matrix_that_is_not_definite_gives_none() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1.0]))
    low, high = torch.full((2,), -INF), torch.full((2,), INF)
    assert solve_in_box(MatrixOnFaces(matrix), torch.ones(2), low, high) is None


# Models on faces.


def pairs_of(matrix: Tensor, count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    result = []
    for i in range(count):
        s = torch.randn(len(matrix), dtype=torch.float64, generator=generator) * 10.0 ** (-i / 3)
        result.append((s.to(device), (matrix @ s).to(device)))
    return result


def lbfgs(device: torch.device, count: int, history_size: int) -> tuple[FaceModel, Tensor]:
    matrix = random_quadratic(0, 12, 1e3).matrix
    inverse = InverseBFGS(12, history_size, torch.float64, device)
    for s, y in pairs_of(matrix, count, device):
        inverse.push(s, y)
        inverse.direction(s)
    return CompactBFGS(inverse), torch.linalg.inv(inverse.dense())


def bfgs(device: torch.device, count: int, update: str) -> tuple[FaceModel, Tensor]:
    matrix = random_quadratic(0, 12, 1e3).matrix
    inverse = InverseBroyden(12, torch.float64, device, update=update)
    for s, y in pairs_of(matrix, count, device):
        assert inverse.push(s, y)
    return InverseOnFaces(inverse), torch.linalg.inv(inverse.dense())


MODELS = {
    "steepest": lambda d: (ScaledIdentity(0.5), 2 * torch.eye(12, dtype=torch.float64, device=d)),
    "one pair": lambda d: lbfgs(d, 1, 5),
    "half full": lambda d: lbfgs(d, 3, 5),
    "full": lambda d: lbfgs(d, 5, 5),
    "round the ring": lambda d: lbfgs(d, 13, 5),
    "more pairs than entries": lambda d: lbfgs(d, 30, 25),
    "bfgs": lambda d: bfgs(d, 3, "bfgs"),
    "ssbroyden": lambda d: bfgs(d, 11, "ssbroyden"),
    "matrix": lambda d: (
        MatrixOnFaces(random_quadratic(0, 12, 1e3).matrix.to(d)),
        random_quadratic(0, 12, 1e3).matrix.to(d),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [0, 1, 6, 11, 12])
def test_minimizers_on_faces_are_those_of_the_dense_matrix(
    name: str, count: int, device: torch.device
) -> None:
    model, matrix = MODELS[name](device)
    generator = torch.Generator().manual_seed(count)
    grad = torch.randn(12, dtype=torch.float64, generator=generator).to(device)
    fixed = torch.zeros(12, dtype=torch.bool, device=device)
    fixed[torch.randperm(12, generator=generator)[:count].to(device)] = True
    values = torch.where(fixed, torch.randn(12, generator=generator).to(grad), 0)
    face = model.minimize_on_face(grad, fixed, values)
    wanted = MatrixOnFaces(matrix).minimize_on_face(grad, fixed, values)
    assert face is not None and wanted is not None
    torch.testing.assert_close(face.step, wanted.step, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(face.slopes, wanted.slopes, rtol=1e-7, atol=1e-7)
    assert torch.equal(face.step[fixed], values[fixed])


def test_multipliers_do_not_blur_the_step() -> None:
    """Slopes against a bound may be many orders of magnitude larger than the others."""
    grad = torch.full((12,), 1e-9, dtype=torch.float64)
    fixed = torch.arange(12) < 6
    grad[fixed] = 1e6
    for name in ("full", "bfgs", "matrix"):
        model, matrix = MODELS[name](torch.device("cpu"))
        face = model.minimize_on_face(grad, fixed, torch.zeros_like(grad))
        assert face is not None
        wanted = -torch.linalg.solve(matrix[6:, 6:], grad[6:])
        torch.testing.assert_close(face.step[6:], wanted, rtol=1e-6, atol=0.0)


# The dense quadratic of `Newton`.


def indefinite(seed: int) -> Quadratic:
    q = random_quadratic(seed, 8, 1e2)
    matrix = q.matrix - 20 * torch.eye(8, dtype=torch.float64)
    return q._replace(matrix=matrix, low=q.low.clamp(min=-5), high=q.high.clamp(max=5))


@pytest.mark.parametrize("seed", range(8))
def test_indefinite_quadratics_give_descent_within_the_box(seed: int) -> None:
    q = indefinite(seed)
    boxed = BoxedQuadratic(*q)
    assert boxed.definiteness == "indefinite"
    assert boxed.smallest_eigenvalue is not None and boxed.smallest_eigenvalue < 0
    for step in (boxed.within(0.1), boxed.within(10.0), boxed.damped(1.0), boxed.modified()):
        assert ((step.x >= q.low) & (step.x <= q.high)).all()
        assert float(q.grad @ step.x) < 0.0
        assert step.decrease == pytest.approx(-q.value(step.x))
        assert step.decrease > 0.0
    near = boxed.within(0.1)
    assert float(near.x.abs().max()) <= 0.1 == near.length and near.held


def test_a_definite_quadratic_in_a_box_is_solved() -> None:
    q = random_quadratic(3, 5, 1e2)
    boxed = BoxedQuadratic(*q)
    assert boxed.definiteness == "positive definite" and boxed.smallest_eigenvalue is None
    torch.testing.assert_close(boxed.modified().x, enumerated(q))
    torch.testing.assert_close(boxed.within(1e6).x, enumerated(q))
    damped = boxed.damped(10.0)
    heavier = q._replace(matrix=q.matrix + 10 * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(damped.x, enumerated(heavier))
    assert damped.multiplier == 10.0
    # From somewhere else, with the gradient there, the matrix leads to the same point.
    moved = 0.3 * enumerated(q)
    torch.testing.assert_close(
        moved + boxed.further(q.grad + q.matrix @ moved, moved), enumerated(q)
    )


def test_definiteness_is_that_of_the_free_entries() -> None:
    matrix = torch.diag(torch.tensor([-1.0, 2.0], dtype=torch.float64))
    low, high = torch.tensor([[0.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    grad = torch.tensor([1.0, 1.0], dtype=torch.float64)
    boxed = BoxedQuadratic(matrix, grad, low, high)
    assert boxed.definiteness == "positive definite"
    torch.testing.assert_close(boxed.within(5.0).x, torch.tensor([0.0, -0.5], dtype=torch.float64))
    assert boxed.along_gradient() == pytest.approx(2.0)
    singular = torch.diag(torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert BoxedQuadratic(singular, -grad, low, high).definiteness == "singular"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_that_are_kept_are_those_of_all_pairs(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(box, "_COLUMNS", 5)
    generator = torch.Generator().manual_seed(0)
    matrix = random_quadratic(0, 12, 1e2).matrix.to(dtype)
    inverse = InverseBFGS(12, 25, dtype, device)
    kept = CompactBFGS(inverse)

    def draw(n: int = 12) -> Tensor:
        return torch.randn(n, dtype=dtype, generator=generator)

    for step in range(60):  # past the first growth of the history, and round its ring
        if step == 40:
            inverse.reset()
        if step in (50, 51):
            inverse.load_state_dict(inverse.state_dict())
        for _ in range(step % 3 if step != 40 else 1):  # none, one or two at once
            s = draw()
            inverse.push(s.to(device), (matrix @ s).to(device))
        if not inverse.count:
            continue
        fixed = (draw() > 0.3).to(device)
        values, grad = torch.where(fixed, draw().to(device), 0), draw().to(device)
        face = kept.minimize_on_face(grad, fixed, values)
        fresh = CompactBFGS(inverse).minimize_on_face(grad, fixed, values)
        assert face is not None and fresh is not None
        tolerance = 1e-8 if dtype == torch.float64 else 1e-2
        torch.testing.assert_close(face.step, fresh.step, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(face.slopes, fresh.slopes, rtol=tolerance, atol=100 * tolerance)
