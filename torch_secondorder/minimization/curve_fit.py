"""Fits of curves to data, with the covariance of their parameters."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from math import inf
from typing import Any, Literal, overload

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_callable
from torch_secondorder.minimization.least_squares import as_start, least_squares, plain_array
from torch_secondorder.minimization.result import LeastSquaresResult

__all__ = ["curve_fit"]

_NO_COVARIANCE = (
    "the covariance of the parameters could not be estimated: {}; all its entries are infinite"
)

# Arguments of `scipy.optimize.curve_fit` that are not here.
_OF_SCIPY = {
    "maxfev": "max_nfev is the most evaluations",
    "method": "leave it out, there is one method, with bounds and without",
    "nan_policy": "leave out what is not finite, of xdata, ydata and sigma",
}


@overload
def curve_fit(
    f: Callable[..., Any],
    xdata: Any,
    ydata: Any,
    p0: Any = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    check_finite: bool = True,
    bounds: Any = None,
    *,
    full_output: Literal[False] = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]: ...


@overload
def curve_fit(
    f: Callable[..., Any],
    xdata: Any,
    ydata: Any,
    p0: Any = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    check_finite: bool = True,
    bounds: Any = None,
    *,
    full_output: Literal[True],
    **kwargs: Any,
) -> tuple[Tensor, Tensor, LeastSquaresResult]: ...


def curve_fit(
    f: Callable[..., Any],
    xdata: Any,
    ydata: Any,
    p0: Any = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    check_finite: bool = True,
    bounds: Any = None,
    *,
    full_output: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, LeastSquaresResult]:
    """Fits a curve to data by least squares, and estimates the covariance of its parameters.

    The conventions are those of `scipy.optimize.curve_fit`. The covariance is `(J'J)^-1`, the
    inverse of the information in the data where residuals are small or the curve is almost linear
    in its parameters; `J` is the Jacobian of the residuals divided by `sigma`.

    Args:
        f: The curve: `f(xdata, *params)`, with each parameter a tensor without dimensions, computed
            by operations of torch.
        xdata: What `f` takes as its first argument: a tensor, or anything else. Arrays and lists
            of numbers become tensors, in float64, unless there is a `jac`, with which `f` need not
            be in torch.
        ydata: The data, a tensor or an array with `N` entries.
        p0: The parameters to start from; ones by default, as many as `f` has arguments.
        sigma: The standard deviations of the data, a number or `N` of them, or their covariance
            matrix `(N, N)`; ones by default.
        absolute_sigma: Whether `sigma` are standard deviations. If not, they are weights, and the
            covariance is multiplied by the variance that the residuals show.
        check_finite: Whether `ydata`, and `xdata` if it is or becomes a tensor, are refused if an
            entry is not finite.
        bounds: See `least_squares`.
        full_output: Whether the result of `least_squares` is returned as well.
        **kwargs: Further arguments of `least_squares`, such as `loss` or `max_nfev`.

    Returns:
        The parameters, shape `(n,)`, and their covariance, shape `(n, n)`. Standard errors are the
        roots of its diagonal. It is infinite, with a warning, if the data do not determine all
        parameters.

    Raises:
        TypeError: An argument is one of SciPy's that has another name here, or see `least_squares`.
        ValueError: `p0` is missing and the number of parameters unknown; there are fewer data than
            parameters; data are not finite; `sigma` has a wrong shape, is not positive or not
            positive definite; or see `least_squares`.
        RuntimeError: The fit has not converged; the message says why.

    >>> x = torch.linspace(0, 4, 9, dtype=torch.float64)
    >>> noise = torch.tensor([1, -1, 1, -1, 0, 1, -1, 1, -1], dtype=torch.float64) / 20
    >>> def decay(x, a, b):
    ...     return a * torch.exp(-b * x)
    >>> popt, pcov = curve_fit(decay, x, decay(x, 3.0, 0.7) + noise)
    >>> [round(v, 2) for v in popt.tolist()]
    [3.03, 0.71]
    >>> [round(v, 2) for v in pcov.diagonal().sqrt().tolist()]  # standard errors
    [0.05, 0.02]
    """
    check_callable("f", f)
    for name, instead in _OF_SCIPY.items():
        if name in kwargs:
            raise TypeError(f"curve_fit has no argument {name!r}: {instead}")
    start = _start(f, p0, bounds)
    if kwargs.get("jac") is None:
        xdata = _points(xdata, start.device)
    y = _data(ydata, start)
    if check_finite:
        for name, data in (("xdata", xdata), ("ydata", y)):
            if isinstance(data, Tensor) and not bool(data.isfinite().all()):
                raise ValueError(
                    f"{name} has entries that are not finite: leave them out, or pass "
                    "check_finite=False"
                )
    if len(y) < len(start):
        raise ValueError(
            f"{len(y)} data do not determine {len(start)} parameters: pass more data, or fix "
            "parameters in f"
        )
    whiten = _whitening(sigma, y)

    def residuals(params: Tensor) -> Tensor:
        found = f(xdata, *params.unbind())
        if not isinstance(found, Tensor):
            raise TypeError(f"f must return a tensor, got {type(found).__name__}")
        if found.numel() != len(y):
            raise ValueError(
                f"f returned {found.numel()} values, of shape {tuple(found.shape)}, for "
                f"{len(y)} entries of ydata"
            )
        return whiten(found.reshape(-1) - y)

    result = least_squares(residuals, start, bounds=bounds, **kwargs)
    if not result.success:
        raise RuntimeError(f"the fit has not converged: {result.message}")
    covariance = _covariance(result, absolute=absolute_sigma)
    if full_output:
        return result.x, covariance, result
    return result.x, covariance


def _start(f: Callable[..., Any], p0: Any, bounds: Any) -> Tensor:
    """The parameters to start from, a vector."""
    if p0 is not None:
        start = as_start(p0)
        if not isinstance(start, Tensor) or start.dim() > 1:
            raise ValueError("p0 must be a vector of parameters, one for each argument of f")
        return start.reshape(-1)
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(plain) < 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ValueError("the number of parameters cannot be told from f: pass p0")
    start = torch.ones(len(plain) - 1, dtype=torch.float64)
    if bounds is None:
        return start
    low, high = (bounds.lb, bounds.ub) if hasattr(bounds, "lb") else bounds
    low, high = (
        torch.as_tensor(end if b is None else b, dtype=torch.float64)
        for b, end in ((low, -inf), (high, inf))
    )
    low, high = low.broadcast_to(start.shape), high.broadcast_to(start.shape)
    # As in SciPy: the middle where both are finite, one off the finite one else.
    middle = 0.5 * (low + high)
    start = torch.where(low.isfinite() & high.isfinite(), middle, start)
    start = torch.where(low.isfinite() & ~high.isfinite(), low + 1.0, start)
    return torch.where(~low.isfinite() & high.isfinite(), high - 1.0, start)


def _points(xdata: Any, device: torch.device) -> Any:
    """Arrays and sequences of numbers as tensors; anything else as it is."""
    if type(xdata) in (list, tuple):
        if any(getattr(entry, "ndim", 0) for entry in xdata):  # several arrays or tensors
            return type(xdata)(_points(entry, device) for entry in xdata)
    elif isinstance(xdata, Tensor) or not hasattr(xdata, "__array__"):
        return xdata
    try:
        return torch.as_tensor(plain_array(xdata), dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError):  # not of numbers
        return xdata


def _data(ydata: Any, start: Tensor) -> Tensor:
    """The data as a vector, on the device of the parameters."""
    y = ydata
    if not isinstance(y, Tensor):
        y = torch.as_tensor(plain_array(ydata), dtype=torch.float64)
    if y.is_complex():
        raise TypeError("ydata is complex: fit torch.view_as_real of it")
    y = y.detach().reshape(-1).to(start.device)
    if not len(y):
        raise ValueError("ydata has no entries")
    return y if y.is_floating_point() else y.to(start.dtype)


def _whitening(sigma: Any, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The function that makes residuals of variance one."""
    if sigma is None:
        return lambda r: r
    deviations = torch.as_tensor(plain_array(sigma), dtype=y.dtype, device=y.device).detach()
    n = len(y)
    if deviations.dim() == 2 and deviations.shape == (n, n):
        factor, failed = torch.linalg.cholesky_ex(deviations)
        if int(failed) or not bool(factor.isfinite().all()):
            raise ValueError("sigma is not a positive definite covariance matrix")
        return lambda r: torch.linalg.solve_triangular(factor, r[:, None], upper=False)[:, 0]
    if deviations.dim() > 1 or deviations.numel() not in (1, n):
        raise ValueError(
            f"sigma must be a number, {n} standard deviations, or a covariance matrix of shape "
            f"({n}, {n}), got shape {tuple(deviations.shape)}"
        )
    if not bool((deviations > 0).all()) or not bool(deviations.isfinite().all()):
        raise ValueError("sigma must be positive and finite: leave out data of no weight")
    return lambda r: r / deviations


def _covariance(result: LeastSquaresResult, *, absolute: bool) -> Tensor:
    """The covariance of the parameters; infinite, with a warning, where it cannot be estimated."""
    J = result.jac
    rows, size = J.shape
    _, values, vectors = torch.linalg.svd(J, full_matrices=False)
    least = torch.finfo(J.dtype).eps * max(J.shape) * values[0]
    reason = ""
    if not bool(values[-1] > least):
        reason = "the data do not determine all parameters, the Jacobian has rank {}"
        reason = reason.format(int((values > least).sum()))
    elif not absolute and rows == size:
        reason = "there are no more data than parameters, which leaves none for the variance"
    if reason:
        warnings.warn(_NO_COVARIANCE.format(reason), stacklevel=3)
        return torch.full((size, size), inf, dtype=J.dtype, device=J.device)
    scaled = vectors / values[:, None]
    covariance: Tensor = scaled.T @ scaled
    return covariance if absolute else covariance * (2.0 * result.cost / (rows - size))
