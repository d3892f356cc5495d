"""Curvature as matrix-free linear operators."""

from torch_secondorder.curvature._loss_structure import InseparableLoss
from torch_secondorder.curvature._output_space import UnknownOutputs
from torch_secondorder.curvature.base import Damped, Diagonal, FromOutputs, LinearOperator
from torch_secondorder.curvature.diagonal import (
    DiagonalEstimator,
    GaussNewtonBartlett,
    Hutchinson,
    exact_diagonal,
)
from torch_secondorder.curvature.finite_difference import FiniteDifference
from torch_secondorder.curvature.fisher import Fisher
from torch_secondorder.curvature.gauss_newton import GaussNewton
from torch_secondorder.curvature.hessian import Hessian
from torch_secondorder.curvature.inverse_bfgs import InverseBFGS
from torch_secondorder.curvature.inverse_broyden import InverseBroyden
from torch_secondorder.curvature.kronecker import KroneckerFactors
from torch_secondorder.curvature.reduced_broyden import ReducedBroyden
from torch_secondorder.curvature.residual_jacobian import JacobianMethod, ResidualJacobian

__all__ = [
    "Damped",
    "Diagonal",
    "DiagonalEstimator",
    "FiniteDifference",
    "Fisher",
    "FromOutputs",
    "GaussNewton",
    "GaussNewtonBartlett",
    "Hessian",
    "Hutchinson",
    "InseparableLoss",
    "InverseBFGS",
    "InverseBroyden",
    "JacobianMethod",
    "KroneckerFactors",
    "LinearOperator",
    "ReducedBroyden",
    "ResidualJacobian",
    "UnknownOutputs",
    "exact_diagonal",
]


def __dir__() -> list[str]:
    return __all__
