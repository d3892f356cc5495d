"""Files of the repository outside of `docs/` that pages link to, as pages of the site.

A page links to `../examples/pinn_poisson.py` or to `../CONTRIBUTING.md` by the path in the
repository, which works wherever the repository is shown. On the site, Markdown files of the
repository's root are pages, files of code are pages with their text, and folders are lists.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs/"

#: Files of the root that are shown by another page.
SHOWN_BY = {"README.md": "index.md"}
#: The folder of the site that has the texts of linked files.
SOURCES = "source"

_CODE = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$|(?P<tick>`+).+?(?P=tick)", re.M | re.S
)
_LINK = re.compile(r"(?P<before>\]\()(?P<target>[^()\s]+)(?P<after>(?:\s+\"[^\"]*\")?\))")
# Scripts and notebooks that are pages of their own.
_SCRIPTED = re.compile(r"tutorials/\w+\.py|.+\.ipynb")
_LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".txt": "text", ".yml": "yaml"}


def root_pages() -> dict[str, str]:
    """Markdown files of the repository's root, with the pages that show them."""
    names = sorted(path.name for path in ROOT.glob("*.md"))
    return {name: SHOWN_BY.get(name, name.lower()) for name in names}


def links(text: str) -> Iterator[re.Match[str]]:
    """The relative links of a Markdown text, code left out."""
    code = [found.span() for found in _CODE.finditer(text)]
    for found in _LINK.finditer(text):
        inside = any(start <= found.start() < stop for start, stop in code)
        if not (inside or "://" in found["target"] or found["target"].startswith(("mailto:", "#"))):
            yield found


def linked(text: str, source: str) -> set[str]:
    """Files and folders of the repository outside of `docs/` that a text links to.

    Args:
        text: The Markdown text.
        source: Where it is in the repository.
    """
    paths = (_resolved(found["target"].partition("#")[0], source) for found in links(text))
    return {
        path
        for path in paths
        if path not in root_pages() and not path.startswith(DOCS) and (ROOT / path).exists()
    }


def relinked(text: str, source: str, page: str) -> str:
    """The text with links that lead where the site has the files.

    Args:
        text: The Markdown text.
        source: Where it is in the repository.
        page: Where it is shown on the site, as a path of Markdown.
    """
    parts, last = [], 0
    for found in links(text):
        target, mark, anchor = found["target"].partition("#")
        place = _place(_resolved(target, source))
        if place is not None:
            start = posixpath.dirname(page) or "."
            target = posixpath.relpath(place, start)
            parts += [text[last : found.start("target")], target + mark + anchor]
            last = found.end("target")
    return "".join([*parts, text[last:]])


def source_page(path: str) -> str:
    """The Markdown of the page that shows a file or a folder."""
    if (ROOT / path).is_dir():
        names = sorted(name for name in os.listdir(ROOT / path) if not name.startswith((".", "_")))
        body = "\n".join(f"- `{name}`" for name in names)
    else:
        language = _LANGUAGES.get(posixpath.splitext(path)[1], "text")
        text = (ROOT / path).read_text(encoding="utf-8").rstrip()
        body = f"````{language}\n{text}\n````"
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n{body}\n"


def source_place(path: str) -> str:
    """The page that shows a file or a folder, as a path of Markdown."""
    return f"{SOURCES}/{path}.md"


def _resolved(target: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _place(path: str) -> str | None:
    """The place on the site of a file of the repository; None if it has none."""
    if path in root_pages():
        return root_pages()[path]
    if path.startswith(DOCS):
        page = path.removeprefix(DOCS)
        return posixpath.splitext(page)[0] + ".md" if _SCRIPTED.fullmatch(page) else page
    return source_place(path) if (ROOT / path).exists() else None
