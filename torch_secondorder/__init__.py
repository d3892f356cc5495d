"""Second-order optimization for PyTorch, driven by the standard closure."""

from torch_secondorder import curvature, diagnostics, func, globalization, penalties, solvers
from torch_secondorder._closure.capture import mark_outputs
from torch_secondorder._foundation.deprecation import MovedModules
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.evaluation import Evaluation
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder.dataset import DatasetClosure
from torch_secondorder.optim import (
    LBFGS,
    AdaHessian,
    AdaHessianInfo,
    Contractive,
    ContractiveInfo,
    LBFGSInfo,
    NewtonCG,
    NewtonCGInfo,
    SecondOrderOptimizer,
    Sophia,
    SophiaInfo,
    StepInfo,
    StepStatus,
)

__version__ = "0.1.0"

__all__ = [
    "LBFGS",
    "AdaHessian",
    "AdaHessianInfo",
    "ClosureObjective",
    "Contractive",
    "ContractiveInfo",
    "DatasetClosure",
    "Evaluation",
    "FunctionalObjective",
    "LBFGSInfo",
    "NewtonCG",
    "NewtonCGInfo",
    "SecondOrderOptimizer",
    "Sophia",
    "SophiaInfo",
    "StepInfo",
    "StepStatus",
    "curvature",
    "dataset",
    "diagnostics",
    "func",
    "globalization",
    "mark_outputs",
    "optim",
    "penalties",
    "solvers",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


MovedModules(
    {
        f"torch_secondorder.{old}": [f"torch_secondorder.{place}" for place in places.split()]
        for old, places in {
            "capture": "_closure.capture",
            "evaluation": "_objective.evaluation _objective.base",
            "huggingface": "integrations.huggingface",
            "lightning": "integrations.lightning",
            "lightning.curvature": "integrations.lightning",
            "lightning.monitor": "integrations.lightning",
            "lightning.penalty": "integrations.lightning",
            "objective": "_objective.closure _objective.functional",
            "vector": "_params.vector",
            "dataset.objective": "dataset",
            "dataset.operator": "dataset",
            "diagnostics.definite": "diagnostics",
            "diagnostics.eigen": "diagnostics",
            "diagnostics.hutchpp": "diagnostics",
            "diagnostics.local": "diagnostics",
            "diagnostics.source": "diagnostics",
            "func.batches": "func",
            "func.checks": "func",
            "func.modules": "func",
            "func.products": "func",
            "globalization.named": "globalization",
            "optim.base": "optim",
            "optim.info": "optim",
            "solvers.kronecker": "solvers",
            "solvers.named": "solvers",
        }.items()
    }
).install()
