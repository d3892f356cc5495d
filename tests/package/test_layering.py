"""Imports point one way: each file sees only what lies below it.

Two rules, the same for imports at the top of a file, in functions and under TYPE_CHECKING:

1. Between rooms (the folders at the top of the package) `ROOMS` is the order, bottom up, with the
   lower rooms that each room imports. A new import between rooms needs one word there.
2. Within a folder the files need no list: their imports only must not run in circles, and a file
   never imports the `__init__` of its own package.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "torch_secondorder"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE
MOST_ROOMS = 19
#: Files of the package that are no rooms.
OTHER_FILES = {"__main__.py", "__pycache__", "py.typed"}


@dataclass(frozen=True)
class Rules:
    """What may import what.

    Attributes:
        rooms: The rooms, bottom up, each with the rooms below it that it imports.
        doors: Files with a leading underscore that rooms besides their own import, with those
            rooms. All other such files belong to one room alone.
        reserved: Packages that only files below one folder, or one file, may import.
    """

    rooms: dict[str, str]
    doors: dict[str, str]
    reserved: dict[str, str]


RULES = Rules(
    rooms={
        "_foundation": "",
        "_params": "_foundation",
        "_autograd": "_foundation",
        "func": "_foundation _autograd",
        "_closure": "_foundation _autograd",
        "_objective": "_foundation _params _autograd _closure",
        "curvature": "_foundation _params _autograd _closure _objective",
        "solvers": "_foundation _params _objective curvature",
        "linear": "_foundation _params func curvature solvers",
        "globalization": "_foundation",
        "penalties": "_foundation _autograd",
        "dataset": "_foundation _params _autograd _closure _objective curvature",
        "diagnostics": (
            "_foundation _params _autograd _closure _objective curvature solvers dataset"
        ),
        "constraints": (
            "_foundation _params _autograd _closure _objective curvature solvers dataset "
            "diagnostics"
        ),
        "_optim": (
            "_foundation _params _autograd _closure _objective curvature solvers globalization "
            "dataset constraints"
        ),
        "optim": (
            "_foundation _params _autograd _closure _objective curvature solvers globalization "
            "penalties dataset constraints _optim"
        ),
        "minimization": "_foundation _params _autograd _closure _objective curvature _optim optim",
        "__init__": (
            "_foundation _autograd func _closure _objective curvature solvers linear globalization "
            "penalties dataset diagnostics constraints optim minimization"
        ),
        "integrations": "_foundation penalties diagnostics _optim optim",
        "__main__": "__init__",
    },
    doors={
        "constraints._functions": "optim",
        "constraints._lagrangian": "_optim optim",
        "constraints._program": "_optim optim",
        "constraints._sets": "optim",
        "curvature._layer_factors": "_optim optim",
        "curvature._masked": "_optim",
        "curvature._normal_equations": "solvers dataset",
        "curvature._output_space": "_optim",
        "curvature._random": "diagnostics",
        "curvature._samples": "_optim",
        "dataset._loader": "diagnostics",
        "dataset._objective": "diagnostics constraints _optim",
        "dataset._operator": "diagnostics _optim",
        "dataset._residuals": "_optim",
        "diagnostics._point": "constraints",
        "penalties._encoder": "optim integrations",
        "solvers._box_quadratic": "_optim optim",
        "solvers._boxed_dense": "optim",
        "solvers._multiplier_quadratic": "_optim constraints",
        "solvers._residual_region": "_optim",
        "solvers._units": "_optim linear",
    },
    reserved={
        "accelerate": "integrations.huggingface",
        "lightning": "integrations.lightning",
        "pytorch_lightning": "integrations.lightning",
        "transformers": "integrations.huggingface",
    },
)


class Import(NamedTuple):
    """One import: the file it is in, its line, and the module that it names."""

    file: str  # as in "curvature.base" or "curvature.__init__"
    line: int
    target: str  # likewise, or the full name of a module outside the package

    def __str__(self) -> str:
        return f"{self.file.replace('.', '/')}.py:{self.line}"


class Tree:
    """The files of a package and their imports."""

    def __init__(self, root: Path) -> None:
        paths = {
            ".".join(path.relative_to(root).with_suffix("").parts): path
            for path in sorted(root.rglob("*.py"))
        }
        self.files = list(paths)
        self.problems: list[str] = []
        self.inside: list[Import] = []
        self.outside: list[Import] = []
        for file, path in paths.items():
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        self._add(Import(file, node.lineno, alias.name), "")
                elif isinstance(node, ast.ImportFrom):
                    if node.level:
                        at = Import(file, node.lineno, "")
                        self.problems.append(f"{at}: relative import: write it out in full")
                        continue
                    for alias in node.names:
                        self._add(Import(file, node.lineno, node.module or ""), alias.name)

    def _add(self, found: Import, name: str) -> None:
        top, *rest = found.target.split(".")
        if top != PACKAGE:
            self.outside.append(found)
            return
        module = ".".join(rest) or "__init__"
        member = self._file(".".join([*rest, name]))
        file = member or self._file(module)
        if file is None:
            self.problems.append(f"{found}: there is no module {found.target}")
            return
        if member is None and name.startswith("_"):
            self.problems.append(f"{found}: {name} is private to {module}: drop its underscore")
        self.inside.append(found._replace(target=file))

    def _file(self, module: str) -> str | None:
        return next((f for f in (module, f"{module}.__init__") if f in self.files), None)


def room_of(file: str) -> str:
    """The room that a file is in."""
    return file.partition(".")[0]


def out_of_order(tree: Tree, rules: Rules) -> list[str]:
    """Imports between rooms that the order does not allow, and allowances that nothing uses."""
    order = list(rules.rooms)
    allowed = {room: below.split() for room, below in rules.rooms.items()}
    problems = [
        f"{room}: a room without a place in RULES.rooms: add it to the order"
        for room in {room_of(file): None for file in tree.files}
        if room not in allowed
    ]
    unused = set()
    for room, below in allowed.items():
        unused |= {(room, other) for other in below}
        problems += [
            f"RULES.rooms[{room!r}]: {other} is not below it: move one of them in the order"
            for other in below
            if other not in order[: order.index(room)]
        ]
    for found in tree.inside:
        room, other = room_of(found.file), room_of(found.target)
        unused.discard((room, other))
        if room == other or room not in allowed or other in allowed[room]:
            continue
        if other in order[: order.index(room)]:
            remedy = f"if it must be, add {other} to RULES.rooms[{room!r}]"
        else:
            remedy = "move what it needs into a lower room"
        problems.append(f"{found}: {room} may not import {found.target}: {remedy}")
    return problems + [
        f"RULES.rooms[{room!r}]: nothing in {room} imports {other}: take {other} out"
        for room, other in sorted(unused)
    ]


def past_doors(tree: Tree, rules: Rules) -> list[str]:
    """Imports of other rooms' helpers without a door, and doors that nothing uses."""
    unused = {(file, room) for file, rooms in rules.doors.items() for room in rooms.split()}
    doors = frozenset(unused)
    problems = []
    for found in tree.inside:
        room, (other, *rest) = (
            room_of(found.file),
            found.target.removesuffix(".__init__").split("."),
        )
        if room == other or other.startswith("_") or not any(n.startswith("_") for n in rest):
            continue
        unused.discard((found.target, room))
        if (found.target, room) not in doors:
            problems.append(
                f"{found}: {found.target} is a helper of {other} alone: use what {other} exports, "
                "or add a door to RULES.doors"
            )
    return problems + [
        f"RULES.doors[{file!r}]: nothing in {room} imports it: take {room} out"
        for file, room in sorted(unused)
    ]


def cycles(tree: Tree) -> list[str]:
    """Import cycles among the files and folders of each folder, the first in each."""
    # Two files far apart meet in the lowest folder that holds both: there an import of one by the
    # other is an edge between two entries. A cycle of files is one of entries somewhere.
    edges: dict[str, dict[tuple[str, str], Import]] = defaultdict(dict)
    for found in tree.inside:
        start, end = found.file.split("."), found.target.split(".")
        depth = 0
        while depth < min(len(start), len(end)) - 1 and start[depth] == end[depth]:
            depth += 1
        folder = ".".join(start[:depth])
        if found.file == found.target:
            edges[folder].setdefault((start[depth], start[depth]), found)
        elif folder:  # the rooms themselves have an order
            edges[folder].setdefault((start[depth], end[depth]), found)
    problems = []
    for folder, imports in sorted(edges.items()):
        graph = defaultdict(set)
        for start, end in imports:
            graph[start].add(end)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            around = list(reversed(error.args[1]))
            lines = [str(imports[pair]) for pair in itertools.pairwise(around)]
            problems.append(
                f"{folder or PACKAGE}: {' -> '.join(around)} is a cycle ({', '.join(lines)}): "
                "move what they share into a file below them; within a package import from files, "
                "not from its __init__"
            )
    return problems


def foreign(tree: Tree, rules: Rules) -> list[str]:
    """Imports of what is neither torch nor in the standard library."""
    problems = []
    for found in tree.outside:
        top = found.target.partition(".")[0]
        if top in rules.reserved:
            place = rules.reserved[top]
            if not f"{found.file}.".startswith(f"{place}."):
                problems.append(
                    f"{found}: only {place} may import {top}, so that importing {PACKAGE} does not"
                )
        elif top not in sys.stdlib_module_names | {"torch"}:
            problems.append(
                f"{found}: the package needs torch alone, not {top}: import it where it is used "
                "by importlib.import_module, with an error that says what to install"
            )
    return problems


def violations(root: Path, rules: Rules) -> list[str]:
    """Every broken rule below the folder of a package, a sentence each."""
    tree = Tree(root)
    found = [
        *tree.problems,
        *out_of_order(tree, rules),
        *past_doors(tree, rules),
        *cycles(tree),
        *foreign(tree, rules),
    ]
    return list(dict.fromkeys(found))


def test_imports_keep_to_the_declared_order() -> None:
    assert violations(ROOT, RULES) == []


def test_the_package_has_few_rooms() -> None:
    rooms = sorted(path.name for path in ROOT.iterdir() if path.name not in OTHER_FILES)
    assert len(rooms) <= MOST_ROOMS, f"more than {MOST_ROOMS}: {', '.join(rooms)}"


def test_reductions_over_parameters_go_through_their_space() -> None:
    """An inner product taken past the space would be that of one process's part."""
    standing_alone = {"space.py", "vector.py", "lanczos.py"}
    standing_alone |= {"dense.py", "_boxed_dense.py"}  # matrices over whole vectors
    direct = [
        path.name
        for path in ROOT.rglob("*.py")
        if path.name not in standing_alone
        and re.search(r"(?<!\.)\bto_host\b", path.read_text(encoding="utf-8"))
    ]
    assert direct == []


# Small packages that each break one rule.

SMALL = Rules(
    rooms={"_base": "", "low": "", "__init__": "low", "high": "low"},
    doors={"low._door": "high"},
    reserved={"lightning": "high.light", "transformers": "high.face"},
)
SOUND = {
    "__init__": "from torch_secondorder.low import a",
    "_base/__init__": "",
    "_base/z": "",
    "low/__init__": "from torch_secondorder.low.a import f",
    "low/a": "import torch\nfrom torch_secondorder.low import b",
    "low/b": "import math",
    "low/_door": "",
    "low/_own": "",
    "high/__init__": "import torch_secondorder.low._door",
    "high/face": "import transformers",
    "high/light/__init__": "from lightning import pytorch",
    "high/light/c": "",
    "high/d": "",
}


def written(files: dict[str, str], root: Path) -> Path:
    for name, text in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_checker_accepts_what_keeps_to_the_rules(tmp_path: Path) -> None:
    assert violations(written(SOUND, tmp_path), SMALL) == []


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("low/b", "import torch_secondorder.high.d", "low/b.py:1: low may not import high.d"),
        ("low/b", "from torch_secondorder import high", "low may not import high.__init__"),
        ("low/b", "from torch_secondorder import f", "low may not import __init__"),
        ("low/b", "def f():\n    from torch_secondorder.high.d import g", "low/b.py:2: low may"),
        ("low/b", "if TYPE_CHECKING:\n    import torch_secondorder.high.d", "low/b.py:2: low may"),
        ("high/d", "import torch_secondorder._base.z", "add _base to RULES.rooms['high']"),
        ("high/d", "import torch_secondorder.low._own", "low._own is a helper of low alone"),
        ("high/d", "from torch_secondorder.low.a import _f", "_f is private to low.a"),
        ("high/__init__", "", "nothing in high imports low: take low out"),
        ("high/__init__", "import torch_secondorder.low", "RULES.doors['low._door']: nothing in"),
        ("low/b", "import torch_secondorder.low.a", "low: a -> b -> a is a cycle (low/a.py:2"),
        ("low/b", "def f():\n    from torch_secondorder.low.a import g", "is a cycle"),
        ("low/b", "from torch_secondorder.low import f", "import from files, not"),
        ("low/b", "import torch_secondorder.low.b", "low: b -> b is a cycle (low/b.py:1)"),
        ("low/b", "from . import a", "low/b.py:1: relative import"),
        ("low/b", "import torch_secondorder.low.gone", "there is no module"),
        ("low/b", "def f():\n    import numpy", "needs torch alone, not numpy"),
        ("high/d", "import lightning.pytorch", "only high.light may import lightning"),
        ("high/light/c", "import transformers", "only high.face may import transformers"),
        ("elsewhere", "", "elsewhere: a room without a place"),
    ],
)  # fmt: skip
def test_the_checker_finds(file: str, text: str, problem: str, tmp_path: Path) -> None:
    found = violations(written({**SOUND, file: text}, tmp_path), SMALL)
    assert any(problem in sentence for sentence in found), found


def test_the_checker_finds_folders_that_import_each_other(tmp_path: Path) -> None:
    files = {
        "low/inner/__init__": "",
        "low/inner/x": "import torch_secondorder.low.b",
        "low/inner/y": "",
        "low/c": "import torch_secondorder.low.inner.y",
        "low/b": "import torch_secondorder.low.c",
    }
    (found,) = violations(written({**SOUND, **files}, tmp_path), SMALL)
    assert "inner" in found and "is a cycle" in found


def test_the_checker_finds_an_order_that_contradicts_itself(tmp_path: Path) -> None:
    rules = Rules({"_base": "low", "low": "", "__init__": "low", "high": "low"}, {}, SMALL.reserved)
    found = violations(written(SOUND, tmp_path), rules)
    assert any("RULES.rooms['_base']: low is not below it" in sentence for sentence in found)
