"""The public API is typed: a program that uses all of it passes a strict type check, and runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import torch_secondorder
from tests.package import test_public_api, typed_usage

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_strict_type_check_accepts_the_public_api() -> None:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "tests/package/typed_usage.py"]
    check = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


@pytest.mark.parametrize("function", typed_usage.ALL, ids=lambda function: function.__name__)
def test_the_checked_program_runs(function: Callable[[], None]) -> None:
    function()


def test_the_checked_program_uses_every_public_name() -> None:
    tree = ast.parse(Path(typed_usage.__file__).read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    missing = [
        f"{package}.{name}"
        for package in [torch_secondorder.__name__, *test_public_api.PUBLIC_PACKAGES]
        for name, _ in test_public_api.members(test_public_api.imported(package))
        if name not in used
    ]
    assert missing == []
