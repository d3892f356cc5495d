"""Doctests of docstrings as blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes|Warns):$", re.MULTILINE)
_TITLE = '<p><span class="doc-section-title">Example:</span></p>'


class Doctests(griffe.Extension):
    """Puts doctests in fences, since Markdown takes `>>>` for a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object."""
        if obj.docstring and ">>> " in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """The docstring with its doctests in fences; those after its sections have a title."""
    parts: list[str] = []
    code: list[str] = []
    titled = False
    for line in [*docstring.splitlines(), ""]:
        if code and not line.strip():
            indent = re.match(r" *", code[0])[0]  # type: ignore[index]
            if not indent and not titled and _SECTION.search("\n".join(parts)):
                parts += [_TITLE, ""]
                titled = True
            parts += [f"{indent}```pycon", *code, f"{indent}```", ""]
            code = []
        elif code or line.lstrip().startswith(">>> "):
            code.append(line)
        else:
            parts.append(line)
    return "\n".join(parts).rstrip()
