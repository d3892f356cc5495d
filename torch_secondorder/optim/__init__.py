"""The optimizers, one file each."""

from torch_secondorder.optim.base import SecondOrderOptimizer, StepInfo, StepStatus
from torch_secondorder.optim.lbfgs import LBFGS

__all__ = ["LBFGS", "SecondOrderOptimizer", "StepInfo", "StepStatus"]
