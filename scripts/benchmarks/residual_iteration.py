"""The time of an iteration of Levenberg-Marquardt, and what of it is neither of its three parts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from torch_secondorder import Newton

from .harness import alternate, load_ours, load_peer, progress
from .registry import Options
from .report import Report, Table, number, seconds
from .residual_cases import Case, convection, curve, poisson
from .residual_jacobian import by_samples, evaluator, flat_residuals

# Parameters up to which the others, which need dense matrices, take part.
MOST = 300
# No run ends early.
ENDLESS = {"tolerance_grad": 0.0, "tolerance_change": 0.0}


def _cases(device: torch.device, quick: bool) -> list[tuple[Case, int]]:
    """Networks, each with a number of iterations."""
    if quick:
        return [(curve(device, 100), 5), (poisson(device, 60, 20), 3)]
    return [(curve(device, 100), 10), (poisson(device), 10), (convection(device), 3)]


def _ours(
    make: Any, case: Case, start: Tensor, iterations: int
) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A run of an optimizer from its start, where what it learns about the graph is kept.

    Returns:
        The run, and its first part: going back to the start.
    """
    optimizer = make(case.params, max_iter=iterations, **ENDLESS)
    state = copy.deepcopy(optimizer.state_dict())

    def restart() -> None:
        vector_to_parameters(start.clone(), case.params)
        optimizer.load_state_dict(copy.deepcopy(state))

    def run() -> Any:
        restart()
        optimizer.step(case.closure)
        return optimizer.info

    return run, restart


def _scipy(least_squares: Any, case: Case, start: Tensor, iterations: int) -> Any:
    """SciPy's trust region, with the Jacobian by `vmap(jacrev)`."""

    def values(x: Any) -> Any:
        vector_to_parameters(torch.from_numpy(x).to(case.params[0]), case.params)
        return flat_residuals(case).detach().cpu().numpy()

    def jacobian(x: Any) -> Any:
        return by_samples(case).cpu().numpy()

    endless = {"ftol": None, "xtol": None, "gtol": 1e-15, "max_nfev": iterations}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return least_squares(values, start.cpu().numpy(), jac=jacobian, method="trf", **endless)


def _parts(case: Case, solver: str) -> dict[str, Callable[[], Any]]:
    """An evaluation with its graph, the Jacobian with the first solution, and another one."""
    jacobian_class = load_ours("torch_secondorder.curvature", "ResidualJacobian")
    system_class = load_ours("torch_secondorder.solvers.damped_least_squares", "DampedLeastSquares")
    assert jacobian_class is not None and system_class is not None
    evaluate = evaluator(case.closure, case.params)
    evaluation = evaluate()

    def system() -> Any:
        made = system_class.of(jacobian_class(evaluation), evaluation.grad, solver)
        made.solve(1e-3)
        return made

    made = system()
    return {
        "evaluation": evaluate,
        "Jacobian and system": system,
        "solution again": lambda: made.solve(1e-3),
    }


def _measure(case: Case, iterations: int, options: Options) -> dict[str, Any] | None:
    make = load_ours("torch_secondorder", "LevenbergMarquardt")
    optimize = load_peer("scipy.optimize", "scipy")
    if make is None:
        return None
    start = parameters_to_vector(case.params).detach().clone()
    ours, restart = _ours(make, case, start, iterations)
    ours()
    info = ours()
    vector_to_parameters(start.clone(), case.params)
    calls: dict[str, Callable[[], object]] = {
        "gradient": case.gradient,
        "ours": ours,
        "restart": restart,
        # On a copy, as the graph of an evaluation belongs to its parameters.
        **_parts(replace(case, model=copy.deepcopy(case.model)), info.solver),
    }
    counts = {"ours": info.jacobians}
    if case.size <= MOST:
        newton, _ = _ours(Newton, case, start, 2)
        calls["Newton"] = newton
        counts["Newton"] = newton().iterations
    if optimize is not None and case.size <= MOST:
        calls["scipy trf"] = partial(_scipy, optimize.least_squares, case, start, iterations)
        counts["scipy trf"] = calls["scipy trf"]().njev  # type: ignore[attr-defined]
    timings = alternate(calls, options.repeat, options.device, min_seconds=0.01)
    each = {name: timings[name].median / counts.get(name, 1) for name in calls}
    each["ours"] -= each.pop("restart") / info.jacobians
    evaluations, rejected = (n / info.jacobians for n in (info.evaluations, info.rejected))
    known = each["Jacobian and system"] + evaluations * each["evaluation"]
    known += rejected * each["solution again"]
    return {
        "seconds": each,
        "evaluations per iteration": evaluations,
        "rejected per iteration": rejected,
        "rest": each["ours"] - known,
        "solver": info.solver,
        "jacobian": info.jacobian,
    }


def run_iteration(options: Options, report: Report) -> None:
    """Times iterations of each case beside those of other methods."""
    columns = ["gradient", "evaluation", "Jacobian and system", "solution again"]
    columns += ["ours", "Newton", "scipy trf"]
    table = Table(
        "One iteration; the rest is ours without evaluations, Jacobian, systems and solutions",
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
