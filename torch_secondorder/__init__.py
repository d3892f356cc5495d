"""Second-order optimization for PyTorch, driven by the standard closure."""

from torch_secondorder import curvature, diagnostics, func, globalization, penalties, solvers
from torch_secondorder._closure.capture import mark_outputs
from torch_secondorder._objective.closure import FunctionalObjective
from torch_secondorder.dataset import DatasetClosure
from torch_secondorder.optim import (
    LBFGS,
    AdaHessian,
    Contractive,
    ContractiveInfo,
    NewtonCG,
    SecondOrderOptimizer,
    Sophia,
    StepInfo,
    StepStatus,
)

__version__ = "0.1.0"

__all__ = [
    "LBFGS",
    "AdaHessian",
    "Contractive",
    "ContractiveInfo",
    "DatasetClosure",
    "FunctionalObjective",
    "NewtonCG",
    "SecondOrderOptimizer",
    "Sophia",
    "StepInfo",
    "StepStatus",
    "curvature",
    "diagnostics",
    "func",
    "globalization",
    "mark_outputs",
    "penalties",
    "solvers",
]
