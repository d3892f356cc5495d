"""The time of an iteration of Levenberg-Marquardt, and what of it is neither of its three parts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from torch_secondorder import ClosureObjective, Newton

from .harness import alternate, load_ours, load_peer, progress
from .registry import Options
from .report import Report, Table, number, seconds
from .residual_cases import Case, convection, curve, poisson
from .residual_jacobian import by_samples, flat_residuals

# Entries of a Hessian up to which Newton's method takes part.
MOST = 300
# No run ends early.
ENDLESS = {"tolerance_grad": 0.0, "tolerance_change": 0.0}


def _cases(device: torch.device, quick: bool) -> list[tuple[Case, int]]:
    """Networks, each with a number of iterations."""
    if quick:
        return [(curve(device, 100), 5), (poisson(device, 60, 20), 3)]
    return [(curve(device, 100), 10), (poisson(device), 10), (convection(device), 3)]


def _restarted(case: Case, start: Tensor, run: Callable[[], Any]) -> Any:
    vector_to_parameters(start.clone(), case.params)
    return run()


def _ours(make: Any, case: Case, iterations: int) -> Any:
    optimizer = make(case.params, max_iter=iterations, **ENDLESS)
    optimizer.step(case.closure)
    return optimizer.info


def _scipy(least_squares: Any, case: Case, iterations: int) -> Any:
    """SciPy's trust region, with the Jacobian by `vmap(jacrev)`."""

    def values(x: Any) -> Any:
        vector_to_parameters(torch.from_numpy(x).to(case.params[0]), case.params)
        return flat_residuals(case).detach().cpu().numpy()

    def jacobian(x: Any) -> Any:
        return by_samples(case).cpu().numpy()

    start = parameters_to_vector(case.params).detach().cpu().numpy()
    endless = {"ftol": None, "xtol": None, "gtol": 1e-15, "max_nfev": iterations}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return least_squares(values, start, jac=jacobian, method="trf", **endless)


def _parts(case: Case, solver: str) -> dict[str, Callable[[], Any]]:
    """An evaluation with its graph, the Jacobian from it, and the solution of a system."""
    jacobian_class = load_ours("torch_secondorder.curvature.residual_jacobian", "ResidualJacobian")
    system_class = load_ours("torch_secondorder.solvers.damped_least_squares", "DampedLeastSquares")
    assert jacobian_class is not None and system_class is not None
    objective = ClosureObjective(case.closure, case.params)

    def evaluate() -> Any:
        return objective.evaluate(curvature="jacobian")

    evaluation = evaluate()

    def solve() -> Any:
        return system_class.of(jacobian_class(evaluation), evaluation.grad, solver).solve(1e-3)

    return {"evaluation": evaluate, "Jacobian and system": solve}


def _measure(case: Case, iterations: int, options: Options) -> dict[str, Any] | None:
    make = load_ours("torch_secondorder", "LevenbergMarquardt")
    optimize = load_peer("scipy.optimize", "scipy")
    if make is None:
        return None
    start = parameters_to_vector(case.params).detach().clone()
    info = _restarted(case, start, lambda: _ours(make, case, iterations))
    vector_to_parameters(start.clone(), case.params)
    calls: dict[str, Callable[[], object]] = {
        "gradient": case.gradient,
        "ours": lambda: _restarted(case, start, lambda: _ours(make, case, iterations)),
        # On a copy, as the graph of an evaluation belongs to its parameters.
        **_parts(replace(case, model=copy.deepcopy(case.model)), info.solver),
    }
    counts = {"ours": info.jacobians}
    if case.size <= MOST:
        calls["Newton"] = lambda: _restarted(case, start, lambda: _ours(Newton, case, iterations))
        counts["Newton"] = _restarted(
            case, start, lambda: _ours(Newton, case, iterations)
        ).iterations
    if optimize is not None:
        function = optimize.least_squares
        found = _restarted(case, start, lambda: _scipy(function, case, iterations))
        calls["scipy trf"] = lambda: _restarted(
            case, start, lambda: _scipy(function, case, iterations)
        )
        counts["scipy trf"] = found.njev
    timings = alternate(calls, options.repeat, options.device)
    each = {name: timings[name].median / counts.get(name, 1) for name in calls}
    evaluations = info.evaluations / info.jacobians
    known = each["Jacobian and system"] + evaluations * each["evaluation"]
    return {
        "seconds": each,
        "evaluations per iteration": evaluations,
        "rest": each["ours"] - known,
        "solver": info.solver,
        "jacobian": info.jacobian,
    }


def run_iteration(options: Options, report: Report) -> None:
    """Times iterations of each case beside those of other methods."""
    columns = ["gradient", "evaluation", "Jacobian and system", "ours", "Newton", "scipy trf"]
    table = Table(
        "One iteration; the rest is ours without evaluations, Jacobian and system",
        ["network", "N x n", *columns, "rest", "of it"],
    )
    for case, iterations in progress(_cases(options.device, options.quick), "iterations"):
        found = _measure(case, iterations, options)
        if found is None:
            return
        times, rest = found["seconds"], found["rest"]
        cells = [seconds(times[name]) if name in times else "-" for name in columns]
        sizes = f"{case.rows:,} x {case.size:,}"
        share = number(rest / times["ours"], 2)
        table.add(case.name, sizes, *cells, f"{rest * 1e6:.0f} us", share)
        report.record(f"residuals.iteration.{case.name}", found)
    report.show(table)
