"""Curvature as matrix-free linear operators."""

from torch_secondorder.curvature.base import LinearOperator
from torch_secondorder.curvature.hessian import Hessian
from torch_secondorder.curvature.inverse_bfgs import InverseBFGS

__all__ = ["Hessian", "InverseBFGS", "LinearOperator"]
