"""Globalization: line searches, damping and trust regions."""

from torch_secondorder.globalization._resolve import (
    Globalization,
    GlobalizationName,
    LineSearchName,
    resolve_globalization,
    resolve_line_search,
)
from torch_secondorder.globalization.backtracking import Armijo, FixedStep
from torch_secondorder.globalization.damping import LevenbergMarquardt
from torch_secondorder.globalization.hager_zhang import HagerZhang
from torch_secondorder.globalization.line_search import (
    LineSearch,
    Phi,
    SearchResult,
    SearchStatus,
    Trial,
    falls_without_end,
)
from torch_secondorder.globalization.strong_wolfe import StrongWolfe
from torch_secondorder.globalization.trust_region import TrustRegion

__all__ = [
    "Armijo",
    "FixedStep",
    "Globalization",
    "GlobalizationName",
    "HagerZhang",
    "LevenbergMarquardt",
    "LineSearch",
    "LineSearchName",
    "Phi",
    "SearchResult",
    "SearchStatus",
    "StrongWolfe",
    "Trial",
    "TrustRegion",
    "falls_without_end",
    "resolve_globalization",
    "resolve_line_search",
]


def __dir__() -> list[str]:
    return __all__
