"""Solvers of least squares on classical problems and on NIST's: evaluations, Jacobians, digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from .harness import alternate, geometric_mean, progress, say, threads
from .race import load_example
from .registry import Options
from .report import Report, Table, number
from .residual_problems import ResidualProblem, classical
from .residual_solvers import BUDGET, OPTIMISTIX, Outcome, Solver, solvers

BASE = "scipy lm"
# Correct digits at which a problem counts as solved.
SOLVED = 5.5
QUICK = ("rosenbrock", "kowalik_osborne", "Misra1a, start 1", "MGH17, start 2")


class _SpentError(RuntimeError):
    """Ends a solver that has used all its evaluations."""


@dataclass(frozen=True)
class Row:
    """The result of one solver on one problem.

    Attributes:
        evaluations: Evaluations of the residuals.
        jacobians: Jacobians.
        first: Evaluations up to the first point with the minimum's value to six digits; 0 for none.
        digits: Correct digits at the end, at most eleven.
        time: Seconds; None if not solved, or not taken.
    """

    evaluations: int
    jacobians: int
    first: int
    digits: float
    time: float | None = None

    @property
    def solved(self) -> bool:
        """True if the end is a known minimum."""
        return self.digits >= SOLVED

    def __str__(self) -> str:
        """Evaluations, Jacobians and digits, for a table."""
        mark = "" if self.solved else " FAILS"
        return f"{self.evaluations} {self.jacobians} {self.digits:.1f}{mark}"


def judge(problem: ResidualProblem, solver: Solver) -> Row:
    """Runs a solver once."""
    count = first = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal count, first
        count += 1
        if count > 2 * BUDGET:
            raise _SpentError("all evaluations are spent")
        r = problem.residuals(x)
        if not first and problem.reached(r.detach().square().sum().item()):
            first = count
        return r

    counted.plain = problem.residuals  # type: ignore[attr-defined]
    try:
        outcome: Outcome = solver(counted, problem.start)
    except (RuntimeError, ValueError, ArithmeticError, TypeError) as error:
        say(f"{problem.name}: {type(error).__name__}: {error!s:.80}")
        return Row(count, 0, 0, 0.0)
    return Row(count, outcome.jacobians, first, problem.digits(outcome.point.detach()))


def _timed(
    problem: ResidualProblem, rows: dict[str, Row], table: dict[str, Solver], options: Options
) -> dict[str, Row]:
    calls: dict[str, Callable[[], object]] = {
        name: partial(table[name], problem.residuals, problem.start)
        for name, row in rows.items()
        if row.solved and name != OPTIMISTIX
    }
    timings = alternate(calls, options.repeat, options.device, min_seconds=0.0)
    return {
        name: replace(row, time=timings[name].median if name in timings else None)
        for name, row in rows.items()
    }


def _compare(
    problems: Sequence[ResidualProblem], title: str, key: str, options: Options, report: Report
) -> None:
    table = options.chosen(solvers())
    if options.quick:
        problems = [p for p in problems if p.name in QUICK]
    results: dict[str, dict[str, Row]] = {}
    with threads(1):
        for problem in progress(problems, title):
            rows = {name: judge(problem, solver) for name, solver in table.items()}
            results[problem.name] = _timed(problem, rows, table, options)
            # After each problem, so that a run that is stopped keeps what it has measured.
            report.record(key, _recorded(results))
    shown = Table(f"{title}: evaluations, Jacobians, digits", ["problem", *table])
    for name, rows in results.items():
        shown.add(name, *map(str, rows.values()))
    report.show(shown)
    _summarize(results, list(table), title, key, report)


def _recorded(results: dict[str, dict[str, Row]]) -> dict[str, Any]:
    return {
        p: {n: {**asdict(row), "solved": row.solved} for n, row in rows.items()}
        for p, rows in results.items()
    }


def _summarize(
    results: dict[str, dict[str, Row]], names: list[str], title: str, key: str, report: Report
) -> None:
    base = BASE if BASE in names else names[0]
    table = Table(
        f"{title}: geometric means over {base}, where both solve",
        ["solver", "solved", "to six digits", "evaluations", "Jacobians", "time", "fewer digits"],
    )
    measures: dict[str, Callable[[Row], float]] = {
        "first": lambda row: row.first,
        "evaluations": lambda row: row.evaluations,
        "jacobians": lambda row: row.jacobians,
        "time": lambda row: row.time or 0.0,
    }
    for name in names:
        pairs = [(rows[name], rows[base]) for rows in results.values()]
        both = [(a, b) for a, b in pairs if a.solved and b.solved]
        solved = sum(a.solved for a, _ in pairs)
        means: dict[str, Any] = {
            measure: geometric_mean([of(a) / of(b) for a, b in both if of(a) and of(b)])
            for measure, of in measures.items()
        }
        # The eleventh digit is rounding.
        fewer = sum(a.digits < min(b.digits, 10.0) - 0.5 for a, b in pairs)
        cells = [number(value) for value in means.values()]
        table.add(name, f"{solved} of {len(pairs)}", *cells, fewer)
        counts = {"solved": solved, "fewer digits": fewer, "problems": len(pairs)}
        report.record(f"{key}.ratios.{name}", {**counts, **means})
    report.show(table)


def run_problems(options: Options, report: Report) -> None:
    """The classical problems, with one CPU thread because the vectors are short."""
    problems = classical(options.device)
    _compare(problems, "Classical residuals", "residuals.problems", options, report)


def nist(device: Any) -> list[ResidualProblem]:
    """NIST's problems from both of their starts."""
    example = load_example("_nist")
    if example is None:
        return []
    problems = []
    for problem in example.load_problems().values():
        for number_, start in enumerate(problem.starts, 1):
            problems.append(
                ResidualProblem(
                    f"{problem.name}, start {number_}",
                    problem.residuals,
                    start,
                    (problem.residual_sum_of_squares,),
                    problem.certified,
                )
            )
    return problems


def run_nist(options: Options, report: Report) -> None:
    """NIST's nonlinear regressions, against their certified values."""
    problems = nist(options.device)
    if problems:
        _compare(problems, "NIST's regressions", "residuals.nist", options, report)
