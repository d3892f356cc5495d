"""Losses over whole data sets, computed one batch at a time."""

from __future__ import annotations

import warnings
from typing import Any

from torch_secondorder.dataset import _objective, _operator
from torch_secondorder.dataset.closure import DatasetClosure

__all__ = ["DatasetClosure"]

#: Names that were public once; they stay importable for one release.
_DEPRECATED = {
    "BatchSum": _operator.BatchSum,
    "DatasetObjective": _objective.DatasetObjective,
    "curvature_at": _operator.curvature_at,
}


def __getattr__(name: str) -> Any:
    if name not in _DEPRECATED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.{name} is internal and will be gone in the next release: optimizers and "
        f"diagnostics take a DatasetClosure",
        DeprecationWarning,
        stacklevel=2,
    )
    return _DEPRECATED[name]


def __dir__() -> list[str]:
    return __all__
