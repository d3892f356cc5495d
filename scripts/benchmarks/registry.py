"""The table of sub-commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from .report import Report

Contender = TypeVar("Contender")


@dataclass(frozen=True)
class Options:
    """The command line's options for a sub-command.

    Attributes:
        device: The device of models and data.
        repeat: Number of timed rounds; every candidate runs once in each.
        quick: Smaller sizes and shorter limits, to check that it works.
        part: The only part of the sub-command to run; None runs all.
        seconds: Approximate time for all timed runs together; None for their own limits.
        only: Text that names of contenders must contain, in any case; None takes all.
    """

    device: torch.device
    repeat: int
    quick: bool = False
    part: str | None = None
    seconds: float | None = None
    only: str | None = None

    def wants(self, part: str | None) -> bool:
        """True if a part should run."""
        return self.part is None or self.part == part

    def chosen(self, contenders: Mapping[str, Contender]) -> dict[str, Contender]:
        """The contenders whose names contain the text that was asked for.

        Raises:
            ValueError: None does.
        """
        only = (self.only or "").casefold()
        chosen = {name: entry for name, entry in contenders.items() if only in name.casefold()}
        if not chosen:
            raise ValueError(f"--only {self.only} is in no name of {', '.join(contenders)}")
        return chosen

    def share(self, wanted: float, runs: int) -> float:
        """The time limit for each of several runs.

        A quarter of the total time is reserved for other work.

        Args:
            wanted: The limit that each run would have by itself.
            runs: Number of runs.
        """
        if self.seconds is None:
            return wanted
        return min(wanted, 0.75 * self.seconds / max(runs, 1))


Run = Callable[[Options, Report], None]


@dataclass(frozen=True)
class Command:
    """A sub-command: its name, one line of help, the names of its parts and its function."""

    name: str
    help: str
    parts: tuple[str, ...]
    run: Run


COMMANDS: dict[str, Command] = {}


def command(name: str, summary: str, parts: tuple[str, ...] = ()) -> Callable[[Run], Run]:
    """Registers a function in the table of sub-commands."""

    def register(run: Run) -> Run:
        COMMANDS[name] = Command(name, summary, parts, run)
        return run

    return register
