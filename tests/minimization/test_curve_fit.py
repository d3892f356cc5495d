"""Fits of curves in one call, beside SciPy's."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from torch_secondorder import LeastSquaresResult, curve_fit, least_squares

X = torch.linspace(0.0, 3.0, 12, dtype=torch.float64)
_GENERATOR = torch.Generator().manual_seed(3)
NOISE = torch.randn(12, generator=_GENERATOR, dtype=torch.float64)
SIGMA = 0.02 + 0.1 * torch.rand(12, generator=_GENERATOR, dtype=torch.float64)
_A = torch.randn(12, 12, generator=_GENERATOR, dtype=torch.float64)
COVARIANCE = 0.01 * (_A @ _A.T + torch.eye(12))


def decay(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a * torch.exp(-b * x) + c


def decay_of_arrays(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * np.exp(-b * x) + c


Y = decay_of_arrays(X.numpy(), 2.5, 1.3, 0.5) + 0.05 * NOISE.numpy()


def never(*_: Any) -> Any:
    raise AssertionError("f was called")


@pytest.mark.parametrize("sigma", [None, SIGMA, COVARIANCE])
@pytest.mark.parametrize("absolute", [False, True])
def test_agrees_with_scipy(sigma: Any, absolute: bool) -> None:
    popt, pcov = curve_fit(decay, X, Y, sigma=sigma, absolute_sigma=absolute)
    theirs, covariance = scipy.optimize.curve_fit(
        *(decay_of_arrays, X.numpy(), Y),
        sigma=None if sigma is None else sigma.numpy(),
        absolute_sigma=absolute,
        ftol=1e-14,
        xtol=1e-14,
        gtol=1e-14,
    )
    assert torch.allclose(popt, torch.from_numpy(theirs), rtol=1e-6)
    assert torch.allclose(pcov, torch.from_numpy(covariance), rtol=1e-4)


def test_one_deviation_for_all() -> None:
    one, covariance = curve_fit(decay, X, Y, sigma=0.1, absolute_sigma=True)
    other, same = curve_fit(decay, X, Y, sigma=torch.full((12,), 0.1), absolute_sigma=True)
    assert torch.allclose(one, other) and torch.allclose(covariance, same)


@pytest.mark.parametrize("bounds", [(0, [3.0, 1.1, 1.0]), ([-math.inf, 1.4, 0.0], math.inf)])
def test_agrees_with_scipy_within_bounds(bounds: Any) -> None:
    popt, _ = curve_fit(decay, X, Y, bounds=bounds)
    theirs, _ = scipy.optimize.curve_fit(decay_of_arrays, X.numpy(), Y, bounds=bounds)
    assert torch.allclose(popt, torch.from_numpy(theirs), atol=1e-5)


def test_where_the_fit_starts_within_bounds() -> None:
    starts = []

    def first(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        starts.append([p.item() for p in (a, b, c, d)])
        return decay(x, a, b, c) + d

    low, high = [0.0, 2.0, -math.inf, -math.inf], [4.0, math.inf, -3.0, math.inf]
    with pytest.warns(UserWarning, match="rank"):
        curve_fit(first, X, Y, bounds=(low, high), max_nfev=200)
    assert starts[0] == [2.0, 3.0, -4.0, 1.0]


def test_robust_fits() -> None:
    y = torch.from_numpy(Y).clone()
    y[4] += 3.0
    popt, _ = curve_fit(decay, X, y, loss="cauchy", f_scale=0.05)
    plain, _ = curve_fit(decay, X, Y)
    assert torch.allclose(popt, plain, atol=0.2)


def test_the_result_comes_as_well() -> None:
    popt, pcov, result = curve_fit(decay, X, Y, [2.0, 1.0, 0.0], full_output=True)
    assert isinstance(result, LeastSquaresResult)
    assert torch.equal(result.x, popt)
    same = least_squares(lambda p: decay(X, *p) - torch.from_numpy(Y), [2.0, 1.0, 0.0])
    assert torch.equal(same.x, popt) and same.nfev == result.nfev
    information = result.jac.T @ result.jac
    variance = 2 * result.cost / 9
    assert torch.allclose(pcov, variance * torch.linalg.inv(information), rtol=1e-9)


def test_data_of_several_variables_and_dtypes(device: torch.device) -> None:
    x = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)).to(device)
    y = (1.0 + 2.0 * x[0] - 3.0 * x[1]).view(5, 6)

    def plane(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        assert a.dim() == 0
        return (a + b * x[0] + c * x[1]).view(5, 6)

    popt, pcov = curve_fit(plane, x, y, torch.zeros(3, device=device))
    assert popt.dtype == pcov.dtype == torch.float32 and popt.device == x.device
    assert torch.allclose(popt, torch.tensor([1.0, 2.0, -3.0], device=device), atol=1e-5)


class Column:
    """A column of a table with labels of its own, as those of pandas."""

    def __init__(self, values: Any) -> None:
        self._values = np.asarray(values)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, label: Any) -> Any:
        raise KeyError(label)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._values


@pytest.mark.parametrize("kind", [np.asarray, list, tuple, "column"])
def test_data_that_are_no_tensors(kind: Any) -> None:
    def line(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        assert isinstance(x, Tensor) and x.dtype is torch.float64
        return a + b * x

    kind = Column if kind == "column" else kind
    x, y = np.arange(1, 6), np.array([2.0, 4.0, 6.5, 8.0, 9.5])
    expected = curve_fit(line, torch.tensor(x).double(), torch.tensor(y))
    p0, sigma, bounds = kind(np.ones(2)), kind(np.ones(5)), (kind(np.zeros(2)), 9.0)
    found = curve_fit(line, kind(x), kind(y), p0=p0, sigma=sigma)
    within, _ = curve_fit(line, kind(x), kind(y), p0=p0, bounds=bounds)
    assert torch.allclose(within, expected[0])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "xdata", [(X, X.square()), (X.numpy(), X.square().numpy()), X.numpy() ** [[1], [2]]]
)
def test_points_of_several_coordinates(xdata: Any) -> None:
    popt, _ = curve_fit(lambda x, a, b: a * x[0] + b * x[1], xdata, 2 * X - 3 * X.square())
    assert torch.allclose(popt, torch.tensor([2.0, -3.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("xdata", "jac"), [({"t": X}, None), (["a", "b"], None), (None, None), (X.numpy(), "2-point")]
)
def test_other_points_come_as_they_are(xdata: Any, jac: Any) -> None:
    seen = []

    def curve(x: Any, a: Tensor) -> Tensor:
        seen.append(x)
        return a * X

    curve_fit(curve, xdata, X, jac=jac)
    assert all(x is xdata for x in seen)


def test_the_covariance_is_the_spread_of_fits() -> None:
    generator = torch.Generator().manual_seed(5)
    truth = torch.tensor([2.5, 1.3, 0.5], dtype=torch.float64)
    curve = decay(X, *truth)
    fits = torch.stack(
        [
            curve_fit(
                decay, X, curve + 0.01 * torch.randn(12, generator=generator, dtype=torch.float64)
            )[0]
            for _ in range(60)
        ]
    )
    _, pcov = curve_fit(decay, X, curve, truth, sigma=0.01, absolute_sigma=True)
    assert torch.allclose(fits.std(0), pcov.diagonal().sqrt(), rtol=0.3)


# Fits without a covariance.


def test_parameters_that_the_data_do_not_determine() -> None:
    with pytest.warns(UserWarning, match="do not determine all parameters.*rank 1.*infinite"):
        popt, pcov = curve_fit(lambda x, a, b: (a + b) * x, X, 3 * X)
    assert float(popt.sum()) == pytest.approx(3.0)
    assert pcov.shape == (2, 2) and bool((pcov == math.inf).all())


def test_no_more_data_than_parameters() -> None:
    few = slice(0, 3)
    with pytest.warns(UserWarning, match="no more data than parameters"):
        _, pcov = curve_fit(decay, X[few], Y[few])
    assert bool((pcov == math.inf).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, pcov = curve_fit(decay, X[few], Y[few], sigma=0.1, absolute_sigma=True)
    assert bool(pcov.isfinite().all())


def test_a_fit_that_does_not_converge() -> None:
    with pytest.raises(RuntimeError, match="the fit has not converged: max_nfev"):
        curve_fit(decay, X, Y, max_nfev=2)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"f": 3}, TypeError, "f must be callable"),
        ({"f": lambda x, *p: x}, ValueError, "number of parameters cannot be told from f: pass p0"),
        ({"f": lambda x: x}, ValueError, "number of parameters cannot be told from f"),
        ({"p0": [[1.0], [2.0]]}, ValueError, "p0 must be a vector"),
        ({"ydata": []}, ValueError, "ydata has no entries"),
        ({"ydata": [1.0, 2.0]}, ValueError, "2 data do not determine 3 parameters"),
        ({"ydata": torch.full((12,), math.nan)}, ValueError, "ydata has entries that are not"),
        ({"xdata": X * math.inf}, ValueError, "xdata has entries .*check_finite=False"),
        ({"ydata": torch.ones(12) * 1j}, TypeError, "ydata is complex"),
        ({"sigma": -SIGMA}, ValueError, "sigma must be positive and finite"),
        ({"sigma": SIGMA[:5]}, ValueError, r"12 standard deviations.*got shape \(5,\)"),
        ({"sigma": -COVARIANCE}, ValueError, "not a positive definite covariance matrix"),
        ({"bounds": (2, 3), "p0": [1.0, 1.0, 1.0]}, ValueError, "x0 is outside of the bounds"),
        ({"loss": "square"}, ValueError, "loss must be"),
        ({"maxfev": 9}, TypeError, "curve_fit has no argument 'maxfev': max_nfev is"),
        ({"method": "lm"}, TypeError, "no argument 'method': leave it out, there is one"),
        ({"nan_policy": "omit"}, TypeError, "no argument 'nan_policy': leave out what is not"),
        ({"xdata": [math.nan] * 12}, ValueError, "xdata has entries .*check_finite=False"),
    ],
)
def test_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    def curve(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return never()  # type: ignore[no-any-return]

    with pytest.raises(kind, match=message):
        curve_fit(**({"f": curve, "xdata": X, "ydata": Y} | arguments))


@pytest.mark.parametrize(
    ("f", "kind", "message"),
    [
        (lambda x, a: 1.0, TypeError, "f must return a tensor, got float"),
        (
            lambda x, a: a * x[:4],
            ValueError,
            r"f returned 4 values, of shape \(4,\), for 12 entries",
        ),
        (lambda x, a: a / (x - x), ValueError, "residuals are not finite at x0"),
        (lambda x, a: np.exp(a * x.numpy()), TypeError, "NumPy.*torch.exp for np.exp.*'2-point'"),
    ],
)
def test_what_a_curve_returns(f: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        curve_fit(f, X, Y)
