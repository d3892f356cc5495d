"""Linear least squares: dense and matrix-free, of minimum norm, damped, and within a ball."""

from torch_secondorder.linear.iterative import KrylovResult, KrylovStatus
from torch_secondorder.linear.lsmr import lsmr
from torch_secondorder.linear.lsqr import lsqr
from torch_secondorder.linear.lstsq import LstsqResult, lstsq
from torch_secondorder.linear.norm_constrained import NormConstrainedResult, norm_constrained
from torch_secondorder.linear.operators import (
    OperatorLike,
    RectangularOperator,
    as_operator,
    jacobian_operator,
)
from torch_secondorder.linear.ridge import RidgeResult, ridge

__all__ = [
    "KrylovResult",
    "KrylovStatus",
    "LstsqResult",
    "NormConstrainedResult",
    "OperatorLike",
    "RectangularOperator",
    "RidgeResult",
    "as_operator",
    "jacobian_operator",
    "lsmr",
    "lsqr",
    "lstsq",
    "norm_constrained",
    "ridge",
]


def __dir__() -> list[str]:
    return __all__
