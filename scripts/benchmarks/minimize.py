"""The classical problems by `minimize`, beside SciPy's and pytorch-minimize's."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .harness import Timing, alternate, geometric_mean, load_peer, progress, say, threads
from .lbfgs_problems import load_problems
from .registry import Options, command
from .report import Report, Table, number, seconds
from .solvers import with_closure

if TYPE_CHECKING:
    from tests.support.problems import Problem

Function = Callable[[Tensor], Tensor]
#: Minimizes a function from a start, and returns the point.
Solver = Callable[[Function, Tensor], Tensor]

# The largest entry of the gradient, where that is exact.
TOLERANCE = 1e-6
# Most iterations, and most calls of the function; of differences a multiple.
BUDGET = 5_000
BASE = "scipy BFGS"
OURS = ("bfgs", "ssbroyden", "lbfgs", "cg", "newton", "newton-cg")
TWICE = ("newton", "newton-cg")
SCIPY = ("BFGS", "L-BFGS-B", "CG", "Newton-CG", "trust-exact")
TORCHMIN = ("bfgs", "l-bfgs", "cg", "newton-exact", "trust-exact")
#: Its times are those of its compiler, so they are not taken.
OPTIMISTIX = "optimistix BFGS"
CHANGE = 1e-9
QUICK = ("rosenbrock", "beale")


@dataclass(frozen=True)
class Row:
    """The result of one solver on one problem.

    Attributes:
        evaluations: Calls of the function, for values or values with gradients.
        gradient: The largest entry of the exact gradient at the end.
        value: The value at the end.
        is_known_minimum: Whether it is that of a known minimum.
        solved: Whether the solver has reached its aim.
        time: Seconds; None if not solved.
    """

    evaluations: int
    gradient: float
    value: float
    is_known_minimum: bool
    solved: bool
    time: float | None = None


def ours(method: str, jac: str | None, function: Function, start: Tensor) -> Tensor:
    """The methods of this library, by name."""
    from torch_secondorder import minimize

    options: dict[str, Any] = {"maxiter": BUDGET}
    if jac is None:
        options |= {"gtol": TOLERANCE, "ftol": 0.0}
    point: Tensor = minimize(function, start, method, jac=jac, options=options).x  # type: ignore[arg-type]
    return point


def with_scipy(
    minimize: Any, method: str, jac: str | None, function: Function, start: Tensor
) -> Tensor:
    """SciPy on the same function, with exact derivatives by torch or with its differences."""
    options: dict[str, Any] = {"maxiter": BUDGET}

    def value(x: Any) -> float:
        return function(torch.from_numpy(x).to(start.device)).item()

    def value_and_gradient(x: Any) -> tuple[float, Any]:
        point = torch.from_numpy(x).to(start.device).requires_grad_()
        loss = function(point)
        (gradient,) = torch.autograd.grad(loss, point)
        return loss.item(), gradient.cpu().numpy()

    def hessian(x: Any) -> Any:
        point = torch.from_numpy(x).to(start.device)
        plain = getattr(function, "plain", function)  # a Hessian is no call of the function
        return torch.autograd.functional.hessian(plain, point).cpu().numpy()

    if jac is not None:
        result = minimize(value, start.cpu().numpy(), jac=jac, method=method, options=options)
        return torch.from_numpy(result.x).to(start)
    further: dict[str, Any] = {}
    if method == "L-BFGS-B":
        options |= {"gtol": TOLERANCE, "ftol": 0.0, "maxfun": BUDGET}
    elif method == "Newton-CG":
        options["xtol"] = TOLERANCE
        further["hess"] = hessian
    else:
        options["gtol"] = TOLERANCE
        if method == "trust-exact":
            further["hess"] = hessian
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = minimize(
            value_and_gradient,
            start.cpu().numpy(),
            jac=True,
            method=method,
            options=options,
            **further,
        )
    return torch.from_numpy(result.x).to(start)


def with_torchmin(minimize: Any, method: str, function: Function, start: Tensor) -> Tensor:
    """pytorch-minimize, which stops at the gradient alone as well."""
    options: dict[str, Any] = {"gtol": TOLERANCE}
    if method in ("bfgs", "l-bfgs"):
        options |= {"xtol": 0.0, "gtd_tol": 0.0}
    elif method == "newton-exact":  # it looks at the step alone
        options = {"xtol": 1e-8}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = minimize(function, start, method=method, max_iter=BUDGET, options=options)
    point: Tensor = result.x
    return point


def with_optimistix(
    optimistix: Any, jax: Any, numpy: Any, function: Function, start: Tensor
) -> Tensor:
    """BFGS of optimistix; it calls torch for value and gradient, and stops at small changes."""
    jax.config.update("jax_enable_x64", True)

    def value_and_gradient(x: Any) -> tuple[Any, Any]:
        point = torch.from_numpy(numpy.array(x)).to(start.device).requires_grad_()
        loss = function(point)
        (gradient,) = torch.autograd.grad(loss, point)
        return numpy.asarray(loss.item()), gradient.cpu().numpy()

    def called(x: Any) -> tuple[Any, Any]:
        shapes = (jax.ShapeDtypeStruct((), x.dtype), jax.ShapeDtypeStruct(x.shape, x.dtype))
        found: tuple[Any, Any] = jax.pure_callback(value_and_gradient, shapes, x)
        return found

    @jax.custom_jvp  # type: ignore[untyped-decorator]
    def value(x: Any) -> Any:
        return called(x)[0]

    @value.defjvp  # type: ignore[untyped-decorator]
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        found, gradient = called(*primals)
        return found, jax.numpy.vdot(gradient, *tangents)

    solver = optimistix.BFGS(rtol=CHANGE, atol=CHANGE)
    first = jax.numpy.array(start.cpu().numpy())
    result = optimistix.minimise(
        lambda y, _: value(y), solver, first, max_steps=BUDGET, throw=False
    )
    return torch.from_numpy(numpy.array(result.value)).to(start)


def with_torch(function: Function, start: Tensor) -> Tensor:
    """Runs torch's L-BFGS with its line search, in one step."""
    made = with_closure(
        torch.optim.LBFGS, function, start, TOLERANCE, BUDGET, line_search_fn="strong_wolfe"
    )
    return made.point


def solvers(jac: str | None) -> dict[str, Solver]:
    """All installed solvers that can work with such gradients."""
    from torch_secondorder.minimization._methods import METHODS

    names = [name for name in OURS if name in METHODS and (jac is None or name not in TWICE)]
    table: dict[str, Solver] = {name: partial(ours, name, jac) for name in names}
    if jac is None:
        table["torch.optim.LBFGS"] = with_torch
    optimize = load_peer("scipy.optimize", "scipy")
    if optimize is not None:
        for name in SCIPY if jac is None else SCIPY[:3]:
            table[f"scipy {name}"] = partial(with_scipy, optimize.minimize, name, jac)
    torchmin = load_peer("torchmin", "pytorch-minimize") if jac is None else None
    if torchmin is not None:
        for name in TORCHMIN:
            table[f"torchmin {name}"] = partial(with_torchmin, torchmin.minimize, name)
    optimistix = load_peer("optimistix") if jac is None else None
    if optimistix is not None:
        jax, numpy = (importlib.import_module(name) for name in ("jax", "numpy"))
        table[OPTIMISTIX] = partial(with_optimistix, optimistix, jax, numpy)
    return table


def _run(problem: Problem, solver: Solver, exact: bool) -> Row:
    """Runs a solver once and judges it by the exact gradient.

    With estimated gradients solvers have their own tolerances, and the value tells who is there.
    """
    count = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count > (BUDGET if exact else 20 * BUDGET):
            raise RuntimeError("all calls of the function are spent")
        return problem.function(x)

    counted.plain = problem.function  # type: ignore[attr-defined]
    try:
        point = solver(counted, problem.start).detach().clone().requires_grad_()
    except (RuntimeError, ValueError, ArithmeticError, TypeError) as error:
        say(f"{problem.name}: {type(error).__name__}: {error!s:.80}")
        return Row(count, float("inf"), float("nan"), False, False)
    loss = problem.function(point)
    (gradient,) = torch.autograd.grad(loss, point)
    norm, value = gradient.abs().max().item(), loss.item()
    known = problem.is_minimum(value)
    return Row(count, norm, value, known, norm <= TOLERANCE if exact else known)


def _compare(options: Options, report: Report, jac: str | None) -> None:
    """Every solver on every problem, with the exact gradient or differences."""
    title = "exact gradients" if jac is None else f"{jac} gradients"
    table = solvers(jac)
    problems = load_problems(options.device)
    if options.quick:
        problems = tuple(p for p in problems if p.name in QUICK)
    results: dict[str, dict[str, Row]] = {}
    with threads(1):
        for problem in progress(problems, title):
            rows = {name: _run(problem, solver, jac is None) for name, solver in table.items()}
            calls = {
                name: partial(table[name], problem.function, problem.start)
                for name, row in rows.items()
                if row.solved and name != OPTIMISTIX
            }
            timings = alternate(calls, options.repeat, options.device, min_seconds=0.0)
            results[problem.name] = {
                name: Row(**{**asdict(row), "time": _median(timings.get(name))})
                for name, row in rows.items()
            }
            # After each problem, so that a run that is stopped keeps what it has measured.
            report.record(f"minimize.{jac or 'exact'}", _recorded(results))
    aim = f"|g|_inf <= {TOLERANCE:g}" if jac is None else "a known minimum"
    shown = Table(f"minimize, {title}, to {aim}: calls of the function", ["problem", *table])
    for name, rows in results.items():
        cells = [str(r.evaluations) + ("" if r.solved else " FAILS") for r in rows.values()]
        shown.add(name, *cells)
    report.show(shown)
    _summarize(results, list(table), title, f"minimize.{jac or 'exact'}", report)


def _recorded(results: dict[str, dict[str, Row]]) -> dict[str, Any]:
    return {p: {name: asdict(row) for name, row in rows.items()} for p, rows in results.items()}


def _median(timing: Timing | None) -> float | None:
    return None if timing is None else timing.median


def _summarize(
    results: dict[str, dict[str, Row]], names: list[str], title: str, key: str, report: Report
) -> None:
    base = BASE if BASE in names else names[0]
    table = Table(
        f"minimize, {title}: geometric means over {base}, where both solve",
        ["solver", "solved", "evaluations", "time", "time in all"],
    )
    for name in names:
        pairs = [(rows[name], rows[base]) for rows in results.values()]
        both = [(a, b) for a, b in pairs if a.solved and b.solved]
        count = sum(rows[name].solved for rows in results.values())
        evaluations = geometric_mean([a.evaluations / b.evaluations for a, b in both])
        times = geometric_mean([a.time / b.time for a, b in both if a.time and b.time])
        total = sum(rows[name].time or 0.0 for rows in results.values())
        cells = (f"{count} of {len(results)}", number(evaluations), number(times), seconds(total))
        table.add(name, *cells)
        made = {"solved": count, "evaluations": evaluations, "time": times, "time in all": total}
        report.record(f"{key}.ratios.{name}", made)
    report.show(table)


def _call(options: Options, report: Report) -> None:
    """The time of a whole call on tiny problems, and of one evaluation by itself."""

    def rosenbrock(x: Tensor) -> Tensor:
        a, b = x.unbind()
        return 100.0 * (b - a * a).square() + (1.0 - a).square()

    def quadratic(x: Tensor) -> Tensor:
        return x @ x

    def evaluate(function: Function, start: Tensor) -> None:
        point = start.clone().requires_grad_()
        torch.autograd.grad(function(point), point)

    table = Table(
        "minimize: one call on a tiny problem, float64",
        ["problem", "gradients", "evaluation", *(names := ["bfgs", "lbfgs", *SCIPY[:2]])],
    )
    optimize = load_peer("scipy.optimize", "scipy")
    starts = {
        "rosenbrock": (rosenbrock, [-1.2, 1.0]),
        "quadratic": (quadratic, [1.0, -2.0]),
        "quadratic, n = 100": (quadratic, [1.0] * 100),
    }
    found: dict[str, Any] = {}
    with threads(1):
        for problem, (function, values) in starts.items():
            start = torch.tensor(values, dtype=torch.float64, device=options.device)
            for jac in (None, "2-point"):
                table_of = {name: partial(ours, name, jac) for name in names[:2]}
                if optimize is not None:
                    for name in names[2:]:
                        table_of[name] = partial(with_scipy, optimize.minimize, name, jac)
                calls = {name: partial(s, function, start) for name, s in table_of.items()}
                calls["evaluation"] = partial(evaluate, function, start)  # type: ignore[assignment]
                timings = alternate(calls, options.repeat, options.device)
                cells = [
                    seconds(timings[name].median) if name in timings else "-"
                    for name in ("evaluation", *names)
                ]
                table.add(problem, jac or "exact", *cells)
                found[f"{problem}, {jac or 'exact'}"] = {n: t.as_dict() for n, t in timings.items()}
    report.show(table)
    report.record("minimize.call", found)


PARTS: dict[str, Callable[[Options, Report], None]] = {
    "exact": partial(_compare, jac=None),
    "2-point": partial(_compare, jac="2-point"),
    "call": _call,
}


@command("minimize", "classical problems by minimize, SciPy and pytorch-minimize", tuple(PARTS))
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    for name, part in PARTS.items():
        if options.wants(name):
            part(options, report)
