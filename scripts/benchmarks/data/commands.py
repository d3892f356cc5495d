"""The sub-commands that work with results: `release`, `compare`, `tables`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch_secondorder

from .compare import changes, machines, missing, regressions, share, table
from .figures import Figures
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
    if given.into.name[:1].isdigit() and given.into.name != torch_secondorder.__version__:
        measured = torch_secondorder.__version__
        print(f"bench: {given.into} is of another version: this is {measured}", file=sys.stderr)
    statuses = release(given.into, given.minutes, given.again, given.counts, given.only)
    if not statuses:
        print(f"bench: no part has {given.only!r} in its name", file=sys.stderr)
        return 2
    for title, status in statuses.items():
        print(f"{title}: {'measured' if status == 0 else status}")
    failed = [title for title, status in statuses.items() if isinstance(status, int) and status]
    return 1 if failed else 0


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path, metavar="OLD", help="a JSON file, or a folder of them")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument(
        "--fail-above",
        metavar="SHARE",
        help="exit with 1 if a figure is worse by more than this share and beyond the spread: 10%%",
    )
    parser.add_argument("--all", action="store_true", help="also what is within the spread")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="figures with this in their names"
    )


def _compare(given: argparse.Namespace) -> int:
    try:
        threshold = share(given.fail_above) if given.fail_above is not None else None
        old, new = Figures.read(given.old), Figures.read(given.new)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    found = [change for change in changes(old, new) if given.only in change.name]
    shown = [change for change in found if given.all or change.beyond_spread]
    print(f"old: {'; '.join(sorted(machines(old)))}\nnew: {'; '.join(sorted(machines(new)))}")
    if machines(old) != machines(new):
        print("The machines differ: times are not comparable, ratios and counts are.")
    print(table(shown, f"{len(shown)} of {len(found)} figures") if shown else "nothing changed")
    lost = [name for name in missing(old, new) if given.only in name]
    if lost:
        print(f"\nnot in the new figures: {len(lost)}, such as {', '.join(lost[:5])}")
    if threshold is None:
        return 0
    bad = regressions(found, threshold)
    for change in bad:
        print(f"worse by more than {threshold:.0%}: {change.name}, {change.worse:+.1%}")
    return 1 if bad else 0


WORK: dict[str, Work] = {
    "compare": Work(
        "what changed between two files or folders of results", _compare_arguments, _compare
    ),
    "release": Work("measure what a release publishes, part by part", _release_arguments, _release),
    "tables": Work(
        "write figures into README.md and docs/, and draw plots", _tables_arguments, _tables
    ),
}
