"""The documents: files, names and links that exist, code that runs."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import warnings
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.documented import run_page
from torch_secondorder import LBFGSInfo

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "torch_secondorder"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# The pages whose code runs from top to bottom; what it prints is on the page. The tests of
# optimizers of one's own run that of the last page.
RUNNABLE = [
    page
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if "```python\n" in path.read_text(encoding="utf-8")
    and (page := path.relative_to(ROOT / "docs").as_posix()) != "adding_an_optimizer.md"
]
# What a page may import besides torch and the package.
OPTIONAL = ("accelerate", "lightning", "matplotlib", "numpy", "scipy", "sklearn", "transformers")
# What Lightning warns of on import, and with a loader that reads from memory.
NOISE = (
    "isinstance\\(treespec, LeafSpec\\)",
    "does not have many workers",
    "`tensorboardX` has been",
)
# The places that a path in a document may be relative to.
BASES = (ROOT, PACKAGE)

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*(?:\.(?:py|sh|md|txt|toml|json)|/)")
_DOTTED = re.compile(r"\btorch_secondorder(?:\.\w+)+")
_MEMBER = re.compile(r"`([A-Z]\w*)\.(\w+)")
_PLACE = re.compile(r"`(\w+)[^`]*`\s+\(`([\w/]+\.py)`\)")
_ROW = re.compile(r"^\| `(\w+)/` \|", re.MULTILINE)
_IMPORT = re.compile(r"^ *from torch_secondorder\.(\w+)", re.MULTILINE)


documents = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT).with_suffix(""))
)


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return _BLOCK.sub("", text)


def paths_in(text: str) -> list[str]:
    """The file paths in inline code; the arguments of a command are looked at one by one."""
    words = [word for code in _CODE.findall(prose(text)) for word in code.split()]
    return [word for word in words if _PATH.fullmatch(word)]


def resolve(name: str) -> Any:
    """The object with a dotted name."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        try:
            found = importlib.import_module(".".join(parts[:number]))
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("torch_secondorder"):
                pytest.skip(f"{name} needs {error.name}")
            found = getattr(found, part)
    return found


@cache
def members() -> dict[str, set[str]]:
    """The names in the bodies of the package's classes, with those of their bases there."""
    names: dict[str, set[str]] = defaultdict(set)
    bases: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
                for item in ast.walk(node):
                    if isinstance(item, ast.FunctionDef):
                        names[node.name].add(item.name)
                    elif isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store):
                        names[node.name].add(item.id)
                    elif isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store):
                        names[node.name].add(item.attr)
    for _ in range(3):  # deeper than any class is
        for name, above in bases.items():
            names[name] |= set().union(*(names[base] for base in above if base in bases))
    return names


def anchors_of(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    """The relative links of a document that lead nowhere."""
    broken = []
    for link in _LINK.findall(prose(document.read_text(encoding="utf-8"))):
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, anchor = link.partition("#")
        path = (document.parent / target).resolve() if target else document
        found = path.exists()
        if found and anchor:
            found = anchor in anchors_of(path.read_text(encoding="utf-8"))
        if not found:
            broken.append(link)
    return broken


def test_contributing_has_at_most_100_lines() -> None:
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100


def test_contributing_lists_the_packages_bottom_up() -> None:
    rows = _ROW.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert sorted(rows) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    for number, row in enumerate(rows):
        for path in (PACKAGE / row).rglob("*.py"):
            imported = set(_IMPORT.findall(path.read_text(encoding="utf-8")))
            assert imported <= set(rows[: number + 1]), path


@documents
def test_every_path_exists(document: Path) -> None:
    paths = paths_in(document.read_text(encoding="utf-8"))
    missing = [
        path
        for path in paths
        if not any((base / path).exists() for base in (*BASES, document.parent))
    ]
    assert not missing, f"{document.name} mentions files that do not exist: {missing}"


@documents
def test_every_dotted_name_exists(document: Path) -> None:
    # The changelog names old modules too; they work for one release, with a warning.
    action = "ignore" if document.name == "CHANGELOG.md" else "error"
    missing = []
    with warnings.catch_warnings():
        warnings.simplefilter(action, DeprecationWarning)  # type: ignore[arg-type]
        for name in sorted(set(_DOTTED.findall(document.read_text(encoding="utf-8")))):
            try:
                resolve(name)
            except (AttributeError, DeprecationWarning) as error:
                missing.append(f"{name} ({error})")
    assert not missing, f"{document.name} mentions names that do not exist: {missing}"


@documents
def test_every_member_of_a_class_exists(document: Path) -> None:
    text = prose(document.read_text(encoding="utf-8"))
    missing = [
        f"{cls}.{name}"
        for cls, name in _MEMBER.findall(text)
        if cls in members() and name not in members()[cls]
    ]
    assert not missing, f"{document.name} mentions members that do not exist: {missing}"
    if document.name == "life_of_a_step.md":
        classes = set(re.findall(r"`([A-Z]\w+)(?=[`.(])", text))
        assert classes <= set(members()), classes - set(members())


@documents
def test_every_relative_link_resolves(document: Path) -> None:
    assert not broken_links(document)


def test_life_of_a_step_names_the_files_of_today() -> None:
    text = (ROOT / "docs" / "life_of_a_step.md").read_text(encoding="utf-8")
    places = _PLACE.findall(text)
    assert len(places) > 25
    for name, path in places:
        source = (PACKAGE / path).read_text(encoding="utf-8")
        assert re.search(rf"^(class|def) {name}\b", source, re.MULTILINE), (name, path)


def test_broken_links_and_names_are_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "# One heading\n[a](page.md#one-heading) [b](#one-heading) [c](gone.md) [d](page.md#two)\n"
        "[e](https://example.org) `tests/gone.py --flag` `optim/lbfgs.py` `.venv` `a / b`\n",
        encoding="utf-8",
    )
    assert broken_links(document) == ["gone.md", "page.md#two"]
    assert paths_in(document.read_text(encoding="utf-8")) == ["tests/gone.py", "optim/lbfgs.py"]
    with pytest.raises(AttributeError):
        resolve("torch_secondorder.optim.lbfgs.Gone")


def test_readme_has_at_most_120_lines_and_its_code_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    blocks = _BLOCK.findall(text)
    # The swap is three lines of a diff, and the lines that it adds are in the program below it.
    (diff,) = [code for language, code in blocks if language == "diff"]
    (program,) = [code for language, code in blocks if language == "python"]
    assert [line[0] for line in diff.splitlines()] == ["+", "-", "+"]
    assert all(line[1:] in program.splitlines() for line in diff.splitlines() if line[0] == "+")
    names: dict[str, Any] = {"__name__": "readme"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "README.md", "exec"), names)
    assert float(printed.getvalue().split(",")[0]) < 1e-3


def test_picture_of_the_readme_is_drawn_from_its_data() -> None:
    path = ROOT / "scripts" / "draw_readme.py"
    script: dict[str, Any] = {"__name__": "draw_readme", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), script)
    data = json.loads(script["DATA"].read_text(encoding="utf-8"))
    assert script["draw"](data) == script["PICTURE"].read_text(encoding="utf-8")
    assert script["PICTURE"].stat().st_size < 80_000
    assert str(script["PICTURE"].relative_to(ROOT)) in (ROOT / "README.md").read_text("utf-8")
    settings = script["settings"]()
    assert list(data["results"]) == list(settings)
    for name, result in data["results"].items():
        # As many settings for each, those that the script has, and the best of them is drawn.
        assert list(result["last_loss"]) == list(settings[name])
        assert len(settings[name]) == len(settings["Adam"])
        assert result["setting"] == min(result["last_loss"], key=result["last_loss"].get)


def test_report_in_getting_started_has_the_fields_of_today() -> None:
    blocks = _BLOCK.findall((ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8"))
    (shown,) = [text for language, text in blocks if language == "text" and "LBFGSInfo" in text]
    names = [line.split()[0] for line in shown.partition("LBFGSInfo\n")[2].splitlines()]
    fields = list(LBFGSInfo.__dataclass_fields__)
    # An empty reason and, without bounds, what is about bounds are not shown.
    hidden = {"history_reset", "projected_grad_norm", "active_bounds", "start_projected"}
    assert names == [name for name in fields if name not in hidden]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page == "trainers.md" else [])
        for page in RUNNABLE
    ],
)
def test_code_of_a_page_runs_and_prints_what_is_shown(page: str) -> None:
    path, default = ROOT / "docs" / page, torch.get_default_dtype()
    text = path.read_text(encoding="utf-8")
    for message in NOISE:
        warnings.filterwarnings("ignore", message=f".*{message}")
    for package in OPTIONAL:
        if re.search(rf"^(from|import) {package}\b", text, re.MULTILINE):
            pytest.importorskip(package)
    try:
        printed = run_page(path)
    finally:
        torch.set_default_dtype(default)
    # Each shows something, but for the first page and that of settings to start from.
    assert len(printed) > 2 or page in ("choosing.md", "index.md")
    for each in printed:
        assert each.found == each.shown, f"line {each.line} of docs/{page}"


def test_what_a_page_prints_is_compared(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\nprint(x)  # 2\nprint(x + 1)\nprint(\n    x + 2\n)  # 3\n```\n\n"
        "```text\n1\n```\n\n```python\nassert x == 1  # from above\n```\n",
        encoding="utf-8",
    )
    names: dict[str, Any] = {}
    found = [(each.line, each.found, each.shown) for each in run_page(page, names)]
    assert found == [(3, "1", "2"), (5, "3", "3"), (10, "2", "1")]
    assert names["x"] == 1
    page.write_text("text\n\n```python\nx = 1\n\n1 / 0\n```\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError) as raised:
        run_page(page)
    assert raised.traceback[-1].lineno == 5  # counted from zero
