"""Losses over whole data sets, batch by batch."""

from torch_secondorder.dataset.closure import DatasetClosure
from torch_secondorder.dataset.objective import DatasetObjective
from torch_secondorder.dataset.operator import BatchSum, curvature_at

__all__ = ["BatchSum", "DatasetClosure", "DatasetObjective", "curvature_at"]
