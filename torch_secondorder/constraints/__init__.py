"""Constraints: simple sets of tensors, and certificates of optimality under constraints."""

from torch_secondorder.constraints.kkt import KKTReport, kkt_residuals

__all__ = ["KKTReport", "kkt_residuals"]


def __dir__() -> list[str]:
    return __all__
