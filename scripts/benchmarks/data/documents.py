"""Figures in documents: markers in Markdown that are filled from the JSON files.

A figure in a text stands between two comments, which no page shows:

    <!-- figure: lbfgs.direction.1000000.ratio; .2f -->0.47<!-- /figure -->

The name is that of a figure, or of two with `/` between them; `:min`, `:lower`, `:upper` or `:max`
takes that part of the spread, and `@h100` that device. After the semicolon follows a format, see
`form`. A table stands between `<!-- generated: NAME -->` and `<!-- /generated -->`; its template is
`scripts/benchmarks/tables/NAME.md`, with `{{name; format}}` for a figure. All figures of a row are
of one version, the newest that has all of them, and `{{measured}}` says which that is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .figures import Figure, Figures, Record

TABLES = Path(__file__).resolve().parents[1] / "tables"

_FIGURE = re.compile(r"<!-- figure: ([^;>]+?)(?:; ([^>]+?))? -->(.*?)<!-- /figure -->", re.DOTALL)
_BLOCK = re.compile(r"<!-- generated: ([\w-]+) -->\n(.*?)<!-- /generated -->", re.DOTALL)
_HOLE = re.compile(r"\{\{\s*([^;}]+?)\s*(?:;\s*([^}]+?)\s*)?\}\}")
_OPENED = re.compile(r"<!-- (?:figure|generated):")
# Blocks of code, inline code, targets of links.
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`|\]\([^)]*\)", re.DOTALL | re.MULTILINE)
_UNIT = "%|(?:ns|us|µs|ms|s|GiB|MiB|KiB|kB|bytes|times|(?:micro|milli)?seconds|minutes)\\b"
_MEASURED = re.compile(rf"(?<![\w.])\d[\d,.]*(?:e-?\d+)?(?<!,)\s?(?:{_UNIT})")
_DECIMAL = re.compile(r"(?<![\w.])(?<!Python )(?<!orch )\d+\.\d+(?:e-?\d+)?(?![\w.]*\d)")
_SUFFIX = re.compile(r":(min|lower|upper|max)(?=@|$)")


@dataclass(frozen=True)
class Asked:
    """A figure, or a quotient of two, as it is written in a marker.

    Attributes:
        names: The names of one or two figures.
        parts: The part of the spread that is asked for; `""` for the value.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Asked:
        """Reads the text of a marker."""
        pieces = [piece.strip() for piece in text.split(" / ")]
        found = [_SUFFIX.search(piece) for piece in pieces]
        names = tuple(_SUFFIX.sub("", piece) for piece in pieces)
        return cls(names, tuple(match.group(1) if match else "" for match in found))

    def value(self, figures: list[Figure]) -> tuple[float, str]:
        """The number and its unit."""
        values = [figure.part(part) for figure, part in zip(figures, self.parts, strict=True)]
        if len(values) == 1:
            return values[0], figures[0].unit
        return values[0] / values[1], "ratio"


def form(value: float, unit: str, spec: str = "") -> str:
    """A number as text.

    Args:
        value: The number.
        unit: Its unit.
        spec: A format of Python such as `.2f`, `.0%` or `,d`; `time` or `time2` for a time with
            three or two digits and a suitable unit; `bytes`; `inverse`, and a format after it, for
            one over the number. By default it depends on the unit.

    >>> form(5.21e-5, "s"), form(1856, "count"), form(2.6e-6, "1", ".1e"), form(0.25, "ratio")
    ('52.1 us', '1,856', '2.6e-6', '0.25')
    """
    if value != value:
        raise ValueError("only the range of a figure is known: ask for its :min and :max")
    if spec.startswith("inverse"):
        return form(1.0 / value, "ratio", spec.removeprefix("inverse").strip())
    if spec.startswith("time") or (not spec and unit == "s"):
        return _time(value, int(spec.removeprefix("time") or 3))
    if spec == "bytes" or (not spec and unit == "B"):
        return _bytes(value)
    default = {"count": ",.0f", "ratio": ".2f", "B/s": ".3g"}.get(unit, ".3g")
    spec = spec or default
    number = int(value) if spec.endswith("d") else value
    return re.sub(r"e([+-])0?(\d)", lambda m: f"e{m[1].strip('+')}{m[2]}", format(number, spec))


def _time(value: float, digits: int) -> str:
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
    unit, scale = next((pair for pair in units if value >= pair[1]), ("ns", 1e-9))
    text = f"{value / scale:#.{digits}g}"
    if "e" in text:  # a time of more digits than are shown
        text = f"{float(text):,.0f}"
    return f"{text.rstrip('.')} {unit}"


def _bytes(value: float) -> str:
    # Bytes are counted up to ten thousand, as far as people read them.
    for unit, scale, least in (("GiB", 2**30, 1.0), ("MiB", 2**20, 1.0), ("KiB", 2**10, 10.0)):
        if value >= least * scale:
            number = value / scale
            return f"{number:,.0f} {unit}" if number >= 100.0 else f"{number:.3g} {unit}"
    return f"{value:,.0f} bytes"


def label(records: list[Record], newest: str = "") -> str:
    """The version and machine of a row; an older version than `newest` is marked as such."""
    machines = sorted({record.machine for record in records})
    version = records[0].version
    threads = {record.environment.get("threads") for record in records}
    text = f"{version}, {' and '.join(machines)}"
    if len(threads) == 1 and (count := threads.pop()) and records[0].device == "cpu":
        text += f", {count} thread{'s' if count != 1 else ''}"
    if any(record.was_busy for record in records):
        text += ", beside other work"
    if any(record.note.startswith("Incomplete") for record in records):
        text += ", not all of it"
    return text if version == (newest or version) else f"*{text}*"


def fill_row(line: str, figures: Figures) -> str:
    """A row or an item of a template with its figures, all of them of one version.

    Raises:
        KeyError: There is no such figure, or no version with all of them.
    """
    holes = [(text, spec) for text, spec in _HOLE.findall(line) if text != "measured"]
    asked = {text: Asked.parse(text) for text, _ in holes}
    names = list(dict.fromkeys(name for each in asked.values() for name in each.names))
    if not names:
        return line
    records, found = figures.find(names)
    table = dict(zip(names, found, strict=True))

    def text_of(match: re.Match[str]) -> str:
        if match[1] == "measured":
            return label(records, figures.records[0].version)
        each = asked[match[1]]
        value, unit = each.value([table[name] for name in each.names])
        return form(value, unit, match[2] or "")

    return _HOLE.sub(text_of, line)


def fill_template(text: str, figures: Figures) -> str:
    """A template with its figures, row by row; indented lines belong to the line above."""
    rows = re.split(r"\n(?!  )", text.removesuffix("\n"))
    return "\n".join(fill_row(row, figures) for row in rows) + "\n"


def fill(text: str, figures: Figures, tables: Path = TABLES) -> str:
    """A document with its markers filled.

    Raises:
        KeyError: A figure is not in any file.
        ValueError: A marker is not closed, or has no template.
    """
    opened = len(_OPENED.findall(text))
    closed = len(_FIGURE.findall(text)) + len(_BLOCK.findall(text))
    if opened != closed:
        raise ValueError(f"{opened} markers are opened, and {closed} of them closed")

    def figure(match: re.Match[str]) -> str:
        asked = Asked.parse(match[1])
        value, unit = asked.value(figures.find(asked.names)[1])
        shown = form(value, unit, match[2] or "")
        return match[0].replace(f"-->{match[3]}<!--", f"-->{shown}<!--")

    def block(match: re.Match[str]) -> str:
        template = tables / f"{match[1]}.md"
        if not template.exists():
            raise ValueError(f"the block {match[1]} has no template {template.name} in {tables}")
        made = fill_template(template.read_text(encoding="utf-8"), figures).strip("\n")
        return f"<!-- generated: {match[1]} -->\n\n{made}\n\n<!-- /generated -->"

    return _FIGURE.sub(figure, _BLOCK.sub(block, text))


def without_figures(text: str) -> str:
    """A document without what is filled: what is left was written by hand."""
    return _FIGURE.sub("", _BLOCK.sub("", text))


def loose_figures(text: str, decimals: bool = False) -> list[str]:
    """Numbers with a unit of time, memory or a share in a document's prose that are in no marker.

    Args:
        text: The document.
        decimals: Find numbers with a decimal point as well, except for versions.
    """
    prose = _CODE.sub("", without_figures(text))
    found = [match.group() for match in _MEASURED.finditer(prose)]
    if decimals:
        found += [match.group() for match in _DECIMAL.finditer(prose)]
    return found


def documents(root: Path) -> Iterator[Path]:
    """All documents that may have markers."""
    yield root / "README.md"
    yield from sorted((root / "docs").rglob("*.md"))
