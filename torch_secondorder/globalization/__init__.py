"""Globalization: line searches, damping and trust regions."""

from typing import TYPE_CHECKING

from torch_secondorder._foundation.deprecation import renamed
from torch_secondorder.globalization._resolve import (
    DampingName,
    Globalization,
    GlobalizationName,
    LineSearchName,
    resolve_damping,
    resolve_globalization,
    resolve_line_search,
)
from torch_secondorder.globalization.backtracking import Armijo, FixedStep
from torch_secondorder.globalization.damping import (
    DampingRule,
    MarquardtDamping,
    NielsenDamping,
)
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
    "DampingName",
    "DampingRule",
    "FixedStep",
    "Globalization",
    "GlobalizationName",
    "HagerZhang",
    "LineSearch",
    "LineSearchName",
    "MarquardtDamping",
    "NielsenDamping",
    "Phi",
    "SearchResult",
    "SearchStatus",
    "StrongWolfe",
    "Trial",
    "TrustRegion",
    "falls_without_end",
    "resolve_damping",
    "resolve_globalization",
    "resolve_line_search",
]

if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, {"LevenbergMarquardt": "MarquardtDamping"})


def __dir__() -> list[str]:
    return __all__
