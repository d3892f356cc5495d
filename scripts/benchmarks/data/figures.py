"""Figures: the numbers of a benchmark with units and spreads, one a line in a JSON file.

Benchmarks record nested results (`report.Report`). A figure is one number of these under the
dotted path that leads to it, such as `lbfgs.direction.1000000.ratio`. Files are sorted and rounded,
so that a difference of two versions shows what was measured anew and nothing else.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Significant digits that are kept; the times of two runs differ in the second or third.
DIGITS = 5
#: The parts of a spread in the order of size; `rounds` says how many samples they are of.
SPREAD = ("min", "lower", "upper", "max")

#: The note of a record without times.
COUNTS = "Counts only: times were not taken."
#: Processes that want to run, for each core, above which times are not to be trusted.
BUSY = 1.5

_TIMING = {"median", "min", "max", "rounds"}
_RATIO = {"of_medians", "minimum", "median", "maximum"}
#: Keys whose whole content has one unit, and keys of single numbers; all others have no unit.
_CONTENT = {
    **dict.fromkeys(("seconds", "time", "per iteration", "time per step", "seconds per step"), "s"),
    **dict.fromkeys(("calls", "evaluations", "products", "iterations", "ball"), "count"),
    **dict.fromkeys(("shares", "overhead", "ratios", "over", "NewtonCG over"), "ratio"),
    **dict.fromkeys(("bytes", "memory"), "B"),
}
_COUNTS = {"solved", "reached", "problems", "both", "fewer digits"}
_NUMBERS = {
    **dict.fromkeys(("function", "total", "beside", "floor", "first call", "product"), "s"),
    **dict.fromkeys(("time in all", "time_per_evaluation", "bound", "limit"), "s"),
    **dict.fromkeys(("peak", "early", "late", "state", "held"), "B"),
    **dict.fromkeys(("n", "size", "rows", "images", "parameters", "problems", "solved"), "count"),
    **dict.fromkeys(("evaluations", "iterations", "products", "jacobians", "steps"), "count"),
    **dict.fromkeys(("gradients", "hessians", "reached", "first", "both", "tensor calls"), "count"),
    **dict.fromkeys(("geometric_mean", "ratio_of_sums", "largest", "score over"), "ratio"),
    "bytes per second": "B/s",
}
#: What a run ended with, which a table of evaluations does not need.
_DROPPED = {"gradient", "value", "is_known_minimum", "gradients, a product for two"}
_DROPPED |= {"distance", "residual", "is_minimum"}


@dataclass(frozen=True)
class Figure:
    """One number that was measured.

    Attributes:
        value: The number to quote; of several samples the median. NaN if only the range is known.
        unit: `"s"`, `"B"`, `"B/s"`, `"count"`, `"ratio"`, `"bool"`, or `"1"` for all else.
        spread: Smallest sample, quartiles and largest sample by the names of `SPREAD`, as far as
            they are known.
        rounds: The number of samples.
    """

    value: float
    unit: str = "1"
    spread: Mapping[str, float] | None = None
    rounds: int = 1

    @property
    def low(self) -> float:
        """The smallest sample."""
        return (self.spread or {}).get("min", self.value)

    @property
    def high(self) -> float:
        """The largest sample."""
        return (self.spread or {}).get("max", self.value)

    def part(self, name: str) -> float:
        """A part of the spread by its name, or the value."""
        return (self.spread or {}).get(name, self.value) if name else self.value

    def as_dict(self) -> dict[str, Any]:
        """The line of the JSON file."""
        known = math.isfinite(self.value)
        line: dict[str, Any] = {"value": rounded(self.value) if known else None, "unit": self.unit}
        for name in SPREAD:
            if self.spread and name in self.spread:
                line[name] = rounded(self.spread[name])
        if self.rounds > 1:
            line["rounds"] = self.rounds
        return line

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Figure:
        """Reads a line of the JSON file."""
        spread = {name: float(line[name]) for name in SPREAD if name in line}
        value = math.nan if line["value"] is None else line["value"]
        return cls(value, line["unit"], spread or None, line.get("rounds", 1))


def rounded(value: float) -> float | int:
    """A number as it is written: integers whole, others to `DIGITS` digits."""
    if isinstance(value, int):
        return value
    if value.is_integer() and abs(value) < 1e15:
        return int(value)
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def slug(key: object) -> str:
    """A key of the results as a part of a name: no blanks, brackets or commas.

    >>> slug("BFGS, ssbroyden (ours) / LBFGS")
    'BFGS_ssbroyden_ours_over_LBFGS'
    """
    text = re.sub(r"\s*/\s*", "_over_", str(key).strip())
    return re.sub(r"_+", "_", re.sub(r"[^\w.+=@%<>|*'-]+|-{2,}", "_", text)).strip("_")


def unit_of(path: Sequence[str]) -> str:
    """The unit of a number, by the keys that lead to it.

    >>> unit_of(["minimize", "wood", "evaluations"]), unit_of(["runs", "ours", "seconds", "1e-5"])
    ('count', 's')
    """
    last = path[-1]
    if last in _COUNTS:
        return "count"
    if last == "time in all":
        return "s"
    if ".ratios" in path[0] or " / " in last or last.startswith("ratio") or "over " in last:
        return "ratio"
    for key in path:
        if key in _CONTENT:
            return _CONTENT[key]
    return _NUMBERS.get(last, "1")


def flatten(results: Mapping[str, Any]) -> dict[str, Figure]:
    """All figures of a benchmark's results by their names, in the order in which people sort.

    Timings and ratios become one figure with a spread. A list of results is one figure for each
    number in them, with the spread over the list. Texts and lists of numbers, such as the course of
    a loss, are left out; of a list of texts, such as problems that were not solved, the length is
    kept.
    """
    found = {slug(name): figure for name, figure in _leaves((), results)}
    return {name: found[name] for name in sorted(found, key=natural)}


def natural(name: str) -> list[tuple[int, float, str]]:
    """A key for sorting by which 20 comes before 100."""
    pieces = re.split(r"(\d+)", name)
    return [(0, float(piece), "") if piece.isdigit() else (1, 0.0, piece) for piece in pieces]


def _name(path: Sequence[str]) -> str:
    return ".".join(slug(key) for key in path)


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[str, Figure]]:
    if path and path[-1] in _DROPPED:
        return
    if isinstance(value, bool):
        yield _name(path), Figure(int(value), "bool")
    elif isinstance(value, (int, float)):
        if math.isfinite(value):
            yield _name(path), Figure(value, unit_of(path))
    elif isinstance(value, Mapping):
        if _is_summary(value):
            yield from _summary(path, value)
            value = {key: value[key] for key in set(value) - _TIMING - _RATIO - set(SPREAD)}
        for key, entry in value.items():
            yield from _leaves((*path, str(key)), entry)
    elif isinstance(value, (list, tuple)):
        yield from _list(path, value)


def _is_summary(value: Mapping[str, Any]) -> bool:
    return set(value) >= _TIMING or set(value) == _RATIO


def _summary(path: tuple[str, ...], value: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """A `Timing` or a `Ratio`."""
    if set(value) == _RATIO:
        if value["of_medians"] is not None:
            low, high = value["minimum"], value["maximum"]
            yield _name(path), Figure(value["of_medians"], "ratio", {"min": low, "max": high})
        return
    if value["median"] is not None:
        spread = {part: value[part] for part in SPREAD if value.get(part) is not None}
        yield _name(path), Figure(value["median"], "s", spread, value["rounds"])


def _list(path: tuple[str, ...], value: Sequence[Any]) -> Iterator[tuple[str, Figure]]:
    if all(isinstance(entry, str) for entry in value):
        yield _name(path), Figure(len(value), "count")
    elif all(isinstance(entry, Mapping) for entry in value):
        if any(_is_summary(entry) for entry in value):
            for index, entry in enumerate(value):
                yield from _leaves((*path, str(index)), entry)
            return
        samples: dict[str, list[Figure]] = {}
        for entry in value:
            for name, figure in _leaves(path, entry):
                samples.setdefault(name, []).append(figure)
        for name, figures in samples.items():
            yield name, of_samples([figure.value for figure in figures], figures[0].unit)


def of_samples(samples: Sequence[float], unit: str) -> Figure:
    """A figure of several samples: their median, quartiles and extremes."""
    if min(samples) == max(samples):
        return Figure(samples[0], unit, None, len(samples))
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    spread = {"min": min(samples), "lower": lower, "upper": upper, "max": max(samples)}
    if unit == "bool":  # the share of runs in which it is true
        return Figure(statistics.fmean(samples), unit, None, len(samples))
    return Figure(statistics.median(samples), unit, spread, len(samples))


@dataclass(frozen=True)
class Record:
    """The figures of one run of a benchmark, and where they were measured.

    Attributes:
        benchmark: The sub-command and its part.
        command: The command that measures them.
        environment: Machine and versions, see `report.environment`.
        figures: By their names.
        note: What else a reader has to know, such as that they were measured by hand.
        release: The release in whose folder the file is, or `""`.
    """

    benchmark: str
    command: str
    environment: Mapping[str, Any]
    figures: Mapping[str, Figure]
    note: str = ""
    release: str = ""

    @property
    def version(self) -> str:
        """The release, or the version of this package that was measured."""
        return self.release or str(self.environment.get("version", "0.1.0"))

    @property
    def was_busy(self) -> bool:
        """True if other work was waiting for the processor when the run began, and it matters."""
        load, cores = self.environment.get("load"), self.environment.get("cores")
        return bool(load and cores and load > BUSY * cores and COUNTS not in self.note)

    @property
    def device(self) -> str:
        """The accelerator, or `"cpu"`."""
        return str(self.environment.get("device", "cpu"))

    @property
    def machine(self) -> str:
        """The accelerator or the processor in a word or two."""
        name = self.device if self.device != "cpu" else str(self.environment.get("processor", "?"))
        for pattern in (r"H\d+|A\d+|RTX \w+|V\d+", r"AMD EPYC", r"Intel.*Xeon", r"Apple \w+"):
            found = re.search(pattern, name)
            if found:
                return re.sub(r"\(R\)", "", found.group())
        return name

    @classmethod
    def read(cls, path: Path) -> Record:
        """Reads a file of `release`, or one of `--json` and gpu_check.py with nested results."""
        document = json.loads(path.read_text(encoding="utf-8"))
        if "results" in document:
            figures = flatten(document["results"])
            command = document.get("command", "scripts/gpu_check.sh")
            title = document.get("benchmark", path.stem)
            return cls(title, command, document.get("environment") or {}, figures)
        figures = {name: Figure.from_dict(line) for name, line in document["figures"].items()}
        return cls(
            document["benchmark"],
            document["command"],
            document["environment"],
            figures,
            document.get("note", ""),
        )

    def write(self, path: Path) -> None:
        """Writes the file, at once when it is complete."""
        beside = path.with_name(path.name + ".part")
        beside.write_text(str(self), encoding="utf-8")
        beside.replace(path)

    def __str__(self) -> str:
        """The content of the file: each figure is a line."""
        head: dict[str, Any] = {"benchmark": self.benchmark, "command": self.command}
        if self.note:
            head["note"] = self.note
        head["environment"] = self.environment
        text = json.dumps(head, indent=1, ensure_ascii=False)
        lines = [
            f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(self.figures[name].as_dict())}"
            for name in sorted(self.figures, key=natural)
        ]
        figures = ",\n".join(lines)
        return text.removesuffix("\n}") + ',\n "figures": {\n' + figures + "\n }\n}\n"


def version_key(version: str) -> tuple[int, ...]:
    """A key for sorting versions."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


class Figures:
    """All figures that are kept, the newest version first.

    Args:
        records: The runs of benchmarks.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = sorted(records, key=lambda record: version_key(record.version), reverse=True)

    @classmethod
    def read(cls, path: Path) -> Figures:
        """Reads a file, or all files of a folder and of its folders."""
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"there are no JSON files in {path}")
        return cls([Record.read(file) for file in files])

    def candidates(self, name: str) -> list[tuple[Record, Figure]]:
        """All measurements of `name`, which may end with `@` and a part of the device's name.

        Without that, figures are of the CPU.
        """
        name, _, device = name.partition("@")
        wanted = device.casefold() or "cpu"
        return [
            (record, record.figures[name])
            for record in self.records
            if name in record.figures and wanted in record.device.casefold()
        ]

    def find(self, names: Sequence[str]) -> tuple[list[Record], list[Figure]]:
        """The newest measurements of several figures that are of the same version.

        Raises:
            KeyError: There is no version with all of them.
        """
        options = [self.candidates(name) for name in names]
        for name, found in zip(names, options, strict=True):
            if not found:
                raise KeyError(f"there is no figure {name}{self._near(name)}")
        versions = {record.version for record, _ in options[0]} if options else set()
        for version in sorted(versions, key=version_key, reverse=True):
            chosen = [
                next((pair for pair in found if pair[0].version == version), None)
                for found in options
            ]
            pairs = [pair for pair in chosen if pair is not None]
            if len(pairs) == len(names):
                return [record for record, _ in pairs], [figure for _, figure in pairs]
        raise KeyError(f"no version has all of {', '.join(names)}")

    def _near(self, name: str) -> str:
        """A hint at names that begin in the same way."""
        stem = name.partition("@")[0]
        known = {key for record in self.records for key in record.figures}
        while "." in stem:
            stem = stem.rpartition(".")[0]
            near = sorted((key for key in known if key.startswith(stem + ".")), key=natural)
            if near:
                return f"; there are {', '.join(near[:6])}{', ...' if len(near) > 6 else ''}"
        return ""
