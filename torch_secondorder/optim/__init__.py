"""The optimizers, one file each."""

from torch_secondorder._optim.base import SecondOrderOptimizer
from torch_secondorder._optim.info import StepInfo, StepStatus
from torch_secondorder.optim.adahessian import AdaHessian, AdaHessianInfo
from torch_secondorder.optim.adasecant import AdaSecant, AdaSecantInfo, SecantName
from torch_secondorder.optim.bfgs import BFGS, BFGSInfo
from torch_secondorder.optim.captured_step import CapturedStep
from torch_secondorder.optim.constrained import Constrained, ConstrainedInfo
from torch_secondorder.optim.contractive import Contractive, ContractiveInfo
from torch_secondorder.optim.kfac import KFAC, KFACInfo
from torch_secondorder.optim.lbfgs import LBFGS, LBFGSInfo
from torch_secondorder.optim.levenberg_marquardt import (
    AccelerationName,
    DampingName,
    LevenbergMarquardt,
    LevenbergMarquardtInfo,
    ScalingName,
)
from torch_secondorder.optim.newton import Newton, NewtonInfo
from torch_secondorder.optim.newton_cg import NewtonCG, NewtonCGInfo
from torch_secondorder.optim.nonlinear_cg import NonlinearCG, NonlinearCGInfo
from torch_secondorder.optim.projected import Projected, ProjectedInfo
from torch_secondorder.optim.shampoo import (
    GraftingName,
    RootMethodName,
    Shampoo,
    ShampooInfo,
)
from torch_secondorder.optim.soap import SOAP, SOAPInfo
from torch_secondorder.optim.sophia import Sophia, SophiaInfo

__all__ = [
    "BFGS",
    "KFAC",
    "LBFGS",
    "SOAP",
    "AccelerationName",
    "AdaHessian",
    "AdaHessianInfo",
    "AdaSecant",
    "AdaSecantInfo",
    "BFGSInfo",
    "CapturedStep",
    "Constrained",
    "ConstrainedInfo",
    "Contractive",
    "ContractiveInfo",
    "DampingName",
    "GraftingName",
    "KFACInfo",
    "LBFGSInfo",
    "LevenbergMarquardt",
    "LevenbergMarquardtInfo",
    "Newton",
    "NewtonCG",
    "NewtonCGInfo",
    "NewtonInfo",
    "NonlinearCG",
    "NonlinearCGInfo",
    "Projected",
    "ProjectedInfo",
    "RootMethodName",
    "SOAPInfo",
    "ScalingName",
    "SecantName",
    "SecondOrderOptimizer",
    "Shampoo",
    "ShampooInfo",
    "Sophia",
    "SophiaInfo",
    "StepInfo",
    "StepStatus",
]


def __dir__() -> list[str]:
    return __all__
