"""Minimization of functions by one call, after the conventions of SciPy."""

from torch_secondorder.minimization.result import OptimizeResult
from torch_secondorder.minimization.scalar_function import minimize

__all__ = ["OptimizeResult", "minimize"]


def __dir__() -> list[str]:
    return __all__
