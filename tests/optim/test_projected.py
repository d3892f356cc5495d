"""Parameters kept in sets: along manifolds, within convex sets, with any optimizer and loop."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_secondorder import (
    BFGS,
    LBFGS,
    AdaHessian,
    ClosureObjective,
    Constrained,
    Contractive,
    DatasetClosure,
    FunctionalObjective,
    LevenbergMarquardt,
    Newton,
    NewtonCG,
    NonlinearCG,
    Projected,
    Sophia,
)
from torch_secondorder._optim.residuals import residuals_at
from torch_secondorder._params.manifold import Manifold
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.constraints import Box, NormBall, Orthogonal, Simplex, UnitNorm
from torch_secondorder.curvature import FiniteDifference, Hessian

# The article's least squares problem: within the unit ball its solution is (0.6, 0.8).
A = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
B = torch.tensor([2.0, 1.0, 2.8], dtype=torch.float64)
SOLUTION = torch.tensor([0.6, 0.8], dtype=torch.float64)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.05)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.5)


def torch_lbfgs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, line_search_fn="strong_wolfe")


def ada(params: Any) -> torch.optim.Optimizer:
    return AdaHessian(params, lr=0.05)


FLAT = [LBFGS, BFGS, NonlinearCG, NewtonCG, Newton]


def parameter(*values: float, **more: Any) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64, **more))


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def symmetric(n: int) -> Tensor:
    matrix = random(n, n)
    return matrix + matrix.T


def least_squares(x: Tensor) -> Tensor:
    return (A.to(x) @ x - B.to(x)).square().sum() / 2


def closure_of(optimizer: Any, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def run(optimizer: Any, loss: Callable[[], Tensor], steps: int) -> None:
    closure = closure_of(optimizer, loss)
    for _ in range(steps):
        optimizer.step(closure)


# Objectives on manifolds, against dense oracles.

PROBLEMS = {
    "sphere": (UnitNorm(), (6,), lambda x: x @ symmetric(6).to(x) @ x + x.exp().sum()),
    "rows": (UnitNorm(dim=1), (3, 4), lambda x: (x @ symmetric(4) @ x.T).square().sum()),
    "stiefel": (Orthogonal(), (5, 2), lambda x: (x.T @ symmetric(5) @ x).diagonal() @ x[0].exp()),
    "wide": (Orthogonal(), (2, 4), lambda x: (x**3).sum() + (x @ symmetric(4) @ x.T).sum()),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("scale", [None, [0.5, 1.0]], ids=["plain", "scaled"])
def test_gradients_and_products_are_those_along_the_manifold(
    name: str, scale: list[float] | None
) -> None:
    found, shape, function = PROBLEMS[name]
    x = nn.Parameter(found.project(random(*shape, seed=1)))
    free = parameter(0.3, -0.2)

    def loss(x: Tensor, free: Tensor) -> Tensor:
        return function(x) * (1 + free.square().sum()) + free.sum()

    def closure() -> Tensor:
        value = loss(x, free)
        value.backward()
        return value

    vector = ParameterVector([x, free], scale)
    objective = ClosureObjective.for_step(closure, vector)
    objective.manifold = Manifold(vector, {id(x): found})
    with objective:
        base, n = x.detach().clone(), x.numel()
        start = free.detach().clone()
        factor = torch.ones(vector.size).double() if vector.scale is None else vector.scale

        def chart(v: Tensor) -> Tensor:
            move = v * factor
            step = found.tangent(base, move[:n].view(shape))
            return loss(found.project(base + step), start + move[n:])

        zero = torch.zeros(vector.size, dtype=torch.float64)
        evaluation = objective.evaluate(curvature=True)
        torch.testing.assert_close(evaluation.grad, torch.autograd.functional.jacobian(chart, zero))
        dense = torch.autograd.functional.hessian(chart, zero)
        torch.testing.assert_close(Hessian(evaluation).dense(), dense, rtol=1e-9, atol=1e-9)
        v = random(vector.size, seed=3)
        torch.testing.assert_close(Hessian(evaluation) @ v, dense @ v, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(FiniteDifference(objective) @ v, dense @ v, rtol=1e-5, atol=1e-5)
        # At a trial, the gradient is by the step; once it is accepted, by the next one.
        trial = objective.trial(v, 0.3)
        expected = torch.autograd.functional.jacobian(chart, 0.3 * v)
        torch.testing.assert_close(trial.grad, expected)
        objective.accept(v, 0.3)
        assert found.contains(x.detach())
        again = objective.evaluate()
        assert trial.ambient is not None
        landed = objective.manifold.tangent(objective.position, trial.ambient)
        torch.testing.assert_close(again.grad, landed)


@pytest.mark.parametrize("make", [Newton, NewtonCG], ids=lambda make: make.__name__)
def test_newton_finds_eigenvectors_as_fast_as_the_dense_riemannian_method(make: Any) -> None:
    # The Rayleigh quotient: Newton's method on the sphere converges cubically.
    matrix = symmetric(8)
    _, vectors = torch.linalg.eigh(matrix)
    lowest = vectors[:, 0]
    x = nn.Parameter(UnitNorm().project(lowest + 0.1 * random(8, seed=2)))
    more = (
        {"corrections": 0, "globalization": "line_search"}
        if make is Newton
        else {"curvature": "hessian"}
    )
    optimizer = Projected(make([x], tolerance_grad=0.0, **more), {x: UnitNorm()})
    oracle, errors, gaps = x.detach().clone(), [], []
    for _ in range(4):
        run(optimizer, lambda: x @ matrix @ x / 2, 1)
        # Newton's equation on the tangent space, by a basis of it.
        basis = torch.linalg.svd(oracle[None])[2][1:].T
        gradient = basis.T @ matrix @ oracle
        hessian = basis.T @ (matrix - oracle @ matrix @ oracle * torch.eye(8).double()) @ basis
        oracle = UnitNorm().retract(oracle, -basis @ torch.linalg.solve(hessian, gradient))
        with torch.no_grad():
            errors.append(float((x - lowest * (x @ lowest).sign()).norm()))
            gaps.append(float((x - oracle).norm()))
    assert errors[-1] < 1e-14
    for before, after in pairwise([0.2, *errors]):
        assert after < max(20 * before**2, 1e-14)
    if make is Newton:
        assert max(gaps) < 1e-10
        for before, after in pairwise(errors):
            assert after < max(30 * before**3, 1e-14)


def brockett(n: int, k: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    matrix = symmetric(n)
    weights = torch.arange(k, 0, -1, dtype=torch.float64)
    return torch.linalg.eigh(matrix)[1][:, :k], lambda W: ((matrix @ W) * W * weights).sum()


@pytest.mark.parametrize("make", FLAT, ids=lambda make: make.__name__)
def test_flat_optimizers_find_eigenvectors_on_the_stiefel_manifold(make: Any) -> None:
    vectors, loss = brockett(7, 3)
    W = nn.Parameter(Orthogonal().project(random(7, 3, seed=5)))
    optimizer = Projected(make([W]), [(W, Orthogonal())])
    run(optimizer, lambda: loss(W), 20)
    cosines = (W.detach() * vectors).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-10)
    info = optimizer.info
    assert info is not None and info.inner is optimizer.optimizer.info
    assert info.violation < 1e-14 and info.correction == 0.0 and not info.start_projected


@pytest.mark.parametrize("update", ["bfgs", "ssbfgs", "ssbroyden"])
def test_every_update_of_lbfgs_stays_on_the_manifold(update: Any) -> None:
    vectors, loss = brockett(7, 3)
    for make in (LBFGS, BFGS):
        W = nn.Parameter(Orthogonal().project(random(7, 3, seed=5)))
        optimizer = Projected(make([W], update=update, max_iter=200), [(W, Orthogonal())])
        run(optimizer, lambda W=W: loss(W), 4)
        cosines = (W.detach() * vectors).sum(0).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-9)


@pytest.mark.parametrize("line_search_fn", ["strong_wolfe", "hager_zhang", "armijo", None])
def test_every_line_search_stays_on_the_sphere(line_search_fn: Any) -> None:
    matrix = symmetric(6)
    x = nn.Parameter(UnitNorm().project(random(6)))
    lr = 1.0 if line_search_fn else 0.2
    optimizer = LBFGS([x], lr=lr, line_search_fn=line_search_fn, max_iter=100)
    run(Projected(optimizer, {x: UnitNorm()}), lambda: x @ matrix @ x, 5)
    lowest = torch.linalg.eigvalsh(matrix)[0]
    torch.testing.assert_close((x @ matrix @ x).detach(), lowest, rtol=1e-10, atol=0)


@pytest.mark.parametrize("rule", ["damping", "trust_region", "line_search"])
@pytest.mark.parametrize("make", [Newton, NewtonCG], ids=lambda make: make.__name__)
def test_every_globalization_stays_on_the_manifold(make: Any, rule: Any) -> None:
    vectors, loss = brockett(6, 2)
    W = nn.Parameter(Orthogonal().project(random(6, 2, seed=4)))
    optimizer = make([W], globalization=rule, max_iter=10)
    run(Projected(optimizer, {W: Orthogonal()}), lambda: loss(W), 10)
    cosines = (W.detach() * vectors).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-8)


@pytest.mark.parametrize("make", [LBFGS, BFGS, NonlinearCG], ids=lambda make: make.__name__)
def test_lines_are_tangent_and_not_longer_than_half_of_the_point(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, loss = brockett(7, 3)
    W = nn.Parameter(Orthogonal().project(random(7, 3, seed=5)))
    trial, seen = ClosureObjective.trial, []

    def watched(objective: Any, step: Tensor, t: float = 1.0, **more: Any) -> Any:
        tangent = objective.manifold.tangent(objective.position, step)
        torch.testing.assert_close(step, tangent, rtol=0, atol=1e-12 * float(step.norm()))
        seen.append(t * float(step.norm()))
        return trial(objective, step, t, **more)

    monkeypatch.setattr(ClosureObjective, "trial", watched)
    run(Projected(make([W]), {W: Orthogonal()}), lambda: 100 * loss(W), 2)
    assert len(seen) > 20
    assert max(seen) <= 0.5 * 3**0.5 * (1 + 1e-12)
    assert max(seen) > 0.49 * 3**0.5


def test_newton_without_second_derivatives_takes_differences() -> None:
    vectors, loss = brockett(6, 2)
    W = nn.Parameter(Orthogonal().project(random(6, 2, seed=4)))
    optimizer = NewtonCG([W], curvature_products="finite_difference", max_iter=30)
    run(Projected(optimizer, {W: Orthogonal()}), lambda: loss(W), 3)
    cosines = (W.detach() * vectors).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-8)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_principal_components_of_digits_take_at_most_sixty_evaluations(k: int, seed: int) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    X = torch.from_numpy(datasets.load_digits().data)
    X = X - X.mean(0)
    vectors = torch.linalg.eigh(X.T @ X)[1][:, -k:]
    W = nn.Parameter(Orthogonal().project(random(64, k, seed=seed)))
    optimizer = Projected(LBFGS([W]), {W: Orthogonal()})
    evaluations = 0
    while True:
        run(optimizer, lambda: -(X @ W).square().sum(), 1)
        evaluations += optimizer.optimizer.info.evaluations
        with torch.no_grad():
            gap = torch.linalg.matrix_norm(W - vectors @ (vectors.T @ W), 2)
        if gap <= 1e-10 or evaluations > 100:
            break
    assert gap <= 1e-10
    assert evaluations <= 60


@pytest.mark.parametrize("make", [*FLAT, torch_lbfgs, adam], ids=lambda make: make.__name__)
def test_procrustes_is_solved_by_the_polar_factor(make: Any) -> None:
    data, target = random(10, 4), random(10, 4, seed=1)
    W = nn.Parameter(torch.eye(4, dtype=torch.float64))
    expected = Orthogonal().project(data.T @ target)
    if torch.linalg.det(expected) < 0:  # retractions do not leave the rotations
        W.data[:, 0] *= -1
    optimizer = Projected(make([W]), {W: Orthogonal()})
    steps = 400 if make is adam else 20
    run(optimizer, lambda: (data @ W - target).square().sum(), steps)
    torch.testing.assert_close(W.detach(), expected, rtol=0, atol=2e-5)


RESIDUALS: list[dict[str, Any]] = [
    {},
    {"globalization": "trust_region"},
    {"globalization": "armijo"},
    {"solver": "dual"},
    {"solver": "cg"},
    {"acceleration": "geodesic"},
    {"scaling": "identity"},
]


@pytest.mark.parametrize("more", RESIDUALS, ids=str)
def test_levenberg_marquardt_fits_along_the_manifold(more: dict[str, Any]) -> None:
    data, truth = random(30, 6), UnitNorm(dim=1).project(random(2, 6, seed=1))
    target = torch.tanh(data @ truth.T) + 0.1
    W = nn.Parameter(UnitNorm(dim=1).project(truth + 0.5 * random(2, 6, seed=2)))
    free = parameter(0.0)
    optimizer = Projected(LevenbergMarquardt([W, free], **more), {W: UnitNorm(dim=1)})
    for step in range(14):
        run(optimizer, lambda: nn.functional.mse_loss(torch.tanh(data @ W.T) + free, target), 1)
        if not step:
            assert optimizer.optimizer.info.jacobian == "graph"
    torch.testing.assert_close(W.detach(), truth, rtol=0, atol=1e-5)
    assert free.item() == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("method", ["graph", "rows", "columns"])
def test_jacobians_of_residuals_are_those_along_the_manifold(method: Any) -> None:
    found = Orthogonal()
    data, x = random(5, 4), nn.Parameter(found.project(random(4, 2)))
    base = x.detach().clone()

    def residuals(x: Tensor) -> Tensor:
        return torch.tanh(data @ x) - 0.3

    def closure() -> Tensor:
        loss = nn.functional.mse_loss(torch.tanh(data @ x), torch.full((5, 2), 0.3).double())
        loss.backward()
        return loss

    objective = ClosureObjective(closure, [x])
    objective.manifold = Manifold(objective.vector, {id(x): found})
    with objective:
        J = residuals_at(objective, objective.evaluate(curvature="jacobian"), method)

        def chart(v: Tensor) -> Tensor:
            moved = found.project(base + found.tangent(base, v.view(4, 2)))
            return residuals(moved).flatten() * (2 / 10) ** 0.5

        zero = torch.zeros(8, dtype=torch.float64)
        dense = torch.autograd.functional.jacobian(chart, zero)
        square = dense.T @ dense
        torch.testing.assert_close(J.normal_matrix(), square)
        torch.testing.assert_close(J.diagonal(), square.diagonal())
        v, weights = random(8, seed=3), random(8, seed=4)
        torch.testing.assert_close(J.pull(J.push(v)), square @ v)
        rows = J.dense()
        torch.testing.assert_close(rows.T @ rows, square)
        torch.testing.assert_close(J.kernel(), rows @ rows.T)
        torch.testing.assert_close(J.kernel(weights), (rows * weights) @ rows.T)
        torch.testing.assert_close(J.pull(J.residuals), dense.T @ chart(zero))


def test_residuals_of_whole_data_sets_go_with_no_manifold() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    optimizer = Projected(LevenbergMarquardt(model.parameters()), {model.weight: UnitNorm()})
    batches = [(random(4, 3), random(4, 1))]
    with pytest.raises(ValueError, match="come batch by batch, which does not go with a manifold"):
        optimizer.step(DatasetClosure(model, nn.functional.mse_loss, batches))


# Loops.


@pytest.mark.parametrize("make", FLAT, ids=lambda make: make.__name__)
@pytest.mark.parametrize("kind", ["closure", "function"])
def test_flat_optimizers_solve_least_squares_on_the_circle(make: Any, kind: str) -> None:
    x = parameter(0.0, 1.0)
    optimizer = Projected(make([x]), [(x, UnitNorm())])
    closure: Any = closure_of(optimizer, lambda: least_squares(x))
    if kind == "function":
        closure = FunctionalObjective(least_squares, x)
    for _ in range(15):
        optimizer.step(closure)
    torch.testing.assert_close(x.detach(), SOLUTION, rtol=0, atol=1e-6)


SCALED = {
    "sgd": sgd,
    "adam": adam,
    "adahessian": ada,
    "sophia": lambda params: Sophia(params, lr=0.01),
    "torch lbfgs": torch_lbfgs,
}


@pytest.mark.parametrize("name", SCALED)
def test_other_optimizers_end_on_the_circle_at_the_minimum(name: str) -> None:
    x = parameter(0.0, 1.0)
    optimizer = Projected(SCALED[name]([x]), [(x, UnitNorm())])
    run(optimizer, lambda: least_squares(x), 5 if name == "torch lbfgs" else 500)
    torch.testing.assert_close(x.detach(), SOLUTION, rtol=0, atol=1e-3)
    assert optimizer.info is not None
    assert optimizer.info.violation < 1e-14


@pytest.mark.parametrize("name", ["sgd", "adam", "adahessian", "torch lbfgs"])
@pytest.mark.parametrize(
    ("found", "expected"),
    [(NormBall(), (0.6, 0.8)), (Simplex(), (0.44, 0.56)), (Box(-1.0, 0.7), (0.7, 0.7))],
    ids=["ball", "simplex", "box"],
)
def test_other_optimizers_end_at_the_minimum_within_a_convex_set(
    name: str, found: Any, expected: tuple[float, float]
) -> None:
    x = parameter(0.1, 0.0)
    optimizer = Projected(SCALED[name]([x]), [(x, found)])
    for _ in range(3):
        run(optimizer, lambda: least_squares(x), 250 if name != "torch lbfgs" else 5)
        for group in optimizer.param_groups:
            group["lr"] *= 0.1 if name != "torch lbfgs" else 1.0
    assert found.contains(x.detach())
    torch.testing.assert_close(x.detach(), torch.tensor(expected).double(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("found", [UnitNorm(), NormBall(), NormBall(p=1), Simplex()], ids=repr)
def test_later_evaluations_see_the_loss_of_the_projection(found: Any) -> None:
    seen: list[Tensor] = []

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            with torch.no_grad():
                x.add_(torch.tensor([0.7, -0.2]))
            seen.append(x.detach().clone())
            closure()
            seen.append(x.detach().clone())
            assert x.grad is not None
            seen.append(x.grad.clone())

    x = nn.Parameter(found.project(torch.tensor([0.9, 1.1]).double()))
    optimizer = Projected(Twice([x], lr=0.1), {x: found})
    run(optimizer, lambda: least_squares(x), 1)
    before, after, gradient = seen
    assert torch.equal(after, before)
    variable = before.requires_grad_()
    (expected,) = torch.autograd.grad(least_squares(found.project(variable)), variable)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(x.detach(), found.project(before.detach()))


@pytest.mark.parametrize("make", [adam, sgd, ada], ids=lambda make: make.__name__)
@pytest.mark.parametrize("found", [UnitNorm(), NormBall()], ids=repr)
def test_all_loops_take_the_same_steps(make: Any, found: Any) -> None:
    results = []
    for loop in ("closure", "backward", "function"):
        x = parameter(0.6, -0.8)
        optimizer = Projected(make([x]), {x: found})
        closure = closure_of(optimizer, lambda x=x: least_squares(x))
        for _ in range(5):
            if loop == "closure":
                optimizer.step(closure)
            elif loop == "function" and make is ada:
                optimizer.step(FunctionalObjective(least_squares, x))
            else:
                optimizer.zero_grad()
                least_squares(x).backward()
                optimizer.step()
        results.append(x.detach().clone())
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    if make is not ada:  # its estimates are those of the projected loss there
        torch.testing.assert_close(results[2], results[0], rtol=1e-12, atol=1e-12)


def test_gradients_with_a_graph_keep_it() -> None:
    x = parameter(0.6, -0.8)
    optimizer = Projected(ada([x]), {x: UnitNorm()})
    for _ in range(100):
        optimizer.zero_grad()
        (gradient,) = torch.autograd.grad(least_squares(x), x, create_graph=True)
        x.grad = gradient
        optimizer.step()
    torch.testing.assert_close(x.detach(), SOLUTION, rtol=0, atol=1e-2)


@pytest.mark.parametrize("make", [LBFGS, NewtonCG, Newton], ids=lambda make: make.__name__)
def test_whole_data_sets_are_taken(make: Any) -> None:
    data = random(12, 4)
    model = nn.Linear(4, 2, bias=False).double()
    W = model.weight
    with torch.no_grad():
        W.copy_(Orthogonal().project(random(2, 4, seed=1)))
    vectors = torch.linalg.eigh(data.T @ data)[1][:, -2:]
    optimizer = Projected(make(model.parameters()), {W: Orthogonal()})
    batches = [(data[:5], data[:5]), (data[5:], data[5:])]
    closure = DatasetClosure(model, lambda z, _: -z.square().mean(), batches)
    for _ in range(15):
        optimizer.step(closure)
    gap = W.detach() - W.detach() @ vectors @ vectors.T
    assert gap.norm() < 1e-6


# Groups, several sets, precision.


@pytest.mark.parametrize("make", [LBFGS, NewtonCG, adam], ids=lambda make: make.__name__)
def test_several_sets_and_free_parameters_go_together(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    model = model.double()
    x, y = random(20, 4), random(20, 1, seed=1)
    first, second = model[0].weight, model[2].weight
    sets = [(first, UnitNorm(dim=1)), ([second], Orthogonal())]
    optimizer = Projected(make(model.parameters()), sets)

    def loss() -> Tensor:
        return nn.functional.mse_loss(model(x), y)

    before = loss().item()
    bias = model[0].bias.detach().clone()
    run(optimizer, loss, 20)
    assert optimizer.info is not None
    assert optimizer.info.start_projected is False
    assert loss().item() < 0.7 * before
    assert UnitNorm(dim=1).contains(first.detach()) and Orthogonal().contains(second.detach())
    assert not torch.equal(model[0].bias, bias)


@pytest.mark.parametrize("make", [LBFGS, NewtonCG, Newton], ids=lambda make: make.__name__)
def test_groups_may_have_learning_rates_and_weight_decay(make: Any) -> None:
    matrix = symmetric(5)
    x, free = nn.Parameter(UnitNorm().project(random(5))), parameter(2.0)
    groups = [{"params": [x], "lr": 0.5, "weight_decay": 3.0}, {"params": [free], "lr": 1.0}]
    optimizer = Projected(make(groups, max_iter=20), {x: UnitNorm()})
    run(optimizer, lambda: x @ matrix @ x + (free - 1).square().sum(), 10)
    # Decay is constant on the sphere, so it changes nothing.
    lowest = torch.linalg.eigvalsh(matrix)[0]
    torch.testing.assert_close((x @ matrix @ x).detach(), lowest, rtol=1e-9, atol=0)
    assert free.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("make", [LBFGS, NewtonCG, adam], ids=lambda make: make.__name__)
def test_losses_may_be_maximized(make: Any) -> None:
    x = parameter(0.0, 1.0)
    inside = adam([x]) if make is adam else make([x])
    inside.param_groups[0]["maximize"] = True
    if make is not adam:
        inside = make([x], maximize=True)
    for found in (UnitNorm(), *([NormBall()] if make is adam else [])):
        optimizer = Projected(inside, {x: found})
        run(optimizer, lambda: -least_squares(x), 400 if make is adam else 15)
        torch.testing.assert_close(x.detach(), SOLUTION, rtol=0, atol=1e-2)


@pytest.mark.parametrize("make", [LBFGS, adam], ids=lambda make: make.__name__)
def test_low_precision_is_on_the_manifold_up_to_rounding(make: Any) -> None:
    x = nn.Parameter(torch.tensor([0.1, 1.0], dtype=torch.bfloat16))
    optimizer = Projected(make([x]), {x: UnitNorm()})
    run(optimizer, lambda: least_squares(x.float()), 10 if make is LBFGS else 200)
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(x.detach().double(), SOLUTION, rtol=0, atol=0.02)
    assert optimizer.info is not None and optimizer.info.violation < 0.01


def test_complex_parameters_are_kept_unitary() -> None:
    target = torch.linalg.qr(torch.randn(3, 3, dtype=torch.complex128))[0]
    for make in (LBFGS, NewtonCG, Newton):
        W = nn.Parameter(torch.eye(3, dtype=torch.complex128))
        optimizer = Projected(make([W]), {W: Orthogonal()})
        run(optimizer, lambda W=W: (W - target).abs().square().sum(), 20)
        torch.testing.assert_close(W.detach(), target, rtol=0, atol=1e-6)


def test_frozen_parameters_are_left_alone() -> None:
    x, frozen = parameter(0.6, -0.8), parameter(5.0, 5.0)
    optimizer = Projected(LBFGS([x, frozen]), [([x, frozen], UnitNorm())])
    frozen.requires_grad_(False)
    run(optimizer, lambda: least_squares(x), 5)
    assert frozen.tolist() == [5.0, 5.0]
    torch.testing.assert_close(x.detach(), SOLUTION, rtol=0, atol=1e-5)


# Boxes, starts, reports.


@pytest.mark.parametrize("make", [LBFGS, BFGS, Newton], ids=lambda make: make.__name__)
def test_a_box_becomes_bounds(make: Any) -> None:
    x, free = parameter(0.0, 0.0), parameter(2.0)
    optimizer = Projected(make([x, free]), {x: Box(high=torch.tensor([0.5, inf]))})
    run(optimizer, lambda: least_squares(x) + free.square().sum(), 5)
    bounded = parameter(0.0, 0.0)
    direct = make([bounded], bounds=(None, torch.tensor([0.5, inf])))
    run(direct, lambda: least_squares(bounded), 5)
    torch.testing.assert_close(x.detach(), bounded.detach(), rtol=0, atol=1e-6)
    assert x[0].item() == 0.5
    assert optimizer.optimizer.param_groups[0]["bounds"] is None  # only during a step


@pytest.mark.parametrize("make", [LBFGS, adam, torch_lbfgs], ids=lambda make: make.__name__)
def test_a_start_outside_is_projected_and_reported(make: Any) -> None:
    x = parameter(3.0, 4.0)
    optimizer = Projected(make([x]), {x: UnitNorm()})
    seen: list[float] = []

    def loss() -> Tensor:
        seen.append(x.detach().norm().item())
        return least_squares(x)

    assert optimizer.info is None
    run(optimizer, loss, 1)
    assert optimizer.info is not None and optimizer.info.start_projected
    run(optimizer, loss, 1)
    assert not optimizer.info.start_projected
    with torch.no_grad():
        x.mul_(2.0)
    run(optimizer, loss, 1)
    assert optimizer.info.start_projected
    torch.testing.assert_close(torch.tensor(seen), torch.ones(len(seen)))
    assert "start_projected" in str(optimizer.info)


def test_the_report_says_how_far_the_projection_moved() -> None:
    x = parameter(1.0, 0.0)
    optimizer = Projected(torch.optim.SGD([x], lr=1.0), {x: UnitNorm()})
    run(optimizer, lambda: x[1] * 0.75, 1)
    assert optimizer.info is not None
    assert optimizer.info.correction == pytest.approx(0.25)
    torch.testing.assert_close(x.detach(), torch.tensor([0.8, -0.6]).double())


@pytest.mark.parametrize("make", [LBFGS, torch_lbfgs, adam], ids=lambda make: make.__name__)
def test_an_error_in_a_closure_leaves_the_parameters_in_their_set(make: Any) -> None:
    x = parameter(0.6, -0.8)
    optimizer = Projected(make([x]), {x: UnitNorm()})
    count = 0

    def loss() -> Tensor:
        nonlocal count
        count += 1
        if count == 4:
            raise ArithmeticError("no")
        return least_squares(x)

    with pytest.raises(ArithmeticError, match="no"):
        run(optimizer, loss, 4)
    assert UnitNorm().contains(x.detach())


def test_a_step_that_fails_or_is_skipped_changes_no_bit() -> None:
    x = nn.Parameter(UnitNorm().project(random(7)))
    before = x.detach().clone()
    optimizer = Projected(adam([x]), {x: UnitNorm()})

    def fails() -> Tensor:
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError, match="no"):
        run(optimizer, fails, 1)
    assert torch.equal(x, before)
    x.grad = torch.full_like(x, inf)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())
    optimizer.step()
    assert torch.equal(x, before)


def test_losses_that_are_not_finite_leave_the_parameters_alone() -> None:
    x = parameter(0.6, -0.8)
    for make in (LBFGS, NewtonCG):
        optimizer = Projected(make([x]), {x: UnitNorm()})
        run(optimizer, lambda: least_squares(x) * nan, 1)
        assert x.tolist() == [0.6, -0.8]
    W = nn.Parameter(torch.eye(3).double())
    optimizer = Projected(LBFGS([W]), {W: Orthogonal()})
    run(optimizer, lambda: (W[0] - 1).square().sum() + torch.where(W[1, 0] > 0.2, nan, 0.0), 5)
    assert Orthogonal().contains(W.detach())


# Checkpoints, copies, mixed precision, other wrappers.


@pytest.mark.parametrize("make", [LBFGS, NewtonCG, BFGS, adam, ada], ids=lambda m: m.__name__)
def test_checkpoints_go_on_bit_for_bit(make: Any, tmp_path: Any) -> None:
    _, loss = brockett(6, 2)

    def started(start: Tensor) -> tuple[nn.Parameter, Projected]:
        W = nn.Parameter(start.clone())
        inside = make([W], max_iter=3) if make in (LBFGS, BFGS) else make([W])
        return W, Projected(inside, {W: Orthogonal()})

    W, optimizer = started(random(6, 2))
    run(optimizer, lambda: loss(W), 3)
    torch.save((W.detach(), optimizer.state_dict()), tmp_path / "state.pt")
    run(optimizer, lambda: loss(W), 3)
    start, state = torch.load(tmp_path / "state.pt", weights_only=True)
    V, resumed = started(start)
    resumed.load_state_dict(state)
    run(resumed, lambda: loss(V), 3)
    assert torch.equal(V, W)
    assert set(state["projected"]) == {"steps"}


def test_a_checkpoint_of_the_optimizer_inside_loads() -> None:
    x = parameter(0.6, -0.8)
    optimizer = LBFGS([x])
    run(optimizer, lambda: least_squares(x), 1)
    Projected(LBFGS([x]), {x: UnitNorm()}).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("make", [LBFGS, adam], ids=lambda make: make.__name__)
def test_copies_and_pickles_have_their_own_parameters(make: Any) -> None:
    x = parameter(0.6, -0.8)
    optimizer = Projected(make([x]), {x: UnitNorm()})
    run(optimizer, lambda: least_squares(x), 1)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        y = other.param_groups[0]["params"][0]
        assert y is not x
        run(other, lambda y=y: least_squares(y), 3)
        assert UnitNorm().contains(y.detach())
        assert repr(other) == repr(optimizer)


@pytest.mark.parametrize("make", [adam, sgd, ada], ids=lambda make: make.__name__)
def test_a_grad_scaler_changes_nothing(make: Any) -> None:
    results = []
    for scales in (False, True):
        x = nn.Parameter(torch.tensor([0.6, -0.8]))
        optimizer = Projected(make([x]), {x: UnitNorm()})
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scales)
        for i in range(4):
            optimizer.zero_grad()
            value = least_squares(x) * (inf if scales and i == 2 else 1.0)
            if not scales and i == 2:
                continue
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(x.detach().clone())
    torch.testing.assert_close(results[1], results[0])
    assert UnitNorm().contains(results[1])


def test_a_scaler_takes_no_closure() -> None:
    x = parameter(0.6, -0.8)
    optimizer = Projected(adam([x]), {x: UnitNorm()})
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
    with pytest.raises(RuntimeError, match="was called by a GradScaler"):
        run(optimizer, lambda: least_squares(x), 1)


@pytest.mark.parametrize(
    ("order", "make"),
    [("outside", LBFGS), ("inside", LBFGS), ("inside", torch_lbfgs)],
    ids=["outside", "inside", "inside of torch"],
)
def test_sets_and_constraints_go_together(order: str, make: Any) -> None:
    # On the sphere and in a plane through it: a circle.
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    x = nn.Parameter(UnitNorm().project(random(3, seed=1)))
    plane: dict[str, Any] = {"equalities": lambda: x.sum() - 1, "method": "augmented_lagrangian"}
    optimizer: Any
    if order == "inside":
        optimizer = Constrained(Projected(make([x]), {x: UnitNorm()}), **plane)
    else:
        optimizer = Projected(Constrained(make([x]), **plane), {x: UnitNorm()})
    run(optimizer, lambda: x @ matrix @ x, 40)
    assert UnitNorm().contains(x.detach())
    assert abs(x.sum().item() - 1) < 1e-5
    angle = torch.linspace(0, 6.3, 4001, dtype=torch.float64)[:, None]
    u = torch.tensor([1.0, -1.0, 0.0]).double() / 2**0.5
    v = torch.tensor([1.0, 1.0, -2.0]).double() / 6**0.5
    circle = 1 / 3 + (2 / 3) ** 0.5 * (angle.cos() * u + angle.sin() * v)
    lowest = (circle.square() @ matrix.diagonal()).min()
    assert (x @ matrix @ x).item() == pytest.approx(lowest.item(), abs=1e-4)


def test_constraints_go_outside_of_a_projection_after_the_step() -> None:
    x = parameter(0.6, -0.8)
    inside = Constrained(adam([x]), equalities=lambda: x.sum())
    with pytest.raises(ValueError, match="wrap the other way round, as in Constrained"):
        Projected(inside, {x: UnitNorm()})


def test_sequential_quadratic_programming_takes_no_manifold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LBFGS, "_takes_constraints", True)
    x = parameter(0.6, -0.8)
    inside = Constrained(LBFGS([x]), equalities=lambda: x.sum(), method="sqp")
    optimizer = Projected(inside, {x: UnitNorm()})
    with pytest.raises(ValueError, match='method="sqp" of Constrained takes no manifolds'):
        run(optimizer, lambda: least_squares(x), 1)


def test_the_contractive_penalty_goes_together_with_sets() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())
    model = nn.Sequential(encoder, nn.Linear(3, 4)).double()
    x, weight = random(10, 4), encoder[0].weight
    for make in (LBFGS, adam):
        inside = Contractive(make(model.parameters()), encoder, weight=0.1)
        optimizer = Projected(inside, {weight: UnitNorm(dim=1)})
        run(optimizer, lambda: nn.functional.mse_loss(model(x), x), 3)
        assert UnitNorm(dim=1).contains(weight.detach())
        assert optimizer.info is not None and optimizer.info.inner == inside.info


def test_schedulers_and_groups_are_those_of_the_optimizer_inside() -> None:
    x, y = parameter(0.6, -0.8), parameter(1.0)
    optimizer = Projected(sgd([x]), {x: UnitNorm()})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run(optimizer, lambda: least_squares(x), 1)
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.025
    optimizer.add_param_group({"params": [y]})
    run(optimizer, lambda: least_squares(x) + y.sum(), 1)
    assert y.item() < 1.0


# Errors.


@pytest.mark.parametrize(
    ("sets", "kind", "message"),
    [
        (lambda x, y: UnitNorm(), TypeError, "sets must be a list of pairs .* got UnitNorm"),
        (lambda x, y: [UnitNorm()], TypeError, "got UnitNorm as one of the pairs"),
        (lambda x, y: [(x, UnitNorm(), 1)], TypeError, "got tuple as one of the pairs"),
        (lambda x, y: [("x", UnitNorm())], TypeError, "got str for a parameter"),
        (lambda x, y: [(3, UnitNorm())], TypeError, "got int for a parameter"),
        (lambda x, y: [([3], UnitNorm())], TypeError, "got int for a parameter"),
        (lambda x, y: [(x, UnitNorm)], TypeError, r"UnitNorm is a class: make a set, as in Unit"),
        (lambda x, y: [(x, (0, 1))], TypeError, "a set is one of .*, got tuple"),
        (lambda x, y: [], ValueError, "there is no set"),
        (lambda x, y: {y: UnitNorm()}, ValueError, r"shape \(1,\) has a set but is not the opt"),
        (lambda x, y: [(x, UnitNorm()), (x, UnitNorm())], ValueError, r"\(2,\) has two sets"),
        (lambda x, y: [(x, Orthogonal())], ValueError, "Orthogonal is a set of matrices"),
    ],
)
def test_wrong_sets_are_refused(sets: Any, kind: type[Exception], message: str) -> None:
    x, y = parameter(0.6, -0.8), parameter(1.0)
    with pytest.raises(kind, match=message):
        Projected(adam([x]), sets(x, y))


class Straight(LBFGS):
    """An optimizer that cannot stay on a manifold."""

    _takes_manifolds = False


def flat_with_bounds(x: Tensor, y: Tensor) -> torch.optim.Optimizer:
    return LBFGS([{"params": [x]}, {"params": [y], "bounds": (0.0, None)}])


@pytest.mark.parametrize(
    ("make", "sets", "message"),
    [
        (LBFGS, lambda x, y: {x: NormBall()}, "LBFGS cannot stay in NormBall.*could raise the"),
        (NewtonCG, lambda x, y: {x: Simplex()}, "NewtonCG cannot stay in Simplex"),
        (NewtonCG, lambda x, y: {x: Box(0.0)}, "NewtonCG takes no bounds and so no Box: use LB"),
        (LBFGS, lambda x, y: {x: Box(0.0), y: UnitNorm()}, "bounds or manifolds, not both"),
        (flat_with_bounds, lambda x, y: {x: Box(0.0)}, "has bounds already, which a Box would"),
        (flat_with_bounds, lambda x, y: {x: UnitNorm()}, "bounds or manifolds, not both"),
        (Straight, lambda x, y: {x: UnitNorm()}, "Straight takes no manifolds: use LBFGS, BFGS"),
    ],
)
def test_flat_optimizers_refuse_sets_that_they_cannot_stay_in(
    make: Any, sets: Any, message: str
) -> None:
    x, y = parameter(0.6, -0.8), parameter(1.0)
    optimizer = make(x, y) if make is flat_with_bounds else make([x, y])
    with pytest.raises(ValueError, match=message):
        Projected(optimizer, sets(x, y))


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = parameter(0.6, -0.8)
    monkeypatch.setattr("torch_secondorder.optim.projected.is_distributed", lambda p: p is x)
    with pytest.raises(ValueError, match="a set is one of whole tensors, and the parameters are"):
        Projected(adam([x]), {x: UnitNorm()})


def test_it_wraps_optimizers_only() -> None:
    with pytest.raises(TypeError, match="optimizer is what trains the model, got list"):
        Projected([], {})  # type: ignore[arg-type]


def test_a_closure_is_something_to_call() -> None:
    x = parameter(0.6, -0.8)
    with pytest.raises(TypeError):
        Projected(adam([x]), {x: UnitNorm()}).step(3)
