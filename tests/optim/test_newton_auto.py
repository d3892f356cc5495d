"""NewtonCG with no argument: what it makes of losses of all kinds."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.custom_functions import Cube
from torch_secondorder import DatasetClosure, FunctionalObjective, NewtonCG, StepStatus
from torch_secondorder import mark_outputs as mark
from torch_secondorder._autograd.graph import MissingSecondDerivative
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature import FiniteDifference, GaussNewton

DIFFERENCES = "hessian by differences"


class Problem(NamedTuple):
    """Parameters and a loss of them."""

    params: list[Tensor]
    value: Callable[[], Tensor]

    def closure(self) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = self.value()
        loss.backward()
        return loss


def network(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def data(count: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(count, 3, dtype=torch.float64)
    return x, x[:, :1].sin() + x[:, 1:2] * x[:, 2:], torch.randint(4, (count,))


def of(model: nn.Module, value: Callable[[], Tensor]) -> Problem:
    return Problem(list(model.parameters()), value)


def squared_by_hand() -> Problem:
    model, (x, y, _) = network(3, 6, 1), data()
    return of(model, lambda: (model(x) - y).square().mean())


def squared() -> Problem:
    model, (x, y, _) = network(3, 6, 1), data()
    return of(model, lambda: F.mse_loss(model(x), y))


def smoothed(by_hand: bool) -> Problem:
    model, (x, _, labels) = network(3, 6, 4), data()

    def value() -> Tensor:
        if not by_hand:
            return F.cross_entropy(model(x), labels, label_smoothing=0.1)
        logs = model(x).log_softmax(-1)
        chosen = logs.gather(1, labels[:, None]).mean()
        return -0.9 * chosen - 0.1 * logs.mean()

    return of(model, value)


def ctc() -> Problem:
    model = network(3, 6, 5)
    x = torch.randn(12, 4, 3, dtype=torch.float64)
    targets = torch.randint(1, 5, (4, 3))
    lengths = torch.full((4,), 12), torch.full((4,), 3)
    return of(model, lambda: F.ctc_loss(model(x).log_softmax(-1), targets, *lengths))


def log_probability() -> Problem:
    model, (x, y, _) = network(3, 6, 1), data()
    scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def value() -> Tensor:
        return -torch.distributions.Normal(model(x), scale.exp()).log_prob(y).mean()

    return Problem([*model.parameters(), scale], value)


def gaussian_process() -> Problem:
    x, y, _ = data(15)
    logs = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def value() -> Tensor:
        length, height, noise = logs.exp()
        squares = (x[:, None] - x[None]).square().sum(-1)
        kernel = height * torch.exp(-squares / (2 * length**2))
        factor = torch.linalg.cholesky(kernel + noise * torch.eye(len(x), dtype=x.dtype))
        solved = torch.cholesky_solve(y, factor)
        return 0.5 * (y * solved).sum() + factor.diagonal().log().sum()

    return Problem([logs], value)


def residuals() -> Problem:
    """u'' = -u with u(0) = 0 and u'(0) = 1, all of it by hand."""
    model = network(1, 8, 1)
    t = torch.linspace(0, 2, 20, dtype=torch.float64)[:, None]

    def value() -> Tensor:
        at = t.clone().requires_grad_()
        u = model(at)
        (first,) = torch.autograd.grad(u.sum(), at, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), at, create_graph=True)
        start = u[0].square() + (first[0] - 1).square()
        return (second + u).square().sum() + start.sum()

    return of(model, value)


def similarity() -> Problem:
    model, (x, _, _) = network(3, 6, 4), data()
    signs = torch.where(torch.rand(len(x)) < 0.5, -1.0, 1.0).double()
    return of(model, lambda: F.cosine_embedding_loss(model(x), model(x.flip(0)), signs))


def triplet() -> Problem:
    model, (x, _, _) = network(3, 6, 4), data()
    return of(model, lambda: F.triplet_margin_loss(model(x), model(x.roll(1, 0)), model(x.flip(0))))


def absolute() -> Problem:
    """Linear in the outputs almost everywhere: its Gauss-Newton matrix is zero."""
    model, (x, y, _) = network(3, 6, 1), data()
    return of(model, lambda: F.l1_loss(model(x), y))


def partly_standard() -> Problem:
    """The outputs are those of a small part of the loss, and the rest is not convex."""
    model, (x, y, labels) = network(3, 6, 5), data()

    def value() -> Tensor:
        z = model(x)
        by_hand = (torch.sin(2 * z[:, 4:]) - y).square().mean() + (z[:, :4].cos()).mean()
        return 0.01 * F.cross_entropy(model(x)[:, :4], labels) + 10 * by_hand

    return of(model, value)


def penalized() -> Problem:
    model, (x, _, labels) = network(3, 6, 4), data()

    def value() -> Tensor:
        penalty = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
        return F.cross_entropy(model(x), labels) + 0.01 * penalty

    return of(model, value)


def sum_of_squares() -> Problem:
    x = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    return Problem([x], lambda: x.square().sum())


def rosenbrock() -> Problem:
    x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    return Problem([x], lambda: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)


class Late(torch.autograd.Function):
    """A function whose backward looks differentiable, but raises when differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return LateBackward.apply(x, grad)


class LateBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
        return 3 * x * x * grad

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("derivative for LateBackward is not implemented")


def custom(function: Any) -> Problem:
    first, second, (x, _, labels) = network(3, 6), network(6, 4), data()
    params = [*first.parameters(), *second.parameters()]
    return Problem(params, lambda: F.cross_entropy(second(function.apply(first(x))), labels))


def compiled() -> Problem:
    model, (x, y, _) = network(3, 6, 1), data()
    fast = torch.compile(model, backend="aot_eager")
    return of(model, lambda: F.mse_loss(fast(x), y))


#: The loss, the curvature it gets, and the share of its size at the start that may be left of it.
LOSSES: dict[str, tuple[Callable[[], Problem], str, float]] = {
    "squared error": (squared, "ggn", 0.02),
    "squared error by hand": (squared_by_hand, "hessian", 0.02),
    "label smoothing": (lambda: smoothed(False), "ggn", 0.8),
    "label smoothing by hand": (lambda: smoothed(True), "hessian", 0.8),
    "ctc": (ctc, DIFFERENCES, 0.5),
    "log-probability": (log_probability, "hessian", 0.1),
    "Gaussian process": (gaussian_process, "hessian", 0.95),
    "residuals": (residuals, "hessian", 1e-4),
    "cosine embedding": (similarity, "hessian", 0.9),
    "triplet": (triplet, "hessian", 0.4),
    "absolute error": (absolute, "hessian", 0.75),
    "partly standard": (partly_standard, "hessian", 0.6),
    "penalized": (penalized, "ggn", 0.99),
    "squares": (sum_of_squares, "hessian", 1e-9),
    "Rosenbrock": (rosenbrock, "hessian", 1e-3),
    "once differentiable": (lambda: custom(Cube), DIFFERENCES, 0.8),
    "raises in a product": (lambda: custom(Late), DIFFERENCES, 0.8),
    "compiled": (compiled, DIFFERENCES, 0.05),
}


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_any_loss_with_no_argument(name: str) -> None:
    make, curvature, fall = LOSSES[name]
    torch.manual_seed(0)
    problem = make()
    optimizer = NewtonCG(problem.params)
    start = optimizer.step(problem.closure).item()
    last = start
    for _ in range(25):
        loss = optimizer.step(problem.closure).item()
        assert loss <= last + 1e-12 * abs(last)
        last = loss
    assert optimizer.info.curvature == curvature
    assert start - last >= (1 - fall) * abs(start), (start, last)
    trusts = curvature != "ggn"
    assert (optimizer.info.trust_radius > 0) == trusts
    assert (optimizer.info.damping > 0) != trusts


def test_differences_are_not_found_out_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    problem = custom(Cube)
    found: list[bool] = []
    evaluate = ClosureObjective.evaluate

    def watched(self: Any, *, curvature: bool = False) -> Any:
        found.append(curvature)
        return evaluate(self, curvature=curvature)

    monkeypatch.setattr(ClosureObjective, "evaluate", watched)
    optimizer = NewtonCG(problem.params, max_cg_iter=2)
    for _ in range(45):
        optimizer.step(problem.closure)
    assert found[0] and sum(found) == 3  # once more after 20 steps, in case that it has changed


def test_a_graph_that_has_second_derivatives_again_is_used() -> None:
    torch.manual_seed(0)
    first, second, (x, _, labels) = network(3, 6), network(6, 4), data()
    cube: list[Callable[[Tensor], Tensor]] = [Cube.apply]
    params = [*first.parameters(), *second.parameters()]
    problem = Problem(params, lambda: F.cross_entropy(second(cube[0](first(x))), labels))
    optimizer = NewtonCG(params, max_cg_iter=2)
    optimizer.step(problem.closure)
    assert optimizer.info.curvature == DIFFERENCES and optimizer.info.trust_radius > 0
    cube[0] = lambda z: z**3
    for _ in range(25):
        optimizer.step(problem.closure)
    assert optimizer.info.curvature == "ggn" and optimizer.info.damping > 0


def test_closures_of_two_kinds_by_turns() -> None:
    torch.manual_seed(0)
    model, (x, y, _) = network(3, 6, 1), data()
    seen = of(model, lambda: F.mse_loss(model(x), y))
    unseen = of(model, lambda: (model(x) - y).square().mean())
    optimizer = NewtonCG(model.parameters())
    kinds, losses = [], []
    for _ in range(10):
        for problem in (seen, unseen):
            losses.append(optimizer.step(problem.closure).item())
            kinds.append(optimizer.info.curvature)
    assert kinds == ["ggn", "hessian"] * 10
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]


def resumed(problem: Problem, again: Problem, steps: int, **arguments: Any) -> tuple[Any, Any]:
    """The reports of a run and of one that was stopped in the middle; weights must be equal."""
    optimizer = NewtonCG(problem.params, **arguments)
    for _ in range(steps):
        optimizer.step(problem.closure)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    with torch.no_grad():
        for mine, theirs in zip(again.params, problem.params, strict=True):
            mine.copy_(theirs)
    for _ in range(steps):
        optimizer.step(problem.closure)
    file.seek(0)
    other = NewtonCG(again.params, **arguments)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(steps):
        other.step(again.closure)
    assert all(map(torch.equal, problem.params, again.params))
    return optimizer.info, other.info


@pytest.mark.parametrize(
    "name",
    [
        "squared error",
        "squared error by hand",
        "once differentiable",
        "raises in a product",
        "partly standard",
    ],
)
def test_resuming_bit_for_bit(name: str) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(LOSSES[name][0]())
    one, other = resumed(made[0], made[1], 4)
    assert one == other and one.curvature == LOSSES[name][1]


def wide(hidden: int) -> Problem:
    model = nn.Sequential(nn.Linear(40, hidden), nn.Tanh(), nn.Linear(hidden, 4))
    x, labels = torch.randn(200, 40), torch.randint(4, (200,))
    return of(model, lambda: F.cross_entropy(model(x), labels))


@pytest.mark.parametrize(("hidden", "name"), [(30, "Nystrom"), (60, "KFAC"), (1, "")])
def test_resuming_with_a_preconditioner_that_was_chosen(hidden: int, name: str) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(wide(hidden))
    one, other = resumed(made[0], made[1], 3)
    assert one == other and one.preconditioner == name
    assert name != "KFAC" or one.solver_iterations <= 5
    plain = NewtonCG(made[0].params, preconditioner=None)
    plain.step(made[0].closure)
    assert plain.info.preconditioner == ""


def test_checkpoints_without_a_kind_load() -> None:
    torch.manual_seed(0)
    problem = squared()
    optimizer = NewtonCG(problem.params)
    for _ in range(3):
        optimizer.step(problem.closure)
    state = copy.deepcopy(optimizer.state_dict())
    for kept in state["state"].values():
        for name in ("kind", "indefinite"):
            kept.pop(name, None)
    del state["param_groups"][0]["max_eval"]
    torch.manual_seed(0)
    again = squared()
    with torch.no_grad():
        for mine, theirs in zip(again.params, problem.params, strict=True):
            mine.copy_(theirs)
    other = NewtonCG(again.params)
    other.load_state_dict(state)
    for _ in range(2):
        assert other.step(again.closure) == optimizer.step(problem.closure)
    assert other.info == optimizer.info


def test_a_data_set() -> None:
    torch.manual_seed(0)
    model, (x, y, _) = network(3, 6, 1), data(40)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    whole = copy.deepcopy(model)
    runs = []
    for name, loss in (
        ("ggn", F.mse_loss),
        ("hessian", lambda z, t: (z - t).square().mean()),
    ):
        fresh = copy.deepcopy(model)
        optimizer = NewtonCG(fresh.parameters())
        closure = DatasetClosure(fresh, loss, loader)
        runs.append([optimizer.step(closure).item() for _ in range(6)])
        assert optimizer.info.curvature == name
    problem = of(whole, lambda: F.mse_loss(whole(x), y))
    plain = NewtonCG(whole.parameters())
    expected = [plain.step(problem.closure).item() for _ in range(6)]
    torch.testing.assert_close(runs[0], expected, rtol=1e-2, atol=0)
    assert runs[1][-1] < 0.5 * runs[1][0]


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("fast", [False, True])
def test_a_pure_function(outputs: bool, fast: bool) -> None:
    torch.manual_seed(0)
    x, y, _ = data()
    weights = {"a": torch.randn(3, 5).double() / 3, "b": torch.randn(5, 1).double() / 3}
    weights = {name: w.requires_grad_() for name, w in weights.items()}

    def loss(tree: dict[str, Tensor]) -> Tensor:
        z = torch.tanh(x @ tree["a"]) @ tree["b"]
        return F.mse_loss(z, y) if outputs else (z - y).square().mean()

    compile: Any = {"backend": "aot_eager"} if fast else False
    objective = FunctionalObjective(loss, weights, compile=compile)
    optimizer = NewtonCG(weights.values())
    losses = [optimizer.step(objective).item() for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.info.curvature == ("ggn" if outputs else "hessian")


def test_a_zero_gauss_newton_matrix_is_known() -> None:
    torch.manual_seed(0)
    problem = absolute()
    with ClosureObjective(problem.closure, problem.params) as objective:
        operator = GaussNewton(objective.evaluate(curvature=True))
        assert operator.vanishes((F.l1_loss,))
        assert not (operator @ torch.randn(operator.size).double()).any()


def test_minres_has_damping_for_the_hessian_too() -> None:
    torch.manual_seed(0)
    problem = squared_by_hand()
    optimizer = NewtonCG(problem.params, solver="minres")
    losses = [optimizer.step(problem.closure).item() for _ in range(10)]
    assert optimizer.info.curvature == "hessian" and optimizer.info.damping > 0
    assert losses[-1] < losses[0]


# One evaluation at each point.


@pytest.mark.parametrize("name", ["squared error", "squared error by hand", "Rosenbrock"])
def test_no_point_is_evaluated_twice(name: str) -> None:
    torch.manual_seed(0)
    problem = LOSSES[name][0]()
    points: list[Tensor] = []

    def closure() -> Tensor:
        points.append(torch.cat([p.detach().flatten() for p in problem.params]))
        return problem.closure()

    optimizer = NewtonCG(problem.params, max_iter=8)
    optimizer.step(closure)
    info = optimizer.info
    assert info.iterations == 8 and info.evaluations == len(points)
    assert not any(torch.equal(a, b) for i, a in enumerate(points) for b in points[:i])


@pytest.mark.parametrize("name", ["squared error", "squared error by hand", "Gaussian process"])
def test_kept_graphs_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, evaluations = [], []
    for room in (True, False):
        torch.manual_seed(0)
        problem = LOSSES[name][0]()
        monkeypatch.setattr(ClosureObjective, "has_room_for_a_graph", lambda self, r=room: r)
        optimizer = NewtonCG(problem.params, max_iter=6)
        for _ in range(2):
            optimizer.step(problem.closure)
        made.append(torch.cat([p.detach().flatten() for p in problem.params]))
        evaluations.append(optimizer.info.evaluations)
    torch.testing.assert_close(*made, rtol=1e-9, atol=1e-12)
    assert evaluations[0] < evaluations[1]


def test_graphs_from_before_a_step_notice_that_it_moved_parameters() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    before = (w**3).sum()
    problem = Problem([w], lambda: (w**4).sum())
    NewtonCG([w], max_iter=4).step(problem.closure)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()


# A bound on evaluations.


@pytest.mark.parametrize("name", ["squared error", "squared error by hand", "once differentiable"])
@pytest.mark.parametrize("most", [1, 2, 5, 12])
def test_a_step_ends_when_its_evaluations_are_used_up(name: str, most: int) -> None:
    torch.manual_seed(0)
    problem = LOSSES[name][0]()
    calls, start = [], [p.detach().clone() for p in problem.params]

    def closure() -> Tensor:
        calls.append(None)
        return problem.closure()

    optimizer = NewtonCG(problem.params, max_iter=50, max_eval=most)
    optimizer.step(closure)
    info = optimizer.info
    assert info.status is StepStatus.MAX_EVALUATIONS and info.evaluations == most
    assert len(calls) <= most + 1  # the one that found no second derivative has come to nothing
    assert info.loss_after == pytest.approx(problem.value().item(), rel=1e-12)
    assert info.loss_after <= info.loss
    if most == 1:
        assert all(map(torch.equal, problem.params, start))
    if most == 12:
        assert info.iterations >= 1


# Steps of differences.


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("scales", [(1e-6, 1e6), (1e-6, 1.0, 1e6), (1e-8, 1e-8), (1e7, 1e7)])
def test_differences_follow_the_sizes_of_the_variables(
    scales: tuple[float, ...], together: bool
) -> None:
    """A function of `x_i / s_i`: its Hessian is that of the plain one, over the sizes."""
    s = torch.tensor(scales, dtype=torch.float64)
    u = torch.linspace(0.7, 1.3, len(s), dtype=torch.float64)

    def plain(z: Tensor) -> Tensor:
        return (z.exp() * z.flip(0).sin()).sum() + z.prod() ** 2

    tensors = [u * s] if together else list((u * s).split(1))
    tensors = [t.clone().requires_grad_() for t in tensors]
    problem = Problem(tensors, lambda: plain(torch.cat(tensors) / s))
    expected = torch.autograd.functional.hessian(plain, u)
    with ClosureObjective(problem.closure, tensors) as objective:
        operator = FiniteDifference(objective)
        found = operator @ torch.eye(len(s), dtype=torch.float64)
        mixed = operator @ s  # every variable at once, by as much as its size
        steep = operator @ s.reciprocal()
    torch.testing.assert_close(found * s * s[:, None], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mixed * s, expected.sum(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(steep, (expected / s / s[:, None]) @ (1 / s), rtol=1e-5, atol=0)


def test_steps_that_leave_the_domain_are_shortened() -> None:
    # Within 2e-9 of the wall: the usual step of 6e-6 crosses it.
    x = torch.tensor([2e-9, 1.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0 - 1e-7], dtype=torch.float64, requires_grad=True)
    problem = Problem([x, y], lambda: (1 - y[0]).sqrt() * 1e-3 + x.square().sum())
    with ClosureObjective(problem.closure, [x, y]) as objective:
        v = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        product = FiniteDifference(objective) @ v
    exact = -0.25e-3 * (1 - y.detach()) ** -1.5
    torch.testing.assert_close(product[2:], exact, rtol=0.2, atol=0)


def test_a_variable_that_passes_zero_keeps_its_size() -> None:
    torch.manual_seed(0)
    problem = custom(Cube)
    optimizer = NewtonCG(problem.params)
    for _ in range(3):
        optimizer.step(problem.closure)
    sizes = optimizer._memory.sizes.clone()
    assert optimizer.info.curvature == DIFFERENCES
    with torch.no_grad():
        problem.params[0].zero_()
    optimizer.step(problem.closure)
    assert (optimizer._memory.sizes >= sizes).all()


def test_what_was_asked_for_is_not_changed() -> None:
    problem = custom(Cube)
    with pytest.raises(MissingSecondDerivative):
        NewtonCG(problem.params, curvature="ggn").step(problem.closure)
    model, (x, y, _) = network(3, 6, 1), data()
    marked = of(model, lambda: (mark(model(x)) - y).square().mean())
    optimizer = NewtonCG(model.parameters())
    optimizer.step(marked.closure)
    assert optimizer.info.curvature == "ggn"


def test_batches_follow_when_the_curvature_changes() -> None:
    """A term that bypasses the outputs is not convex: the Hessian is used from the first step."""
    torch.manual_seed(0)
    model, (x, y, _) = network(3, 6, 1), data(40)
    found = []
    for batch_size in (40, 16):
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size)
        fresh = copy.deepcopy(model)

        def loss(z: Tensor, t: Tensor, net: nn.Module = fresh) -> Tensor:
            bypass = sum((p.cos().sum() for p in net.parameters()), z.new_zeros(()))
            return F.mse_loss(z, t) + bypass

        closure = DatasetClosure(fresh, loss, loader)
        optimizer = NewtonCG(fresh.parameters())
        reports = []
        for _ in range(4):
            optimizer.step(closure)
            info = optimizer.info
            reports.append((info.curvature, info.damping > 0, info.trust_radius > 0))
        found.append(reports)
    assert found[0] == [("ggn", True, False)] + 3 * [("hessian", False, True)]
    assert found[1] == found[0]
