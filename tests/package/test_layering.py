"""Imports point one way: each layer sees only what lies below it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = "torch_secondorder"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE

#: What each layer may import of the package, besides itself. Later layers are here already.
ALLOWED: dict[str, set[str]] = {
    "buffer_pool": set(),
    "subclass": set(),
    "space": set(),
    "vector": {"space", "subclass", "buffer_pool"},
    "convolution": set(),
    "nodes": {"convolution", "graph", "weight_norm"},
    "interception": set(),
    "weight_norm": set(),
    "twice": {"convolution", "interception", "weight_norm"},
    "func": {"twice"},
    "ranks": set(),
    "replay": {"ranks", "subclass"},
    "custom_functions": {"ranks", "replay"},
    "graph": {"custom_functions", "subclass"},
    "capture": {"twice", "custom_functions", "graph", "interception", "subclass"},
    "evaluation": {"space", "vector", "func", "graph", "ranks", "replay"},
    "contract": {"subclass"},
    "traced": {"graph", "capture", "contract"},
    "compiled": {"graph", "capture", "contract", "traced"},
    "objective": {
        *("vector", "func", "graph", "capture", "compiled", "contract", "replay", "evaluation")
    },
    "single": {
        "buffer_pool",
        "subclass",
        "graph",
        "capture",
        "contract",
        "ranks",
        "replay",
        "objective",
    },
    "curvature": {
        "space",
        "subclass",
        "buffer_pool",
        "vector",
        "func",
        "graph",
        "ranks",
        "evaluation",
    },
    "solvers": {"space", "vector", "func", "evaluation", "curvature"},
    "globalization": {"evaluation"},
    "penalties": {"func", "subclass", "twice"},
    "progress": set(),
    "dataset": {
        "subclass",
        "ranks",
        "vector",
        "graph",
        "capture",
        "contract",
        "replay",
        "evaluation",
        "objective",
        "single",
        "curvature",
        "progress",
    },
}
BELOW_OPTIM = set(ALLOWED)
ALLOWED["optim"] = BELOW_OPTIM
ALLOWED["diagnostics"] = BELOW_OPTIM
ALLOWED["lightning"] = BELOW_OPTIM | {"optim", "diagnostics"}
ALLOWED["huggingface"] = BELOW_OPTIM | {"optim"}
ALLOWED["__init__"] = set(ALLOWED) - {"lightning", "huggingface"}

OUTSIDE = {"torch"}
#: What one module alone may import.
RESERVED = {
    "lightning": "lightning",
    "pytorch_lightning": "lightning",
    "accelerate": "huggingface",
    "transformers": "huggingface",
}


def imported(path: Path) -> list[tuple[int, str]]:
    """All absolute names that a file imports, with their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import out in full"
            if node.module == PACKAGE:
                found += [(node.lineno, f"{PACKAGE}.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module or ""))
    return found


def violations(root: Path) -> list[str]:
    """What breaks the rule under the folder of a package, one sentence each."""
    problems = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        layer = parts[0]
        if layer not in ALLOWED:
            problems.append(
                f"{path.name}: layer {layer!r} has no place in tests/package/test_layering.py"
            )
            continue
        for line, name in imported(path):
            top, *rest = name.split(".")
            where = f"{'/'.join(parts)}.py:{line}"
            if top == PACKAGE:
                target = rest[0] if rest else "__init__"
                if target not in ALLOWED[layer] | {layer}:
                    problems.append(f"{where}: {layer} may not import {name}")
            elif top in RESERVED:
                if layer != RESERVED[top]:
                    problems.append(f"{where}: only {RESERVED[top]}.py may import {name}")
            elif top not in sys.stdlib_module_names | OUTSIDE:
                problems.append(f"{where}: the core imports torch only, not {name}")
    return problems


def test_the_package_keeps_to_its_layers() -> None:
    assert violations(ROOT) == []


def test_numbers_of_vectors_are_asked_of_the_space_they_live_in() -> None:
    """An inner product read past its space would be that of one process's part."""
    standing_alone = {"space.py", "vector.py", "lanczos.py"}
    direct = [
        path.name
        for path in ROOT.rglob("*.py")
        if path.name not in standing_alone
        and re.search(r"(?<!\.)\bto_host\b", path.read_text(encoding="utf-8"))
    ]
    assert direct == []


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("vector.py", "import torch_secondorder._objective.closure", "vector may not import"),
        ("capture.py", "from torch_secondorder import optim", "capture may not import"),
        ("solvers/cg.py", "from torch_secondorder._optim.base import X", "solvers may not import"),
        ("curvature/a.py", "def f():\n    import numpy", "core imports torch only, not numpy"),
        ("optim/a.py", "import lightning.pytorch", "only lightning.py may import"),
        ("lightning.py", "import transformers", "only huggingface.py may import"),
        ("__init__.py", "from torch_secondorder import huggingface", "__init__ may not import"),
        ("elsewhere.py", "", "has no place"),
    ],
)
def test_the_checker_finds(file: str, text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    (found,) = violations(tmp_path)
    assert problem in found
