"""Helpers of the examples with constraints: the end of a solution, and shadow prices.

At a solution of `min f(x)` subject to `g(x) - b <= 0` or `g(x) - b = 0` with the multiplier `y`,
the lowest loss falls by `y` per unit that `b` is raised: `y` is the price of the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from _report import format_table
from torch_secondorder import StepStatus

FEASIBLE = 1e-10
UNFINISHED = (StepStatus.MAX_ITERATIONS, StepStatus.MAX_EVALUATIONS)


def finished(info: Any) -> bool:
    """True if another step of an optimizer, constrained or not, is of no use.

    Args:
        info: Its report.
    """
    inner = getattr(info, "inner", info)
    return inner.status not in UNFINISHED and getattr(info, "violation", 0.0) < FEASIBLE


@dataclass(frozen=True)
class Price:
    """The price of a bound, twice.

    Attributes:
        name: What is bounded, as shown.
        bound: The bound.
        change: By how much the bound was lowered and raised.
        multiplier: That of the constraint at the bound.
        below: The lowest loss with the lowered bound.
        above: That with the raised bound.
    """

    name: str
    bound: float
    change: float
    multiplier: float
    below: float
    above: float

    @property
    def predicted(self) -> float:
        """The difference of the two losses by the multiplier."""
        return -2.0 * self.change * self.multiplier

    @property
    def measured(self) -> float:
        """The difference of the two losses."""
        return self.above - self.below

    @property
    def error(self) -> float:
        """The distance of the two, relative to the measured one."""
        return abs(self.predicted - self.measured) / max(abs(self.measured), 1e-300)


def check_price(
    name: str, bound: float, change: float, multiplier: float, solve: Callable[[float], float]
) -> Price:
    """Solves a problem with a lower and a higher bound.

    Args:
        name: What is bounded.
        bound: The bound.
        change: By how much it is lowered and raised.
        multiplier: That of the constraint at the bound.
        solve: Returns the lowest loss for a bound.
    """
    return Price(name, bound, change, multiplier, solve(bound - change), solve(bound + change))


def print_prices(prices: Sequence[Price]) -> None:
    """Prints one row for each price."""
    header = ["bound on", "bound", "moved by", "multiplier", "loss by multiplier", "loss measured"]
    rows = [
        [
            price.name,
            f"{price.bound:g}",
            f"+-{price.change:g}",
            f"{price.multiplier:.5g}",
            f"{price.predicted:+.4e}",
            f"{price.measured:+.4e}",
            f"{price.error:.1e}",
        ]
        for price in prices
    ]
    print(format_table([*header, "difference"], rows))
