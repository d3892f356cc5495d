"""Losses over whole data sets, batch by batch."""

from torch_secondorder.dataset._objective import DatasetObjective
from torch_secondorder.dataset._operator import BatchSum, curvature_at
from torch_secondorder.dataset.closure import DatasetClosure

__all__ = ["BatchSum", "DatasetClosure", "DatasetObjective", "curvature_at"]


def __dir__() -> list[str]:
    return __all__
