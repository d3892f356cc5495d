"""Timing of candidates side by side, and imports of optional peers.

Machines are noisy: other processes, clock changes and page faults change a time by tens of percent
from one minute to the next. Therefore candidates take turns in one process, so that a slow moment
affects all of them, and reports contain medians, and ratios within a round.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
_SAID: set[str] = set()


@dataclass(frozen=True)
class Timing:
    """Seconds per call, with one sample per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        """The fastest sample."""
        return min(self.samples)

    @property
    def maximum(self) -> float:
        """The slowest sample."""
        return max(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile of the samples."""
        if len(self.samples) < 2:
            return self.median, self.median
        lower, _, upper = statistics.quantiles(self.samples, n=4, method="inclusive")
        return lower, upper

    def as_dict(self) -> dict[str, float | int]:
        """The summary that goes into the JSON file."""
        lower, upper = self.quartiles
        return {
            "median": self.median,
            "min": self.minimum,
            "lower": lower,
            "upper": upper,
            "max": self.maximum,
            "rounds": len(self.samples),
        }


@dataclass(frozen=True)
class Ratio:
    """One candidate's time over another's.

    Attributes:
        of_medians: The ratio of the two medians; quote this number.
        minimum: The smallest ratio within a round.
        median: The median ratio within a round.
        maximum: The largest ratio within a round.
    """

    of_medians: float
    minimum: float
    median: float
    maximum: float

    def __str__(self) -> str:
        """The number to quote, and the spread over the rounds."""
        return f"{self.of_medians:.2f} [{self.minimum:.2f} {self.median:.2f} {self.maximum:.2f}]"

    def as_dict(self) -> dict[str, float]:
        """The fields that go into the JSON file."""
        return dict(vars(self))


def ratio(candidate: Timing, base: Timing) -> Ratio:
    """Compares two timings from the same call of `alternate`."""
    pairs = zip(candidate.samples, base.samples, strict=True)
    rounds = [ours / theirs for ours, theirs in pairs]
    of_medians = candidate.median / base.median
    return Ratio(of_medians, min(rounds), statistics.median(rounds), max(rounds))


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean; NaN for an empty sequence."""
    return statistics.geometric_mean(values) if values else float("nan")


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample(
    call: Callable[[], object],
    calls: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    synchronize(device)
    start = clock()
    for _ in range(calls):
        call()
    synchronize(device)
    return (clock() - start) / calls


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    repeat: int,
    device: torch.device | str = "cpu",
    min_seconds: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times candidates in turns in one process.

    Each candidate is warmed up, then called in every round until the sample has taken about
    `min_seconds`. The order is reversed every other round, so that none always follows the same
    other one.

    Args:
        candidates: Functions without arguments, by name.
        repeat: The number of rounds.
        device: The device to wait for before reading the time.
        min_seconds: The smallest duration of one sample; 0 for a single call.
        clock: Reads the time. `time.process_time` leaves out what other processes get.

    Returns:
        A timing for each candidate, in the order given.
    """
    device = torch.device(device)
    calls = {}
    for name, call in candidates.items():
        _sample(call, 1, device)  # the warm-up: allocations, kernel selection, lazy imports
        once = _sample(call, 1, device) if min_seconds > 0 else min_seconds
        calls[name] = max(1, round(min_seconds / max(once, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeat):
        names = list(candidates)
        for name in reversed(names) if turn % 2 else names:
            samples[name].append(_sample(candidates[name], calls[name], device, clock))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def load_peer(module: str, package: str | None = None) -> ModuleType | None:
    """Imports a peer, or prints one line that it is skipped.

    Args:
        module: The module's dotted name.
        package: The package to install; by default the module's first name.

    Returns:
        The module, or None if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = package or module.split(".")[0]
        if name not in _SAID:
            _SAID.add(name)
            say(f"skipped: {name} is not installed (no module named {error.name!r})")
        return None


def load_ours(module: str, name: str) -> Any | None:
    """Gets one of this library's names, or prints one line that it is missing."""
    found = load_peer(module, f"{module}.{name}")
    if found is not None and not hasattr(found, name):
        say(f"skipped: {module} has no {name}")
        return None
    return getattr(found, name, None)


def load_support(name: str) -> ModuleType:
    """Loads a module of tests/support by its path: other packages may install a module `tests`."""
    path = Path(__file__).resolve().parents[2] / "tests" / "support" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"_bench_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def say(line: str, end: str = "\n") -> None:
    """Prints a line immediately, so that you see it while the benchmark runs."""
    print(line, end=end, flush=True)


def progress(items: Iterable[Item], title: str) -> Iterator[Item]:
    """Iterates with a progress bar on a terminal with tqdm, else with plain lines."""
    entries = list(items)
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
        tqdm = importlib.import_module("tqdm").tqdm
        yield from tqdm(entries, desc=title, leave=False, dynamic_ncols=True)
        return
    said = float("-inf")
    for index, item in enumerate(entries, start=1):
        if time.monotonic() - said > 10.0:
            said = time.monotonic()
            print(f"{title}: {index} of {len(entries)}", file=sys.stderr, flush=True)
        yield item


@contextmanager
def threads(count: int) -> Iterator[None]:
    """A context with another number of CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
