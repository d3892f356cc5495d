"""BFGS and its self-scaled relatives: directions, products, pairs, endings, and reports."""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from tests.support.broyden import textbook
from tests.support.closures import rosenbrock, standard, start_at
from tests.support.oracles import make_case
from tests.support.problems import PROBLEMS, PROBLEMS_BY_NAME, Problem
from torch_secondorder import BFGS, LBFGS, StepStatus
from torch_secondorder._foundation import memory
from torch_secondorder.curvature import InverseBroyden
from torch_secondorder.curvature.inverse_broyden import BroydenUpdate
from torch_secondorder.globalization import SearchStatus, StrongWolfe

UPDATES = get_args(BroydenUpdate)


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x)
    return gradient


def solve(problem: Problem, **arguments: Any) -> tuple[BFGS, nn.Parameter]:
    x = nn.Parameter(problem.start.clone())
    more = {"max_iter": 3000, "max_eval": 3000, "tolerance_grad": 1e-6} | arguments
    optimizer = BFGS([x], **more)
    optimizer.step(standard(optimizer, lambda: problem.function(x)))
    return optimizer, x


# Arguments.


def test_the_arguments_are_those_of_lbfgs() -> None:
    """Without `history_size`; so a change of the name is all that a program needs."""
    theirs, ours = inspect.signature(LBFGS).parameters, inspect.signature(BFGS).parameters
    shared = [name for name in theirs if name not in ("history_size", "damping")]
    assert [name for name in ours if name in theirs] == shared
    for name in shared:
        assert (ours[name].default, ours[name].kind) == (theirs[name].default, theirs[name].kind)


def test_wrong_arguments() -> None:
    x = start_at(1.0)
    with pytest.raises(ValueError, match=r"update must be one of 'bfgs', 'ssbfgs', .* got 'sr1'"):
        BFGS([x], update="sr1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_iter must be an integer of at least 1, got 0"):
        BFGS([x], max_iter=0)
    with pytest.raises(ValueError, match="line_search_fn must be one of"):
        BFGS([x], line_search_fn="wolfe")  # type: ignore[arg-type]


def test_what_does_not_fit_is_said_before_anything_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e9)
    x = nn.Parameter(torch.zeros(30_000))
    optimizer = BFGS([x])
    for _ in range(2):
        with pytest.raises(MemoryError, match=r"30,000 x 30,000 .* 3\.4 GiB.* use LBFGS"):
            optimizer.step(lambda: pytest.fail("evaluated"))
    assert not x.any()
    LBFGS([x]).step(standard(optimizer, lambda: (x - 1).square().sum()))


# Classical problems.


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_default_solves_the_classical_problems(problem: Problem) -> None:
    optimizer, x = solve(problem)
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT, optimizer.info
    assert problem.is_minimum(problem.function(x).item())


@pytest.mark.parametrize("update", ["ssbfgs", "ssbroyden"])
@pytest.mark.parametrize("name", ["rosenbrock", "beale", "powell_singular", "chebyquad", "wood"])
def test_self_scaled_updates_solve_them_too(name: str, update: Any) -> None:
    problem = PROBLEMS_BY_NAME[name]
    optimizer, x = solve(problem, update=update)
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT, optimizer.info
    assert problem.is_minimum(problem.function(x).item())


def test_scaling_pays_on_an_ill_conditioned_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain BFGS scales a little, and the self-scaled updates more."""

    def evaluations(update: str) -> int:
        info = solve(PROBLEMS_BY_NAME["ill_conditioned_quadratic"], update=update)[0].info
        assert info.status is StepStatus.CONVERGED_GRADIENT
        return info.evaluations

    little, more = evaluations("bfgs"), evaluations("ssbroyden")
    monkeypatch.setattr("torch_secondorder.curvature.inverse_broyden._LATER", 1.0)
    none = evaluations("bfgs")
    assert more < 0.6 * none
    assert little < 0.85 * none
    assert more < 0.9 * little


@pytest.mark.parametrize("update", UPDATES)
def test_quadratics_end_after_n_exact_searches(update: Any, device: torch.device) -> None:
    """Directions of the whole family are conjugate then, and scaling changes nothing about it."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    matrix = (basis @ basis.T + torch.eye(8)).to(device)
    x = nn.Parameter(torch.ones(8, dtype=torch.float64, device=device))
    optimizer = BFGS([x], max_iter=8, max_eval=1000, update=update)
    optimizer.line_search = StrongWolfe(c1=1e-12, c2=1e-10)
    directions = []
    for _ in range(8):
        optimizer.param_groups[0]["max_iter"] = 1
        before = x.detach().clone()
        optimizer.step(standard(optimizer, lambda: x @ matrix @ x / 2))
        directions.append((x.detach() - before) / (x.detach() - before).norm())
    products = torch.stack(directions) @ matrix @ torch.stack(directions).T
    off = products - products.diag().diag()
    assert off.abs().max() <= 1e-5 * products.diag().max()
    assert (matrix @ x).norm() <= 1e-5 * matrix.norm()


# Directions and products.


@pytest.mark.parametrize("search", ["strong_wolfe", "hager_zhang", None])
@pytest.mark.parametrize("update", UPDATES)
def test_the_path_is_that_of_the_textbook(
    update: Any, search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step goes along -Hg, with an H that the textbook makes of the steps before."""
    problem = PROBLEMS_BY_NAME["broyden_tridiagonal"]
    x = nn.Parameter(problem.start.clone())
    lr = 1.0 if search else 0.3
    optimizer = BFGS([x], lr=lr, max_iter=1, max_eval=1, update=update, line_search_fn=search)
    H, n = None, problem.size
    for count in range(12):
        before, g = x.detach().clone(), gradient_of(problem.function, x)
        optimizer.step(standard(optimizer, lambda: problem.function(x)))
        if optimizer.info.status is StepStatus.CONVERGED_GRADIENT:
            break
        s, y = x.detach() - before, gradient_of(problem.function, x) - g
        t = optimizer.info.step_length
        if H is None:
            H = s.norm() / t / g.norm() * torch.eye(n, dtype=torch.float64)
        torch.testing.assert_close(s / t, -H @ g, rtol=1e-6, atol=1e-9)
        H = textbook(H, s, y, update, count)
    assert count >= 6


@pytest.mark.parametrize("update", UPDATES)
def test_an_iteration_reads_the_matrix_once(update: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product is enough for the update and for the next direction; a step begins with one."""
    products = 0
    multiply = InverseBroyden._multiply

    def spy(self: InverseBroyden, v: Tensor, sign: float) -> Tensor:
        nonlocal products
        products += 1
        return multiply(self, v, sign)

    x = nn.Parameter(PROBLEMS_BY_NAME["chained_rosenbrock"].start.clone())
    function = PROBLEMS_BY_NAME["chained_rosenbrock"].function
    optimizer = BFGS([x], max_iter=20, max_eval=100, update=update)
    optimizer.step(standard(optimizer, lambda: function(x)))
    monkeypatch.setattr(InverseBroyden, "_multiply", spy)
    optimizer.step(standard(optimizer, lambda: function(x)))
    assert optimizer.info.iterations == 20
    assert products == 21


def test_the_next_direction_is_the_product_with_the_new_matrix() -> None:
    """What is computed from the old matrix agrees with a product, over 200 iterations."""
    problem = PROBLEMS_BY_NAME["chained_rosenbrock"]
    x = nn.Parameter(problem.start.clone())
    differences = []

    class Watched(BFGS):
        def _direction(self, descent: Any) -> Tensor | None:
            direction = super()._direction(descent)
            if direction is not None:
                exact = self._inverse.direction(descent.point.grad)
                differences.append(float((direction - exact).norm() / exact.norm()))
            return direction

    optimizer = Watched([x], max_iter=200, max_eval=1000, update="ssbroyden", tolerance_grad=0)
    optimizer.step(standard(optimizer, lambda: problem.function(x)))
    assert len(differences) > 100
    assert max(differences) < 1e-7


def test_a_self_scaled_search_begins_where_the_last_line_had_its_minimum() -> None:
    problem = PROBLEMS_BY_NAME["chained_rosenbrock"]
    first_trials: dict[str, list[float]] = {}
    for update in ("bfgs", "ssbroyden"):
        x = nn.Parameter(problem.start.clone())
        optimizer = BFGS([x], lr=0.8, max_iter=60, max_eval=1000, update=update)  # type: ignore[arg-type]
        search, tried = optimizer.line_search, []

        def spy(phi: Any, start: Any, t0: float, *, precision: float, o: Any = optimizer,
                tried: list[float] = tried, search: Any = search) -> Any:  # fmt: skip
            tried.append(t0 / (0.8 * min(1.0, o._inverse.ratio)))
            return search(phi, start, t0, precision=precision)

        optimizer.line_search = spy
        optimizer.step(standard(optimizer, lambda x=x: problem.function(x)))
        first_trials[update] = tried
    assert first_trials["ssbroyden"] == pytest.approx([1.0] * 60)
    assert first_trials["bfgs"] != pytest.approx([1.0] * 60)


# Pairs and restarts.


@pytest.mark.parametrize("damping", [False, True])
def test_pairs_without_curvature(damping: bool) -> None:
    """On a hilltop s'y < 0."""
    x = start_at(0.1, -0.2, 0.3)
    optimizer = BFGS([x], lr=0.1, max_iter=6, line_search_fn=None, powell_damping=damping)
    optimizer.step(standard(optimizer, lambda: x.cos().sum()))
    info = optimizer.info
    assert (info.iterations, info.status) == (6, StepStatus.MAX_ITERATIONS)
    assert not info.history_reset
    if damping:
        assert info.skipped_pairs == 0
        assert info.damped_pairs >= 2
        assert optimizer._inverse.count == 6
    else:
        assert (info.skipped_pairs, info.damped_pairs) == (6, 0)
        assert optimizer._inverse.count == 0


def test_damping_keeps_a_fifth_of_the_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    push = InverseBroyden.push

    def spy(self: InverseBroyden, s: Tensor, y: Tensor, **known: Any) -> bool:
        shares.append(float(s @ y) / known["expected"])
        if self.count:
            H = self @ torch.eye(3, dtype=torch.float64)
            assert known["expected"] == pytest.approx(float(s @ torch.linalg.solve(H, s)), rel=1e-6)
        return push(self, s, y, **known)

    monkeypatch.setattr(InverseBroyden, "push", spy)
    x = start_at(0.1, -0.2, 0.3)
    optimizer = BFGS([x], lr=0.1, max_iter=6, line_search_fn=None, powell_damping=True)
    optimizer.step(standard(optimizer, lambda: x.cos().sum()))
    damped = [share for share in shares if share == pytest.approx(0.2, rel=1e-8)]
    assert len(damped) == optimizer.info.damped_pairs >= 2
    assert min(shares) >= 0.2 * (1 - 1e-8)


def test_an_indefinite_matrix_is_dropped_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    x = start_at(-1.2, 1.0)
    optimizer = BFGS([x], max_iter=5, max_eval=100)
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    optimizer._inverse._matrix.neg_()
    optimizer._inverse._rows.zero_()
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    assert optimizer.info.history_reset == "the history gave a direction of ascent"
    assert optimizer.info.loss_after < optimizer.info.loss
    monkeypatch.setattr(InverseBroyden, "push", lambda *args, **more: False)
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    assert optimizer.info.history_reset == ("the inverse Hessian was no longer positive definite")
    assert optimizer.info.loss_after < optimizer.info.loss


def test_it_begins_anew_with_other_parameters(device: torch.device) -> None:
    case = make_case("mlp", device)
    params = list(case.model.parameters())
    optimizer = BFGS(params, max_iter=3)
    closure = case.closure()
    optimizer.step(closure)
    params[0].requires_grad_(False)
    optimizer.step(closure)
    assert "changed" in optimizer.info.history_reset
    assert optimizer._inverse.size == sum(p.numel() for p in params[1:])
    params[0].requires_grad_(True)
    optimizer.step(closure)
    assert "changed" in optimizer.info.history_reset


# Reports and checkpoints.


def test_the_report() -> None:
    x = start_at(-1.2, 1.0)
    optimizer = BFGS([x], max_iter=7, max_eval=100, update="ssbroyden")
    assert optimizer.info is None
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return standard(optimizer, lambda: rosenbrock(x))()

    loss = optimizer.step(closure)
    info = optimizer.info
    assert (info.loss, info.loss_after) == (loss.item(), rosenbrock(x).item())
    assert (info.iterations, info.evaluations) == (7, calls)
    assert info.search_status is SearchStatus.WOLFE
    assert (info.tau, info.phi) == (optimizer._inverse.tau, optimizer._inverse.phi)
    assert 0 < info.tau <= 1
    assert "tau" in str(info)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_checkpoints_between_writes_go_on_bit_for_bit(update: Any, dtype: torch.dtype) -> None:
    """After 5, 10, 15, 20 pairs, of which sixteen at a time are written into the matrix."""

    def make() -> tuple[nn.Parameter, BFGS]:
        x = nn.Parameter(PROBLEMS_BY_NAME["broyden_tridiagonal"].start.to(dtype, copy=True))
        return x, BFGS([x], max_iter=5, max_eval=50, update=update, tolerance_grad=0)

    function = PROBLEMS_BY_NAME["broyden_tridiagonal"].function
    x, optimizer = make()
    for _ in range(4):
        optimizer.step(standard(optimizer, lambda: function(x)))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        y, resumed = make()
        y.data.copy_(x)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        optimizer.step(standard(optimizer, lambda: function(x)))
        resumed.step(standard(resumed, lambda y=y: function(y)))
        assert torch.equal(x, y)
        assert resumed.info == optimizer.info


def test_a_checkpoint_of_other_parameters_is_refused() -> None:
    x, z = start_at(-1.2, 1.0), start_at(1.0, 2.0, 3.0)
    optimizer, other = BFGS([x]), BFGS([z])
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    other.step(standard(other, lambda: z @ z))
    inverse = other._inverse
    with pytest.raises(ValueError, match="2 parameter entries, the optimizer has 3"):
        other.load_state_dict(optimizer.state_dict())
    assert other._inverse is inverse


def test_rates_of_groups_scale_the_first_direction(device: torch.device) -> None:
    """A group's share of the largest rate is its share of the initial inverse Hessian."""
    paths = []
    for rates in ((1.0, 1.0), (1.0, 0.01)):
        x, z = start_at(1.0, device=device), start_at(1.0, device=device)
        groups = [{"params": [x], "lr": rates[0]}, {"params": [z], "lr": rates[1]}]
        optimizer = BFGS(groups, max_iter=1)
        optimizer.step(standard(optimizer, lambda x=x, z=z: (x**2 + z**2).sum()))
        paths.append((1 - z.item()) / (1 - x.item()))
    assert paths == pytest.approx([1.0, 0.01])


def test_a_loss_that_is_not_finite_is_stepped_back_from() -> None:
    x = start_at(1.0, 1.0)

    def function() -> Tensor:
        return -(1 - x).clamp(min=-math.inf).log().sum() - x.log().sum() + 3 * x[0]

    with torch.no_grad():
        x.fill_(0.999)
    for update in UPDATES:
        optimizer = BFGS([x], max_iter=100, update=update)
        optimizer.step(standard(optimizer, function))
        assert math.isfinite(optimizer.info.loss_after)
    assert x.isfinite().all()
