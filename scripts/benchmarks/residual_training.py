"""Levenberg-Marquardt implementations on a small physics-informed network, each for some time."""

from __future__ import annotations

import copy
import importlib
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from .harness import load_ours, load_peer, progress, say
from .registry import Options
from .report import Report, Table, number
from .residual_cases import Case, Term, laplacian_once, poisson
from .residual_jacobian import by_samples, flat_residuals

SECONDS = 20.0
TARGETS = (1e-3, 1e-4, 1e-5)


class _TimeUpError(Exception):
    """Ends a run."""


@dataclass
class Course:
    """A run with its clock, which stands still while errors are measured.

    Attributes:
        limit: Seconds.
        error: The error of the network at a flat vector of parameters.
        evaluations: Evaluations of all residuals.
        jacobians: Jacobians.
        history: Seconds and error of the best points, as far as they were measured.
    """

    limit: float
    error: Callable[[Tensor], float]
    evaluations: int = 0
    jacobians: int = 0
    history: list[tuple[float, float]] = field(default_factory=list)
    _lost: float = 0.0
    _started: float | None = None
    _lowest: float = math.inf

    def met(self, square: float, point: Callable[[], Tensor]) -> None:
        """Takes down a point if its sum of squares is the lowest; ends the run if time is up.

        The clock starts at the first call, so that compilers are left out.
        """
        now = time.perf_counter()
        if self._started is None:
            self._started = now
        seconds = now - self._started - self._lost
        if square < self._lowest:
            self._lowest = square
            self.history.append((seconds, self.error(point())))
        self._lost += time.perf_counter() - now
        if seconds > self.limit:
            raise _TimeUpError

    @property
    def best(self) -> float:
        """The error at the lowest sum of squares."""
        return self.history[-1][1] if self.history else math.inf

    def reached(self, target: float) -> float:
        """Seconds to an error; infinity if it was not reached."""
        return next((seconds for seconds, error in self.history if error <= target), math.inf)


Contender = Callable[[Case, Course], None]


def _flat(case: Case) -> Tensor:
    return parameters_to_vector(case.params).detach().clone()


def with_ours(make: Any, arguments: dict[str, Any], case: Case, course: Course) -> None:
    """`LevenbergMarquardt` of this library, on the closure."""
    optimizer = make(case.params, **arguments)

    def closure() -> Tensor:
        course.evaluations += 1
        return case.closure()

    while True:
        before = _flat(case)
        loss = optimizer.step(closure)
        course.jacobians += optimizer.info.jacobians
        course.met(2.0 * float(loss), before.clone)
        if torch.equal(before, _flat(case)):
            return


def with_scipy(least_squares: Any, method: str, case: Case, course: Course) -> None:
    """SciPy's `least_squares`, with the Jacobian by `vmap(jacrev)`."""

    def moved(x: Any) -> None:
        vector_to_parameters(torch.from_numpy(x).to(case.params[0]), case.params)

    def values(x: Any) -> Any:
        moved(x)
        course.evaluations += 1
        r = flat_residuals(case).detach().cpu()
        course.met(r.square().sum().item(), lambda: torch.from_numpy(x.copy()))
        return r.numpy()

    def jacobian(x: Any) -> Any:
        moved(x)
        course.jacobians += 1
        return by_samples(case).cpu().numpy()

    endless = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15, "max_nfev": 10**6}
    start = _flat(case).cpu().numpy()
    least_squares(values, start, jac=jacobian, method=method, x_scale="jac", **endless)


class _Rows(nn.Module):
    """The residuals of all terms as one module, for a package that wants one output a sample.

    A sample is a point, and the factors of its equation and of its boundary value.
    """

    def __init__(self, case: Case, course: Course) -> None:
        super().__init__()
        self.model, self.course = case.model, course

    def once(self, sample: Tensor) -> Tensor:
        """The residual of one sample."""
        point, equation, value = sample[:2], sample[2:3], sample[3:4]
        boundary: Tensor = value * self.model(point[None])[0]
        return equation * laplacian_once(self.model, point) + boundary

    def forward(self, samples: Tensor) -> Tensor:
        """Maps shape `(N, 4)` to `(N, 1)`."""
        result: Tensor = vmap(self.once)(samples)
        return result


def _samples(case: Case) -> tuple[Tensor, Tensor]:
    inputs, targets = [], []
    for place, term in enumerate(case.terms):
        factors = torch.zeros_like(term.inputs)
        factors[:, place] = term.scale
        inputs.append(torch.cat([term.inputs, factors], dim=1))
        targets.append(term.scale * term.targets)
    return torch.cat(inputs), torch.cat(targets)


def with_module(package: Any, case: Case, course: Course) -> None:
    """torch-levenberg-marquardt with its defaults, by `vmap(jacrev)`."""
    logging.getLogger("torch_levenberg_marquardt").setLevel(logging.ERROR)
    inputs, targets = _samples(case)
    module = package.training.LevenbergMarquardtModule(_Rows(case, course))
    while True:
        before = _flat(case)
        _, loss, stopped, logs = module.training_step(inputs, targets)
        course.jacobians += 1
        course.evaluations += 1 + int(logs["attempts"])
        course.met(len(targets) * loss.item(), lambda: _flat(case))
        if stopped or torch.equal(before, _flat(case)):
            return


def with_optimistix(optimistix: Any, jax: Any, case: Case, course: Course) -> None:
    """Levenberg-Marquardt of optimistix on the same network in JAX, compiled."""
    jax.config.update("jax_enable_x64", True)
    logging.getLogger("jax._src.debugging").setLevel(logging.CRITICAL)  # it reports the end of time
    np, numpy = jax.numpy, importlib.import_module("numpy")
    W, b, out, last = (np.array(p.detach().cpu().numpy()) for p in case.params)
    start, unravel = jax.flatten_util.ravel_pytree((W, b, out, last))
    inputs, targets = (np.array(t.cpu().numpy()) for t in _samples(case))

    def network(parameters: Any, point: Any) -> Any:
        W, b, out, last = parameters
        return (out @ np.tanh(W @ point + b) + last)[0]

    def once(parameters: Any, sample: Any, target: Any) -> Any:
        value = partial(network, parameters)
        curvature = np.trace(jax.hessian(value)(sample[:2]))
        return sample[2] * curvature + sample[3] * value(sample[:2]) - target[0]

    def saw(x: Any, square: Any) -> None:
        course.evaluations += 1
        course.met(float(square), lambda: torch.from_numpy(numpy.array(x)))

    def residuals(flat: Any, _: Any) -> Any:
        r = jax.vmap(once, (None, 0, 0))(unravel(flat), inputs, targets)
        jax.debug.callback(saw, jax.lax.stop_gradient(flat), jax.lax.stop_gradient(r @ r))
        return r

    solver = optimistix.LevenbergMarquardt(rtol=1e-15, atol=1e-15)
    result = optimistix.least_squares(residuals, solver, start, max_steps=10**6, throw=False)
    jax.block_until_ready(result.value)


def contenders() -> dict[str, Contender]:
    """The installed solvers."""
    table: dict[str, Contender] = {}
    make = load_ours("torch_secondorder", "LevenbergMarquardt")
    if make is not None:
        table["ours"] = partial(with_ours, make, {})
        table["ours, marquardt scaling"] = partial(with_ours, make, {"scaling": "marquardt"})
    optimize = load_peer("scipy.optimize", "scipy")
    if optimize is not None:
        for method in ("lm", "trf"):
            table[f"scipy {method}"] = partial(with_scipy, optimize.least_squares, method)
    module = load_peer("torch_levenberg_marquardt", "torch-levenberg-marquardt")
    if module is not None:
        table["torch-lm"] = partial(with_module, module)
    optimistix = load_peer("optimistix")
    if optimistix is not None:
        jax = importlib.import_module("jax")
        importlib.import_module("jax.flatten_util")
        table["optimistix"] = partial(with_optimistix, optimistix, jax)
    return table


def make_problem(device: torch.device, quick: bool) -> Case:
    """Poisson's equation with the solution `sin(pi x) sin(pi y)` for the bars' network."""
    case = poisson(device, *((60, 20) if quick else (900, 120)))
    inside, edge = case.terms
    source = -2.0 * math.pi**2 * (math.pi * inside.inputs).sin().prod(1, keepdim=True)
    on = edge.inputs.clone()
    for side in range(4):  # the points are random; each quarter of them goes to a side
        on[side::4, side // 2] = float(side % 2)
    terms = (Term(inside.inputs, source, inside.values, inside.once), Term(on, edge.targets))
    return Case("Poisson's equation, 2-64-1", case.model, terms)


def _error_of(case: Case) -> Callable[[Tensor], float]:
    line = torch.linspace(0.0, 1.0, 51).to(case.params[0])
    grid = torch.cartesian_prod(line, line)
    exact = (math.pi * grid).sin().prod(1, keepdim=True)
    model = copy.deepcopy(case.model)
    shapes = [(name, p.shape) for name, p in model.named_parameters()]

    def error(flat: Tensor) -> float:
        pieces = flat.to(exact).split([shape.numel() for _, shape in shapes])
        parts = {name: part.view(shape) for (name, shape), part in zip(shapes, pieces, strict=True)}
        with torch.no_grad():
            found = functional_call(model, parts, (grid,))
        return float((found - exact).norm() / exact.norm())

    return error


def run_pinn(options: Options, report: Report) -> None:
    """Each solver from the same network for some seconds; JAX's compiler is not counted."""
    problem = make_problem(options.device, options.quick)
    table = options.chosen(contenders())
    limit = options.share(0.2 if options.quick else SECONDS, len(table))
    shown = Table(
        f"{problem.name}, {problem.rows:,} x {problem.size}, {limit:.3g} s",
        ["solver", "evaluations", "Jacobians", "error", *(f"s to {t:g}" for t in TARGETS)],
    )
    for name, run in progress(table.items(), problem.name):
        case = Case(problem.name, copy.deepcopy(problem.model), problem.terms)
        course = Course(limit, _error_of(case))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run(case, course)
        except _TimeUpError:
            pass
        except Exception as error:  # JAX wraps the end of time; a peer may fail by itself
            if "_TimeUpError" not in str(error):
                say(f"{name}: {type(error).__name__}: {error!s:.80}")
        times = [number(course.reached(target)) for target in TARGETS]
        shown.add(name, course.evaluations, course.jacobians or "-", number(course.best), *times)
        entry: dict[str, Any] = {
            "evaluations": course.evaluations,
            "jacobians": course.jacobians,
            "error": course.best,
            "seconds": {f"to {target:g}": course.reached(target) for target in TARGETS},
        }
        report.record(f"residuals.pinn.{name}", {**entry, "history": course.history})
    report.show(shown)
