"""Code of the documentation: as modules, or run from top to bottom with what it prints."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def module_of(page: str, block: int = 0) -> ModuleType:
    """A block of Python code of a page, as a module that pickles find again.

    Args:
        page: The name of the page, without its ending.
        block: The number of the block among those of Python code.
    """
    name = f"docs_{page}_{block}"
    if name not in sys.modules:
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        found = [m for m in _BLOCK.finditer(text) if m[1] == "python"][block]
        module = sys.modules[name] = ModuleType(name)
        exec(_compiled(found, DOCS / f"{page}.md"), vars(module))
    return sys.modules[name]


@dataclass(frozen=True)
class Printed:
    """What a statement of a page printed, or a block, and what the page shows."""

    line: int
    found: str
    shown: str


def run_page(path: Path, names: dict[str, Any] | None = None) -> list[Printed]:
    """Runs all Python code of a page in one namespace, in the order in which it is read.

    A comment at the end of a `print(...)` shows its output. A block of `text` below a block of
    Python code shows all that the block printed otherwise.

    Args:
        path: The page.
        names: The namespace, filled in place; by default that of a new module.
    """
    text = path.read_text(encoding="utf-8")
    if names is None:  # a module, which torch.compile finds again by its name
        module = sys.modules[f"page_{path.stem}"] = ModuleType(f"page_{path.stem}")
        names = vars(module)
    names.setdefault("__name__", path.stem)
    printed: list[Printed] = []
    rest = ""
    for block in _BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        if block[1] == "text" and rest:
            printed.append(Printed(line, rest.rstrip(), block[2].rstrip()))
            rest = ""
        if block[1] != "python":
            continue
        rest = ""
        for statement in ast.parse(block[2]).body:
            output = io.StringIO()
            code = ast.Module([statement], [])
            ast.increment_lineno(code, line)
            with contextlib.redirect_stdout(output):
                exec(compile(code, str(path), "exec"), names)
            last = text.splitlines()[statement.end_lineno - 1]  # type: ignore[operator]
            shown = last.partition("  # ")[2]
            if _prints(statement) and shown:
                printed.append(Printed(statement.lineno, output.getvalue().strip(), shown.strip()))
            else:
                rest += output.getvalue()
    return printed


def _prints(statement: ast.stmt) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print"


def _compiled(found: re.Match[str], path: Path) -> Any:
    # With as many lines before it as on the page, for tracebacks.
    lines = "\n" * found.string.count("\n", 0, found.start(2))
    return compile(lines + found[2], str(path), "exec")
