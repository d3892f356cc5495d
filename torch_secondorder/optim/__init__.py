"""The optimizers, one file each."""

from torch_secondorder.optim.base import SecondOrderOptimizer
from torch_secondorder.optim.info import StepInfo, StepStatus
from torch_secondorder.optim.lbfgs import LBFGS
from torch_secondorder.optim.newton_cg import NewtonCG

__all__ = ["LBFGS", "NewtonCG", "SecondOrderOptimizer", "StepInfo", "StepStatus"]
