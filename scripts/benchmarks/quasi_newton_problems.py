"""Evaluations of dense quasi-Newton methods on classical test functions, beside peers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .harness import geometric_mean, load_ours, load_peer, progress, say, threads
from .lbfgs_problems import load_problems
from .registry import Options
from .report import Report, Table, number
from .solvers import Function, Outcome, Solver, with_closure

if TYPE_CHECKING:
    from tests.support.problems import Problem

TOLERANCE = 1e-6
BUDGET = 3_000
BASE = "LBFGS"
DEFAULT = "BFGS, bfgs"


@dataclass(frozen=True)
class Row:
    """The result of one solver on one problem.

    Attributes:
        evaluations: Evaluations of the function with its gradient.
        gradient: The largest entry of the gradient at the end.
        value: The value at the end.
        is_known_minimum: Whether it is that of a known minimum.
    """

    evaluations: int
    gradient: float
    value: float
    is_known_minimum: bool

    @property
    def solved(self) -> bool:
        """True if the gradient is within the tolerance."""
        return self.gradient <= TOLERANCE


def with_scipy(
    minimize: Any, function: Function, start: Tensor, tolerance: float, budget: int
) -> Outcome:
    """Runs SciPy's BFGS on the same function, with exact gradients."""
    count = 0

    def value_and_gradient(x: Any) -> tuple[float, Any]:
        nonlocal count
        count += 1
        point = torch.from_numpy(x).to(start.device).requires_grad_()
        loss = function(point)
        loss.backward()
        assert point.grad is not None
        return loss.item(), point.grad.cpu().numpy()

    limits = {"maxiter": budget, "gtol": tolerance}
    result = minimize(
        value_and_gradient, start.cpu().numpy(), jac=True, method="BFGS", options=limits
    )
    return Outcome(torch.from_numpy(result.x).to(start), count)


def with_torchmin(
    minimize: Any, function: Function, start: Tensor, tolerance: float, budget: int
) -> Outcome:
    """Runs pytorch-minimize's BFGS, which ends by small steps and slopes unless told not to."""
    options = {"gtol": tolerance, "xtol": 0.0, "gtd_tol": 0.0, "max_iter": budget}
    result = minimize(function, start.clone(), method="bfgs", options=options)
    return Outcome(result.x.detach(), int(result.nfev))


def with_optimistix(
    optimistix: Any, jax: Any, function: Function, start: Tensor, tolerance: float, budget: int
) -> Outcome:
    """Runs optimistix's BFGS, which calls the torch function from the compiled loop.

    It ends by the change of point and value, so the tolerance is that of these, squared for the
    value. Evaluations are counted at the gradient.
    """
    count = 0

    def host(x: Any, *, counted: bool) -> Any:
        nonlocal count
        count += counted
        point = torch.tensor(x.__array__(), dtype=torch.float64).requires_grad_()
        loss = function(point)
        (gradient,) = torch.autograd.grad(loss, point)
        return loss.detach().numpy(), gradient.numpy()

    shapes = (
        jax.ShapeDtypeStruct((), "float64"),
        jax.ShapeDtypeStruct(tuple(start.shape), "float64"),
    )

    @jax.custom_vjp
    def value(x: Any) -> Any:
        return jax.pure_callback(partial(host, counted=True), shapes, x)[0]

    def forward(x: Any) -> Any:
        return jax.pure_callback(partial(host, counted=True), shapes, x)

    def backward(gradient: Any, cotangent: Any) -> Any:
        return (cotangent * gradient,)

    value.defvjp(forward, backward)
    solver = optimistix.BFGS(rtol=tolerance, atol=tolerance**2)
    solution = optimistix.minimise(
        lambda y, _: value(y),
        solver,
        jax.numpy.asarray(start.cpu().numpy()),
        max_steps=budget,
        throw=False,
    )
    return Outcome(torch.tensor(solution.value.__array__()).to(start), count)


def solvers() -> dict[str, Solver]:
    """All installed solvers; the others are compared with L-BFGS."""
    table: dict[str, Solver] = {}
    lbfgs = load_ours("torch_secondorder", "LBFGS")
    if lbfgs is not None:
        table[BASE] = partial(with_closure, lbfgs)
    bfgs = load_ours("torch_secondorder", "BFGS")
    if bfgs is not None:
        for update in ("bfgs", "ssbfgs", "ssbroyden", "dfp"):
            table[f"BFGS, {update}"] = partial(with_closure, bfgs, update=update)
    optimize = load_peer("scipy.optimize", "scipy")
    if optimize is not None:
        table["SciPy BFGS"] = partial(with_scipy, optimize.minimize)
    torchmin = load_peer("torchmin", "pytorch-minimize")
    if torchmin is not None:
        table["pytorch-minimize bfgs"] = partial(with_torchmin, torchmin.minimize)
    optimistix, jax = load_peer("optimistix"), load_peer("jax")
    if optimistix is not None and jax is not None:
        jax.config.update("jax_enable_x64", True)
        table["optimistix BFGS"] = partial(with_optimistix, optimistix, jax)
    return table


def _judge(problem: Problem, solver: Solver) -> Row:
    try:
        outcome = solver(problem.function, problem.start, TOLERANCE, BUDGET)
    except (ArithmeticError, RuntimeError, ValueError):  # a peer that met a value it cannot bear
        return Row(BUDGET, float("inf"), float("nan"), False)
    point = outcome.point.clone().requires_grad_()
    loss = problem.function(point)
    (gradient,) = torch.autograd.grad(loss, point)
    norm = gradient.abs().max().item()
    norm = norm if norm == norm else float("inf")
    return Row(outcome.evaluations, norm, loss.item(), problem.is_minimum(loss.item()))


def _show(results: Mapping[str, Mapping[str, Row]], names: list[str], report: Report) -> None:
    title = f"To |g|_inf <= {TOLERANCE:g}, float64: evaluations"
    table = Table(title, ["problem", *names])
    for problem, rows in results.items():
        cells = [
            f"{rows[name].evaluations}{'' if rows[name].is_known_minimum else ' *'}"
            if rows[name].solved
            else f"FAILS |g| {rows[name].gradient:.0e}"
            for name in names
        ]
        table.add(problem, *cells)
    report.show(table)
    say("* the final value is not that of a known minimum")


def _summarize(results: Mapping[str, Mapping[str, Row]], names: list[str], report: Report) -> None:
    shown = Table(
        f"Evaluations over those of {BASE}, geometric mean of problems that both solved",
        ["solver", "solved", "evaluations"],
    )
    means = {}
    for name in names:
        pairs = [(rows[name], rows[BASE]) for rows in results.values()]
        both = [a.evaluations / b.evaluations for a, b in pairs if a.solved and b.solved]
        means[name] = geometric_mean(both)
        solved = sum(a.solved for a, _ in pairs)
        shown.add(name, f"{solved} of {len(pairs)}", number(means[name]))
        found = {"solved": solved, "ratio": means[name]}
        if DEFAULT in names:
            pairs = [(rows[DEFAULT], rows[name]) for rows in results.values()]
            both = [a.evaluations / b.evaluations for a, b in pairs if a.solved and b.solved]
            found["BFGS over"] = geometric_mean(both)
        report.record(f"quasi_newton.problems.ratios.{name}", found)
    report.show(shown)


def run_problems(options: Options, report: Report) -> None:
    """Runs every solver on every problem, with one CPU thread because the vectors are short."""
    table = solvers()
    chosen = {BASE: table[BASE]} | options.chosen(table)
    with threads(1):
        problems = load_problems(options.device)
        if options.quick:
            problems = problems[:4]
        results = {
            problem.name: {name: _judge(problem, solver) for name, solver in chosen.items()}
            for problem in progress(problems, "test functions")
        }
    _show(results, list(chosen), report)
    _summarize(results, list(chosen), report)
    recorded = {
        problem: {name: asdict(row) for name, row in rows.items()}
        for problem, rows in results.items()
    }
    report.record("quasi_newton.problems", recorded)
