"""Nonlinear least squares by one call, after the conventions of SciPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import (
    check_callable,
    check_choice,
    check_integer,
    check_number,
)
from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder.minimization._bounds import Bound, resolve_bounds
from torch_secondorder.minimization._jacobians import Differences, WithJacobian
from torch_secondorder.minimization._least_squares import Fit, Report, Tolerances
from torch_secondorder.minimization._robust import LossName
from torch_secondorder.minimization._runs import takes_result
from torch_secondorder.minimization._trees import leaves_of
from torch_secondorder.minimization.result import LeastSquaresResult, OptimizeResult

__all__ = ["least_squares"]

# Arguments of the optimizer that are arguments of `least_squares` or have no meaning here.
_NO_OPTIONS = {
    "params": "x0 is the parameter",
    "bounds": "bounds is an argument of least_squares itself",
    "scaling": "x_scale is an argument of least_squares itself",
    "max_eval": "max_nfev is an argument of least_squares itself",
    "tolerance_grad": "gtol is an argument of least_squares itself",
    "tolerance_change": "ftol and xtol are arguments of least_squares itself",
    "maximize": "residuals can only be made small",
    "weight_decay": "return sqrt(weight_decay) * x among the residuals instead",
}


def least_squares(
    fun: Callable[..., Any],
    x0: Any,
    jac: Literal["2-point", "3-point"] | Callable[..., Any] | None = None,
    bounds: Any = None,
    *,
    loss: LossName = "linear",
    f_scale: float = 1.0,
    x_scale: Literal["jac"] | float = "jac",
    ftol: float | None = 1e-14,
    xtol: float | None = 1e-8,
    gtol: float | None = 1e-14,
    max_nfev: int | None = None,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    callback: Callable[..., Any] | None = None,
    verbose: Literal[0, 1, 2] = 0,
    options: Mapping[str, Any] | None = None,
) -> LeastSquaresResult:
    """Minimizes half the sum of squares of residuals, or a robust loss of them.

    The conventions are those of `scipy.optimize.least_squares`. The Jacobian is exact, by autograd.
    The method is that of Levenberg and Marquardt within a trust region, as in MINPACK, with up to
    two further steps for each Jacobian (see `LevenbergMarquardt`). Nothing that you pass is
    modified.

    The cost is `f_scale^2 sum(rho((r / f_scale)^2)) / 2` with `rho(z)` by the name of the loss:
    `"linear"`, `z`; `"huber"`, `z` up to 1 and `2 sqrt(z) - 1` beyond; `"soft_l1"`,
    `2 (sqrt(1 + z) - 1)`; `"cauchy"`, `log(1 + z)`; `"arctan"`, `arctan(z)`.

    References: Moré 1978, "The Levenberg-Marquardt algorithm: implementation and theory"; Triggs,
    McLauchlan, Hartley and Fitzgibbon 2000, "Bundle adjustment: a modern synthesis", for the
    curvature of robust losses.

    Args:
        fun: Takes a tensor like `x0` and returns the residuals, a tensor of any shape, computed by
            operations of torch.
        x0: The start: a number, a list or an array of numbers (in float64), a tensor, or a dict,
            list or tuple of tensors.
        jac: None for the exact Jacobian by autograd. A function that takes what `fun` takes and
            returns it, of shape `(*residuals, *x)`; a tree of these for a tree. `"2-point"` or
            `"3-point"` for finite differences. With these `fun` need not be in torch: it may return
            an array. Each evaluation takes a Jacobian then.
        bounds: A pair `(low, high)`, each a number, a tensor or an array like `x0`, a tree like
            `x0`, or None; or a `scipy.optimize.Bounds`. `fun` is only evaluated within the bounds.
        loss: The name of `rho`.
        f_scale: The residual from which one counts as large; of no account for the linear loss.
        x_scale: `"jac"` for steps that do not depend on the units of the parameters: lengths are
            measured by the largest columns of the Jacobian so far. A number if all parameters are
            of one size.
        ftol: The iteration ends once both the decrease of the cost and the predicted one are below
            this share of it. None for no such test. Tolerances are at least four times the machine
            epsilon.
        xtol: The iteration ends once a step is shorter than this share of `x`, in the metric of
            `x_scale`. It also ends where the next step would be, and would gain less than `ftol`.
        gtol: The iteration ends once the cosines between the residuals and the columns of the
            Jacobian are not larger.
        max_nfev: Most evaluations of `fun`; by default 200 for each unknown and 200 more.
        args: Further arguments of `fun`: a tuple, or the only one.
        kwargs: Further keyword arguments of `fun`.
        callback: Called after each iteration, with a result that has `x`, `cost`, `nit` and `nfev`
            if its argument is called `intermediate_result`, else with `x`. It ends the iteration by
            `raise StopIteration`.
        verbose: 1 prints a line at the end, 2 one for each iteration as well.
        options: Arguments of `LevenbergMarquardt`, such as `{"acceleration": "geodesic",
            "globalization": "damping"}`.

    Returns:
        The result; `success` is False if the iteration has not converged, and `message` says why.

    Raises:
        TypeError: An argument has a wrong type, or `fun` returns something else than a tensor of
            real numbers.
        ValueError: An argument is out of range or a name unknown; bounds cross, do not fit `x0`, or
            `x0` lies outside of them; `fun` returns no residuals, a different number of them than
            before, residuals that are not finite at `x0`, or that do not depend on its argument;
            or `jac` returns a Jacobian of another shape.

    >>> t = torch.linspace(0, 4, 9, dtype=torch.float64)
    >>> y = 3 * torch.exp(-0.7 * t)
    >>> def residuals(x):
    ...     return x[0] * torch.exp(-x[1] * t) - y
    >>> result = least_squares(residuals, [1.0, 1.0])
    >>> result.success, [round(v, 6) for v in result.x.tolist()]
    (True, [3.0, 0.7])
    >>> y[4] += 10.0  # an outlier
    >>> robust = least_squares(residuals, [1.0, 1.0], loss="cauchy", f_scale=0.1)
    >>> [round(v, 2) for v in robust.x.tolist()]
    [3.0, 0.7]
    """
    check_callable("fun", fun)
    check_callable("callback", callback, optional=True)
    check_choice("loss", loss, LossName)
    check_number("f_scale", f_scale, above=0.0)
    for name, tolerance in (("ftol", ftol), ("xtol", xtol), ("gtol", gtol)):
        check_number(name, tolerance, low=0.0, optional=True)
    if ftol is None and xtol is None and gtol is None:
        raise ValueError(
            "ftol, xtol and gtol are None: at least one of them must end the iteration"
        )
    check_integer("max_nfev", max_nfev, optional=True, whole_floats=True)
    if verbose not in (0, 1, 2):
        raise ValueError(f"verbose must be 0, 1 or 2, got {verbose!r}")
    leaves, names, structure = leaves_of(as_start(x0))
    for leaf, name in zip(leaves, names, strict=True):
        if leaf.is_complex():
            raise TypeError(f"{name} is complex: pass torch.view_as_real({name})")
        if not leaf.numel():
            raise ValueError(f"{name} has no entries")
    arguments = dict(options or {})
    for name, reason in _NO_OPTIONS.items():
        if name in arguments:
            raise ValueError(f"{name!r} is no option of least_squares: {reason}")
    limits = _limits(bounds, leaves, names, structure)
    dtype = min((leaf.dtype for leaf in leaves), key=lambda t: -torch.finfo(t).eps)
    scaling = _scaling(x_scale)
    residuals = _with_arguments(fun, args, kwargs)
    source = _source(residuals, jac, args, kwargs, limits)
    if source is not None:  # gradients are no cheaper than Jacobians
        residuals = source
        arguments = {"corrections": 0} | arguments
    fit = Fit(residuals, leaves, structure, limits, loss, f_scale)
    most = None if max_nfev is None else int(max_nfev)
    report = _report(callback, verbose)
    result = fit.run(Tolerances.of(ftol, xtol, gtol, dtype), most, report, scaling, arguments)
    if source is not None:
        result.nfev, result.njev = source.evaluations, source.jacobians
    if verbose:
        print(  # noqa: T201
            f"{result.message} (status {result.status}): cost {result.cost:.6g}, "
            f"{result.nit} iterations, {result.nfev} evaluations, {result.njev} Jacobians"
        )
    return result


def as_start(x0: Any) -> Any:
    """The start as a tensor or a tree of tensors; numbers become float64."""
    if isinstance(x0, Tensor):
        return x0
    leaves = pytree.tree_leaves(x0)
    if isinstance(x0, Mapping) or any(isinstance(leaf, Tensor) for leaf in leaves):
        return x0
    try:
        found = torch.as_tensor(plain_array(x0))
        if isinstance(x0, (bool, str)) or found.dtype is torch.bool:
            raise TypeError("not numbers")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"x0 must be a number, an array of numbers, a tensor or a tree of tensors, got "
            f"{type(x0).__name__}"
        ) from error
    # Arrays have a dtype of their own; Python's numbers are as precise as float64.
    keeps = hasattr(x0, "dtype") and (found.is_floating_point() or found.is_complex())
    return found if keeps or found.is_complex() else _doubled(x0)


def plain_array(value: Any) -> Any:
    """A column of a table as the array it holds: torch would look its labels up."""
    if isinstance(value, Tensor) or not hasattr(value, "__array__"):
        return value
    return value.__array__()


def _doubled(x0: Any) -> Tensor:
    return torch.as_tensor(plain_array(x0), dtype=torch.float64)


def _limits(
    bounds: Any, leaves: list[Tensor], names: list[str], structure: Any
) -> list[tuple[Bound, Bound]] | None:
    """The bounds of each leaf, which must have `x0` between them; None where all are infinite."""
    if bounds is None:
        return None
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        bounds = (bounds.lb, bounds.ub)
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(
            "bounds must be (low, high), each a number, a tensor or an array like x0, or None; or "
            f"an object with lb and ub; got {type(bounds).__name__}"
        )
    if structure is None:
        bounds = tuple(_bound(bound, leaves[0]) for bound in bounds)
    limits = resolve_bounds(tuple(bounds), leaves, names, structure)
    infinite = True
    for leaf, (low, high), name in zip(leaves, limits, names, strict=True):
        low, high = -inf if low is None else low, inf if high is None else high
        if bool(((leaf < low) | (leaf > high)).any()):
            raise ValueError(f"{name} is outside of the bounds: move it between low and high")
        for bound in (low, high):
            infinite = infinite and not bool(torch.as_tensor(bound).isfinite().any())
    return None if infinite else limits


def _bound(bound: Any, leaf: Tensor) -> Any:
    if bound is None or isinstance(bound, (int, float, Tensor)):
        return bound
    try:
        return torch.as_tensor(plain_array(bound), dtype=leaf.dtype, device=leaf.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"a bound must be a number or numbers, got {bound!r:.60}") from error


def _source(
    fun: Callable[[Any], Any],
    jac: Any,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    limits: list[tuple[Bound, Bound]] | None,
) -> WithJacobian | None:
    """The residuals with a Jacobian by differences or by a function; None for one by autograd."""
    if jac is None:
        return None
    if isinstance(jac, str) and jac in ("2-point", "3-point"):
        return Differences(fun, jac, limits)
    if not callable(jac):
        raise ValueError(
            "jac must be None for autograd, a function, '2-point' or '3-point' for finite "
            f"differences, got {jac!r}"
        )
    return WithJacobian(fun, _with_arguments(jac, args, kwargs))


def _scaling(x_scale: Any) -> str:
    if isinstance(x_scale, str) and x_scale == "jac":
        return "more"
    if isinstance(x_scale, str) or not isinstance(x_scale, (int, float)):
        raise ValueError(
            f"x_scale must be 'jac' or a number, got {x_scale!r}: for sizes of single parameters, "
            "make them of one size in fun"
        )
    check_number("x_scale", x_scale, above=0.0)
    return "identity"


def _with_arguments(
    fun: Callable[..., Any], args: Any, kwargs: Mapping[str, Any] | None
) -> Callable[[Any], Any]:
    if not isinstance(args, tuple):
        args = (args,)
    if not args and not kwargs:
        return fun
    more = dict(kwargs or {})
    return lambda x: fun(x, *args, **more)


def _report(callback: Callable[..., Any] | None, verbose: int) -> Report | None:
    if callback is None and verbose < 2:
        return None

    def report(x: Any, cost: float, nit: int, nfev: int) -> bool:
        if verbose == 2:
            print(f"iteration {nit:4d}: cost {cost:.8e}, {nfev} evaluations")  # noqa: T201
        if callback is None:
            return False
        result = OptimizeResult(x=x, cost=cost, nit=nit, nfev=nfev)
        try:
            if takes_result(callback):
                callback(intermediate_result=result)
            else:
                callback(x)
        except StopIteration:
            return True
        return False

    return report
