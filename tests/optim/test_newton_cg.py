"""NewtonCG: exact where it can be, safe where it cannot."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import GLOBALIZATIONS, closure_of, start_at
from tests.support.custom_functions import Cube, NanCurvature
from tests.support.oracles import CASES, make_case
from torch_secondorder import FunctionalObjective, NewtonCG, StepStatus, mark_outputs
from torch_secondorder._objective.base import Evaluation
from torch_secondorder.curvature import Damped, GaussNewton, Hessian
from torch_secondorder.globalization import Armijo, MarquardtDamping, StrongWolfe, TrustRegion
from torch_secondorder.solvers import CG, MINRES, Martens, Nystrom, SolveStatus


class Regression:
    """Logistic regression with a small penalty: strictly convex, its minimum known."""

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64):
        torch.manual_seed(1)
        self.x = torch.randn(40, 5).to(device, dtype)
        self.y = torch.randint(3, (40,)).to(device)
        self.w = nn.Parameter(torch.zeros(5, 3, device=device, dtype=dtype))

    def value(self) -> Tensor:
        return F.cross_entropy(self.x @ self.w, self.y) + 0.01 * self.w.square().sum()

    def closure(self) -> Callable[[], Tensor]:
        return closure_of(self.value, self.w)

    def minimum(self) -> Tensor:
        optimizer = NewtonCG([self.w], max_iter=100, tolerance_grad=1e-14)
        optimizer.step(self.closure())
        found = self.w.detach().clone()
        nn.init.zeros_(self.w)
        return found


# Convergence.


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
def test_near_a_minimum_the_number_of_right_digits_doubles(
    curvature: str, globalization: str, device: torch.device
) -> None:
    problem = Regression(device)
    minimum = problem.minimum()
    optimizer = NewtonCG(
        [problem.w], curvature=curvature, globalization=globalization, tolerance_grad=0.0
    )
    errors = []
    for _ in range(40):
        optimizer.step(problem.closure())
        errors.append((problem.w - minimum).norm().item())
        if errors[-1] < 1e-12:
            break
    tail = [e for e in errors if 1e-14 < e < 0.3]
    assert errors[-1] < 1e-12 and len(tail) >= 3
    # The last steps that rounding leaves visible: e -> C e^2 with a modest C.
    assert all(after <= 20 * before**2 + 1e-13 for before, after in list(pairwise(tail))[-2:])


def test_a_quadratic_takes_one_undamped_step(device: torch.device) -> None:
    torch.manual_seed(2)
    a = torch.randn(9, 6, dtype=torch.float64, device=device)
    b = torch.randn(9, dtype=torch.float64, device=device)
    x = nn.Parameter(torch.zeros(6, dtype=torch.float64, device=device))
    solver = CG(100, tolerance=1e-14)
    optimizer = NewtonCG([x], globalization="line_search", solver=solver)
    optimizer.step(closure_of(lambda: F.mse_loss(a @ x, b), x))
    expected = torch.linalg.lstsq(a, b).solution
    torch.testing.assert_close(x.detach(), expected, rtol=1e-10, atol=1e-10)
    assert optimizer.info.step_length == 1.0
    assert optimizer.info.gain_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("curvature", ["ggn", "hessian", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
@pytest.mark.parametrize("case", sorted(CASES))
def test_every_combination_goes_down_and_never_up(
    case: str, globalization: str, curvature: str, device: torch.device
) -> None:
    made = make_case(case, device)
    arguments = {} if globalization == "trust_region" else {"damping": 0.1}
    optimizer = NewtonCG(
        made.params(), curvature=curvature, globalization=globalization, **arguments
    )
    for _ in range(4):
        optimizer.step(made.closure())
        info = optimizer.info
        if info.status is StepStatus.CONVERGED_GRADIENT and not info.iterations:
            break  # the last step has left nothing to do
        assert info.loss_after < info.loss
        assert info.evaluations >= 2 and info.products >= 1
        assert isinstance(info.solver_status, SolveStatus)
    # One evaluation in training mode, as the optimizer has seen it.
    assert made.value().item() == pytest.approx(info.loss_after, rel=1e-9)


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
def test_no_step_ends_at_a_worse_point(globalization: str, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = scale * torch.randn(6, 3).double(), scale * torch.randn(6, 2).double()
    optimizer = NewtonCG(net.parameters(), curvature="hessian", globalization=globalization)
    for _ in range(5):
        before = F.mse_loss(net(x), y).item()
        optimizer.step(closure_of(lambda: F.mse_loss(net(x), y), *net.parameters()))
        after = F.mse_loss(net(x), y).item()
        assert after <= before * (1 + 1e-12)
        assert after == pytest.approx(optimizer.info.loss_after)


def test_small_batches(device: torch.device) -> None:
    """On average: one run ends anywhere between 0.75 and 0.92, by its seed and by rounding."""

    def accuracy(seed: int) -> float:
        torch.manual_seed(seed)
        x = torch.randn(512, 8).to(device)  # drawn on the host: the same for all devices
        y = (x[:, 0] * x[:, 1] > 0).long()
        net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 2)).to(device)
        optimizer = NewtonCG(net.parameters(), max_cg_iter=20, preconditioner="martens")
        start = F.cross_entropy(net(x), y).item()
        for _ in range(40):
            rows = torch.randint(512, (128,)).to(device)
            optimizer.step(
                closure_of(lambda r=rows: F.cross_entropy(net(x[r]), y[r]), *net.parameters())
            )
        assert F.cross_entropy(net(x), y).item() < start
        return (net(x).argmax(1) == y).double().mean().item()

    accuracies = [accuracy(seed) for seed in range(8)]
    # Their mean is 0.83 with a standard error of 0.02 (12 seeds), and a guess is worth 0.5.
    assert sum(accuracies) / len(accuracies) > 0.75


# The second closure.


def test_products_come_from_the_curvature_closure() -> None:
    x = start_at(1.0, 1.0)
    calls = []

    def tenfold() -> Tensor:
        calls.append(x.detach().clone())
        return 10 * x.square().sum()

    optimizer = NewtonCG([x], curvature="hessian", globalization="line_search")
    optimizer.step(closure_of(lambda: x.square().sum(), x), closure_of(tenfold, x))
    # The gradient is 2x, the curvature twenty: a tenth of the way.
    torch.testing.assert_close(x.detach(), torch.tensor([0.9, 0.9], dtype=torch.float64))
    assert len(calls) == 1 and calls[0].tolist() == [1.0, 1.0]
    assert optimizer.info.evaluations == 3


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_of_the_curvature_closure_do_not_stay(to_none: bool) -> None:
    net = nn.Linear(3, 2).double()
    x, y = torch.randn(20, 3).double(), torch.randint(2, (20,))
    optimizer = NewtonCG(net.parameters())
    seen = []

    def loss(rows: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=to_none)
            value = F.cross_entropy(net(x[:rows]), y[:rows])
            value.backward()
            seen.append((rows, [p.grad.clone() for p in net.parameters()]))
            return value

        return closure

    optimizer.step(loss(20), loss(5))
    assert {rows for rows, _ in seen} == {20, 5}
    last = next(grads for rows, grads in reversed(seen) if rows == 20)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), last, strict=True))


def test_what_a_curvature_closure_does_not_go_with() -> None:
    x = start_at(1.0)
    closure = closure_of(lambda: x.square().sum(), x)
    with pytest.raises(ValueError, match="does not go with curvature_products"):
        NewtonCG([x], curvature_products="finite_difference").step(closure, closure)
    objective = FunctionalObjective(lambda p: p.square().sum(), x)
    with pytest.raises(TypeError, match="not with a FunctionalObjective"):
        NewtonCG([x], curvature="hessian").step(objective, closure)
    with pytest.raises(TypeError, match="must be callable, got int"):
        NewtonCG([x], curvature="hessian").step(closure, 3)
    with pytest.raises(RuntimeError, match="needs a closure"):
        NewtonCG([x]).step(None, closure)


# Curvature.


def test_a_factory_makes_the_operator() -> None:
    made: list[Evaluation] = []

    def factory(evaluation: Evaluation) -> Damped:
        made.append(evaluation)
        return Damped(Hessian(evaluation), 2.0)

    x = start_at(1.0, -1.0)
    optimizer = NewtonCG([x], curvature=factory, globalization="line_search")
    optimizer.step(closure_of(lambda: x.square().sum(), x))
    assert len(made) == 1
    torch.testing.assert_close(x.detach(), torch.tensor([0.5, -0.5], dtype=torch.float64))


def test_finite_differences_follow_the_hessian() -> None:
    weights = []
    for products in ("autograd", "finite_difference"):
        made = make_case("mlp", torch.device("cpu"))
        optimizer = NewtonCG(made.params(), curvature="hessian", curvature_products=products)
        for _ in range(4):
            optimizer.step(made.closure())
        weights.append(torch.cat([p.detach().flatten() for p in made.params()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


class Flash(nn.Module):
    """Attention by the kernel itself, out of reach of the choice of backends."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(len(x), 1, 2, 3)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, q, q)[0].reshape(len(x), 6)


def model_without_second_derivatives(kind: str) -> nn.Module:
    if kind == "compiled":
        inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        return torch.compile(inner, backend="aot_eager")
    return nn.Sequential(
        nn.Linear(4, 6), {"custom": Custom, "flash": Flash}[kind](), nn.Linear(6, 3)
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [("custom", "Cube"), ("flash", "scaled_dot_product_flash"), ("compiled", "torch.compile")],
)
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_where_there_is_no_second_derivative(kind: str, name: str, curvature: str) -> None:
    torch.manual_seed(0)
    model = model_without_second_derivatives(kind)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    closure = closure_of(lambda: F.cross_entropy(model(x), y), *model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=rf"{name}(.|\n)*curvature_products=.finite_difference."):
        NewtonCG(model.parameters(), curvature=curvature).step(closure)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer = NewtonCG(
        model.parameters(), curvature=curvature, curvature_products="finite_difference"
    )
    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < 0.8 * losses[0]


def test_attention_runs_on_the_backend_that_has_one() -> None:
    made = make_case("attention", torch.device("cpu"), torch.float32)
    optimizer = NewtonCG(made.params())
    losses = [optimizer.step(made.closure()).item() for _ in range(5)]
    assert losses[-1] < 0.8 * losses[0]


def test_several_losses_are_one() -> None:
    weights = []
    for parts in (1, 3):
        made = make_case("mlp", torch.device("cpu"))

        def closure(made: Any = made, parts: int = parts) -> Tensor:
            made.model.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for x, y in zip(made.x.chunk(parts), made.y.chunk(parts), strict=True):
                loss = made.loss(made.model(x), y) * len(x) / len(made.x)
                loss.backward()
                total = total + loss.detach()
            return total

        optimizer = NewtonCG(made.params(), damping=1.0)  # with less, rounding soon shows
        for _ in range(3):
            optimizer.step(closure)
        weights.append(torch.cat([p.detach().flatten() for p in made.params()]))
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-11)


def test_a_model_in_eval_mode() -> None:
    made = make_case("batchnorm", torch.device("cpu"))
    made.model.eval()
    buffers = [b.clone() for b in made.model.buffers()]
    optimizer = NewtonCG(made.params())
    losses = [optimizer.step(made.closure()).item() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert not made.model.training
    assert all(torch.equal(a, b) for a, b in zip(buffers, made.model.buffers(), strict=True))


# What can go wrong.


@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
def test_away_from_a_saddle(globalization: str) -> None:
    x = start_at(0.5, 1e-3)

    def value() -> Tensor:  # a saddle at zero, minima at (0, 1) and (0, -1)
        return x[0] ** 2 - x[1] ** 2 / 2 + x[1] ** 4 / 4

    optimizer = NewtonCG([x], curvature="hessian", globalization=globalization, max_iter=60)
    optimizer.step(closure_of(value, x))
    if globalization != "damping":  # which starts with enough of it to see none
        assert optimizer.info.negative_curvature < 0
    torch.testing.assert_close(
        x.detach().abs(), torch.tensor([0.0, 1.0]).double(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_a_singular_operator(globalization: str, curvature: str) -> None:
    """Twice the same column, and a parameter that the loss is linear in."""
    w, slope = start_at(1.0, 3.0), start_at(0.5)

    def value() -> Tensor:
        z = torch.stack([w.sum(), 2 * w.sum()])
        return F.mse_loss(z, torch.ones_like(z)) + 1e-3 * slope.sum()

    optimizer = NewtonCG([w, slope], curvature=curvature, globalization=globalization)
    losses = [optimizer.step(closure_of(value, w, slope)).item() for _ in range(15)]
    assert all(after < before for before, after in pairwise(losses))
    assert abs(w.sum().item() - 0.6) < 1e-2


@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
def test_a_gradient_of_zero(globalization: str) -> None:
    x = start_at(0.0, 0.0)
    optimizer = NewtonCG([x], curvature="hessian", globalization=globalization)
    assert optimizer.step(closure_of(lambda: x.square().sum(), x)).item() == 0
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT
    assert optimizer.info.products == 0 and x.tolist() == [0, 0]


@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
@pytest.mark.parametrize("preconditioner", [None, "nystrom"])
def test_a_product_that_is_not_finite(globalization: str, preconditioner: str | None) -> None:
    x = start_at(1.0, 2.0)
    optimizer = NewtonCG(
        [x], curvature="hessian", globalization=globalization, preconditioner=preconditioner
    )
    optimizer.step(closure_of(lambda: NanCurvature.apply(x).sum(), x))
    info = optimizer.info
    assert info.loss_after < info.loss and info.loss_after == pytest.approx(x.square().sum().item())
    expected = "no entry of a product was finite, products were differences of gradients"
    assert info.repair == expected
    optimizer.step(closure_of(lambda: x.square().sum(), x))
    assert x.norm() < 2 and optimizer.info.repair == ""


@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
def test_a_wall_of_infinite_loss(globalization: str) -> None:
    x = start_at(1.0)

    def value() -> Tensor:  # the Newton step from here leads behind the wall at zero
        return (x.log() * x - 0.9 * x - 0.5 * x.log()).sum()

    optimizer = NewtonCG([x], curvature="hessian", globalization=globalization, max_iter=30, lr=4.0)
    optimizer.step(closure_of(value, x))
    assert x.item() > 0
    assert optimizer.info.loss_after < optimizer.info.loss


def test_a_trial_that_is_not_finite_raises_the_damping() -> None:
    x = start_at(1.0)

    def value() -> Tensor:
        return (x - 3).square().sum() + torch.where(x > 1.5, torch.inf, 0.0).sum()

    optimizer = NewtonCG([x], curvature="hessian", globalization="damping", damping=1e-3)
    optimizer.step(closure_of(value, x))
    info = optimizer.info
    assert 1 < x.item() <= 1.5
    assert info.nonfinite_trials >= 1 and info.gain_ratio is None and info.damping > 1e-3


@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
def test_nothing_but_non_finite_trials(globalization: str) -> None:
    x = start_at(1.0)
    calls = 0

    def value() -> Tensor:
        nonlocal calls
        calls += 1
        return x.square().sum() * (1.0 if calls == 1 else torch.inf)

    optimizer = NewtonCG([x], curvature="hessian", globalization=globalization)
    optimizer.step(closure_of(value, x))
    assert optimizer.info.status is StepStatus.NONFINITE_TRIALS
    assert x.item() == 1.0


def test_a_rejected_step_is_solved_again_on_the_same_operator() -> None:
    made = []

    def factory(evaluation: Evaluation) -> Hessian:
        made.append(Hessian(evaluation))
        return made[-1]

    x = start_at(3.0)

    def value() -> Tensor:  # far out the curvature is tiny, and the solution much too far
        return (1 + x.square()).log().sum()

    optimizer = NewtonCG([x], curvature=factory, globalization=TrustRegion(initial=100.0))
    optimizer.step(closure_of(value, x))
    assert len(made) == 1
    assert optimizer.info.loss_after < optimizer.info.loss
    assert optimizer.info.products > 1 and optimizer.info.trust_radius < 100


@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
def test_a_gradient_that_lies(globalization: str) -> None:
    """No step lowers the loss, however short and however damped."""
    made = []

    def factory(evaluation: Evaluation) -> Hessian:
        made.append(Hessian(evaluation))
        return made[-1]

    x = start_at(1.0)

    def value() -> Tensor:
        return x.square().sum() - 2 * x.detach().square().sum()

    optimizer = NewtonCG([x], curvature=factory, globalization=globalization, damping=0.1)
    optimizer.step(closure_of(value, x))
    assert optimizer.info.status is StepStatus.NO_DECREASE
    assert x.item() == 1.0 and len(made) == 1
    if globalization == "damping":
        assert optimizer.info.damping > 10 and optimizer.info.products > 10


def test_float32_goes_on_until_rounding(device: torch.device) -> None:
    problem = Regression(device, torch.float32)
    optimizer = NewtonCG([problem.w], max_iter=100, tolerance_grad=0.0, tolerance_change=0.0)
    optimizer.step(problem.closure())
    assert optimizer.info.grad_norm < 1e-7
    before = problem.w.detach().clone()
    loss = problem.value().item()
    optimizer.step(problem.closure())
    assert problem.value().item() <= loss * (1 + 1e-6)
    torch.testing.assert_close(problem.w.detach(), before, rtol=1e-4, atol=1e-5)


# Strategies and their names.


@pytest.mark.parametrize(
    "arguments",
    [
        {"solver": "minres"},
        {"solver": MINRES(50, 1e-3)},
        {"solver": CG(5)},
        {"globalization": MarquardtDamping(initial=0.01)},
        {"globalization": TrustRegion(initial=0.1)},
        {"globalization": Armijo()},
        {"globalization": StrongWolfe()},
        {"globalization": "hager_zhang", "damping": 0.1},
        {"preconditioner": "martens"},
        {"preconditioner": Martens(power=1.0, n_samples=2)},
        {"preconditioner": "nystrom", "globalization": "trust_region"},
        {"preconditioner": Nystrom(5, 3)},
        {"max_cg_iter": 3},
    ],
    ids=lambda arguments: re.sub(" object at \\w+", "", str(arguments)),  # the same in each process
)
def test_strategies(arguments: dict[str, Any], device: torch.device) -> None:
    made = make_case("mlp", device)
    optimizer = NewtonCG(made.params(), **arguments)
    losses = [optimizer.step(made.closure()).item() for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    if "max_cg_iter" in arguments:
        assert optimizer.info.solver_iterations <= 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"curvature": "newton"},
            ValueError,
            "'auto', 'ggn', .* got 'newton'",
        ),
        ({"curvature_products": "exact"}, ValueError, "'finite_difference', got 'exact'"),
        (
            {"globalization": "hope"},
            ValueError,
            "'damping', 'trust_region', .* got 'hope'",
        ),
        ({"globalization": 3}, TypeError, "globalization must be one of 'damping'.* an instance"),
        ({"globalization": TrustRegion}, TypeError, "globalization must be one of .* an instance"),
        ({"solver": "lu"}, ValueError, "solver must be one of 'cg', 'minres', .* got 'lu'"),
        ({"solver": MINRES}, TypeError, "an instance such as MINRES"),
        ({"solver": "minres", "globalization": "trust_region"}, ValueError, "needs solver='cg'"),
        ({"solver": "minres", "curvature": "hessian"}, ValueError, "needs solver='cg'"),
        (
            {"preconditioner": "ilu"},
            ValueError,
            "preconditioner must be .* got 'ilu'",
        ),
        ({"preconditioner": Nystrom}, TypeError, "an instance such as Nystrom"),
        ({"damping": -1.0}, ValueError, "damping must be .* got -1.0"),
        (
            {"damping": 0.0},
            ValueError,
            "damping must be a finite number above 0",
        ),
        ({"damping": 1.0, "globalization": MarquardtDamping()}, ValueError, "leave damping out"),
        ({"max_iter": 0}, ValueError, "max_iter must be an integer of at least 1, got 0"),
        ({"max_cg_iter": 2.5}, ValueError, "max_cg_iter must be an integer"),
        ({"tolerance_grad": -1}, ValueError, "tolerance_grad must be"),
        ({"tolerance_change": float("nan")}, ValueError, "tolerance_change must be"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NewtonCG([start_at(1.0)], **arguments)


def test_a_loss_without_outputs() -> None:
    x = start_at(1.0)
    closure = closure_of(lambda: x.square().sum(), x)
    with pytest.raises(RuntimeError, match=r"mark_outputs(.|\n)*curvature=.hessian."):
        NewtonCG([x], curvature="ggn").step(closure)
    assert x.item() == 1.0
    optimizer = NewtonCG([x], curvature="ggn")
    optimizer.step(closure_of(lambda: mark_outputs(x * 1).square().sum(), x))
    assert x.item() < 1.0


def test_martens_needs_outputs() -> None:
    x = start_at(1.0)
    optimizer = NewtonCG([x], curvature="hessian", preconditioner="martens")
    with pytest.raises(TypeError, match="does not know; use curvature='ggn', or 'nystrom'"):
        optimizer.step(closure_of(lambda: x.square().sum(), x))


# State.


@pytest.mark.parametrize(
    "arguments",
    [
        {"curvature": "fisher", "preconditioner": "martens"},
        {"preconditioner": Nystrom(6, 4)},
        {"curvature": "hessian"},
    ],
    ids=["fisher-martens", "nystrom", "trust_region"],
)
def test_resuming_bit_for_bit(arguments: dict[str, Any], device: torch.device) -> None:
    made, again = make_case("mlp", device), make_case("mlp", device)
    optimizer = NewtonCG(made.params(), **copy.deepcopy(arguments))
    for _ in range(5):
        optimizer.step(made.closure())
    file = io.BytesIO()
    torch.save((made.model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    for _ in range(5):
        optimizer.step(made.closure())
    resumed = NewtonCG(again.params(), **copy.deepcopy(arguments))
    weights, state = torch.load(file, weights_only=True)
    again.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(5):
        resumed.step(again.closure())
    assert all(torch.equal(a, b) for a, b in zip(made.params(), again.params(), strict=True))
    assert optimizer.info == resumed.info


def test_a_state_of_another_size() -> None:
    optimizer = NewtonCG([start_at(1.0, 2.0)], curvature="hessian", globalization="damping")
    x = optimizer.param_groups[0]["params"][0]
    optimizer.step(closure_of(lambda: x.square().sum(), x))
    other = NewtonCG([start_at(1.0)], curvature="hessian", globalization="damping")
    with pytest.raises(ValueError, match="2 parameter entries, the optimizer has 1"):
        other.load_state_dict(optimizer.state_dict())


def test_freezing_a_parameter_drops_what_was_learned() -> None:
    made = make_case("mlp", torch.device("cpu"))
    optimizer = NewtonCG(made.params(), preconditioner="nystrom", damping=0.1)
    for _ in range(3):
        optimizer.step(made.closure())
    assert optimizer.info.damping < 0.1
    made.params()[0].requires_grad_(False)
    before = made.params()[0].detach().clone()
    optimizer.step(made.closure())
    assert torch.equal(made.params()[0], before)
    assert optimizer.info.loss_after < optimizer.info.loss


def test_the_report() -> None:
    made = make_case("mlp", torch.device("cpu"))
    optimizer = NewtonCG(made.params(), max_iter=3)
    optimizer.step(made.closure())
    info = optimizer.info
    assert info.status is StepStatus.MAX_ITERATIONS and info.iterations == 3
    assert info.trust_radius == 0 and info.damping < 1 and info.negative_curvature == 0
    assert info.gain_ratio == pytest.approx(1, abs=0.5)
    assert info.solver_iterations <= info.products
    assert replace(info) == info
    trusting = NewtonCG(made.params(), curvature="hessian")
    trusting.step(made.closure())
    assert trusting.info.trust_radius > 0 and trusting.info.damping == 0


def test_lr_zero_moves_nothing() -> None:
    made = make_case("mlp", torch.device("cpu"))
    optimizer = NewtonCG(made.params(), lr=0.0)
    before = [p.detach().clone() for p in made.params()]
    optimizer.step(made.closure())
    assert optimizer.info.status is StepStatus.ZERO_LEARNING_RATE
    assert all(torch.equal(a, b) for a, b in zip(before, made.params(), strict=True))


def test_the_gauss_newton_matrix_ignores_what_it_is_told_to() -> None:
    """A factory is the way to options of an operator."""
    x = start_at(2.0)

    def value() -> Tensor:
        return F.mse_loss(x, torch.zeros_like(x)) + x.square().sum()

    def without(evaluation: Evaluation) -> GaussNewton:
        return GaussNewton(evaluation, remainder="ignore")

    optimizer = NewtonCG([x], curvature=without, globalization="line_search")
    optimizer.step(closure_of(value, x))
    assert optimizer.info.gain_ratio == pytest.approx(0, abs=1e-9)


# Losses without a lower bound.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_loss_that_falls_without_end(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([1.0, 2.0], dtype=dtype, device=device, requires_grad=True)
    optimizer = NewtonCG([x], curvature="hessian", globalization="line_search", max_iter=60)
    closure = closure_of(lambda: -x.exp().sum(), x)
    optimizer.step(closure)
    info = optimizer.info
    assert info.status is StepStatus.UNBOUNDED
    assert x.isfinite().all() and math.isfinite(info.loss_after) and info.loss_after < -1e3


@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: (-x).exp().sum(),
        lambda x: F.softplus(x).sum(),
        lambda x: (x**4 - x**2).sum(),
        lambda x: x.square().sum() - 1e12,
        lambda x: -x.square().log1p().sum(),
    ],
)
def test_a_bounded_loss_is_not_called_unbounded(
    function: Callable[[Tensor], Tensor], globalization: str
) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = NewtonCG([x], curvature="hessian", globalization=globalization, max_iter=20)
    for _ in range(3):
        optimizer.step(closure_of(lambda: function(x), x))
        assert optimizer.info.status is not StepStatus.UNBOUNDED
        assert x.isfinite().all()
