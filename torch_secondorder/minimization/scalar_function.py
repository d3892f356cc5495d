"""Minimization of a scalar function of a tensor or a tree of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_callable
from torch_secondorder._optim.base import SecondOrderOptimizer
from torch_secondorder.minimization._bounds import Bound, resolve_bounds
from torch_secondorder.minimization._constrained_runs import descend_within
from torch_secondorder.minimization._constraints import read_constraints
from torch_secondorder.minimization._gradients import (
    Counts,
    Differences,
    Function,
    Limits,
    differentiable,
    exact,
    given,
)
from torch_secondorder.minimization._methods import (
    Method,
    Settings,
    check_bounds_fit,
    check_takes_constraints,
    default_method,
    read_options,
    resolve_method,
    stands_for_default,
)
from torch_secondorder.minimization._runs import Problem, descend, update_repeatedly
from torch_secondorder.minimization._trees import leaves_of
from torch_secondorder.minimization.result import OptimizeResult

__all__ = ["minimize"]

#: Where gradients come from: autograd, the function itself, another function, or differences.
Jac: TypeAlias = "Literal[True, '2-point', '3-point'] | Callable[..., Any] | None"

_SCHEMES = ("2-point", "3-point")
# Iterations by default, for each unknown, as in SciPy.
_ITERATIONS = 200


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    method: str | type[SecondOrderOptimizer] | None = None,
    *,
    args: Any = (),
    jac: Jac = None,
    bounds: Any = None,
    constraints: Any = (),
    callback: Callable[..., Any] | None = None,
    tol: float | None = None,
    options: Mapping[str, Any] | None = None,
    compile: bool | Mapping[str, Any] = False,
) -> OptimizeResult:
    """Minimizes a scalar function of a tensor or of a tree of tensors.

    The conventions are those of `scipy.optimize.minimize`. The gradient is exact by default, by
    autograd. Nothing that you pass is modified.

    Args:
        fun: Takes a tree like `x0` and returns a scalar: a tensor that is computed from it by
            operations of torch. A number will do if the gradient comes from `jac`.
        x0: The start: a tensor of real or complex numbers, or a dict, list or tuple of such
            tensors, nested as you like.
        method: A name in any case, or an optimizer class. `"bfgs"`, and its relatives `"ssbfgs"`,
            `"ssbroyden"` and `"dfp"`; `"lbfgs"`, also known as `"L-BFGS-B"`; `"cg"` for
            `NonlinearCG`; `"newton"`, with the Hessian as a matrix, also known as `"trust-exact"`;
            `"newton-cg"` for `NewtonCG`, and `"trust-ncg"` for the same with the Hessian and a
            trust region; `"adahessian"` and `"sophia"`, which are for losses with noise. By default
            `"bfgs"`, and `"lbfgs"` with bounds or more than 1,000 unknowns. With constraints
            `"bfgs"` up to 1,000 unknowns and `"lbfgs"` beyond, also known as `"SLSQP"` and
            `"trust-constr"`; all other methods that make many iterations minimize a sequence of
            augmented Lagrangians, see `Constrained`.
        args: Further arguments of `fun`, and of `jac` if that is a function: a tuple, or the only
            one.
        jac: None for the exact gradient by autograd. True if `fun` returns the pair
            `(value, gradient)`. A function that takes what `fun` takes and returns the gradient, a
            tree like `x0`. `"2-point"` or `"3-point"` for finite differences with SciPy's steps,
            which take one evaluation or two for each entry of `x0`.
        bounds: A pair `(low, high)`, each a number, a tensor, a tree of these like `x0`, or None.
            SciPy's forms are fine as well: a pair `(min, max)` for each entry of a 1-d `x0`, or a
            `scipy.optimize.Bounds`. `fun` is only evaluated within the bounds; an `x0` outside is
            moved to the nearest point within first (`info.start_projected`).
        constraints: One constraint, a list or tuple of them, or a dict of them by name, in SciPy's
            forms: a dict `{"type": "eq" or "ineq", "fun": c}` for `c(x) = 0` or `c(x) >= 0`, with
            `"jac"` and `"args"` if you like; an object with `fun`, `lb` and `ub`, such as a
            `NonlinearConstraint`; or one with `A`, `lb` and `ub`, such as a `LinearConstraint`, for
            the entries of `x` one after another. Entries with equal bounds are equalities. `c`
            takes what `fun` takes, and returns a tensor of any shape or several scalars in a list.
            Its derivatives are exact, by autograd; for a function without a graph they come from
            the constraint's own `jac`, a function or a scheme of differences. Constraints may be
            violated on the way, even with `keep_feasible`, which is a warning; bounds are not.
        callback: Called after each iteration, with an `OptimizeResult` that has `x` and `fun` if
            its argument is called `intermediate_result`, else with `x`. It ends the minimization
            by `raise StopIteration`.
        tol: Short for the option `gtol`.
        options: By name: `maxiter`, 200 for each entry of `x0` by default; `maxfun`, most
            evaluations, unlimited by default and checked between iterations; `gtol`, the largest
            absolute entry of the gradient at the solution; `ftol` (or `xtol`), the relative change
            of both function and `x` at which an iteration is the last, 1e-9 in float64;
            `feasibility_tol` (or `catol`, `constr_viol_tol`), the largest violation of a constraint
            at the solution, 1e-8 by default in float64, where `gtol` is about the gradient of the
            Lagrangian; `constraint_method`, the `method` of `Constrained`, whose other arguments
            are options as well; `finite_diff_rel_step`, the step relative to `|x|`;
            `finite_diff_vmap` to evaluate the points of a difference in one call by
            `torch.func.vmap`; `disp` to print a line at the end. All others are arguments of the
            optimizer, such as `history_size` of `LBFGS`. By default `gtol` is 1e-7 with exact
            gradients in float64, 1e-5 with `"2-point"`, and 8e-5 with exact gradients in float32;
            times the largest entry of the gradient at `x0` if that is below one. With constraints,
            times that at the solution if it is above one.
        compile: Whether function, gradient and products are compiled, or arguments for
            `torch.compile`; see `FunctionalObjective`.

    Returns:
        The result; `success` is False if the minimization has not converged, and `message` says
        why. With constraints it converges where they and the conditions of Karush, Kuhn and Tucker
        hold, with multipliers in `v`.

    Raises:
        TypeError: An argument has a wrong type: `x0` holds integers or things that are no tensors,
            `fun` returns no tensor where autograd needs one.
        ValueError: A method or an option is unknown, the method cannot take bounds or needs second
            derivatives that finite differences do not give, bounds cross, are NaN or do not fit
            `x0`, or `fun` returns no scalar. A subclass of it if the method needs a matrix that
            does not fit into memory.
        RuntimeError: The value of `fun` does not depend on its argument, or has no second
            derivatives where the method needs them, or the values of a constraint change their
            shape.

    >>> def rosenbrock(x):
    ...     return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    >>> x0 = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    >>> result = minimize(rosenbrock, x0)
    >>> result.success, [round(v, 6) for v in result.x.tolist()]
    (True, [1.0, 1.0])
    >>> without = minimize(rosenbrock, x0, jac="2-point")
    >>> without.nfev == 3 * without.njev
    True

    In a disk, where the radius is a constraint and the multiplier tells what a wider disk is worth:

    >>> disk = {"type": "ineq", "fun": lambda x: 1 - x.square().sum()}
    >>> within = minimize(rosenbrock, x0, constraints=disk)
    >>> [round(v, 4) for v in within.x.tolist()], round(within.v[0].item(), 4)
    ([0.7864, 0.6177], -0.1215)
    """
    check_callable("fun", fun)
    check_callable("callback", callback, optional=True)
    leaves, names, structure = leaves_of(x0)
    size = sum(leaf.numel() * (1 + leaf.is_complex()) for leaf in leaves)
    constrained = not (constraints is None or _is_empty(constraints))
    if method is None or stands_for_default(method):
        method = default_method(size, bounded=bounds is not None, constrained=constrained)
    name, chosen = resolve_method(method)
    settings = read_options(options, tol, name, chosen, constrained=constrained)
    given_constraints = []
    if constrained:
        check_takes_constraints(name, chosen)
        given_constraints = read_constraints(constraints, leaves)
        if compile is not False:
            raise ValueError("compile does not go with constraints: leave it out")
    limits = None
    if bounds is not None:
        check_bounds_fit(name, chosen)
        limits = resolve_bounds(bounds, leaves, names, structure)
    if not isinstance(args, tuple):
        args = (args,)
    if args:
        fun, jac = _with_arguments(fun, args), _with_arguments(jac, args) if callable(jac) else jac
    counts = Counts()
    function = _function(fun, jac, counts, name, chosen, settings, limits)
    if compile is not False and jac is not None:
        raise ValueError("compile goes with gradients by autograd: leave jac out")
    if settings.max_iter is None:
        settings.max_iter = _ITERATIONS * max(size, 1)
    problem = Problem(leaves, structure, function, counts, jac, limits)
    if not size:
        result = problem.nothing_to_move(fun, jac)
    elif constrained:
        result = descend_within(problem, given_constraints, chosen, settings, callback)
    elif chosen.iterates:
        if compile is not False:
            with torch.enable_grad():
                differentiable(fun(problem.tree()))  # errors by the names that you know
            problem.function = fun
        result = descend(problem, chosen, settings, callback, compile)
    else:
        if compile is not False:
            raise ValueError(f"method {name!r} does not go with compile: leave it out")
        result = update_repeatedly(problem, chosen, settings, callback)
    if settings.disp:
        print(  # noqa: T201
            f"{result.message} (status {result.status}): fun = {result.fun:.6g}, "
            f"{result.nit} iterations, {result.nfev} evaluations, {result.njev} gradients"
            + (f", largest violation {result.constr_violation:.3g}" if constrained else "")
        )
    return result


def _is_empty(constraints: Any) -> bool:
    return isinstance(constraints, (list, tuple, dict)) and not constraints


def _with_arguments(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[Any], Any]:
    return lambda x: function(x, *args)


def _function(
    fun: Callable[..., Any],
    jac: Any,
    counts: Counts,
    name: str,
    method: Method,
    settings: Settings,
    limits: Sequence[tuple[Bound, Bound]] | None,
) -> Function:
    """The function with its gradient, wherever that comes from."""
    if jac is None:
        return exact(fun)
    if jac is True:
        return given(fun, None, counts, twice=method.twice)
    if isinstance(jac, str) and jac in _SCHEMES:
        if method.twice:
            raise ValueError(
                f"method {name!r} takes second derivatives, and differences of jac={jac!r} are too "
                "inaccurate to be differenced again: leave jac out, pass a function, or use a "
                "method that needs the gradient only, such as 'lbfgs'"
            )
        flat = None if limits is None else _flat_limits(limits)
        step, at_once = settings.rel_step, settings.at_once
        return Differences(fun, jac, counts, step, flat, at_once=at_once)
    if jac == "cs":
        raise ValueError(
            "jac='cs' needs a function of complex numbers, and the exact gradient by autograd is "
            "as accurate: leave jac out, or pass '2-point' or '3-point'"
        )
    if not callable(jac):
        raise ValueError(
            "jac must be None for autograd, True if fun returns (value, gradient), a function, "
            f"'2-point' or '3-point', got {jac!r}"
        )
    return given(fun, jac, counts, twice=method.twice)


def _flat_limits(limits: Sequence[tuple[Bound, Bound]]) -> list[Limits]:
    """Bounds as numbers or flat vectors, for differences."""
    ends = (-torch.inf, torch.inf)
    return [
        tuple(  # type: ignore[misc]
            end if v is None else v.reshape(-1) if isinstance(v, Tensor) and v.dim() else v
            for v, end in zip(pair, ends, strict=True)
        )
        for pair in limits
    ]
