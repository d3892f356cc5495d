"""The optimizers, one file each."""

from torch_secondorder._optim.base import SecondOrderOptimizer
from torch_secondorder._optim.info import StepInfo, StepStatus
from torch_secondorder.optim.adahessian import AdaHessian
from torch_secondorder.optim.contractive import Contractive, ContractiveInfo
from torch_secondorder.optim.lbfgs import LBFGS
from torch_secondorder.optim.newton_cg import NewtonCG
from torch_secondorder.optim.sophia import Sophia

__all__ = [
    "LBFGS",
    "AdaHessian",
    "Contractive",
    "ContractiveInfo",
    "NewtonCG",
    "SecondOrderOptimizer",
    "Sophia",
    "StepInfo",
    "StepStatus",
]
