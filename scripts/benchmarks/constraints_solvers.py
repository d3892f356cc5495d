"""Solvers of constrained problems: this library's, SciPy's and those of other packages.

Each has its own best settings: tolerances below those that count, and exact derivatives by torch.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secondorder import BFGS, LBFGS, Constrained, Newton, NewtonCG

from .constraints_problems import BASES, BUDGET, KKT, VIOLATION, Counted, Solver, kkt
from .harness import load_peer

Function = Callable[[Tensor], Tensor]

# The steps of an augmented Lagrangian, each a minimization.
OUTER = 100


def ours(make: Callable[..., Any], method: str | None, curvature: str, counted: Counted) -> Tensor:
    """`Constrained` around an optimizer, with bounds among the inequalities.

    One step is all of a sequential quadratic program, or one minimization of an augmented
    Lagrangian. The certificate ends the steps.
    """
    problem = counted.problem
    x = problem.start.clone().requires_grad_()
    inner = make([x], max_iter=BUDGET, tolerance_grad=1e-9, tolerance_change=0.0)
    constraints = [lambda: problem.all_equalities(x)], [lambda: problem.all_inequalities(x)]
    given = [
        part if len(part[0]()) else None for part in constraints
    ]  # a function without entries is no constraint
    optimizer = Constrained(inner, *given, method=method)  # type: ignore[arg-type]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = counted(x)
        counted.gradients += 1
        loss.backward()
        return loss

    def step() -> None:
        optimizer.step(closure)
        if curvature:
            counted.hessians += getattr(inner.info, curvature)

    _steps(step, counted, x)
    return x


def _steps(step: Callable[[], object], counted: Counted, x: Tensor) -> None:
    """Steps until the certificate holds, or nothing changes."""
    for _ in range(OUTER):
        before = x.detach().clone()
        step()
        done = torch.equal(before, x.detach()) or not x.isfinite().all()
        if done or _certified(counted, x):
            return


def _certified(counted: Counted, x: Tensor) -> bool:
    """True if the point is feasible and stationary, whatever the optimum is."""
    problem = counted.problem
    with torch.no_grad():
        h, g = problem.all_equalities(x), problem.all_inequalities(x)
    feasible = torch.cat([h.abs(), g]).max().item() <= VIOLATION
    return feasible and kkt(problem, x) <= KKT


def by_hand(counted: Counted) -> Tensor:
    """An augmented Lagrangian around torch's L-BFGS, as one writes it: 17.4 of Nocedal-Wright."""
    problem = counted.problem
    x = problem.start.clone().requires_grad_()
    y, u = (
        torch.zeros_like(problem.all_equalities(x)),
        torch.zeros_like(problem.all_inequalities(x)),
    )
    y, u = y.detach(), u.detach()
    rho, last = 10.0, math.inf

    def step() -> None:
        nonlocal y, u, rho, last
        optimizer = torch.optim.LBFGS(
            [x],
            max_iter=500,
            tolerance_grad=1e-9,
            tolerance_change=0.0,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            h, g = problem.all_equalities(x), problem.all_inequalities(x)
            loss = counted(x) + y @ h + 0.5 * rho * h @ h
            loss = loss + ((u + rho * g).clamp(min=0.0).square() - u.square()).sum() / (2 * rho)
            counted.gradients += 1
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            h, g = problem.all_equalities(x), problem.all_inequalities(x)
            y, u = y + rho * h, (u + rho * g).clamp(min=0.0)
            violation = torch.cat([h.abs(), g.clamp(min=0.0)]).max().item()
        if violation > last / 4:
            rho = min(10.0 * rho, 1e8)
        last = violation

    _steps(step, counted, x)
    return x


class Numpy:
    """A problem as functions of NumPy arrays, with exact derivatives.

    Args:
        counted: The problem.
    """

    def __init__(self, counted: Counted) -> None:
        self._counted, self.problem = counted, counted.problem
        self.start = self.problem.start.numpy().copy()

    def value(self, x: Any) -> float:
        """The objective; it is counted."""
        with torch.no_grad():
            return self._counted(torch.from_numpy(x.copy())).item()

    def gradient(self, x: Any) -> Any:
        """The gradient."""
        return self._counted.gradient(torch.from_numpy(x.copy())).numpy()

    def hessian(self, x: Any) -> Any:
        """The Hessian."""
        self._counted.hessians += 1
        point = torch.from_numpy(x.copy())
        return torch.autograd.functional.hessian(self.problem.function, point).numpy()

    def constraint(self, function: Function, sign: float) -> tuple[Any, Any, Any]:
        """Value, Jacobian, and Hessian of the values' weighted sum, times a sign."""

        def value(x: Any) -> Any:
            with torch.no_grad():
                return sign * function(torch.from_numpy(x.copy())).numpy()

        def jacobian(x: Any) -> Any:
            point = torch.from_numpy(x.copy())
            return sign * torch.autograd.functional.jacobian(function, point).numpy()

        def hessian(x: Any, v: Any) -> Any:
            point, weights = torch.from_numpy(x.copy()), torch.from_numpy(v.copy())
            found = torch.autograd.functional.hessian(lambda z: weights @ function(z), point)
            return sign * found.numpy()

        return value, jacobian, hessian

    def kinds(self) -> list[tuple[str, Function, float]]:
        """The general constraints with SciPy's name for the kind and the sign."""
        given = [("eq", self.problem.equalities, 1.0), ("ineq", self.problem.inequalities, -1.0)]
        return [(kind, function, sign) for kind, function, sign in given if function is not None]

    def bounds(self) -> list[tuple[float, float]] | None:
        """The bounds; None if there are none."""
        low, high = self.problem.low, self.problem.high
        if low is None and high is None:
            return None
        n = len(self.start)
        lows = [-math.inf] * n if low is None else low.tolist()
        highs = [math.inf] * n if high is None else high.tolist()
        return list(zip(lows, highs, strict=True))


def with_slsqp(minimize: Any, tolerance: float, counted: Counted) -> Tensor:
    """SciPy's SLSQP."""
    problem = Numpy(counted)
    constraints = []
    for kind, function, sign in problem.kinds():
        value, jacobian, _ = problem.constraint(function, sign)
        constraints.append({"type": kind, "fun": value, "jac": jacobian})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = minimize(
            problem.value,
            problem.start,
            jac=problem.gradient,
            method="SLSQP",
            bounds=problem.bounds(),
            constraints=constraints,
            options={"ftol": tolerance, "maxiter": 1000},
        )
    return torch.from_numpy(result.x)


def with_trust_constr(optimize: Any, exact: bool, counted: Counted) -> Tensor:
    """SciPy's trust-constr, with its BFGS or exact Hessians."""
    problem = Numpy(counted)
    constraints = []
    for kind, function, sign in problem.kinds():
        value, jacobian, hessian = problem.constraint(function, sign)
        constraints.append(
            optimize.NonlinearConstraint(
                value,
                0.0,
                0.0 if kind == "eq" else math.inf,
                jac=jacobian,
                hess=hessian if exact else optimize.BFGS(),
            )
        )
    bounds = problem.bounds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = optimize.minimize(
            problem.value,
            problem.start,
            jac=problem.gradient,
            hess=problem.hessian if exact else optimize.BFGS(),
            method="trust-constr",
            bounds=None if bounds is None else optimize.Bounds(*zip(*bounds, strict=True)),
            constraints=constraints,
            options={"gtol": 1e-9, "xtol": 1e-12, "barrier_tol": 1e-10, "maxiter": 2000},
        )
    return torch.from_numpy(result.x)


def with_ipopt(ipopt: Any, exact: bool, counted: Counted) -> Tensor:
    """IPOPT, with its L-BFGS or exact Hessians."""
    problem = Numpy(counted)
    constraints = []
    for kind, function, sign in problem.kinds():
        value, jacobian, hessian = problem.constraint(function, sign)
        more = {"hess": hessian} if exact else {}
        constraints.append({"type": kind, "fun": value, "jac": jacobian, **more})
    result = ipopt.minimize_ipopt(
        problem.value,
        problem.start,
        jac=problem.gradient,
        hess=problem.hessian if exact else None,
        bounds=problem.bounds(),
        constraints=constraints,
        tol=1e-9,
        # Otherwise it relaxes bounds and inequalities by 1e-8.
        options={"print_level": 0, "sb": "yes", "max_iter": 1000, "bound_relax_factor": 0.0},
    )
    return torch.from_numpy(result.x)


def with_nlopt(nlopt: Any, augmented: bool, counted: Counted) -> Tensor:
    """NLopt's SLSQP, or its augmented Lagrangian around L-BFGS."""
    problem = Numpy(counted)
    n = len(problem.start)
    optimizer = nlopt.opt(nlopt.LD_AUGLAG if augmented else nlopt.LD_SLSQP, n)
    if augmented:
        inner = nlopt.opt(nlopt.LD_LBFGS, n)
        inner.set_ftol_rel(1e-12)
        inner.set_xtol_rel(1e-12)
        optimizer.set_local_optimizer(inner)

    def objective(x: Any, gradient: Any) -> float:
        if gradient.size:
            gradient[:] = problem.gradient(x)
        return problem.value(x)

    optimizer.set_min_objective(objective)
    for kind, function, sign in problem.kinds():
        value, jacobian, _ = problem.constraint(function, -sign if kind == "ineq" else sign)

        def constraint(
            result: Any, x: Any, gradient: Any, value: Any = value, jac: Any = jacobian
        ) -> None:
            result[:] = value(x)
            if gradient.size:
                gradient[:] = jac(x)

        add = (
            optimizer.add_equality_mconstraint
            if kind == "eq"
            else optimizer.add_inequality_mconstraint
        )
        add(constraint, [1e-9] * len(value(problem.start)))
    bounds = problem.bounds()
    if bounds is not None:
        optimizer.set_lower_bounds([low for low, _ in bounds])
        optimizer.set_upper_bounds([high for _, high in bounds])
    optimizer.set_ftol_rel(1e-12)
    optimizer.set_xtol_rel(1e-12)
    optimizer.set_maxeval(BUDGET)
    start = counted.problem.start
    if bounds is not None:
        start = start.clamp(*torch.tensor(bounds, dtype=start.dtype).unbind(1))
    try:
        point = optimizer.optimize(start.numpy())
    except (RuntimeError, nlopt.RoundoffLimited, nlopt.runtime_error):
        return counted.points[-1]  # it does not give its own
    return torch.from_numpy(point)


def with_cooper(cooper: Any, rate: float, counted: Counted) -> Tensor:
    """Cooper: its augmented Lagrangian with Adam, multipliers first, penalties that grow."""
    problem = counted.problem
    x = problem.start.clone().requires_grad_()
    kinds = {
        "h": (problem.all_equalities, cooper.ConstraintType.EQUALITY),
        "g": (problem.all_inequalities, cooper.ConstraintType.INEQUALITY),
    }
    kinds = {name: kind for name, kind in kinds.items() if len(kind[0](x))}

    class Problem(cooper.ConstrainedMinimizationProblem):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for name, (function, kind) in kinds.items():
                m = len(function(x))
                multiplier = cooper.multipliers.DenseMultiplier(
                    num_constraints=m, dtype=torch.float64
                )
                penalty = cooper.penalty_coefficients.DensePenaltyCoefficient(
                    init=torch.full((m,), 10.0, dtype=torch.float64)
                )
                constraint = cooper.Constraint(
                    kind, cooper.formulations.AugmentedLagrangian, multiplier, penalty
                )
                setattr(self, name, constraint)

        def compute_cmp_state(self) -> Any:
            states = {
                getattr(self, name): cooper.ConstraintState(violation=function(x))
                for name, (function, _) in kinds.items()
            }
            counted.gradients += 1
            return cooper.CMPState(loss=counted(x), observed_constraints=states)

    cmp = Problem()
    optimizer = cooper.optim.AlternatingDualPrimalOptimizer(
        cmp,
        primal_optimizers=torch.optim.Adam([x], lr=rate),
        dual_optimizers=torch.optim.SGD(cmp.dual_parameters(), lr=1.0, maximize=True),
    )
    while not (len(counted.points) % 50 == 0 and _certified(counted, x)):
        optimizer.roll()
    return x


def solvers() -> dict[str, Solver]:
    """All solvers that are installed, by name."""
    optimize = importlib.import_module("scipy.optimize")
    augmented = "augmented_lagrangian"
    table: dict[str, Solver] = {
        BASES[0]: partial(with_slsqp, optimize.minimize, 1e-6),
        BASES[1]: partial(with_slsqp, optimize.minimize, 1e-12),
        "LBFGS (ours)": partial(ours, LBFGS, None, ""),
        "BFGS (ours)": partial(ours, BFGS, None, ""),
        "LBFGS AL (ours)": partial(ours, LBFGS, augmented, ""),
        "Newton AL (ours)": partial(ours, Newton, augmented, "hessians"),
        "NewtonCG AL (ours)": partial(ours, NewtonCG, augmented, "products"),
        "torch LBFGS AL": by_hand,
        "trust-constr": partial(with_trust_constr, optimize, False),
        "trust-constr exact": partial(with_trust_constr, optimize, True),
    }
    if (ipopt := load_peer("cyipopt")) is not None:
        table["IPOPT"] = partial(with_ipopt, ipopt, False)
        table["IPOPT exact"] = partial(with_ipopt, ipopt, True)
    if (nlopt := load_peer("nlopt")) is not None:
        table["nlopt SLSQP"] = partial(with_nlopt, nlopt, False)
        table["nlopt AL"] = partial(with_nlopt, nlopt, True)
    if (cooper := load_peer("cooper", "cooper-optim")) is not None:
        table["cooper Adam"] = partial(with_cooper, cooper, 0.01)
    return table
