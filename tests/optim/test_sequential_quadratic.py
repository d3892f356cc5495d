"""`Constrained` around `LBFGS` and `BFGS`: sequential quadratic programming."""

from __future__ import annotations

import io
import math
from functools import cache

import pytest
import torch

from tests.support.constrained_problems import (
    CONSTRAINED_BY_NAME,
    CONSTRAINED_PROBLEMS,
    ConstrainedProblem,
)
from tests.support.constrained_runs import Run
from torch_secondorder import BFGS, LBFGS, Constrained, DatasetClosure, FunctionalObjective
from torch_secondorder.optim import bfgs, lbfgs

F64 = torch.float64
each_kind = pytest.mark.parametrize("kind", [LBFGS, BFGS])
each_problem = pytest.mark.parametrize("problem", CONSTRAINED_PROBLEMS, ids=lambda p: p.name)


def run_of(kind, problem: ConstrainedProblem, **more):
    """A run with bounds among the inequalities."""
    rows = len(problem.all_inequalities(problem.start))
    inequalities = problem.all_inequalities if rows else None
    return Run(kind, problem.start, problem.function, problem.equalities, inequalities, **more)


def squares(x):
    return (x - 2).square().sum()


def circle(x):
    return x.square().sum() - 1


# The problems of Hock and Schittkowski.


@cache
def solved(kind, name: str) -> Run:
    """The run of a problem with the defaults, made once."""
    return run_of(kind, CONSTRAINED_BY_NAME[name]).converge()


@each_kind
@each_problem
def test_solves(problem: ConstrainedProblem, kind) -> None:
    run = solved(kind, problem.name)
    assert run.status.startswith("CONVERGED")
    assert problem.is_minimum(problem.function(run.x).item(), 1e-6)
    assert problem.violation(run.x) < 1e-8
    y = run.multipliers("equalities"), run.multipliers("inequalities")
    assert problem.kkt_residual(run.x, *y) < 1e-6


@cache
def evaluations_of_slsqp(name: str) -> int:
    problem = CONSTRAINED_BY_NAME[name]
    optimize = pytest.importorskip("scipy.optimize")
    count = 0

    def value(x):
        nonlocal count
        count += 1
        return problem.function(torch.from_numpy(x)).item()

    def of(function):
        return lambda x: function(torch.from_numpy(x)).numpy()

    def minus(x):
        return -problem.inequalities(x)

    constraints = [
        {"type": kind, "fun": of(f), "jac": of(torch.func.jacrev(f))}
        for kind, f in (("eq", problem.equalities), ("ineq", problem.inequalities and minus))
        if f is not None
    ]
    bounds = None
    if problem.low is not None or problem.high is not None:
        infinite = torch.full_like(problem.start, math.inf)
        bounds = optimize.Bounds(
            (-infinite if problem.low is None else problem.low).numpy(),
            (infinite if problem.high is None else problem.high).numpy(),
        )
    optimize.minimize(
        value,
        problem.start.numpy(),
        jac=of(torch.func.grad(problem.function)),
        method="SLSQP",
        bounds=bounds,
        constraints=constraints,
        options={"ftol": 1e-6, "maxiter": 500},
    )
    return count


@each_kind
def test_evaluations_beside_slsqp(kind) -> None:
    """1.2 times as many for both; SLSQP's results are a few digits shorter, and hs61 it leaves."""
    names = [name for name in CONSTRAINED_BY_NAME if name != "hs61"]
    theirs = list(map(evaluations_of_slsqp, names))
    ours = [len(solved(kind, name).seen) for name in names]
    assert sum(ours) < 1.35 * sum(theirs)
    ratios = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    assert math.exp(sum(ratios) / len(ratios)) < 1.35


@each_kind
@pytest.mark.parametrize(
    "problem",
    [p for p in CONSTRAINED_PROBLEMS if p.low is not None or p.high is not None],
    ids=lambda p: p.name,
)
def test_bounds_of_the_optimizer(problem: ConstrainedProblem, kind) -> None:
    run = Run(
        kind,
        problem.start,
        problem.function,
        problem.equalities,
        problem.inequalities,
        bounds=(problem.low, problem.high),
    ).converge()
    assert run.status.startswith("CONVERGED")
    assert problem.is_minimum(problem.function(run.x).item(), 1e-6)
    assert problem.violation(run.x) < 1e-8
    seen = torch.stack(run.seen)
    assert problem.low is None or (seen >= problem.low).all()
    assert problem.high is None or (seen <= problem.high).all()
    assert run.inner.info.projected_grad_norm <= 1e-7


@pytest.mark.parametrize(
    "more",
    [
        {"line_search_fn": None},
        {"line_search_fn": "hager_zhang"},
        {"line_search_fn": "armijo"},
        {"update": "ssbfgs"},
        {"update": "ssbroyden"},
    ],
    ids=str,
)
@each_kind
def test_other_settings(kind, more) -> None:
    for name in ("hs7", "hs43", "hs77", "hs100"):
        problem = CONSTRAINED_BY_NAME[name]
        run = run_of(kind, problem, **more).converge()
        assert run.status.startswith("CONVERGED")
        assert problem.is_minimum(problem.function(run.x).item(), 1e-6)
        assert problem.violation(run.x) < 1e-8


# The step.


@each_kind
@pytest.mark.parametrize("name", ["hs12", "hs43", "hs78", "hs100", "hs113"])
def test_direction_solves_the_quadratic_program(kind, name) -> None:
    run = run_of(kind, CONSTRAINED_BY_NAME[name])
    checked = 0

    def observe(descent, iterate):
        def observed(descent):
            nonlocal checked
            inverse, owner = run.inner._inverse_hessian(), run.inner._sequential
            if inverse is None or owner.step is None:
                return iterate(descent)
            step, here, grad = owner.step, owner.here, descent.point.grad
            B = torch.linalg.inv(inverse.dense())
            active = ~owner.inequality | (step.multipliers > 0)
            rows, values = here.jacobian[active], here.values[active]
            k = len(rows)
            kkt = torch.cat((torch.cat((B, rows.T), 1), torch.cat((rows, rows.new_zeros(k, k)), 1)))
            solution = torch.linalg.solve(kkt, -torch.cat((grad, values)))
            d, y = solution[: len(grad)], solution[len(grad) :]
            scale = d.abs().max() + 1e-6
            torch.testing.assert_close(step.direction / scale, d / scale, atol=1e-5, rtol=0)
            bound = 1e-5 * (1.0 + y.abs().sum().item())
            torch.testing.assert_close(step.multipliers[active], y, atol=bound, rtol=0)
            line, size = owner.line(descent), step.residual.abs().max() + 1e-6
            torch.testing.assert_close(
                line.product / size, B @ line.direction / size, atol=1e-4, rtol=0
            )
            left_out = here.values[~active] + here.jacobian[~active] @ step.direction
            assert (left_out <= 1e-7).all()
            checked += 1
            return iterate(descent)

        return observed

    run.inner._observe = observe
    run.converge()
    assert checked >= 5


@each_kind
def test_continues_bit_for_bit(kind) -> None:
    """Three steps are two steps, a checkpoint, and one more."""
    problem = CONSTRAINED_BY_NAME["hs100"]
    whole, first = (run_of(kind, problem, max_iter=3) for _ in range(2))
    for _ in range(3):
        whole.constrained.step(whole.closure)
    for _ in range(2):
        first.constrained.step(first.closure)
    file = io.BytesIO()
    torch.save(first.constrained.state_dict(), file)
    file.seek(0)
    again = run_of(kind, problem, max_iter=3)
    with torch.no_grad():
        again.x.copy_(first.x)
    again.constrained.load_state_dict(torch.load(file, weights_only=True))
    again.constrained.step(again.closure)
    assert torch.equal(again.x, whole.x)
    for name, value in whole.constrained.multipliers.items():
        assert torch.equal(again.constrained.multipliers[name], value)
    assert again.inner.info == whole.inner.info


@each_kind
def test_short_steps_are_one_long_step(kind) -> None:
    problem = CONSTRAINED_BY_NAME["hs77"]
    long = run_of(kind, problem, max_iter=9, max_eval=1000)
    short = run_of(kind, problem, max_iter=3, max_eval=1000)
    long.constrained.step(long.closure)
    for _ in range(3):
        short.constrained.step(short.closure)
    assert torch.equal(long.x, short.x)
    assert len(short.seen) == len(long.seen) + 2  # each step evaluates where it starts


def test_report() -> None:
    run = Run(LBFGS, torch.tensor([3.0, 1.0], dtype=F64), squares, circle).converge()
    info = run.inner.info
    assert info.status.name == "CONVERGED_GRADIENT"
    assert info.loss == 2.0
    assert info.loss_after == pytest.approx(2 * (2 - math.sqrt(0.5)) ** 2)
    assert info.grad_norm <= 1e-7  # of the Lagrangian: the loss's own is 2.6
    assert run.constrained.info.violation < 1e-9
    assert run.multipliers("equalities").item() == pytest.approx(2 * math.sqrt(2) - 1)


def test_a_tolerance_of_violations() -> None:
    loose = Run(LBFGS, torch.tensor([3.0, 1.0], dtype=F64), squares, circle, tolerance=1e-2)
    loose.inner.param_groups[0]["tolerance_grad"] = 1e-1
    loose.converge()
    tight = Run(LBFGS, torch.tensor([3.0, 1.0], dtype=F64), squares, circle).converge()
    assert len(loose.seen) < len(tight.seen)
    assert loose.constrained.info.violation > tight.constrained.info.violation


# Constraints that are hard to keep.


@each_kind
@pytest.mark.parametrize(
    ("equalities", "inequalities"),
    [
        (lambda x: torch.stack([x[0] - 1, x[0] + 1]), None),
        (None, lambda x: torch.stack([x[0] - 1, 2 - x[0]])),
        (lambda x: x[:1].square() + 1, None),
        (None, lambda x: torch.stack([circle(x), circle(x - 3)])),
    ],
    ids=["equalities", "inequalities", "no root", "circles"],
)
def test_contradictions_are_reported(kind, equalities, inequalities) -> None:
    run = Run(kind, torch.tensor([3.0, 1.0], dtype=F64), squares, equalities, inequalities)
    run.converge()
    assert run.status == "INFEASIBLE"
    assert run.x.isfinite().all()
    assert run.constrained.info.violation > 0.4
    assert run.constrained.info.most_violated
    assert run.constrained.info.multiplier > 100  # those of a feasible problem are about one


@each_kind
def test_constraints_that_contradict_bounds(kind) -> None:
    start = torch.tensor([0.3, 0.1], dtype=F64)
    run = Run(kind, start, squares, lambda x: x.sum() - 5, bounds=(0.0, 1.0)).converge(30)
    assert run.status == "INFEASIBLE"
    assert run.x.tolist() == [1.0, 1.0]


@each_kind
def test_dependent_constraints(kind) -> None:
    def rows(x):
        return torch.stack([x.sum() - 1, 2 * x.sum() - 2, x[0] - x[1], x.sum() - 1])

    run = Run(kind, torch.tensor([3.0, 1.0], dtype=F64), squares, rows).converge()
    assert run.status.startswith("CONVERGED")
    torch.testing.assert_close(run.x.detach(), torch.full((2,), 0.5, dtype=F64))
    y = run.multipliers("equalities")
    assert (y[0] + 2 * y[1] + y[3]).item() == pytest.approx(3.0)
    assert y.abs().max() < 10


@each_kind
def test_a_gradient_of_zero_at_the_start(kind) -> None:
    run = Run(kind, torch.zeros(2, dtype=F64), squares, circle).converge()
    assert run.status.startswith("CONVERGED")
    torch.testing.assert_close(run.x.detach(), torch.full((2,), math.sqrt(0.5), dtype=F64))


@each_kind
def test_a_loss_without_a_gradient(kind) -> None:
    start = torch.tensor([3.0, 1.0], dtype=F64)
    run = Run(kind, start, lambda x: 0 * x.sum(), circle).converge()
    assert run.status.startswith("CONVERGED")
    assert abs(circle(run.x).item()) < 1e-9


@each_kind
def test_trials_that_are_not_finite(kind) -> None:
    def loss(x):
        return (x[0] - 2) ** 2 + x[1] ** 2 - torch.log(x[1])

    def root(x):
        return torch.sqrt(x[0]) - 1  # NaN for negative numbers

    start = torch.tensor([0.01, 3.0], dtype=F64)
    run = Run(kind, start, loss, inequalities=root, lr=1.0).converge()
    assert run.status.startswith("CONVERGED")
    torch.testing.assert_close(run.x.detach(), torch.tensor([1.0, math.sqrt(0.5)], dtype=F64))
    assert all(x.isfinite().all() for x in run.seen)


@each_kind
def test_a_constraint_that_is_nan_at_the_start(kind) -> None:
    start = torch.tensor([-1.0, 3.0], dtype=F64)
    run = Run(kind, start, squares, inequalities=lambda x: torch.sqrt(x[:1]) - 1)
    run.constrained.step(run.closure)
    assert run.status == "NONFINITE_START"
    assert torch.equal(run.x.detach(), start)


@each_kind
def test_a_loss_without_a_minimum(kind) -> None:
    start = torch.tensor([0.3, 0.1], dtype=F64)
    run = Run(kind, start, lambda x: x[0], lambda x: x[1] - x[0]).converge(60)
    assert run.status == "UNBOUNDED"


# Everything else that optimizers have.


@each_kind
def test_float32(kind) -> None:
    run = Run(kind, torch.tensor([3.0, 1.0]), squares, circle, tolerance_grad=1e-5).converge()
    assert run.status.startswith("CONVERGED")
    torch.testing.assert_close(run.x.detach(), torch.full((2,), math.sqrt(0.5)))


@each_kind
def test_maximize_and_weight_decay(kind) -> None:
    start = torch.tensor([0.3, 0.1], dtype=F64)
    run = Run(kind, start, torch.sum, inequalities=circle, maximize=True).converge()
    torch.testing.assert_close(run.x.detach(), torch.full((2,), math.sqrt(0.5), dtype=F64))
    assert run.multipliers("inequalities").item() == pytest.approx(math.sqrt(0.5))
    run = Run(kind, start, torch.sum, inequalities=circle, weight_decay=0.1).converge()
    torch.testing.assert_close(run.x.detach(), torch.full((2,), -math.sqrt(0.5), dtype=F64))
    assert run.multipliers("inequalities").item() == pytest.approx(math.sqrt(0.5) - 0.05)


@each_kind
def test_groups_and_frozen_parameters(kind) -> None:
    a, b, c = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (3.0, 1.0, 7.0))
    c.requires_grad_(False)
    inner = kind([{"params": [a, c], "lr": 0.25}, {"params": [b], "lr": 1.0}])
    optimizer = Constrained(inner, lambda: a**2 + b**2 - 1)

    def closure():
        optimizer.zero_grad()
        loss = (a - 2) ** 2 + (b - 2) ** 2 + c
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert inner.info.status.name.startswith("CONVERGED")
    assert (a.item(), b.item(), c.item()) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5), 7.0))


@each_kind
def test_functional_objective(kind) -> None:
    x = torch.tensor([3.0, 1.0], dtype=F64, requires_grad=True)
    inner = kind([x])
    optimizer = Constrained(inner, lambda tree: circle(tree["x"]))
    objective = FunctionalObjective(lambda tree: squares(tree["x"]), {"x": x})
    for _ in range(5):
        optimizer.step(objective)
    assert inner.info.status.name.startswith("CONVERGED")
    torch.testing.assert_close(x.detach(), torch.full((2,), math.sqrt(0.5), dtype=F64))


def test_many_constraints_and_parameters(device) -> None:
    """A least-squares fit that increases: 60 inequalities, given as one tensor."""
    generator = torch.Generator().manual_seed(0)
    target = torch.linspace(0, 1, 61) + 0.2 * torch.randn(61, generator=generator)
    target = target.to(device)
    x = torch.zeros(61, device=device, requires_grad=True)
    inner = LBFGS([x], tolerance_grad=1e-4)
    optimizer = Constrained(inner, inequalities=lambda: x[:-1] - x[1:])

    def closure():
        optimizer.zero_grad()
        loss = (x - target).square().sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert inner.info.status.name.startswith("CONVERGED")
    assert (x[:-1] - x[1:]).max() < 1e-5
    # The mean over each level is that of the target.
    y = optimizer.multipliers["inequalities"]
    assert (y >= 0).all()
    assert x.mean().item() == pytest.approx(target.mean().item(), abs=1e-4)


@each_kind
def test_sharded_parameters_are_refused(kind, monkeypatch) -> None:
    run = Run(kind, torch.ones(2, dtype=F64), squares, circle)
    monkeypatch.setattr(kind, "_sharded", True)
    with pytest.raises(ValueError, match="takes no constraints for sharded parameters"):
        run.inner._program = run.constrained._program
        run.inner._evaluate(None)
    assert not run.seen


@each_kind
def test_an_exception_leaves_no_constraints_behind(kind) -> None:
    run = Run(kind, torch.tensor([3.0, 1.0], dtype=F64), squares, circle, max_iter=2)
    run.constrained.step(run.closure)
    before = run.x.detach().clone()

    def failing():
        if len(run.seen) > seen:  # in the middle of a step
            raise RuntimeError("no data")
        return run.closure()

    seen = len(run.seen)
    with pytest.raises(RuntimeError, match="no data"):
        run.constrained.step(failing)
    assert torch.equal(run.x.detach(), before)
    y = run.multipliers("equalities").clone()
    run.inner.step(run.closure)
    assert torch.equal(run.multipliers("equalities"), y)
    for _ in range(20):  # alone, it minimizes the loss
        run.inner.step(run.closure)
    torch.testing.assert_close(run.x.detach(), torch.full((2,), 2.0, dtype=F64))


def test_a_data_set() -> None:
    """Constraints of the parameters are evaluated with each batch."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 5, generator=generator, dtype=F64)
    outputs = inputs @ torch.randn(5, 1, generator=generator, dtype=F64)
    model = torch.nn.Linear(5, 1, bias=False, dtype=F64)
    twin = torch.nn.Linear(5, 1, bias=False, dtype=F64)
    twin.load_state_dict(model.state_dict())
    loss = torch.nn.functional.mse_loss
    batches = list(zip(inputs.split(10), outputs.split(10), strict=True))
    by_batches = Constrained(LBFGS([model.weight]), lambda: circle(model.weight))
    at_once = Constrained(LBFGS([twin.weight]), lambda: circle(twin.weight))

    def closure():
        at_once.zero_grad()
        value = loss(twin(inputs), outputs)
        value.backward()
        return value

    for _ in range(3):
        by_batches.step(DatasetClosure(model, loss, batches))
        at_once.step(closure)
    assert at_once.info.inner.status.name.startswith("CONVERGED")
    assert abs(circle(model.weight).item()) < 1e-9
    torch.testing.assert_close(model.weight, twin.weight, atol=1e-6, rtol=0)


def test_only_these_optimizers_take_constraints() -> None:
    assert lbfgs.LBFGS._takes_constraints
    assert bfgs.BFGS._takes_constraints


@each_kind
def test_linearizations_that_contradict_are_left_behind(kind) -> None:
    # At the start no step keeps all three to first order, but one lessens what is violated much.
    def parabolas(x):
        second = torch.tensor([-1.72, -0.65, 1.04], dtype=F64)
        first = torch.tensor([1.26, -1.47, -0.10], dtype=F64)
        return 1e4 * (second * x**2 / 2 + first * x - torch.tensor([1.3, 0.3, 1.0], dtype=F64))

    def function(x):
        return (0.3 * x**4 - x**2 - 0.37 * x).sum()

    run = Run(kind, torch.tensor([13.6], dtype=F64), function, None, parabolas).converge(30)
    assert run.status == "CONVERGED_GRADIENT"
    assert run.constrained.info.violation == 0
