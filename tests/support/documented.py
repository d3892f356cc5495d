"""Code of the documentation, as modules."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).resolve().parents[2] / "docs"


def module_of(page: str, block: int = 0) -> ModuleType:
    """A block of Python code of a page, as a module that pickles find again.

    Args:
        page: The name of the page, without its ending.
        block: The number of the block among those of Python code.
    """
    name = f"docs_{page}_{block}"
    if name not in sys.modules:
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        found = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))[block]
        module = sys.modules[name] = ModuleType(name)
        # With as many lines before it as on the page, for tracebacks.
        code = "\n" * text.count("\n", 0, found.start(1)) + found[1]
        exec(compile(code, str(DOCS / f"{page}.md"), "exec"), vars(module))
    return sys.modules[name]
