"""Results of a benchmark: aligned tables for people, one JSON document for programs."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import torch_secondorder

from .harness import say

_PEERS = (
    "scipy",
    "curvlinops-for-pytorch",
    "pytorch-optimizer",
    "heavyball",
    "pytorch-minimize",
    "optimistix",
    "jax",
    "torch-levenberg-marquardt",
    "torch-optimizer",
    "hessianfree",
    "cooper-optim",
    "cyipopt-wheels",
    "nlopt",
    "geotorch",
    "geoopt",
    "pymanopt",
)


@dataclass
class Table:
    """A text table with the first column aligned left and the others right."""

    title: str
    header: Sequence[str]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Appends a row."""
        if len(cells) != len(self.header):
            raise ValueError(f"{len(cells)} cells in a table of {len(self.header)} columns")
        self.rows.append(tuple(str(cell) for cell in cells))

    def __str__(self) -> str:
        """The table as aligned text."""
        lines = [tuple(self.header), *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [f"\n{self.title}"]
        for line in lines:
            first, *others = (
                cell.rjust(width) if index else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            text.append("  ".join([first, *others]).rstrip())
        text.insert(2, "-" * (sum(widths) + 2 * len(widths) - 2))
        return "\n".join(text)


def seconds(value: float) -> str:
    """A duration with three digits and a suitable unit."""
    if not math.isfinite(value):
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def number(value: float, digits: int = 3) -> str:
    """A number with a number of digits; a dash for NaN and infinity."""
    return f"{value:.{digits}g}" if math.isfinite(value) else "-"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Describes the machine and the software that made the numbers."""
    is_cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": torch_secondorder.__version__,
        "commit": _commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_cuda else None,
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Close to zero on a machine that is suitable for measurements.
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "peers": {name: _version(name) for name in _PEERS},
    }


class Report:
    """Collects results under dotted names, prints tables immediately, and writes the JSON file.

    Args:
        device: The device of the benchmarks.
        path: The JSON file, or None. It is written after each result, so that an interrupted run
            keeps its results.
    """

    def __init__(self, device: torch.device, path: Path | None = None) -> None:
        self.path = path
        self.command = shlex.join(["python", "scripts/bench.py", *sys.argv[1:]])
        self.environment = environment(device)
        self.results: dict[str, Any] = {}

    def show(self, table: Table) -> None:
        """Prints a table."""
        say(str(table))

    def record(self, name: str, value: Any) -> None:
        """Keeps a result for the JSON file."""
        self.results[name] = value
        self.write()

    def write(self) -> None:
        """Writes the results so far."""
        if self.path is None:
            return
        document = {
            "command": self.command,
            "environment": self.environment,
            "results": self.results,
        }
        # JSON has no NaN and no infinity: both become null.
        beside = self.path.with_name(self.path.name + ".part")  # replaced at once when complete
        beside.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")
        beside.replace(self.path)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
