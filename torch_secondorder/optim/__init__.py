"""The optimizers, one file each."""

from torch_secondorder.optim.base import SecondOrderOptimizer
from torch_secondorder.optim.info import StepInfo, StepStatus
from torch_secondorder.optim.lbfgs import LBFGS

__all__ = ["LBFGS", "SecondOrderOptimizer", "StepInfo", "StepStatus"]
