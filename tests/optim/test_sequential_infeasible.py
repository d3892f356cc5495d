"""`Constrained` around `LBFGS` and `BFGS` where constraints contradict each other, or seem to."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from tests.support.constrained_problems import CONSTRAINED_BY_NAME
from tests.support.constrained_runs import Run as AnyRun
from torch_secondorder import BFGS, LBFGS

F64 = torch.float64
each_kind = pytest.mark.parametrize("kind", [LBFGS, BFGS])


class Contradiction:
    """A random problem of `n` parameters whose constraints contradict each other.

    Args:
        kind: `"no root"` for `x'x + a = 0`; `"plane"` for one outside of a ball; `"balls"` that do
            not meet; `"slabs"` for half-spaces that do not meet.
        n: The number of parameters.
        seed: Of the numbers.
    """

    def __init__(self, kind: str, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=F64)

        d, a = draw(n), 0.1 + 2.9 * torch.rand((), generator=generator, dtype=F64)
        d, square, self.linear = d / d.norm(), draw(n, n), draw(n)
        self.square = square @ square.T + torch.eye(n, dtype=F64)
        self.start = draw(n)
        self.equalities = self.inequalities = None
        if kind == "no root":
            self.equalities = lambda x: x.square().sum() + a
        elif kind == "plane":
            self.equalities = lambda x: d @ x - 3 - a
            self.inequalities = lambda x: x.square().sum() - 1
        elif kind == "balls":
            self.inequalities = lambda x: torch.stack(
                [(x - 2 * d).square().sum() - 1, 3 * (x + (a + 1) * d).square().sum() - 1]
            )
        else:
            self.inequalities = lambda x: torch.stack([d @ x + a, a - 2 * d @ x])

    def function(self, x):
        """A convex quadratic function."""
        return x @ self.square @ x / 2 + self.linear @ x

    def squared_violation(self, x):
        """Half the sum of the squared violations."""
        total = x.new_zeros(())
        if self.equalities is not None:
            total = total + self.equalities(x).square().sum()
        if self.inequalities is not None:
            total = total + self.inequalities(x).clamp(min=0).square().sum()
        return total / 2

    def stationarity(self, x, bounds=None) -> float:
        """The slope of the squared violation, over it, times the length of the parameters."""
        x = x.detach().clone().requires_grad_()
        value = self.squared_violation(x)
        (slope,) = torch.autograd.grad(value, x)
        if bounds is not None:
            low, high = bounds
            held = (x <= low) & (slope > 0) | (x >= high) & (slope < 0)
            slope = torch.where(held, 0, slope)
        size = max(1.0, x.norm().item())
        return slope.norm().item() * size / (2 * value.item())


class Run(AnyRun):
    """A run on a problem."""

    def __init__(self, kind, problem, **more):
        parts = problem.equalities, problem.inequalities
        super().__init__(kind, problem.start, problem.function, *parts, **more)

    @property
    def restores(self):
        state = self.constrained._program.restoration
        return state is not None and state[2].item() > 0


KINDS = ["no root", "plane", "balls", "slabs"]


@each_kind
@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("max_iter", [200, 5])
def test_ends_at_the_least_violation(what, kind, max_iter) -> None:
    total = 0
    for n in range(1, 7):
        problem = Contradiction(what, n, seed=n)
        run = Run(kind, problem, max_iter=max_iter).converge()
        total += len(run.seen)
        assert run.status == "INFEASIBLE"
        assert problem.stationarity(run.x) <= 1.01e-6
        assert len(run.seen) <= 110
        info = run.constrained.info
        assert info.violation > 0.05
        assert info.multiplier > 10
    assert total < 6 * 75


@each_kind
@pytest.mark.parametrize("what", KINDS)
def test_multipliers_prove_the_contradiction(what, kind) -> None:
    problem = Contradiction(what, 4, seed=3)
    run = Run(kind, problem, max_iter=200).converge()
    values = [f(run.x) for f in (problem.equalities, problem.inequalities) if f is not None]
    values = torch.cat([v.reshape(-1) for v in values])
    y = torch.cat([v.reshape(-1) for v in run.constrained.multipliers.values()])
    rows = torch.stack([torch.autograd.grad(v, run.x, retain_graph=True)[0] for v in values])
    # Farkas: their combination of gradients is zero, that of the values is above zero.
    assert (y @ rows).norm() <= 1e-5 * (y.abs() @ values.abs())
    assert (y * values).sum() > 0.9 * (y.abs() * values.abs()).sum()
    if problem.inequalities is not None:
        assert (run.constrained.multipliers["inequalities"] >= 0).all()


@each_kind
@pytest.mark.parametrize("what", KINDS)
def test_bounds_hold(what, kind) -> None:
    for n in (1, 3, 5):
        problem, bounds = Contradiction(what, n, seed=n), (-1.0, 0.5)
        run = Run(kind, problem, max_iter=200, bounds=bounds).converge()
        assert run.status == "INFEASIBLE"
        assert problem.stationarity(run.x, bounds) <= 1.01e-6
        seen = torch.stack(run.seen)
        assert ((seen[1:] >= bounds[0]) & (seen[1:] <= bounds[1])).all()


@each_kind
@pytest.mark.parametrize("what", KINDS)
def test_another_step_stays(what, kind) -> None:
    problem = Contradiction(what, 4, seed=5)
    run = Run(kind, problem, max_iter=200).converge()
    before, count = run.x.detach().clone(), len(run.seen)
    run.constrained.step(run.closure)
    assert run.status == "INFEASIBLE"
    assert len(run.seen) == count + 1
    assert torch.equal(run.x, before)


@each_kind
@pytest.mark.parametrize("what", ["no root", "plane"])
def test_continues_bit_for_bit(what, kind) -> None:
    """Checkpoints before, in the middle of, and after the restoration change nothing."""
    problem = Contradiction(what, 4, seed=2)
    whole = Run(kind, problem, max_iter=3)
    parts = Run(kind, problem, max_iter=3)
    phases = set()
    for _ in range(30):
        whole.constrained.step(whole.closure)
        parts.constrained.step(parts.closure)
        assert torch.equal(whole.x, parts.x)
        assert whole.inner.info == parts.inner.info
        phases.add(whole.restores)
        if whole.status == "INFEASIBLE":
            break
        file = io.BytesIO()
        torch.save(copy.deepcopy(parts.constrained.state_dict()), file)
        file.seek(0)
        at, parts = parts.x, Run(kind, problem, max_iter=3)
        with torch.no_grad():
            parts.x.copy_(at)
        parts.constrained.load_state_dict(torch.load(file, weights_only=True))
    assert whole.status == "INFEASIBLE"
    assert phases == {True, False}


class Detour:
    """A feasible problem whose violation is to be lessened first: hs61's constraints, far away."""

    start = torch.full((3,), 10.0, dtype=F64)
    equalities = staticmethod(CONSTRAINED_BY_NAME["hs61"].equalities)
    inequalities = None
    function = staticmethod(CONSTRAINED_BY_NAME["hs61"].function)


@each_kind
def test_restoration_leads_back_to_feasible_points(kind) -> None:
    run = Run(kind, Detour, max_iter=4)
    run.constrained.step(run.closure)
    begin_restoration(run)
    run.inner.param_groups[0]["max_iter"] = 1
    while run.restores:
        run.constrained.step(run.closure)
    # It has ended early, for quadratic programs to go on.
    assert run.constrained.info.violation > 1e-6
    run.converge()
    assert not run.restores
    assert run.status.startswith("CONVERGED")
    assert run.constrained.info.violation < 1e-9


def begin_restoration(run) -> None:
    """Lets the next step begin in the middle of a restoration."""
    program = run.constrained._program
    length = torch.linalg.vector_norm(program.values).item()
    assert length > 1e-3
    program.restoration = torch.tensor([torch.inf, 0.0, length], dtype=F64)


@each_kind
def test_new_multipliers_end_a_restoration(kind) -> None:
    run = Run(kind, Contradiction("no root", 4, seed=2), max_iter=3)
    while not run.restores:
        run.constrained.step(run.closure)
    run.constrained.multipliers = {"equalities": 0.0}
    assert not run.restores
    assert run.converge().status == "INFEASIBLE"


@each_kind
def test_float32(kind) -> None:
    problem = Contradiction("no root", 3, seed=1)
    single = Contradiction("no root", 3, seed=1)
    single.start = problem.start.float()
    single.function = lambda x: problem.function(x.double())
    single.equalities = lambda x: problem.equalities(x.double()).float()
    run = Run(kind, single, max_iter=200).converge()
    assert run.status == "INFEASIBLE"
    assert problem.stationarity(run.x.double()) < 1e-4


@each_kind
def test_a_maximum_of_the_violation_is_no_contradiction(kind) -> None:
    problem = Contradiction("no root", 2, seed=0)
    problem.start = torch.zeros(2, dtype=F64)
    problem.equalities = lambda x: x.square().sum() - 1
    run = Run(kind, problem).converge()
    assert run.status.startswith("CONVERGED")
