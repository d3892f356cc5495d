"""Compares this library with its peers: `python scripts/bench.py SUBCOMMAND [--json FILE]`.

Three more sub-commands work with results: `release` measures all that a release publishes,
`compare OLD NEW` says what changed, `tables` writes figures into README.md and docs/.

Candidates take turns in one process, see scripts/benchmarks/harness.py. Do not trust times from a
machine that does other work at the same time; ratios are a bit more reliable.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

# SciPy's BLAS would distribute even vectors of length two among threads, and wait at each call.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))  # the checkout may not be installed

from benchmarks import COMMANDS, Options  # noqa: E402
from benchmarks.data.commands import WORK  # noqa: E402
from benchmarks.report import Report  # noqa: E402


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    common.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    common.add_argument("--quick", action="store_true", help="smaller sizes, shorter limits")
    common.add_argument("--repeat", type=int, metavar="N", help="timed rounds (default: 5)")
    common.add_argument(
        "--seconds", type=float, metavar="N", help="approximate time for all timed runs"
    )
    common.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    common.add_argument(
        "--only", metavar="TEXT", help="contenders with this in their names (quasi_newton)"
    )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    for entry in COMMANDS.values():
        sub = commands.add_parser(entry.name, help=entry.help, parents=[common])
        if entry.parts:
            sub.add_argument("--part", choices=entry.parts, help="only this part (default: all)")
    for name, work in WORK.items():
        work.add_arguments(commands.add_parser(name, help=work.help))
    commands.add_parser("all", help="every sub-command, into one JSON file", parents=[common])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sub-commands of the command line."""
    given = parse(arguments)
    if given.command in WORK:
        return WORK[given.command].run(given)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda, but torch sees no CUDA device", file=sys.stderr)
        return 1
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    repeat = given.repeat if given.repeat is not None else (2 if given.quick else 5)
    if repeat < 1:
        print(f"bench: --repeat must be at least 1, not {repeat}", file=sys.stderr)
        return 2
    device = torch.device(given.device)
    if device.type == "cuda":
        # By default convolutions round to ten bits, which makes results incomparable.
        torch.backends.cudnn.allow_tf32 = False
    part = getattr(given, "part", None)
    options = Options(device, repeat, given.quick, part, given.seconds, given.only)
    report = Report(device, given.json)
    print("  ".join(f"{key} {value}" for key, value in report.environment.items()), flush=True)
    names = list(COMMANDS) if given.command == "all" else [given.command]
    parts = [(name, part) for name in names for part in COMMANDS[name].parts or (None,)]
    failed = []
    for name, part in parts:
        if not options.wants(part):
            continue
        title = f"{name} {part}" if part else name
        try:
            COMMANDS[name].run(replace(options, part=part), report)
        except Exception:
            # The other benchmarks still run, because time on a machine may be limited.
            print(f"bench: {title} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            failed.append(title)
            report.record(f"{title}.error", traceback.format_exc())
        report.write()
    if failed:
        print(f"bench: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
