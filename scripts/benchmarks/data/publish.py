"""Writes figures into documents, and draws the plots: `scripts/bench.py tables`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .documents import TABLES, documents, fill, fill_template
from .figures import Figures
from .profiles import draw, sections

ROOT = Path(__file__).resolve().parents[3]
#: The figures of all releases, each in a folder with its version.
FIGURES = ROOT / "scripts" / "benchmarks" / "figures"

#: Where the template of the page has the profiles.
PROFILES = "{{profiles}}"


def read_figures(folder: Path = FIGURES) -> Figures:
    """Reads the figures of all releases; files beside the folders of versions are others' data."""
    releases = [path for path in folder.iterdir() if path.is_dir() and path.name[0].isdigit()]
    return Figures(
        [
            replace(record, release=path.name)
            for path in releases
            for record in Figures.read(path).records
        ]
    )


def made(root: Path = ROOT, tables: Path = TABLES) -> Iterator[tuple[Path, str]]:
    """Every document with figures and every plot, with the content that it should have.

    Raises:
        KeyError: A document asks for a figure that is in no file.
        ValueError: A marker is not closed, or has no template.
    """
    figures = read_figures(root / FIGURES.relative_to(ROOT))
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        try:
            filled = fill(text, figures, tables)
        except (KeyError, ValueError) as error:
            raise type(error)(f"{path.relative_to(root)}: {error.args[0]}") from None
        if "<!-- figure: " in text or "<!-- generated: " in text:
            yield path, filled
    page = tables / "benchmarks.md"
    if page.exists():
        yield root / "docs" / "benchmarks.md", benchmarks_page(page, figures)
    for name, drawing in draw(figures).items():
        yield root / "docs" / "images" / name, drawing


def benchmarks_page(template: Path, figures: Figures) -> str:
    """The page of benchmarks."""
    before, _, after = template.read_text(encoding="utf-8").partition(PROFILES)
    profiles = sections(figures, figures.records[0].version)
    text = fill_template(before, figures) + profiles + fill_template(after, figures)
    title, _, rest = text.partition("\n")
    note = "<!-- Written by `python scripts/bench.py tables`; change the template instead. -->"
    return f"{title}\n\n{note}\n{rest}"


def publish(check: bool = False, root: Path = ROOT, tables: Path = TABLES) -> list[Path]:
    """Writes all that is not up to date, or with `check` only finds it.

    Returns:
        The files that were not up to date.
    """
    stale = []
    for path, content in list(made(root, tables)):
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(path)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
    return stale
