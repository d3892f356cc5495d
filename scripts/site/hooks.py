"""Hooks of MkDocs: formulas, tutorials, links into the repository and into the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comments import without_comments
from mathematics import FormulaError, to_mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from names import Names
from notebooks import page_of
from repository import DOCS, ROOT, linked, relinked, root_pages, source_page, source_place
from tutorials import TutorialError, results


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages of tutorials and notebooks, and for links that lead outside of the folder."""
    _add_tutorials(files, config)
    _add_notebooks(files, config)
    for name, place in root_pages().items():
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    found: set[str] = set()
    for file in files.documentation_pages():
        found |= linked(file.content_string, _source(file))
    for path in sorted(found):
        page = File.generated(
            config,
            source_place(path),
            content=source_page(path),
            inclusion=InclusionLevel.NOT_IN_NAV,
        )
        files.append(page)
    return files


def _add_tutorials(files: Files, config: MkDocsConfig) -> None:
    try:
        for path in results():
            files.append(File.generated(config, f"tutorials/{path.name}", abs_src_path=str(path)))
    except TutorialError as error:
        raise PluginError(str(error)) from error


def _add_notebooks(files: Files, config: MkDocsConfig) -> None:
    notebooks = [file for file in files if file.src_uri.endswith(".ipynb")]
    for file in notebooks:
        page, pictures = page_of(Path(file.abs_src_path or ""))
        place = Path(file.src_uri)
        files.append(File.generated(config, str(place.with_suffix(".md")), content=page))
        for name, content in pictures.items():
            uri = place.with_name(name).as_posix()
            files.append(File.generated(config, uri, content=content))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links lead where the site has the files; the landing page has no list of pages beside it."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    if page.file.src_uri.startswith("source/"):
        return markdown
    text = without_comments(markdown)
    return relinked(text, _source(page.file), page.file.src_uri)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Formulas become MathML."""
    try:
        return to_mathml(html)
    except FormulaError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def on_env(env: Any, config: MkDocsConfig, files: Files) -> Any:
    """Names in code type become links to the reference, now that all its pages are known."""
    pages = [file for file in files.documentation_pages() if file.page]
    names = Names(file.content_string for file in pages if file.src_uri.startswith("api/"))
    autorefs = config.plugins["autorefs"]

    for file in pages:
        page = file.page
        if file.src_uri.startswith("source/"):
            continue

        def url_of(name: str, url: str = page.url) -> str | None:
            try:
                return autorefs.get_item_url(name, from_url=url)[0]  # type: ignore[no-any-return]
            except KeyError:
                return None

        page.content = names.linked(page.content, url_of)
    return env


def _source(file: File) -> str:
    """The path of a page's text in the repository."""
    for name, place in root_pages().items():
        if file.src_uri == place and file.generated_by:
            return name
    return DOCS + file.src_uri
