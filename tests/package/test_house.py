"""Files are short enough to read, and tests lie in folders as the package does."""

from __future__ import annotations

import ast
from pathlib import Path

import torch_secondorder

PACKAGE = Path(torch_secondorder.__file__).parent
TESTS = Path(__file__).resolve().parents[1]
LONGEST = 700

#: Folders of tests that are of no room in particular.
OF_NO_ROOM = {"distributed", "examples", "package", "placement", "scripts", "support"}


def test_no_file_is_too_long_to_read() -> None:
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    long = {name: length for name, length in lengths.items() if length > LONGEST}
    assert long == {}, "split them where a reader would"


def test_folders_of_tests_are_named_after_rooms() -> None:
    rooms = {path.name.lstrip("_") for path in PACKAGE.iterdir() if path.is_dir()}
    folders = {path.parent.name for path in TESTS.rglob("test_*.py")}
    assert folders - rooms - OF_NO_ROOM == set()


def test_files_of_tests_do_not_import_from_each_other() -> None:
    """What several share is in `tests/support`."""
    found = [
        f"{path.relative_to(TESTS)}:{node.lineno}: import from {node.module}"
        for path in TESTS.rglob("*.py")
        if path.parent != Path(__file__).parent
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and ".test_" in (node.module or "")
    ]
    assert found == []
