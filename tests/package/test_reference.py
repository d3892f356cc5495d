"""The reference: every public name once, with an example, its results and its errors.

The same for the gallery and the nav: nothing that exists is missing on the site.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TOP = "torch_secondorder"
PACKAGES = [
    *("constraints", "curvature", "dataset", "diagnostics", "func", "globalization", "linear"),
    *("minimization", "optim", "penalties", "solvers"),
]
MODULES = [
    *(TOP, *(f"{TOP}.{name}" for name in PACKAGES)),
    *(f"{TOP}.integrations.{name}" for name in ("huggingface", "lightning")),
]
FROM_TORCH = {"jvp", "vjp"}
#: Tests of these need a trainer, and are in tests/integrations.
WITHOUT_EXAMPLE = {"SecondOrderCallback", "unwrapped"}

_DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
_SECTION = r"^ *{}:\n"
_PAGE = re.compile(r"[\w/]+\.md")
_SHOWN = re.compile(r"^!\[|^\|.*\|$|^```(?:console|text)$", re.MULTILINE)


def imported(name: str) -> Any:
    for package, needed in {"huggingface": "transformers", "lightning": "lightning"}.items():
        if name.endswith(package):
            pytest.importorskip(needed)
    return importlib.import_module(name)


def public(module: str) -> Iterator[tuple[str, Any]]:
    """The names of a module with what they stand for; no modules."""
    found = imported(module)
    for name in found.__all__:
        value = getattr(found, name)
        if not inspect.ismodule(value):
            yield name, value


@cache
def documented() -> Counter[tuple[str, int]]:
    """Names that the pages of the reference have, with the identities of what they stand for."""
    found: Counter[tuple[str, int]] = Counter()
    for page in sorted((DOCS / "api").glob("*.md")):
        for path in _DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            module, _, name = path.rpartition(".")
            with contextlib.suppress(pytest.skip.Exception):  # a trainer that is not installed
                found[name, id(getattr(imported(module), name))] += 1
    return found


def explained(module: str) -> Iterator[tuple[str, Any]]:
    """Classes and functions of a module that a user calls; no protocols, errors and names."""
    for name, value in public(module):
        if name in FROM_TORCH or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not (inspect.isclass(value) and issubclass(value, Enum | Exception)):
            yield name, value


def has_section(name: str, docstring: str | None) -> bool:
    return bool(re.search(_SECTION.format(name), docstring or "", re.MULTILINE))


def raises(function: Any) -> bool:
    """Whether a function raises an error or checks an argument in its own body."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [getattr(call, "id", "") for call in calls]
    return any(name.startswith("check_") for name in names) or any(
        isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree)
    )


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference_once(module: str) -> None:
    found = documented()
    times = {name: found[name, id(value)] for name, value in public(module)}
    assert {name: count for name, count in times.items() if count != 1} == {}


def test_the_reference_has_public_names_alone() -> None:
    known = {(name, id(value)) for module in MODULES for name, value in public(module)}
    assert set(documented()) <= known


@pytest.mark.parametrize("module", MODULES)
def test_every_class_and_function_has_an_example(module: str) -> None:
    missing = [
        name
        for name, value in explained(module)
        if ">>> " not in (value.__doc__ or "") and name not in WITHOUT_EXAMPLE
    ]
    assert missing == []


@pytest.mark.parametrize("module", MODULES)
def test_every_result_is_documented(module: str) -> None:
    missing = [
        name
        for name, value in explained(module)
        if inspect.isfunction(value)
        and inspect.signature(value).return_annotation not in (None, "None")
        and not has_section("Returns", value.__doc__)
    ]
    assert missing == []


@pytest.mark.parametrize("module", MODULES)
def test_every_error_is_documented(module: str) -> None:
    missing = []
    for name, value in explained(module):
        function = value
        if getattr(value, "_is_protocol", False):
            continue
        if inspect.isclass(value):
            function = vars(value).get("__post_init__", vars(value).get("__init__"))
            if function is None or not inspect.isfunction(function):
                continue
            if "__dataclass_fields__" in vars(value) and function.__name__ == "__init__":
                continue
        if raises(function) and not has_section("Raises", value.__doc__):
            missing.append(name)
    assert missing == []


def pages_of_the_nav() -> list[str]:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (nav,) = re.findall(r"^nav:\n((?:[ #].*\n)+)", text, re.MULTILINE)
    lines = [line for line in nav.splitlines() if not line.lstrip().startswith("#")]
    return _PAGE.findall("\n".join(lines))


def test_every_page_is_in_the_nav_once() -> None:
    made_from = {".md": "*.md", ".py": "tutorials/*.py", ".ipynb": "*.ipynb"}
    paths = [path for pattern in made_from.values() for path in DOCS.rglob(pattern)]
    pages = {path.relative_to(DOCS).with_suffix(".md").as_posix() for path in paths}
    # The site makes these from files of the repository's root.
    pages |= {path.name.lower() for path in ROOT.glob("*.md") if path.name != "README.md"}
    assert sorted(pages_of_the_nav()) == sorted(pages)


def test_every_example_is_in_the_gallery_with_a_picture_or_a_table() -> None:
    sections = re.split(
        r"^#{2,3} ", (DOCS / "gallery.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    missing = [
        example.name
        for example in sorted((ROOT / "examples").glob("[!_]*.py"))
        if not any(_SHOWN.search(part) for part in sections if example.name in part)
    ]
    assert missing == []


def test_pictures_have_a_text_and_are_small() -> None:
    for path in (DOCS / "images").rglob("*.*"):
        assert path.stat().st_size < 80_000, path
    for page in DOCS.rglob("*.md"):
        assert "![](" not in page.read_text(encoding="utf-8"), f"{page}: a picture without a text"
