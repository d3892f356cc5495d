"""Time of L-BFGS implementations beside the function, on functions of 2 to 200 variables."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torch_secondorder

from .harness import alternate, geometric_mean, load_peer, progress, say, threads
from .lbfgs_problems import TOLERANCE, load_problems
from .registry import Options
from .report import Report, Table, number, seconds
from .solvers import Function, Outcome, Solver, with_closure, with_scipy

if TYPE_CHECKING:
    from tests.support.problems import Problem

BUDGET = 1_000
# How much longer than SciPy's the time beside the function may be.
BAR = 1.5
_OURS, _BASE = "ours", "scipy m=10"


def _of_function(function: Function, start: Tensor, tolerance: float, budget: int) -> Outcome:
    """Runs our L-BFGS on a `FunctionalObjective`."""
    point = start.clone().requires_grad_()
    optimizer = torch_secondorder.LBFGS(
        [point], max_iter=budget, max_eval=budget, tolerance_grad=tolerance, tolerance_change=0.0
    )
    optimizer.step(torch_secondorder.FunctionalObjective(function, point))
    assert optimizer.info is not None
    return Outcome(point.detach(), optimizer.info.evaluations)


def _in_a_loop(function: Function, start: Tensor, tolerance: float, budget: int) -> Outcome:
    """Runs our L-BFGS in a loop of steps with one iteration each, which each evaluate the start.

    There are at most a hundred steps.
    """
    point = start.clone().requires_grad_()
    optimizer = torch_secondorder.LBFGS(
        [point], max_iter=1, tolerance_grad=tolerance, tolerance_change=0.0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = function(point)
        loss.backward()
        return loss

    evaluations = 0
    for _ in range(min(budget, 100)):
        optimizer.step(closure)
        assert optimizer.info is not None
        evaluations += optimizer.info.evaluations
        if optimizer.info.status.name == "CONVERGED_GRADIENT":
            break
    return Outcome(point.detach(), evaluations)


def _contenders() -> dict[str, Solver]:
    torch_wolfe = partial(with_closure, torch.optim.LBFGS, line_search_fn="strong_wolfe")
    table: dict[str, Solver] = {
        _OURS: partial(with_closure, torch_secondorder.LBFGS),
        "ours, function": _of_function,
        "ours, max_iter=1": _in_a_loop,
        "torch": torch_wolfe,
    }
    optimize = load_peer("scipy.optimize", "scipy")
    if optimize is not None:
        table[_BASE] = partial(with_scipy, optimize.minimize, memory=10)
    return table


def _evaluation(function: Function, point: Tensor) -> None:
    point.grad = None
    function(point).backward()


class _Calls(TorchDispatchMode):
    """Counts the calls of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def _calls(run: Callable[[], object]) -> int:
    with _Calls() as calls:
        run()
    return sum(calls.counts.values())


def _clock(options: Options) -> Callable[[], float]:
    """On a CPU its own time: differences of small times do not survive other processes."""
    return time.process_time if options.device.type == "cpu" else time.perf_counter


def _measure(problem: Problem, options: Options) -> dict[str, dict[str, float]]:
    """The time an evaluation takes beside the function, by contender."""
    budget = 100 if options.quick else BUDGET
    calls: dict[str, Callable[[], Outcome]] = {
        name: partial(solver, problem.function, problem.start, TOLERANCE, budget)
        for name, solver in _contenders().items()
    }
    evaluations = {name: call().evaluations for name, call in calls.items()}
    one = partial(_evaluation, problem.function, problem.start.clone().requires_grad_())
    timings = alternate(
        {"one": one, **calls}, options.repeat, options.device, clock=_clock(options)
    )
    alone = timings["one"].median
    of_one = _calls(one)
    return {
        name: {
            "n": problem.size,
            "evaluations": count,
            "function": alone,
            "total": timings[name].median,
            "beside": timings[name].median / count - alone,
            "tensor calls": _calls(calls[name]) / count - of_one,
        }
        for name, count in evaluations.items()
    }


def _price_of_a_call(options: Options) -> float:
    """Seconds for a small inner product, about what any operation on a short vector takes."""
    a = torch.ones(10, dtype=torch.float64, device=options.device)
    timings = alternate({"dot": partial(torch.dot, a, a)}, options.repeat, clock=_clock(options))
    return timings["dot"].median


def run(options: Options, report: Report) -> None:
    """Measures each function, with one CPU thread."""
    with threads(1):
        problems = load_problems(options.device)
        problems = problems[:2] if options.quick else problems
        results = {
            problem.name: _measure(problem, options) for problem in progress(problems, "overhead")
        }
        price = _price_of_a_call(options)
    names = list(next(iter(results.values())))
    table = Table("Time beside the function for each evaluation", ["problem", "n", *names])
    for problem, found in results.items():
        n = int(found[_OURS]["n"])
        table.add(problem, n, *(seconds(found[name]["beside"]) for name in names))
    report.show(table)
    header = ["medians", "beside", f"over {_BASE}", "total (mean)", "tensor calls", "floor"]
    summary = Table(f"Over {len(results)} functions; a tensor call takes {seconds(price)}", header)
    medians = {}
    for name in names:
        rows = [(found[name], found.get(_BASE)) for found in results.values()]
        beside = statistics.median(row["beside"] for row, _ in rows)
        calls = statistics.median(row["tensor calls"] for row, _ in rows)
        ratios = [row["beside"] / base["beside"] for row, base in rows if base]
        totals = [row["total"] / base["total"] for row, base in rows if base]
        medians[name] = {
            "beside": beside,
            "over SciPy's": statistics.median(ratios) if ratios else None,
            "total over SciPy's": geometric_mean(totals) if totals else None,
            "tensor calls": calls,
            "floor": calls * price,
        }
        of_base = (number(statistics.median(ratios)), number(geometric_mean(totals)))
        cells = of_base if ratios else ("", "")
        summary.add(name, seconds(beside), *cells, number(calls), seconds(calls * price))
    report.show(summary)
    say(
        "beside: total time / evaluations - one evaluation in a loop of its own; on a CPU it is "
        f"CPU time. total: geometric mean of the ratios to {_BASE}. floor: tensor calls times the "
        f"time of one. The bar is {BAR:g} of SciPy's time beside the function"
    )
    report.record("lbfgs.overhead", results)
    report.record("lbfgs.overhead.medians", medians)
