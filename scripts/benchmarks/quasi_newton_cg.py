"""Evaluations of nonlinear conjugate gradients on test functions, compared with peers' and L-BFGS.

Counts depend on luck where a start is moved by a thousandth; ratios are means over several starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

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
BUDGET = 20_000
# Starts of each problem: its own, and others nearby.
STARTS, DISTANCE = 4, 1e-3
QUICK = ("rosenbrock", "wood", "beale")
BASE = "scipy CG"
DEFAULT = "shanno"


def with_scipy(
    minimize: Any, function: Function, start: Tensor, tolerance: float, budget: int
) -> Outcome:
    """Runs SciPy's CG, and counts the evaluations itself."""
    count = 0

    def value_and_gradient(x: Any) -> tuple[float, Any]:
        nonlocal count
        count += 1
        point = torch.from_numpy(x.copy()).to(start.device).requires_grad_()
        loss = function(point)
        loss.backward()
        assert point.grad is not None
        return loss.item(), point.grad.cpu().numpy()

    options = {"gtol": tolerance, "maxiter": budget}
    begin = start.cpu().numpy()
    result = minimize(value_and_gradient, begin, jac=True, method="CG", options=options)
    return Outcome(torch.from_numpy(result.x).to(start), count)


def with_torchmin(
    minimize: Any, function: Function, start: Tensor, tolerance: float, budget: int
) -> Outcome:
    """Runs pytorch-minimize's cg, and counts the evaluations itself."""
    count = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return function(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"gtol": tolerance}
        result = minimize(counted, start, method="cg", max_iter=budget, options=options)
    return Outcome(result.x.detach(), count)


def solvers(*, quick: bool) -> dict[str, Solver]:
    """All formulas, and the peers that are installed."""
    table: dict[str, Solver] = {}
    ours = load_ours("torch_secondorder.optim", "NonlinearCG")
    names = load_ours("torch_secondorder.optim.nonlinear_cg", "BetaName")
    if ours is not None:
        for beta in get_args(names)[: 2 if quick else None]:
            table[beta] = partial(with_closure, ours, beta=beta)
    lbfgs = load_ours("torch_secondorder", "LBFGS")
    if lbfgs is not None:
        table["LBFGS (ours)"] = partial(with_closure, lbfgs)
    optimize = load_peer("scipy.optimize", "scipy")
    if optimize is not None:
        table[BASE] = partial(with_scipy, optimize.minimize)
    torchmin = load_peer("torchmin", "pytorch-minimize")
    if torchmin is not None:
        table["torchmin cg"] = partial(with_torchmin, torchmin.minimize)
    return table


def _starts(problem: Problem, count: int) -> list[Problem]:
    generator = torch.Generator().manual_seed(0)
    starts = [problem]
    for _ in range(count - 1):
        noise = torch.randn(2, problem.size, dtype=torch.float64, generator=generator)
        relative, absolute = noise.to(problem.start) * DISTANCE
        moved = problem.start * (1 + relative) + DISTANCE * absolute
        starts.append(replace(problem, start=moved))
    return starts


def _solve(problem: Problem, solver: Solver, budget: int) -> tuple[int, bool]:
    """The number of evaluations, and whether the gradient is within the tolerance."""
    outcome = solver(problem.function, problem.start, TOLERANCE, budget)
    point = outcome.point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.function(point), point)
    return outcome.evaluations, bool(gradient.abs().max() <= TOLERANCE)


Runs = dict[str, dict[str, list[tuple[int, bool]]]]


def _ratio(results: Runs, name: str, base: str) -> tuple[int, float]:
    """The number of problems that both solve from some start, and the mean of the ratios there."""
    means = []
    for runs in results.values():
        pairs = zip(runs[name], runs[base], strict=True)
        ratios = [a[0] / b[0] for a, b in pairs if a[1] and b[1]]
        if ratios:
            means.append(geometric_mean(ratios))
    return len(means), geometric_mean(means) if means else float("nan")


def _summary(results: Runs, names: Sequence[str], report: Report) -> None:
    base = BASE if BASE in names else next(iter(names))
    shown = Table(
        f"Evaluations over those of {base}: geometric means over problems and starts",
        ["solver", "both solve", "ratio", "solved from the usual starts", "fails there"],
    )
    recorded: dict[str, dict[str, Any]] = {}
    for name in names:
        count, mean = _ratio(results, name, base)
        failed = [problem for problem, runs in results.items() if not runs[name][0][1]]
        solved = len(results) - len(failed)
        recorded[name] = {"problems": count, "ratio": mean, "unsolved": failed, "solved": solved}
        if DEFAULT in names:
            recorded[name][f"{DEFAULT} over"] = _ratio(results, DEFAULT, name)[1]
        shown.add(
            name, count, number(mean), f"{solved} of {len(results)}", ", ".join(failed) or "-"
        )
    report.show(shown)
    report.record("quasi_newton.nonlinear_cg.over", {"base": base, "ratios": recorded})


def run(options: Options, report: Report) -> None:
    """Runs every solver from every start, once, because counts do not vary."""
    if options.device.type != "cpu":
        say("skipped: quasi_newton nonlinear_cg, which only counts work, on the CPU")
        return
    table = options.chosen(solvers(quick=options.quick))
    problems = [
        problem
        for problem in load_problems(options.device)
        if not options.quick or problem.name in QUICK
    ]
    starts, budget = (1, 500) if options.quick else (STARTS, BUDGET)
    results: Runs = {}
    with threads(1):
        for problem in progress(problems, "test functions"):
            several = _starts(problem, starts)
            if problem.name == "ill_conditioned_quadratic":
                several = several[:1]
            results[problem.name] = {
                name: [_solve(p, solver, budget) for p in several] for name, solver in table.items()
            }
    shown = Table(
        f"Nonlinear CG to |g|_inf <= {TOLERANCE:g}, float64: evaluations from the usual start",
        ["problem", *table],
    )
    for problem_name, runs in results.items():
        firsts = [runs[name][0] for name in table]
        shown.add(problem_name, *(f"{n}" if solved else f"{n} FAILS" for n, solved in firsts))
    report.show(shown)
    report.record("quasi_newton.nonlinear_cg.evaluations", results)
    _summary(results, list(table), report)
