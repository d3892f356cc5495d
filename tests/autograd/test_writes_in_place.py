"""Closures may write in place at each evaluation: products stay those of the evaluated point."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torch_secondorder import (
    AdaHessian,
    Contractive,
    DatasetClosure,
    FunctionalObjective,
    NewtonCG,
    Sophia,
    diagnostics,
)
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature import Fisher, GaussNewton, Hessian, LinearOperator
from torch_secondorder.globalization import Armijo, MarquardtDamping, StrongWolfe, TrustRegion

N, D = 5, 6


class Problem:
    """A least-squares problem whose closure writes something in place.

    Args:
        writes: What.
    """

    def __init__(self, writes: str = "nothing") -> None:
        torch.manual_seed(0)
        self.writes = writes
        self.data = torch.randn(N, D, dtype=torch.float64)
        self.data -= self.data.mean(0)
        self.data /= self.data.std(0)
        self.targets = torch.randn(N, dtype=torch.float64)
        self.scale = torch.rand(D, dtype=torch.float64) + 0.5
        # Some outside of [0, 1], some in it.
        self.x = torch.tensor([1.3, 0.4, -0.2, 0.6, 0.9, 0.1], dtype=torch.float64)
        self.x.requires_grad_()
        self.buffers = [torch.empty(N, D, dtype=torch.float64), torch.empty(N, dtype=torch.float64)]
        self.frozen = nn.Parameter(self.scale.clone(), requires_grad=False)

    def model(self, x: Tensor, scale: Tensor, data: Tensor) -> Tensor:
        return (data @ (x * scale)).tanh() * (1 + x.square().mean())

    def z(self, x: Tensor) -> Tensor:
        """The output as a pure function of the parameters."""
        network = self.writes == "target network"
        return self.model(x, self.at().sigmoid() if network else self.scale, self.data)

    def at(self) -> Tensor:
        """The parameters at which the loss is evaluated."""
        x = self.x.detach().clone()
        return x.clamp(0, 1) if "clamp" in self.writes and "after" not in self.writes else x

    def closure(self) -> Tensor:
        self.x.grad = None
        self.before()
        scale, data, targets = self.scale, self.data, self.targets
        if self.writes in ("frozen", "target network"):
            scale = self.frozen
        if self.writes in ("inputs", "micro-batches"):
            data = self.buffers[0]
        if self.writes == "targets":
            targets = self.buffers[1]
        if self.writes == "micro-batches":
            loss = torch.zeros((), dtype=torch.float64)
            for rows in ([0, 1, 2], [3, 4]):
                data = self.buffers[0][: len(rows)].copy_(self.data[rows])
                targets = self.buffers[1][: len(rows)].copy_(self.targets[rows])
                part = F.mse_loss(self.model(self.x, scale, data), targets) * len(rows) / N
                part.backward()
                loss += part.detach()
            return loss
        if "checkpoint" in self.writes:
            z = checkpoint(self.model, self.x, scale, data, use_reentrant=False)
        else:
            z = self.model(self.x, scale, data)
        loss = F.mse_loss(z, targets)
        loss.backward()
        if "after" in self.writes:
            self.clamp()
        return loss

    def clamp(self) -> None:
        """Writes into the parameters."""
        if self.writes.startswith("clamp"):
            with torch.no_grad():
                self.x.clamp_(0, 1)
        if self.writes.startswith("data.clamp"):
            self.x.data.clamp_(0, 1)

    def before(self) -> None:
        """Writes, before the forward pass."""
        with torch.no_grad():
            if "after" not in self.writes:
                self.clamp()
            if self.writes == "frozen":
                self.frozen.copy_(self.scale)
            elif self.writes == "target network":
                self.frozen.copy_(self.x.sigmoid())
            elif self.writes == "normalized":
                self.data.sub_(self.data.mean(0)).div_(self.data.std(0))
            elif self.writes in ("inputs", "targets"):
                self.buffers[0].copy_(self.data)
                self.buffers[1].copy_(self.targets)


SAME = ["frozen", "normalized", "inputs", "targets", "micro-batches"]
MOVED = ["clamp", "data.clamp", "clamp after", "data.clamp after"]
CHECKPOINTED = [f"{name}, checkpoint" for name in MOVED]
WRITES = [*SAME, *MOVED, *CHECKPOINTED, "target network"]


def dense_hessian(problem: Problem, x: Tensor) -> Tensor:
    return jacrev(jacrev(lambda x: F.mse_loss(problem.z(x), problem.targets)))(x)


def dense_gauss_newton(problem: Problem, x: Tensor) -> Tensor:
    J = jacrev(problem.z)(x)
    return 2 / N * J.T @ J


def dense_fisher(problem: Problem, x: Tensor) -> Tensor:
    gradients = 2 * (problem.z(x) - problem.targets)[:, None] * jacrev(problem.z)(x)
    return gradients.T @ gradients / N


KINDS: dict[str, tuple[Callable[..., LinearOperator], Callable[[Problem, Tensor], Tensor]]] = {
    "hessian": (Hessian, dense_hessian),
    "gauss_newton": (GaussNewton, dense_gauss_newton),
    "fisher": (partial(Fisher, labels="empirical"), dense_fisher),
}


@pytest.mark.parametrize("writes", ["nothing", *WRITES])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_evaluated_point(kind: str, writes: str) -> None:
    make, dense = KINDS[kind]
    problem = Problem(writes)
    expected = dense(problem, problem.at())
    eye = torch.eye(D, dtype=torch.float64)
    with ClosureObjective(problem.closure, [problem.x]) as objective:
        position = objective.position.clone()
        evaluation = objective.evaluate(curvature=True)
        gradient, operator = evaluation.grad.clone(), make(evaluation)
        for _ in range(2):
            torch.testing.assert_close(operator @ eye, expected)
            torch.testing.assert_close(operator @ eye[1], expected[1])
            trial = objective.trial(evaluation.grad, -3.0)
            assert not torch.equal(trial.grad, gradient)
        torch.testing.assert_close(operator @ eye[2], expected[2])
        torch.testing.assert_close(evaluation.grad, gradient, rtol=0, atol=0)
        assert torch.equal(objective.position, position)
        # Evaluated again at another point: at once with copies, where that is known to be needed.
        objective.accept(evaluation.grad, -0.1)
        spent = objective.evaluations
        operator = make(objective.evaluate(curvature=True))
        assert objective.evaluations == spent + 1
        problem.x.data.copy_(objective.position)
        expected = dense(problem, problem.at())
        objective.trial(evaluation.grad, 1.0)
        torch.testing.assert_close(operator @ eye, expected)


@pytest.mark.parametrize("writes", ["nothing", "frozen", "clamp"])
def test_an_evaluation_more_is_made_once_where_it_is_needed(writes: str) -> None:
    problem = Problem(writes)
    objective = ClosureObjective(problem.closure, [problem.x])
    operator = Hessian(objective.evaluate(curvature=True))
    v = torch.ones(D, dtype=torch.float64)
    objective.trial(v)
    for _ in range(3):
        operator @ v
    assert objective.evaluations == (2 if writes == "nothing" else 3)


RULES: dict[str, Any] = {
    "damped": MarquardtDamping(),
    "trust": TrustRegion(),
    "armijo": Armijo(),
    "wolfe": StrongWolfe(),
}


def trained(writes: str, make: Callable[..., Any], steps: int = 4) -> Tensor:
    problem = Problem(writes)
    optimizer = make([problem.x])
    for _ in range(steps):
        optimizer.step(problem.closure)
    return problem.x.detach()


@pytest.mark.parametrize("writes", SAME)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_steps_are_those_without_writes(curvature: Any, rule: str, writes: str) -> None:
    make = partial(NewtonCG, curvature=curvature, globalization=RULES[rule], max_iter=3)
    expected = trained("nothing", make)
    # Ill-conditioned steps at the end repeat the rounding of sums over micro-batches.
    torch.testing.assert_close(trained(writes, make), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("when", ["clamp", "clamp after"])
def test_projections_are_the_same_however_they_are_written(
    when: str, curvature: Any, rule: str
) -> None:
    make = partial(NewtonCG, curvature=curvature, globalization=RULES[rule], max_iter=2)
    found = trained(when, make)
    torch.testing.assert_close(found, trained(f"data.{when}", make))
    if when == "clamp":
        torch.testing.assert_close(found, trained("clamp, checkpoint", make))


@pytest.mark.parametrize(
    ("make", "writes"),
    [
        *((make, writes) for make in (AdaHessian, Sophia) for writes in SAME),
        # Over micro-batches other labels are drawn.
        *((partial(Sophia, estimator="gnb"), writes) for writes in SAME[:-1]),
    ],
)
def test_optimizers_that_evaluate_once_see_no_difference(make: Any, writes: str) -> None:
    make = partial(make, lr=0.1)
    torch.testing.assert_close(trained(writes, make), trained("nothing", make))


@pytest.mark.parametrize("writes", ["clamp", "data.clamp", "frozen", "data.clamp, checkpoint"])
def test_curvature_closures_are_evaluated_where_the_closure_is(writes: str) -> None:
    problem = Problem(writes)

    def other() -> Tensor:
        scale = problem.frozen.data.copy_(problem.scale) if writes == "frozen" else problem.scale
        return F.mse_loss(problem.model(problem.x, scale, problem.data), problem.targets)

    objective = ClosureObjective(problem.closure, [problem.x], curvature_closure=other)
    evaluation = objective.evaluate(curvature=True)
    operator, expected = Hessian(evaluation), dense_hessian(problem, problem.at())
    for _ in range(2):
        torch.testing.assert_close(operator @ torch.eye(D, dtype=torch.float64), expected)
        objective.trial(evaluation.grad, -1.0)


def test_functions_may_write_into_what_they_hold() -> None:
    problem, plain = Problem("inputs"), Problem()

    def function(x: Tensor) -> Tensor:
        data = problem.buffers[0].copy_(problem.data)
        return F.mse_loss(problem.model(x, problem.scale, data), problem.targets)

    optimizer = NewtonCG([problem.x], curvature="hessian", max_iter=2)
    for _ in range(4):
        optimizer.step(FunctionalObjective(function, problem.x))
    expected = trained("nothing", partial(NewtonCG, curvature="hessian", max_iter=2))
    torch.testing.assert_close(problem.x.detach(), expected)
    assert plain.x.grad is None


class Writing(nn.Module):
    """A model that writes into a buffer and clamps its weight whenever it is called."""

    def __init__(self, writes: bool, clamps: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(4, 3, dtype=torch.float64)
        self.out = nn.Linear(3, 2, dtype=torch.float64)
        self.held = torch.zeros(20, 4, dtype=torch.float64)
        self.writes, self.clamps = writes, clamps

    def forward(self, x: Tensor) -> Tensor:
        if self.clamps:
            with torch.no_grad():
                self.layer.weight.clamp_(-0.4, 0.4)
        if self.writes:
            x = self.held[: len(x)].copy_(x)
        return self.out(self.layer(x).tanh())


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    return list(zip(x.split(4), (x[:, :2] * x[:, 2:]).split(4), strict=True))


@pytest.mark.parametrize("keep", [0, 2, 10])
@pytest.mark.parametrize(
    ("curvature", "preconditioner"),
    [
        *(("hessian", name) for name in (None, "nystrom")),
        *(("ggn", name) for name in (None, "nystrom", "martens", "kfac")),
    ],
)
def test_data_sets_with_kept_graphs(curvature: Any, preconditioner: Any, keep: int) -> None:
    def run(writes: bool) -> list[Tensor]:
        model = Writing(writes)
        optimizer = NewtonCG(
            model.parameters(), curvature=curvature, preconditioner=preconditioner, max_iter=2
        )
        for _ in range(3):
            optimizer.step(DatasetClosure(model, F.mse_loss, batches(), keep_graphs=keep))
        return [p.detach() for p in model.parameters()]

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keep", [0, 2, 10])
def test_projections_over_data_sets(keep: int) -> None:
    def run(keep: int) -> list[Tensor]:
        model = Writing(False, clamps=True)
        optimizer = NewtonCG(model.parameters(), curvature="hessian", max_iter=2)
        for _ in range(3):
            optimizer.step(DatasetClosure(model, F.mse_loss, batches(), keep_graphs=keep))
        return [p.detach() for p in model.parameters()]

    for a, b in zip(run(keep), run(0), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("retain", [True, False])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_diagnostics_of_several_batches(curvature: Any, retain: bool) -> None:
    found = []
    for writes in (True, False):
        problem = diagnostics.from_model(
            Writing(writes), F.mse_loss, batches(), curvature=curvature, retain=retain
        )
        found.append(diagnostics.eigenpairs(problem, 2).values)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_with_a_penalty(curvature: Any) -> None:
    def run(writes: bool) -> list[Tensor]:
        model, (x, y), held = Writing(False), batches()[0], torch.empty(4, 4, dtype=torch.float64)
        optimizer = Contractive(
            NewtonCG(model.parameters(), curvature=curvature, max_iter=2), model, weight=0.1
        )
        for _ in range(3):
            optimizer.step(lambda: F.mse_loss(model(held.copy_(x) if writes else x), y))
        return [p.detach() for p in model.parameters()]

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b)


def test_embeddings_with_a_largest_norm() -> None:
    """They scale rows of their weight in place, in each forward pass."""
    table = nn.Embedding(5, 3, max_norm=0.5, dtype=torch.float64)
    indices = torch.tensor([0, 1, 1, 4])
    objective = ClosureObjective(lambda: table(indices).exp().sum(), table.parameters())
    operator = Hessian(objective.evaluate(curvature=True))
    values = table.weight.detach().clone()
    counts = torch.tensor([1.0, 2.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    expected = (values.exp() * counts[:, None]).flatten()
    for _ in range(2):
        torch.testing.assert_close(operator @ torch.ones_like(expected), expected)
        objective.trial(torch.ones_like(expected))


def test_what_is_written_between_forward_and_backward_is_refused() -> None:
    """As PyTorch does; nothing here makes it right."""
    x = torch.ones(3, requires_grad=True)

    def closure() -> Tensor:
        y = x.exp()
        loss = y.sum()
        y.detach().zero_()
        loss.backward()
        return loss

    for make in (NewtonCG, AdaHessian):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            make([x]).step(closure)
