"""Comparison of two sets of figures: `scripts/bench.py compare OLD NEW`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..report import Table
from .documents import form, label
from .figures import Figure, Figures, Record, natural

#: Where more is better, by the last words of a name; else it is less.
_MORE = re.compile(r"(solved|digits|accuracy|within_the_bar|is_known_minimum|both|problems)$")
#: Numbers that describe the problem or the machine, of which neither is better.
_NEITHER = re.compile(r"(\.n|\.size|\.rows|\.images|\.parameters|bytes_per_second|\.rate|floor)$")
#: Changes below this share are those of rounding, where there is no spread.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Change:
    """One figure in both sets.

    Attributes:
        name: The name of the figure.
        old: The figure before.
        new: The figure after.
    """

    name: str
    old: Figure
    new: Figure

    @property
    def relative(self) -> float:
        """The change as a share of the old value; infinite if that was zero."""
        if self.new.value == self.old.value:
            return 0.0
        if self.old.value == 0.0:
            return math.copysign(math.inf, self.new.value)
        return (self.new.value - self.old.value) / abs(self.old.value)

    @property
    def beyond_spread(self) -> bool:
        """True if the middle halves of the samples do not overlap.

        Of a figure without quartiles all samples count, and of one without a spread the value.
        """
        ranges = []
        for figure in (self.old, self.new):
            spread = figure.spread or {}
            low = spread.get("lower", spread.get("min", figure.value))
            high = spread.get("upper", spread.get("max", figure.value))
            ranges.append((low, high))
        (low, high), (new_low, new_high) = ranges
        return (new_low > high or new_high < low) and abs(self.relative) > _ROUNDING

    @property
    def worse(self) -> float:
        """The share by which the figure is worse; negative if better, 0 if that has no meaning."""
        if _NEITHER.search(self.name):
            return 0.0
        return -self.relative if _MORE.search(self.name) else self.relative

    @property
    def verdict(self) -> str:
        """The change in a word."""
        if not self.beyond_spread:
            return "within the spread"
        if self.worse == 0.0:
            return "changed"
        return "worse" if self.worse > 0.0 else "better"


def changes(old: Figures, new: Figures) -> list[Change]:
    """The figures that both have, of the newest version in each, sorted by their names."""
    before, after = _by_name(old), _by_name(new)
    return [
        Change(name, before[name], after[name])
        for name in sorted(before.keys() & after.keys(), key=natural)
    ]


def _by_name(figures: Figures) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for record in figures.records:
        for name, figure in record.figures.items():
            if math.isfinite(figure.value):
                found.setdefault(_key(record, name), figure)
    return found


def _key(record: Record, name: str) -> str:
    return name if record.device == "cpu" else f"{name}@{record.machine}"


def regressions(found: Sequence[Change], threshold: float) -> list[Change]:
    """The figures that are worse by more than a share, and beyond the spread."""
    return [change for change in found if change.beyond_spread and change.worse > threshold]


def table(found: Sequence[Change], title: str) -> Table:
    """The changes for people."""
    made = Table(title, ["figure", "old", "[min max]", "new", "[min max]", "change", ""])
    for change in found:
        cells = []
        for figure in (change.old, change.new):
            cells += [form(figure.value, figure.unit), _spread(figure)]
        relative = change.relative
        shown = f"{relative:+.1%}" if abs(relative) < 10.0 else f"x {1.0 + relative:.3g}"
        made.add(change.name, *cells, shown, change.verdict)
    return made


def _spread(figure: Figure) -> str:
    if not figure.spread:
        return ""
    return f"[{form(figure.low, figure.unit)} {form(figure.high, figure.unit)}]"


def machines(figures: Figures) -> set[str]:
    """The machines, with the number of threads where it is known."""
    return {label([record]).partition(", ")[2] for record in figures.records}


def missing(old: Figures, new: Figures) -> list[str]:
    """The figures that only the old set has."""
    return sorted(_by_name(old).keys() - _by_name(new).keys(), key=natural)


def share(text: str) -> float:
    """Reads a share such as `10%` or `0.1`.

    Raises:
        ValueError: It is neither, or negative.
    """
    value = float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
    if not value >= 0.0:
        raise ValueError(f"a share must not be negative, got {text}")
    return value
