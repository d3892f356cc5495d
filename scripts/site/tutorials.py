"""Tutorials: scripts of `docs/tutorials/` that are run when the site is built, as pages.

A tutorial is a Python script in cells, the format of sphinx-gallery. Its docstring opens the page.
A line `# %%` opens a cell; the comments that follow it are text in Markdown, the rest is code. What
a cell prints and draws is shown below it. Editors run such scripts cell by cell.

    python scripts/site/tutorials.py docs/tutorials/NAME.py FOLDER

writes `NAME.md` with its pictures into the folder. The site keeps the result in `.cache/` for as
long as neither the tutorial nor the package has changed.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "tutorials"
CACHE = ROOT / ".cache" / "tutorials"


class TutorialError(RuntimeError):
    """A tutorial that failed, or has no text."""


@dataclass(frozen=True)
class Cell:
    """Part of a tutorial: a text, and the code below it with its first line."""

    text: str
    code: str
    line: int


def cells(source: str) -> Iterator[Cell]:
    """The cells of a tutorial.

    Raises:
        TutorialError: If the script has no docstring to open the page with.
    """
    module = ast.parse(source)
    opening = ast.get_docstring(module)
    if opening is None:
        raise TutorialError("a tutorial opens with a docstring that has its title")
    lines = source.splitlines()
    marks = [number for number, line in enumerate(lines) if line.startswith("# %%")]
    starts = [module.body[0].end_lineno or 1, *(mark + 1 for mark in marks)]
    for start, stop in zip(starts, [*marks, len(lines)], strict=True):
        body = lines[start:stop]
        comments = list(
            takewhile(lambda line: line.startswith("#"), body if opening is None else [])
        )
        text = opening or "\n".join(re.sub(r"^# ?", "", line) for line in comments)
        code = body[len(comments) :]
        blank = len(list(takewhile(lambda line: not line, code)))
        yield Cell(text, "\n".join(code).strip("\n"), start + len(comments) + blank + 1)
        opening = None


def run(path: Path, folder: Path) -> None:
    """Runs a tutorial and writes its page and pictures into a folder."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": path.stem, "figure.dpi": 100})
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    parts = []
    pictures = 0
    for cell in cells(path.read_text(encoding="utf-8")):
        parts.append(cell.text)
        if not cell.code:
            continue
        parts.append(f"```python\n{cell.code}\n```")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * (cell.line - 1) + cell.code, str(path), "exec"), names)
        if output.getvalue():
            parts.append(f"```text\n{output.getvalue().rstrip()}\n```")
        for number in plt.get_fignums():
            figure = plt.figure(number)
            pictures += 1
            name = f"{path.stem}_{pictures}.svg"
            figure.savefig(folder / name, bbox_inches="tight", metadata={"Date": None})
            titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
            parts.append(f"![{'; '.join(filter(None, titles)) or path.stem}]({name})")
            plt.close(figure)
    parts.append(f"[The script of this page]({path.name}){{ download }}")
    (folder / f"{path.stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def results() -> Iterator[Path]:
    """The files that the tutorials make; those that have changed are run first.

    Raises:
        TutorialError: If a tutorial fails.
    """
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for folder in pool.map(_result, sorted(FOLDER.glob("*.py"))):
            yield from sorted(folder.iterdir())


def _result(path: Path) -> Path:
    """The folder with a tutorial's files, from the cache where it has them."""
    folder = CACHE / f"{path.stem}-{_fingerprint(path)}"
    if folder.exists():
        return folder
    for old in CACHE.glob(f"{path.stem}-*"):
        shutil.rmtree(old)
    made = CACHE / f"{path.stem}.partial-{os.getpid()}"
    made.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        ran = subprocess.run(
            [sys.executable, "-W", "error", __file__, str(path), str(made)],
            env=environment,
            capture_output=True,
            text=True,
        )
        if ran.returncode:
            raise TutorialError(f"{path.name} failed:\n{ran.stderr}")
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _fingerprint(path: Path) -> str:
    """A hash of all that a tutorial's result depends on."""
    found = hashlib.sha256()
    for each in (path, Path(__file__), *sorted((ROOT / "torch_secondorder").rglob("*.py"))):
        found.update(each.read_bytes())
    found.update(f"{version('torch')} {version('matplotlib')} {sys.version}".encode())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
