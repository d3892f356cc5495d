"""Optimizers on problems with bounds, beside SciPy's L-BFGS-B and a habit of torch users.

The habit is to clamp the parameters after each step of `torch.optim.LBFGS`. What counts is the
number of evaluations until the projected gradient is small, and whether it ever is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_secondorder import BFGS, LBFGS, Newton

from .harness import alternate, geometric_mean, load_peer, load_support, progress, say, threads
from .registry import Options
from .report import Report, Table, number

if TYPE_CHECKING:
    from tests.support.bounded_problems import BoundedProblem

# SciPy gets to TOLERANCE within the rounding of the loss on all problems; a run counts as solved
# up to ACCEPTED.
TOLERANCE, ACCEPTED = 1e-8, 1e-6
BUDGET = 20_000
HISTORY = 10
QUICK = ("hs2", "hs45", "obstacle")
BASE = "scipy L-BFGS-B"
OURS = "LBFGS (ours)"


@dataclass(frozen=True)
class Run:
    """The cost of a run, and where it ended.

    Attributes:
        evaluations: Evaluations of the function with its gradient.
        residual: The largest entry of the projected gradient, computed separately.
        distance: From the known solution, relative to one or its size; None if there is none.
        value: The function.
        is_minimum: Whether the value is that of a known minimum.
        time: Seconds; None if not solved, or not taken.
    """

    evaluations: int
    residual: float
    distance: float | None
    value: float
    is_minimum: bool
    time: float | None = None

    @property
    def solved(self) -> bool:
        """True if the conditions of first order hold."""
        return self.residual <= ACCEPTED


Solver = Callable[["BoundedProblem"], tuple[Tensor, int]]


def load_problems(device: torch.device) -> tuple[BoundedProblem, ...]:
    """The problems of the tests."""
    module = load_support("bounded_problems")
    table: tuple[BoundedProblem, ...] = module.make_bounded_problems(device)
    return table


def ours(make: Callable[..., Any], problem: BoundedProblem) -> tuple[Tensor, int]:
    """Runs an optimizer of this package in one step."""
    x = problem.start.clone().requires_grad_()
    optimizer = make(
        [x],
        bounds=(problem.low, problem.high),
        max_iter=BUDGET,
        max_eval=BUDGET,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.function(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return x.detach(), optimizer.info.evaluations


def with_scipy(minimize: Any, problem: BoundedProblem) -> tuple[Tensor, int]:
    """Runs SciPy's L-BFGS-B with as many pairs, and no test of the function's decrease."""
    count = 0

    def value_and_gradient(point: Any) -> tuple[float, Any]:
        nonlocal count
        count += 1
        x = torch.from_numpy(point.copy()).requires_grad_()
        value = problem.function(x)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    result = minimize(
        value_and_gradient,
        problem.start.cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(problem.low.tolist(), problem.high.tolist(), strict=True)),
        options={
            "ftol": 0.0,
            "gtol": TOLERANCE,
            "maxcor": HISTORY,
            "maxiter": BUDGET,
            "maxfun": BUDGET,
        },
    )
    return torch.from_numpy(result.x), count


def clamped(problem: BoundedProblem) -> tuple[Tensor, int]:
    """Clamps the parameters after each step of torch's L-BFGS, until nothing changes."""
    x = problem.feasible_start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=20,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    count = 0

    def closure() -> Tensor:
        nonlocal count
        count += 1
        optimizer.zero_grad()
        loss = problem.function(x)
        loss.backward()
        return loss

    while count < BUDGET // 20:
        before = x.detach().clone()
        optimizer.step(closure)
        with torch.no_grad():
            x.clamp_(problem.low, problem.high)
        if not x.isfinite().all() or torch.equal(x, before):
            break
    return x.detach(), count


def solvers() -> dict[str, Solver]:
    """All solvers by name, SciPy's first."""
    optimize = load_peer("scipy.optimize", "scipy")
    table: dict[str, Solver] = {}
    if optimize is not None:
        table[BASE] = partial(with_scipy, optimize.minimize)
    table[OURS] = partial(ours, partial(LBFGS, history_size=HISTORY))
    table["BFGS (ours)"] = partial(ours, BFGS)
    table["Newton (ours)"] = partial(ours, Newton)
    table["torch.optim.LBFGS, clamped"] = clamped
    return table


def _judged(problem: BoundedProblem, solver: Solver) -> Run:
    x, evaluations = solver(problem)
    x = x.to(problem.start)
    value = problem.function(x).item()
    residual = problem.projected_gradient(x).abs().max().item()
    distance = None
    if problem.solution is not None:
        size = problem.solution.abs().clamp(min=1.0)
        distance = ((x - problem.solution).abs() / size).max().item()
    return Run(
        evaluations,
        residual if residual == residual else float("inf"),
        distance,
        value,
        problem.is_minimum(value),
    )


def _timed(
    problem: BoundedProblem, table: dict[str, Solver], runs: dict[str, Run], options: Options
) -> dict[str, Run]:
    calls: dict[str, Callable[[], object]] = {
        name: partial(table[name], problem) for name, found in runs.items() if found.solved
    }
    timings = alternate(calls, options.repeat, options.device, min_seconds=0.0)
    return {
        name: replace(found, time=timings[name].median if name in timings else None)
        for name, found in runs.items()
    }


def run(options: Options, report: Report) -> None:
    """Runs every solver on every problem."""
    table = options.chosen(solvers())
    with threads(1):
        problems = [
            problem
            for problem in load_problems(torch.device("cpu"))
            if not options.quick or problem.name in QUICK
        ]
        results: dict[str, dict[str, Run]] = {}
        for problem in progress(problems, "bounded problems"):
            judged = {name: _judged(problem, solver) for name, solver in table.items()}
            rows = results[problem.name] = _timed(problem, table, judged, options)
            # At once, so that a run that is stopped keeps what it has measured.
            recorded = {name: {**vars(r), "solved": r.solved} for name, r in rows.items()}
            report.record(f"bounds.{problem.name}", recorded)
    shown = Table(
        f"Bounds: evaluations to a projected gradient of {TOLERANCE:g}, float64",
        ["problem", "variables", *table],
    )
    for problem in problems:
        cells = [
            f"{r.evaluations}{'' if r.is_minimum else ' *'}"
            if r.solved
            else f"{r.evaluations} FAILS {r.residual:.0e}"
            for r in results[problem.name].values()
        ]
        shown.add(problem.name, problem.size, *cells)
    report.show(shown)
    say("* the final value is not that of a known minimum")
    _show_means(results, list(table), report)


def _show_means(results: dict[str, dict[str, Run]], names: list[str], report: Report) -> None:
    base = names[0]
    table = Table(f"Evaluations over those of {base}", ["solver", "solved", "geometric mean"])
    means = {}
    for name in names:
        solved = [rows for rows in results.values() if rows[name].solved]
        ratios = [r[name].evaluations / r[base].evaluations for r in solved if r[base].solved]
        means[name] = geometric_mean(ratios)
        table.add(name, f"{len(solved)} of {len(results)}", number(means[name]))
    report.show(table)
    report.record("bounds.ratios", {"base": base, "over": means})
