"""Second-order optimization for PyTorch, driven by the standard closure."""

from torch_secondorder import (
    constraints,
    curvature,
    diagnostics,
    func,
    globalization,
    linear,
    penalties,
    solvers,
)
from torch_secondorder._autograd.graph import MissingSecondDerivative
from torch_secondorder._closure.capture import mark_outputs
from torch_secondorder._foundation.deprecation import MOVED_MODULES, OldModules
from torch_secondorder._objective.base import Evaluation
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder.constraints import KKTReport, kkt_residuals
from torch_secondorder.dataset import DatasetClosure
from torch_secondorder.minimization import (
    LeastSquaresResult,
    OptimizeResult,
    curve_fit,
    least_squares,
    minimize,
)
from torch_secondorder.optim import (
    BFGS,
    KFAC,
    LBFGS,
    SOAP,
    AdaHessian,
    AdaHessianInfo,
    AdaSecant,
    AdaSecantInfo,
    BFGSInfo,
    CapturedStep,
    Constrained,
    ConstrainedInfo,
    Contractive,
    ContractiveInfo,
    KFACInfo,
    LBFGSInfo,
    LevenbergMarquardt,
    LevenbergMarquardtInfo,
    Newton,
    NewtonCG,
    NewtonCGInfo,
    NewtonInfo,
    NonlinearCG,
    NonlinearCGInfo,
    Projected,
    ProjectedInfo,
    SecondOrderOptimizer,
    Shampoo,
    ShampooInfo,
    SOAPInfo,
    Sophia,
    SophiaInfo,
    StepInfo,
    StepStatus,
)

__version__ = "0.2.0"

__all__ = [
    "BFGS",
    "KFAC",
    "LBFGS",
    "SOAP",
    "AdaHessian",
    "AdaHessianInfo",
    "AdaSecant",
    "AdaSecantInfo",
    "BFGSInfo",
    "CapturedStep",
    "ClosureObjective",
    "Constrained",
    "ConstrainedInfo",
    "Contractive",
    "ContractiveInfo",
    "DatasetClosure",
    "Evaluation",
    "FunctionalObjective",
    "KFACInfo",
    "KKTReport",
    "LBFGSInfo",
    "LeastSquaresResult",
    "LevenbergMarquardt",
    "LevenbergMarquardtInfo",
    "MissingSecondDerivative",
    "Newton",
    "NewtonCG",
    "NewtonCGInfo",
    "NewtonInfo",
    "NonlinearCG",
    "NonlinearCGInfo",
    "OptimizeResult",
    "Projected",
    "ProjectedInfo",
    "SOAPInfo",
    "SecondOrderOptimizer",
    "Shampoo",
    "ShampooInfo",
    "Sophia",
    "SophiaInfo",
    "StepInfo",
    "StepStatus",
    "constraints",
    "curvature",
    "curve_fit",
    "dataset",
    "diagnostics",
    "func",
    "globalization",
    "kkt_residuals",
    "least_squares",
    "linear",
    "mark_outputs",
    "minimization",
    "minimize",
    "optim",
    "penalties",
    "solvers",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


OldModules(MOVED_MODULES).install()
