"""Constraints: simple sets of tensors, and certificates of optimality under constraints."""

from torch_secondorder.constraints.box import Box
from torch_secondorder.constraints.kkt import KKTReport, kkt_residuals
from torch_secondorder.constraints.norm_ball import NormBall
from torch_secondorder.constraints.orthogonal import Orthogonal
from torch_secondorder.constraints.simplex import Simplex
from torch_secondorder.constraints.unit_norm import UnitNorm

__all__ = ["Box", "KKTReport", "NormBall", "Orthogonal", "Simplex", "UnitNorm", "kkt_residuals"]


def __dir__() -> list[str]:
    return __all__
