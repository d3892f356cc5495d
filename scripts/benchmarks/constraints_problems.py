"""Problems with equalities and inequalities: evaluations to a certified optimum.

Every point at which a solver evaluates the objective is judged by the same criteria, so that the
counts do not depend on when a solver stops by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .harness import geometric_mean, load_peer, load_support, progress, say, threads
from .registry import Options
from .report import Report, Table, number, seconds

if TYPE_CHECKING:
    from tests.support.constrained_problems import ConstrainedProblem

# The value relative to one or its size, the largest violation, the conditions of first order.
OPTIMUM, VIOLATION, KKT = 1e-6, 1e-8, 1e-6
BUDGET = 2_000
QUICK = ("hs6", "hs12", "hs71")
BASES = ("SLSQP", "SLSQP 1e-12")


class Exhausted(Exception):
    """All evaluations are spent."""


@dataclass
class Counted:
    """A problem that counts what a solver computes, and remembers where.

    Attributes:
        problem: The problem.
        points: The points at which the objective was evaluated.
        gradients: The number of gradients of the objective.
        hessians: The number of Hessians of the objective; each product is one.
    """

    problem: ConstrainedProblem
    points: list[Tensor] = field(default_factory=list)
    gradients: int = 0
    hessians: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """The objective.

        Raises:
            Exhausted: That was one evaluation too many.
        """
        if len(self.points) >= BUDGET:
            raise Exhausted
        self.points.append(x.detach().cpu().clone())
        return self.problem.function(x)

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of the objective."""
        self.gradients += 1
        point = x.detach().clone().requires_grad_()
        return torch.autograd.grad(self.problem.function(point), point)[0]


#: Solves the problem; the result is the point where it ends.
Solver = Callable[[Counted], Tensor]


@dataclass(frozen=True)
class Verdict:
    """The distances of a point from an optimum.

    Attributes:
        error: Of the value, relative to one or the known minimum's size.
        violation: The largest violation.
        kkt: The larger of the gradient of the Lagrangian, relative to one or the largest entry of
            the objective's gradient, and the products of inequalities and their multipliers, which
            are the best ones for this point.
    """

    error: float
    violation: float
    kkt: float

    @property
    def solved(self) -> bool:
        """True if the point is an optimum."""
        return abs(self.error) <= OPTIMUM and self.violation <= VIOLATION and self.kkt <= KKT


def kkt(problem: ConstrainedProblem, x: Tensor) -> float:
    """The smallest residual of the conditions of first order over all multipliers.

    A bounded least-squares problem in the multipliers: the rows are the gradient of the Lagrangian,
    and the products of inequalities and multipliers.
    """
    from scipy.optimize import lsq_linear

    point = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.function(point), point)
    scale = max(1.0, gradient.abs().max().item())
    h, g = problem.all_equalities(point), problem.all_inequalities(point)
    values = torch.cat([h, g])
    rows = [
        torch.autograd.grad(value, point, retain_graph=True, allow_unused=True)[0]
        for value in values.unbind()
    ]
    jacobian = torch.stack([torch.zeros_like(point) if r is None else r for r in rows])
    products = torch.diag(torch.cat([torch.zeros_like(h), g]).detach())[len(h) :]
    matrix = torch.cat([jacobian.T, products]) / scale
    right = torch.cat([-gradient, torch.zeros_like(g)]).detach() / scale
    low = torch.cat([torch.full_like(h, -math.inf), torch.zeros_like(g)]).detach()
    if not (matrix.isfinite().all() and right.isfinite().all()):
        return math.inf
    found = lsq_linear(
        matrix.numpy(), right.numpy(), (low.numpy(), math.inf), method="bvls", tol=1e-15
    )
    return float((matrix @ torch.from_numpy(found.x) - right).abs().max())


def judge(problem: ConstrainedProblem, x: Tensor) -> Verdict:
    """Judges a point."""
    with torch.no_grad():
        value = problem.function(x).item()
        h, g = problem.all_equalities(x), problem.all_inequalities(x)
    parts = torch.cat([h.abs(), g.clamp(min=0.0)])
    violation = parts.max().item() if x.isfinite().all() else math.inf
    error = (value - problem.minimum) / max(1.0, abs(problem.minimum))
    # The multipliers are only computed where the rest is right.
    wanted = abs(error) <= OPTIMUM and violation <= VIOLATION
    return Verdict(error, violation, kkt(problem, x) if wanted else math.inf)


@dataclass(frozen=True)
class Run:
    """The cost of a run, and where it ended.

    Attributes:
        evaluations: Evaluations of the objective until the solver stopped.
        gradients: Gradients of the objective.
        hessians: Hessians of the objective, or products with it.
        reached: Evaluations until the first optimum, None if there was none.
        end: The verdict on the point where the solver stopped.
        time: Seconds of the CPU.
    """

    evaluations: int
    gradients: int
    hessians: int
    reached: int | None
    end: Verdict
    time: float

    def as_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {**vars(self), "end": vars(self.end), "solved": self.end.solved}


def measure(problem: ConstrainedProblem, solver: Solver) -> Run:
    """Runs a solver on a problem."""
    counted = Counted(problem)
    start = time.process_time()
    try:
        point = solver(counted).detach().to("cpu", torch.float64)
    except Exhausted:
        point = counted.points[-1]
    except Exception as error:  # peers have exceptions of their own
        say(f"{problem.name}: {type(error).__name__}: {error!s:.100}")
        point = torch.full_like(problem.start, math.nan)
    spent = time.process_time() - start
    reached = next(
        (i for i, x in enumerate(counted.points, start=1) if judge(problem, x).solved), None
    )
    end = judge(problem, point)
    return Run(len(counted.points), counted.gradients, counted.hessians, reached, end, spent)


def load_problems() -> tuple[ConstrainedProblem, ...]:
    """The problems of the tests."""
    table: tuple[ConstrainedProblem, ...] = load_support(
        "constrained_problems"
    ).make_constrained_problems(torch.device("cpu"))
    return table


Results = dict[str, dict[str, Run]]


def run(options: Options, report: Report) -> None:
    """Runs every solver on every problem."""
    from .constraints_solvers import solvers

    if load_peer("scipy.optimize", "scipy") is None:
        return
    table = options.chosen(solvers())
    with threads(1):
        problems = [p for p in load_problems() if not options.quick or p.name in QUICK]
        results: Results = {}
        for problem in progress(problems, "constrained problems"):
            rows = {name: measure(problem, solver) for name, solver in table.items()}
            results[problem.name] = rows
            # At once, so that a run that is stopped keeps what it has measured.
            recorded = {name: found.as_dict() for name, found in rows.items()}
            report.record(f"constraints.problems.{problem.name}", recorded)
    _show_runs(results, list(table), report)
    _show_means(results, list(table), report)


def _cell(found: Run) -> str:
    """Evaluations to the optimum and in all; what is missing at the end."""
    text = f"{found.reached or '-'} {found.evaluations}"
    if found.end.solved:
        return text
    end = found.end
    if not abs(end.error) <= OPTIMUM:
        return f"{text} f {end.error:.0e}"
    return f"{text} c {end.violation:.0e}" if end.violation > VIOLATION else f"{text} k"


def _show_runs(results: Results, names: list[str], report: Report) -> None:
    title = (
        f"Evaluations to a value within {OPTIMUM:g}, violations within {VIOLATION:g} and "
        f"conditions of first order within {KKT:g}; evaluations in all, float64"
    )
    table = Table(title, ["problem", *names])
    for name, rows in results.items():
        table.add(name, *(_cell(found) for found in rows.values()))
    report.show(table)
    say(
        "f, c, k: the end misses the value by this, violates a constraint by this, misses the "
        "conditions of first order"
    )


@dataclass(frozen=True)
class Comparison:
    """Evaluations of a solver over those of another, on the problems that both solve."""

    both: int
    geometric_mean: float
    ratio_of_sums: float
    largest: float

    @property
    def cells(self) -> tuple[str, ...]:
        """The entries of the table."""
        means = number(self.geometric_mean), number(self.ratio_of_sums)
        return (str(self.both), *means, number(self.largest))


def compare(results: Results, name: str, base: str, of: Callable[[Run], int | None]) -> Comparison:
    """Compares the evaluations of two solvers."""
    pairs = [(of(rows[name]), of(rows[base])) for rows in results.values()]
    both = [(a, b) for a, b in pairs if a and b]
    ratios = [a / b for a, b in both]
    sums = [sum(column) for column in zip(*both, strict=True)] or [math.nan, 1]
    most = max(ratios, default=math.nan)
    return Comparison(len(both), geometric_mean(ratios), sums[0] / sums[1], most)


def _show_means(results: Results, names: list[str], report: Report) -> None:
    """Geometric means and sums of the evaluations over those of SLSQP."""
    counts: dict[str, Callable[[Run], int | None]] = {
        "to the optimum": lambda found: found.reached,
        "in all": lambda found: found.evaluations if found.end.solved else None,
    }
    header = ("both", "mean", "sums", "largest")
    summary: dict[str, Any] = {}
    for base in (base for base in BASES if base in names):
        table = Table(
            f"Evaluations over those of {base}, to the optimum | in all, where the end is one",
            ["solver", "reached", "solved", *header, "|", *header],
        )
        for name in names:
            rows = [result[name] for result in results.values()]
            reached = sum(found.reached is not None for found in rows)
            solved = sum(found.end.solved for found in rows)
            compared = {title: compare(results, name, base, of) for title, of in counts.items()}
            first, last = (entry.cells for entry in compared.values())
            table.add(name, reached, solved, *first, "|", *last)
            summary[f"{name} over {base}"] = {
                "problems": len(rows),
                "reached": reached,
                "solved": solved,
                **{title: vars(entry) for title, entry in compared.items()},
            }
        report.show(table)
    say("mean: geometric; sums: of all evaluations; both: problems that both solve")
    costs = Table(
        "Derivatives and time per evaluation",
        ["solver", "evaluations", "gradients", "Hessians", "time", "time in all"],
    )
    for name in names:
        runs = [rows[name] for rows in results.values()]
        n = sum(found.evaluations for found in runs)
        per = [sum(getattr(f, kind) for f in runs) / n for kind in ("gradients", "hessians")]
        total = sum(found.time for found in runs)
        costs.add(name, n, *(number(value) for value in per), seconds(total / n), seconds(total))
    report.show(costs)
    report.record("constraints.problems.ratios", summary)
