"""Attributes that a class inherits, in its entry of the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ATTRIBUTES = re.compile(r"^Attributes:\n((?: +.*\n?|\n(?= ))+)", re.MULTILINE)
_NAME = re.compile(r"^    (\w+)(?: \(.*\))?:", re.MULTILINE)
# Titles of examples (see doctests.py) and fences, which stand after the sections.
_END = re.compile(r"^(<p><span|```|>>> )", re.MULTILINE)


class Inherited(griffe.Extension):
    """Adds the described attributes of the bases to those of each dataclass.

    The reports of the optimizers share their fields by bases that are no pages of the reference.
    """

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrites the docstrings of the dataclasses of a package."""
        for found in _classes(pkg):
            if "dataclass" not in found.labels or not found.docstring:
                continue
            for base in found.mro():
                if base.docstring and base.package is pkg:
                    found.docstring.value = merged(found.docstring.value, base.docstring.value)


def _classes(scope: griffe.Object) -> Iterator[griffe.Class]:
    """All classes that are defined below a module or a class."""
    for member in scope.members.values():
        if isinstance(member, griffe.Class):
            yield member
        if isinstance(member, griffe.Module | griffe.Class):
            yield from _classes(member)


def merged(docstring: str, base: str) -> str:
    """The docstring with the attributes of a base that it does not describe itself."""
    theirs = _ATTRIBUTES.search(base)
    if not theirs:
        return docstring
    own = _ATTRIBUTES.search(docstring)
    known = set(_NAME.findall(own[1])) if own else set()
    entries = re.split(r"^(?=    \w)", theirs[1].rstrip("\n"), flags=re.MULTILINE)
    added = [entry.rstrip("\n") for entry in entries if entry and _name(entry) not in known]
    if not added:
        return docstring
    lines = "\n".join(added)
    if own:
        end = own.start() + len(own[0].rstrip("\n"))
        return f"{docstring[:end]}\n{lines}{docstring[end:]}"
    end = found.start() if (found := _END.search(docstring)) else len(docstring)
    return f"{docstring[:end].rstrip()}\n\nAttributes:\n{lines}\n\n{docstring[end:]}"


def _name(entry: str) -> str:
    """The attribute that an entry describes."""
    found = _NAME.match(entry)
    return found[1] if found else ""
