"""Minimization of functions by one call, after the conventions of SciPy."""

from torch_secondorder.minimization.curve_fit import curve_fit
from torch_secondorder.minimization.least_squares import least_squares
from torch_secondorder.minimization.result import LeastSquaresResult, OptimizeResult
from torch_secondorder.minimization.scalar_function import minimize

__all__ = ["LeastSquaresResult", "OptimizeResult", "curve_fit", "least_squares", "minimize"]


def __dir__() -> list[str]:
    return __all__
