"""The table of sub-commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .report import Report


@dataclass(frozen=True)
class Options:
    """What the command line asks of a sub-command.

    Attributes:
        device: Where models and data are placed.
        repeat: Timed rounds; every candidate runs once in each.
        quick: Smaller sizes and shorter limits, to see that it works.
        part: The one part of the sub-command to run; None runs all.
        seconds: About how long all runs against the clock together may take; None for as long as
            they ask for.
    """

    device: torch.device
    repeat: int
    quick: bool = False
    part: str | None = None
    seconds: float | None = None

    def wants(self, part: str | None) -> bool:
        """Whether a part is to run."""
        return self.part is None or self.part == part

    def share(self, wanted: float, runs: int) -> float:
        """How long one of several runs may take that each want so many seconds.

        A quarter of the time is for what is done before and beside them.
        """
        if self.seconds is None:
            return wanted
        return min(wanted, 0.75 * self.seconds / max(runs, 1))


Run = Callable[[Options, Report], None]


@dataclass(frozen=True)
class Command:
    """A sub-command: its name, one line of help, the names of its parts and what it does."""

    name: str
    help: str
    parts: tuple[str, ...]
    run: Run


COMMANDS: dict[str, Command] = {}


def command(name: str, summary: str, parts: tuple[str, ...] = ()) -> Callable[[Run], Run]:
    """Enters a function in the table of sub-commands."""

    def register(run: Run) -> Run:
        COMMANDS[name] = Command(name, summary, parts, run)
        return run

    return register
