"""Globalization: how far to go along a direction."""

from torch_secondorder.globalization.backtracking import Armijo, FixedStep
from torch_secondorder.globalization.hager_zhang import HagerZhang
from torch_secondorder.globalization.line_search import (
    LineSearch,
    Phi,
    SearchResult,
    SearchStatus,
    Trial,
)
from torch_secondorder.globalization.named import resolve_line_search
from torch_secondorder.globalization.strong_wolfe import StrongWolfe

__all__ = [
    "Armijo",
    "FixedStep",
    "HagerZhang",
    "LineSearch",
    "Phi",
    "SearchResult",
    "SearchStatus",
    "StrongWolfe",
    "Trial",
    "resolve_line_search",
]
