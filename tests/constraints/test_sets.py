"""Sets of tensors: projections, tangents, retractions, and the derivatives of these."""

from __future__ import annotations

import copy
import pickle
from math import inf, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from torch_secondorder.constraints import Box, NormBall, Orthogonal, Simplex, UnitNorm
from torch_secondorder.constraints._sets import Manifold, TensorSet

CONVEX = {
    "ball": (NormBall(), (5,)),
    "balls of rows": (NormBall(0.7, dim=1), (3, 4)),
    "ball of 1-norm": (NormBall(2.0, p=1), (5,)),
    "balls of 1-norm": (NormBall(0.5, p=1, dim=(0, 2)), (3, 4, 2)),
    "ball of largest entry": (NormBall(0.5, p=inf), (5,)),
    "simplex": (Simplex(), (5,)),
    "simplices of columns": (Simplex(2.0, dim=0), (4, 3)),
    "box": (Box(-0.5, torch.tensor([0.1, inf, 1.0], dtype=torch.float64)), (4, 3)),
    "half space": (Box(low=0.0), (5,)),
}
MANIFOLDS = {
    "sphere": (UnitNorm(), (5,)),
    "spheres of rows": (UnitNorm(dim=-1), (3, 4)),
    "spheres of filters": (UnitNorm(dim=(1, 2)), (2, 3, 2)),
    "points": (UnitNorm(), ()),
    "tall": (Orthogonal(), (5, 3)),
    "wide": (Orthogonal(), (2, 4)),
    "square": (Orthogonal(), (3, 3)),
    "batch": (Orthogonal(), (2, 4, 2)),
}
SETS = {**CONVEX, **MANIFOLDS}
Kind = tuple[TensorSet, tuple[int, ...]]
convex = pytest.mark.parametrize("kind", CONVEX.values(), ids=list(CONVEX))
manifolds = pytest.mark.parametrize("kind", MANIFOLDS.values(), ids=list(MANIFOLDS))
sets = pytest.mark.parametrize("kind", SETS.values(), ids=list(SETS))
real_or_complex = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
few = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 10**6)
scales = st.sampled_from([1e-3, 0.3, 1.0, 3.0, 1e3])


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def real_inner(a: Tensor, b: Tensor) -> float:
    return float((a.conj() * b).sum().real)


@sets
@given(seed=seeds, scale=scales)
@few
def test_a_projection_is_in_the_set_and_stays(kind: Kind, seed: int, scale: float) -> None:
    found, shape = kind
    x = found.project(scale * drawn(seed, shape))
    assert found.distance(x) <= 1e-14
    assert found.contains(x)
    assert torch.equal(found.project(x), x)
    narrow = found.project((scale * drawn(seed, shape)).to(torch.bfloat16))
    assert torch.equal(found.project(narrow), narrow)


@sets
@given(seed=seeds, scale=scales)
@few
def test_no_other_point_is_nearer(kind: Kind, seed: int, scale: float) -> None:
    found, shape = kind
    x = scale * drawn(seed, shape)
    nearest = (found.project(x) - x).norm()
    assert float(nearest) == pytest.approx(float(found.distance(x)), abs=1e-12)
    for other in range(6):
        step = drawn(seed + 1 + other, shape) * 10.0 ** -(other % 4)
        point = found.project(found.project(x) + step)
        assert float((point - x).norm()) >= float(nearest) * (1 - 1e-12)


@convex
@given(seed=seeds, scale=scales)
@few
def test_projections_onto_convex_sets_do_not_expand(kind: Kind, seed: int, scale: float) -> None:
    found, shape = kind
    a, b = scale * drawn(seed, shape), scale * drawn(seed + 1, shape)
    moved = (found.project(a) - found.project(b)).norm()
    assert float(moved) <= float((a - b).norm()) * (1 + 1e-12)


@sets
def test_points_inside_stay_to_the_last_bit(kind: Kind) -> None:
    found, shape = kind
    if isinstance(found, (NormBall, Box)):
        x = 0.05 * drawn(0, shape).abs()
        assert torch.equal(found.project(x), x)


@sets
@given(seed=seeds)
@few
def test_a_tangent_is_the_direction_in_which_the_set_goes_on(kind: Kind, seed: int) -> None:
    found, shape = kind
    x, v, h = found.project(drawn(seed, shape)), drawn(seed + 1, shape), 1e-7
    moved = (found.project(x + h * v) - x) / h
    torch.testing.assert_close(found.tangent(x, v), moved, rtol=0, atol=3e-5)


@sets
def test_a_tangent_of_a_tangent_is_itself(kind: Kind) -> None:
    found, shape = kind
    x, v = found.project(drawn(0, shape)), drawn(1, shape)
    tangent = found.tangent(x, v)
    torch.testing.assert_close(found.tangent(x, tangent), tangent, rtol=0, atol=1e-14)
    assert real_inner(tangent, v - tangent) == pytest.approx(0.0, abs=1e-13)


@manifolds
@real_or_complex
def test_a_retraction_agrees_with_the_geodesic_to_second_order(
    kind: Kind, dtype: torch.dtype
) -> None:
    found, shape = kind
    assert isinstance(found, Manifold)
    x = found.project(drawn(0, shape, dtype))
    v = found.tangent(x, drawn(1, shape, dtype))
    h = 1e-3
    ahead, behind = found.retract(x, h * v), found.retract(x, -h * v)
    assert found.contains(ahead)
    torch.testing.assert_close((ahead - behind) / (2 * h), v, rtol=0, atol=1e-4)
    acceleration = (ahead + behind - 2 * x) / h**2
    # Along a geodesic it is normal to the manifold.
    torch.testing.assert_close(
        found.tangent(x, acceleration), torch.zeros_like(x), rtol=0, atol=1e-4
    )


@manifolds
@real_or_complex
def test_the_differential_is_that_of_the_projection(kind: Kind, dtype: torch.dtype) -> None:
    found, shape = kind
    assert isinstance(found, Manifold)
    w, v, u = (drawn(seed, shape, dtype) for seed in range(3))
    h = 1e-6
    difference = (found.project(w + h * v) - found.project(w - h * v)) / (2 * h)
    along = found.differential(w, v)
    torch.testing.assert_close(along, difference, rtol=1e-6, atol=1e-7)
    # Symmetric, so it takes gradients back as well.
    assert real_inner(u, along) == pytest.approx(real_inner(found.differential(w, u), v), abs=1e-12)


@manifolds
@real_or_complex
def test_the_weingarten_map_is_the_second_derivative_of_the_projection(
    kind: Kind, dtype: torch.dtype
) -> None:
    found, shape = kind
    assert isinstance(found, Manifold)
    x, g = found.project(drawn(0, shape, dtype)), drawn(1, shape, dtype)
    v, h = found.tangent(x, drawn(2, shape, dtype)), 1e-5

    def pulled_back(t: float) -> Tensor:
        return found.tangent(x, found.differential(x + t * v, g))

    difference = (pulled_back(h) - pulled_back(-h)) / (2 * h)
    torch.testing.assert_close(found.weingarten(x, v, g), difference, rtol=1e-6, atol=1e-7)


@sets
@real_or_complex
def test_projections_can_be_differentiated(kind: Kind, dtype: torch.dtype) -> None:
    found, shape = kind
    takes_complex = isinstance(found, Manifold) or (isinstance(found, NormBall) and found.p == 2)
    if dtype.is_complex and not takes_complex:
        with pytest.raises(TypeError, match="complex"):
            found.check(drawn(3, shape, dtype))
        return
    x = drawn(3, shape, dtype).requires_grad_()
    assert torch.autograd.gradcheck(found.project, x)
    assert torch.autograd.gradgradcheck(found.project, x)


@manifolds
def test_points_on_a_manifold_can_be_differentiated(kind: Kind) -> None:
    # Singular values are equal there, and the derivative through their decomposition is NaN.
    found, shape = kind
    x = found.project(drawn(3, shape)).requires_grad_()
    assert torch.autograd.gradcheck(found.project, x)


# Special tensors.


def test_the_nearest_unit_vector_to_zero_has_equal_entries(device: torch.device) -> None:
    x = torch.zeros(2, 4, device=device, requires_grad=True)
    nearest = UnitNorm(dim=1).project(x)
    torch.testing.assert_close(nearest, torch.full_like(x, 0.5))
    nearest.sum().backward()
    assert x.grad is not None and not x.grad.any()
    mixed = torch.tensor([[0.0, 0.0], [3.0, 4.0]], device=device)
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]], device=device)
    torch.testing.assert_close(UnitNorm(dim=1).project(mixed), expected)


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_squares_out_of_range_do_no_harm(size: float) -> None:
    x = torch.tensor([3.0, 4.0], dtype=torch.float64) * size
    expected = torch.tensor([0.6, 0.8], dtype=torch.float64)
    torch.testing.assert_close(UnitNorm().project(x), expected)
    ball = NormBall(size).project(x)
    torch.testing.assert_close(ball / size, expected)


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (3, 3), (2, 4, 3)])
def test_matrices_of_any_rank_have_a_polar_factor(shape: tuple[int, ...]) -> None:
    found = Orthogonal()
    for x in (torch.zeros(shape), torch.ones(shape)):
        x = x.double().requires_grad_()
        nearest = found.project(x)
        assert found.contains(nearest)
        # No other point is nearer than one that makes the nuclear norm.
        with torch.no_grad():
            nuclear = torch.linalg.matrix_norm(x, "nuc").sum()
            torch.testing.assert_close((nearest * x).sum(), nuclear, rtol=0, atol=1e-12)
        (gradient,) = torch.autograd.grad(nearest.sum(), x)
        assert gradient.isfinite().all()


def test_large_numbers_leave_the_sum_of_a_simplex_exact() -> None:
    x = torch.tensor([1e16, 1e16 + 2, -1e16, 0.0], dtype=torch.float64)
    torch.testing.assert_close(Simplex().project(x), torch.tensor([0.0, 1.0, 0.0, 0.0]).double())
    tied = torch.full((4,), 1e8, dtype=torch.float64)
    torch.testing.assert_close(Simplex(2.0).project(tied), torch.full_like(tied, 0.5))


@pytest.mark.parametrize("below", [1e-8, 1e-40])
def test_a_point_of_a_simplex_has_no_number_below_zero(below: float) -> None:
    x = torch.tensor([1.0, -below, 0.0])
    nearest = Simplex().project(x)
    assert nearest.tolist() == [1.0, 0.0, 0.0]
    assert nearest.sqrt().isfinite().all()


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("found", [UnitNorm(), NormBall(1e-35), Box(-1e-35, 1e-35)])
def test_distances_neither_overflow_nor_vanish(found: TensorSet, size: float) -> None:
    x = torch.tensor([3 * size, 4 * size])
    distance = found.distance(x).item()
    assert distance == pytest.approx(abs(5 * size - (1 if isinstance(found, UnitNorm) else 0)))


@sets
def test_a_nan_stays_one(kind: Kind) -> None:
    found, shape = kind
    x = drawn(0, shape)
    x.view(-1)[0] = nan
    assert found.project(x).isnan().any()
    assert not found.contains(x)


@sets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_numbers_are_in_the_set_up_to_rounding(
    kind: Kind, dtype: torch.dtype, device: torch.device
) -> None:
    found, shape = kind
    if isinstance(found, Box) and isinstance(found.high, Tensor):
        found = Box(found.low, found.high.to(device))
    x = (2 * drawn(0, shape)).to(device, dtype)
    nearest = found.project(x)
    assert nearest.dtype == dtype and nearest.device == x.device
    assert found.contains(nearest)
    tangent = found.tangent(nearest, x)
    assert tangent.dtype == dtype


def test_bounds_are_rounded_into_the_box() -> None:
    box = Box(low=torch.tensor(0.1, dtype=torch.float64))
    x = box.project(torch.zeros(1, dtype=torch.bfloat16))
    assert x.item() >= 0.1
    assert box.contains(x)


def test_distances_are_those_of_whole_tensors() -> None:
    rows = UnitNorm(dim=1)
    assert rows.distance(torch.tensor([[3.0, 4.0], [0.0, 4.0]])).item() == pytest.approx(5.0)
    assert NormBall(2.0).distance(torch.tensor([3.0, 4.0])).item() == pytest.approx(3.0)
    assert NormBall().contains(torch.tensor([1.1, 0.0]), tolerance=0.2)
    assert not NormBall().contains(torch.tensor([1.1, 0.0]), tolerance=0.05)


# Parametrizations.


@sets
def test_a_set_is_a_parametrization(kind: Kind) -> None:
    found, shape = kind
    model = nn.Module()
    model.weight = nn.Parameter(2 * drawn(0, shape))
    expected = found.project(model.weight.detach())
    register_parametrization(model, "weight", found.parametrization())
    torch.testing.assert_close(model.weight.detach(), expected)
    point = found.project(drawn(1, shape))
    model.weight = point
    torch.testing.assert_close(model.weight.detach(), point)
    model.weight.sum().backward()
    (original,) = model.parameters()
    assert original.grad is not None
    assert repr(found) in repr(model)


def test_an_angle_is_a_parametrization_of_the_circle() -> None:
    # The reparametrization (cos theta, sin theta) of the least squares problem on the unit circle.
    class Angle(nn.Module):
        def forward(self, theta: Tensor) -> Tensor:
            return torch.cat([theta.cos(), theta.sin()])

        def right_inverse(self, x: Tensor) -> Tensor:
            return torch.atan2(x[1:], x[:1])

    A = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([2.0, 1.0, 2.8], dtype=torch.float64)
    model = nn.Module()
    model.x = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
    register_parametrization(model, "x", Angle(), unsafe=True)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (A @ model.x - b).square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = torch.tensor([0.6, 0.8], dtype=torch.float64)
    torch.testing.assert_close(model.x.detach(), expected, rtol=0, atol=1e-5)


@sets
def test_sets_can_be_copied_and_pickled(kind: Kind) -> None:
    found, shape = kind
    x = 2 * drawn(0, shape)
    expected = found.project(x)
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(other.project(x), expected)
        assert repr(other) == repr(found)


# Errors.


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: UnitNorm(dim="rows"), TypeError, "dim is an integer, a tuple of integers"),
        (lambda: UnitNorm(dim=True), TypeError, "dim is an integer"),
        (lambda: UnitNorm(dim=1.0), TypeError, "dim is an integer"),
        (lambda: NormBall(dim=()), ValueError, "one or more dimensions, each once, got"),
        (lambda: Simplex(dim=(1, 1)), ValueError, "one or more dimensions, each once"),
        (lambda: NormBall(0.0), ValueError, "radius must"),
        (lambda: NormBall(inf), ValueError, "radius must"),
        (lambda: NormBall(p=3), ValueError, "p must be 1, 2 or math.inf, got 3"),
        (lambda: Simplex(-1.0), ValueError, "total must"),
        (lambda: Box(), ValueError, "a lower or an upper bound, got None for both"),
        (lambda: Box(1.0, 0.0), ValueError, "the bounds cross: low is 1.0, high is 0.0"),
        (lambda: Box(nan), ValueError, "low is NaN; None stands for no bound"),
        (lambda: Box(high="1"), TypeError, "high must be a number, a tensor or None, got str"),
        (lambda: Box(torch.ones(2) > 0), TypeError, "real numbers, got a tensor of torch.bool"),
    ],
)
def test_wrong_arguments_are_refused(make, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("found", "tensor", "kind", "message"),
    [
        (UnitNorm(dim=2), torch.ones(2, 3), ValueError, r"about dimension 2, which .* \(2, 3\)"),
        (NormBall(dim=(1, -1)), torch.ones(2, 3), ValueError, "two of which are the same"),
        (UnitNorm(), torch.ones(0), ValueError, r"no empty tensor, got shape \(0,\)"),
        (Orthogonal(), torch.ones(3), ValueError, "matrices, got .*vectors of norm one are Unit"),
        (Orthogonal(), torch.ones(0, 3), ValueError, r"no empty tensor, got shape \(0, 3\)"),
        (Simplex(), torch.ones(2, dtype=torch.cfloat), TypeError, "complex ones lack: hold"),
        (NormBall(p=1), torch.ones(2, dtype=torch.cfloat), TypeError, "complex ones lack: hold"),
        (Box(0, 1), torch.ones(2, dtype=torch.cfloat), TypeError, "complex ones lack: hold"),
        (UnitNorm(), torch.ones(2, dtype=torch.long), TypeError, "got one of torch.int64"),
        (UnitNorm(), [1.0], TypeError, "set of tensors, got list"),
        (Box(torch.zeros(3)), torch.ones(2), ValueError, r"shape \(3,\) does not broadcast"),
        (Box(torch.zeros(2, 2)), torch.ones(2), ValueError, r"\(2, 2\) does not broadcast to"),
    ],
)
def test_tensors_that_a_set_does_not_have_are_refused(
    found: TensorSet, tensor: Tensor, kind: type[Exception], message: str
) -> None:
    for use in (found.check, found.project, found.distance):
        with pytest.raises(kind, match=message):
            use(tensor)
