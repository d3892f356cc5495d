"""Losses over whole data sets, computed one batch at a time."""

from typing import TYPE_CHECKING

from torch_secondorder._foundation.deprecation import withdrawn
from torch_secondorder.dataset import _objective, _operator
from torch_secondorder.dataset.closure import DatasetClosure

__all__ = ["DatasetClosure"]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = withdrawn(
        __name__,
        {
            "BatchSum": _operator.BatchSum,
            "DatasetObjective": _objective.DatasetObjective,
            "curvature_at": _operator.curvature_at,
        },
    )
