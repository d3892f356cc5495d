"""Callbacks for PyTorch Lightning; the optimizers themselves need none.

Both `lightning.pytorch` and `pytorch_lightning` take them, whichever the trainer comes from.
Importing this module imports those that are installed; `torch_secondorder` imports neither.
"""

from torch_secondorder.integrations.lightning.curvature import CurvatureMonitor
from torch_secondorder.integrations.lightning.monitor import SecondOrderMonitor
from torch_secondorder.integrations.lightning.penalty import JacobianPenaltyCallback

__all__ = ["CurvatureMonitor", "JacobianPenaltyCallback", "SecondOrderMonitor"]


def __dir__() -> list[str]:
    return __all__
