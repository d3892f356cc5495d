"""The sub-commands that work with results: `release`, `compare`, `tables`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .publish import ROOT, publish
from .release import release


@dataclass(frozen=True)
class Work:
    """A sub-command: one line of help, its arguments, and its function."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _tables_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")


def _tables(given: argparse.Namespace) -> int:
    try:
        stale = publish(given.check)
    except (KeyError, ValueError) as error:
        print(f"bench: {error.args[0]}", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{'out of date' if given.check else 'wrote'}: {path.relative_to(ROOT)}")
    return 1 if given.check and stale else 0


def _release_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=35.0, metavar="N")
    parser.add_argument("--again", action="store_true", help="also the parts that are there")
    parser.add_argument("--counts", action="store_true", help="only what is counted, without times")
    parser.add_argument("--only", default="", metavar="TEXT", help="parts with this in their names")


def _release(given: argparse.Namespace) -> int:
    statuses = release(given.into, given.minutes, given.again, given.counts, given.only)
    if not statuses:
        print(f"bench: no part has {given.only!r} in its name", file=sys.stderr)
        return 2
    for title, status in statuses.items():
        print(f"{title}: {'measured' if status == 0 else status}")
    failed = [title for title, status in statuses.items() if isinstance(status, int) and status]
    return 1 if failed else 0


WORK: dict[str, Work] = {
    "release": Work("measure what a release publishes, part by part", _release_arguments, _release),
    "tables": Work(
        "write figures into README.md and docs/, and draw plots", _tables_arguments, _tables
    ),
}
