"""Evaluations and time of L-BFGS implementations on classical test functions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .harness import Timing, alternate, geometric_mean, load_support, progress, say, threads
from .registry import Options
from .report import Report, Table, number, seconds
from .solvers import Outcome, Solver, solvers

if TYPE_CHECKING:
    from tests.support.problems import Problem

TOLERANCE = 1e-6
# The report lists runs with more than STRICT evaluations; they end at BUDGET.
STRICT, BUDGET = 3_000, 20_000


@dataclass(frozen=True)
class Row:
    """The result of one solver on one problem; the time is None if it failed."""

    evaluations: int
    gradient: float
    value: float
    is_known_minimum: bool
    timing: Timing | None

    @property
    def solved(self) -> bool:
        """True if the final gradient, computed separately, is within the tolerance."""
        return self.gradient <= TOLERANCE

    def as_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        fields = {**vars(self), "solved": self.solved}
        return {**fields, "timing": self.timing.as_dict() if self.timing else None}


Results = dict[str, dict[str, Row]]


def _evaluation(problem: Problem) -> None:
    """One evaluation with its gradient: the cost of a solver without overhead."""
    point = problem.start.clone().requires_grad_()
    problem.function(point).backward()


def load_problems(device: torch.device) -> tuple[Problem, ...]:
    """The problems of the tests."""
    table: tuple[Problem, ...] = load_support("problems").make_problems(device)
    return table


def _judge(problem: Problem, outcome: Outcome, timing: Timing | None) -> Row:
    point = outcome.point.clone().requires_grad_()
    loss = problem.function(point)
    (gradient,) = torch.autograd.grad(loss, point)
    norm, value = gradient.abs().max().item(), loss.item()
    norm = norm if norm == norm else float("inf")
    return Row(outcome.evaluations, norm, value, problem.is_minimum(value), timing)


def _measure(problem: Problem, table: dict[str, Solver], options: Options) -> dict[str, Row]:
    """Runs every solver once to count evaluations, then times those that solved the problem."""
    budget = STRICT if options.quick else BUDGET
    rows, calls = {}, {}
    for name, solver in table.items():
        call = partial(solver, problem.function, problem.start, TOLERANCE, budget)
        rows[name] = _judge(problem, call(), None)
        if rows[name].solved:
            calls[name] = call
    timings = alternate(calls, options.repeat, options.device)
    return {
        name: Row(row.evaluations, row.gradient, row.value, row.is_known_minimum, timings.get(name))
        for name, row in rows.items()
    }


def _ratios(results: Results, name: str, base: str) -> dict[str, Any]:
    """Geometric means of `name` over `base`, for problems that both solved."""
    pairs = [(rows[name], rows[base]) for rows in results.values()]
    timed = [(a, b, a.timing, b.timing) for a, b in pairs if a.timing and b.timing]
    evaluations = [a.evaluations / b.evaluations for a, b, _, _ in timed]
    times = [mine.median / theirs.median for _, _, mine, theirs in timed]
    rounds = [
        [mine.samples[i] / theirs.samples[i] for _, _, mine, theirs in timed]
        for i in range(len(timed[0][2].samples) if timed else 0)
    ]
    by_round = [geometric_mean(values) for values in rounds]
    return {
        "problems": len(timed),
        "evaluations": geometric_mean(evaluations),
        "time": geometric_mean(times),
        "time_min": min(by_round, default=float("nan")),
        "time_max": max(by_round, default=float("nan")),
    }


def _show_rows(
    results: Results, evaluations: dict[str, float], names: list[str], report: Report
) -> None:
    title = f"L-BFGS to |g|_inf <= {TOLERANCE:g}, float64: evaluations and time"
    table = Table(title, ["problem", "one evaluation", *names])
    for problem, rows in results.items():
        cells = []
        for row in rows.values():
            mark = "" if row.is_known_minimum else " *"
            if row.timing is not None:
                cells.append(f"{row.evaluations} {seconds(row.timing.median):>8}{mark}")
            else:
                cells.append(f"{row.evaluations} FAILS |g| {row.gradient:.1e}{mark}")
        table.add(problem, seconds(evaluations[problem]), *cells)
    report.show(table)
    say("* the final value is not that of a known minimum")


def _show_summary(results: Results, names: list[str], report: Report) -> None:
    base, *others = names
    header = ["compared", "both solved", "evaluations", "time", "[by round]"]
    table = Table(f"Geometric means of {base} over each", header)
    summary = {}
    for other in others:
        means = summary[other] = _ratios(results, base, other)
        spread = f"[{number(means['time_min'])} {number(means['time_max'])}]"
        cells = (number(means["evaluations"]), number(means["time"]), spread)
        table.add(f"{base} / {other}", means["problems"], *cells)
    report.show(table)
    failures = {}
    for name in names:
        failed = [problem for problem, rows in results.items() if not rows[name].solved]
        slow = [p for p, rows in results.items() if rows[name].evaluations > STRICT]
        failures[name] = {"unsolved": failed, f"over {STRICT} evaluations": slow}
        say(f"{name} solves {len(results) - len(failed)} of {len(results)}", end="")
        say(f"; fails: {', '.join(failed) or 'none'}", end="")
        say(f"; over {STRICT} evaluations: {', '.join(slow) or 'none'}")
    report.record("lbfgs.problems.ratios", {"base": base, "over": summary})
    report.record("lbfgs.problems.failures", failures)
    solved = {name: len(results) - len(found["unsolved"]) for name, found in failures.items()}
    report.record("lbfgs.problems.solved", solved | {"problems": len(results)})


def _recorded(results: Results) -> dict[str, Any]:
    return {
        problem: {name: row.as_dict() for name, row in rows.items()}
        for problem, rows in results.items()
    }


def run(options: Options, report: Report) -> None:
    """Runs every solver on every problem, with one CPU thread because the vectors are short."""
    table = solvers()
    with threads(1):
        problems = load_problems(options.device)
        calls = {problem.name: partial(_evaluation, problem) for problem in problems}
        timings = alternate(calls, options.repeat, options.device, min_seconds=0.01)
        results: Results = {}
        for problem in progress(problems, "test functions"):
            results[problem.name] = _measure(problem, table, options)
            # After each problem, so that a run that is stopped keeps what it has measured.
            report.record("lbfgs.problems", _recorded(results))
    evaluations = {name: timing.median for name, timing in timings.items()}
    _show_rows(results, evaluations, list(table), report)
    _show_summary(results, list(table), report)
    report.record("lbfgs.problems.one_evaluation", evaluations)
