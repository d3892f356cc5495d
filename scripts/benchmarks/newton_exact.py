"""Newton's method with exact Hessians on the classical test functions, beside SciPy's and others.

All get exact derivatives and stop at the same gradient. What counts is the number of iterations:
each has a Hessian, or would have one. SciPy and pytorch-minimize count rejected trials as
iterations, Newton tries again within one.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_secondorder import Newton

from .harness import geometric_mean, load_peer, progress, say, threads
from .lbfgs_problems import load_problems
from .registry import Options
from .report import Report, Table, number

if TYPE_CHECKING:
    from tests.support.problems import Problem

TOLERANCE = 1e-6
BUDGET = 2000
QUICK = ("rosenbrock", "wood", "beale")
BASE = "scipy trust-exact"


@dataclass(frozen=True)
class Run:
    """The end of a solver, and its cost.

    Attributes:
        point: Where it ended.
        iterations: Iterations.
        evaluations: Evaluations of the function, with its gradient or without.
    """

    point: Tensor
    iterations: int
    evaluations: int


Solver = Callable[["Problem"], Run]


def ours(problem: Problem, **arguments: Any) -> Run:
    """Runs `Newton` in one step."""
    x = problem.start.clone().requires_grad_()
    optimizer = Newton(
        [x], max_iter=BUDGET, tolerance_grad=TOLERANCE, tolerance_change=0.0, **arguments
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.function(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.info is not None
    return Run(x.detach(), optimizer.info.iterations, optimizer.info.evaluations)


def with_scipy(minimize: Any, problem: Problem) -> Run:
    """Runs SciPy's trust-exact, with gradients and Hessians by torch.func."""
    gradient_and_value = torch.func.grad_and_value(problem.function)
    hessian = torch.func.hessian(problem.function)

    def value_and_gradient(x: Any) -> tuple[float, Any]:
        gradient, value = gradient_and_value(torch.from_numpy(x))
        return value.item(), gradient.numpy()

    def symmetric(x: Any) -> Any:
        found = hessian(torch.from_numpy(x))
        return (0.5 * (found + found.T)).numpy()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = minimize(
            value_and_gradient,
            problem.start.numpy(),
            jac=True,
            hess=symmetric,
            method="trust-exact",
            options={"gtol": TOLERANCE, "maxiter": BUDGET},
        )
    return Run(torch.from_numpy(result.x), result.nit, result.nfev)


def with_torchmin(minimize: Any, method: str, problem: Problem) -> Run:
    """Runs a method of pytorch-minimize; its Newton method looks at the step alone."""
    options = {"xtol": 1e-8} if method == "newton-exact" else {"gtol": TOLERANCE}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = minimize(
            problem.function, problem.start, method=method, max_iter=BUDGET, options=options
        )
    return Run(result.x, int(result.nit), int(result.nfev))


def solvers() -> dict[str, Solver]:
    """All that are installed."""
    table: dict[str, Solver] = {
        "Newton": ours,
        "no corrections": partial(ours, corrections=0),
        "damping": partial(ours, globalization="damping"),
        "line search": partial(ours, globalization="line_search"),
    }
    optimize = load_peer("scipy.optimize", "scipy")
    if optimize is not None:
        table[BASE] = partial(with_scipy, optimize.minimize)
    torchmin = load_peer("torchmin", "pytorch-minimize")
    if torchmin is not None:
        for method in ("newton-exact", "trust-exact"):
            table[f"torchmin {method}"] = partial(with_torchmin, torchmin.minimize, method)
    return table


def _judged(problem: Problem, solver: Solver) -> dict[str, Any]:
    """One run, and what it came to; the gradient is computed separately."""
    begin = time.perf_counter()
    try:
        run = solver(problem)
    except (RuntimeError, ValueError, ArithmeticError) as error:
        say(f"{problem.name}: {type(error).__name__}: {error!s:.80}")
        return {"iterations": 0, "evaluations": 0, "solved": False, "seconds": float("nan")}
    seconds = time.perf_counter() - begin
    x = run.point.clone().requires_grad_()
    value = problem.function(x)
    (gradient,) = torch.autograd.grad(value, x)
    return {
        "iterations": run.iterations,
        "evaluations": run.evaluations,
        "gradient": gradient.abs().max().item(),
        "is_known_minimum": problem.is_minimum(value.item()),
        "solved": gradient.abs().max().item() <= TOLERANCE,
        "seconds": seconds,
    }


def _cell(found: dict[str, Any]) -> str:
    if not found["solved"]:
        return "FAILS"
    mark = "" if found["is_known_minimum"] else " *"
    return f"{found['iterations']} / {found['evaluations']}{mark}"


def run(options: Options, report: Report) -> None:
    """Runs every solver `repeat` times in turns; counts do not vary, times are medians."""
    if options.device.type != "cpu":
        say("skipped: newton exact, which mainly counts iterations, on the CPU")
        return
    table = options.chosen(solvers())
    shown = Table(
        f"Exact Newton methods, float64, |g| <= {TOLERANCE:g}: iterations / evaluations",
        ["problem", "n", *table],
    )
    problems = load_problems(options.device)
    if options.quick:
        problems = tuple(p for p in problems if p.name in QUICK)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    with threads(1):
        for problem in progress(problems, "test functions"):
            runs = [
                {name: _judged(problem, solver) for name, solver in table.items()}
                for _ in range(1 if options.quick else options.repeat)
            ]
            found = {
                name: runs[0][name]
                | {"seconds": statistics.median(turn[name]["seconds"] for turn in runs)}
                for name in table
            }
            rows[problem.name] = found
            shown.add(problem.name, problem.size, *map(_cell, found.values()))
            report.record(f"newton.exact.{problem.name}", {"n": problem.size, **found})
    report.show(shown)
    say("* the final value is not that of a known minimum")
    _summarize(rows, tuple(table), report)


def _summarize(
    rows: dict[str, dict[str, dict[str, Any]]], names: tuple[str, ...], report: Report
) -> None:
    """Means over the functions, and ratios to SciPy's on all that SciPy ends on."""
    shown = Table(
        f"Over all functions; ratios to {BASE}, geometric means",
        ["solver", "solved", "iterations", "of the sums", "evaluations", "seconds"],
    )
    for name in names:
        mine = [row[name] for row in rows.values()]
        cells: dict[str, Any] = {"solved": sum(found["solved"] for found in mine)}
        base = [row[BASE] for row in rows.values()] if BASE in names else mine
        pairs = [
            (one, other)
            for one, other in zip(mine, base, strict=True)
            if one["solved"] and other["iterations"]
        ]
        for key in ("iterations", "evaluations", "seconds"):
            cells[key] = geometric_mean([one[key] / other[key] for one, other in pairs])
        sums = [sum(pair[side]["iterations"] for pair in pairs) for side in (0, 1)]
        cells["of the sums"] = sums[0] / sums[1] if sums[1] else float("nan")
        ratios = ("iterations", "of the sums", "evaluations", "seconds")
        shown.add(
            name, f"{cells['solved']} of {len(mine)}", *(number(cells[key]) for key in ratios)
        )
        report.record(f"newton.exact.ratios.{name}", cells)
    report.show(shown)
