"""Docstrings open with a plain noun or verb phrase that ends with a full stop."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["torch_secondorder", "examples", "scripts"]
LONGEST = 100

#: First words that make a riddle of a summary: question words, and pronouns without a noun.
RIDDLES = {
    *("how", "what", "when", "where", "whether", "which", "who", "whom", "whose", "why"),
    *("he", "her", "hers", "him", "his", "it", "its", "one's", "she", "their", "theirs", "them"),
    *("there", "these", "they", "this", "that", "those", "our", "ours", "we", "you", "your"),
}


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """The docstrings of a source with the lines that they start at."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node.body[0].lineno, docstring


def faults(text: str) -> Iterator[tuple[int, str]]:
    """Lines of a source at which a docstring's summary breaks a rule, and the rule."""
    for line, docstring in docstrings(text):
        summary = docstring.partition("\n")[0]
        first = summary.split()[0].strip("`*,.:;").lower()
        if first in RIDDLES:
            yield line, f"opens with {first!r}, write a noun or verb phrase: {summary}"
        if len(summary) > LONGEST:
            yield line, f"longer than {LONGEST} characters: {summary}"
        if not summary.endswith((".", "?", "!")):
            yield line, f"has no full stop at the end of its first line: {summary}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_summaries_are_plain_phrases(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, fault in faults(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('"""What it does."""', "opens with 'what'"),
        ('class A:\n    """Theirs."""', "opens with 'theirs'"),
        ('def f():\n    def g():\n        """`Where` it is."""', "opens with 'where'"),
        ('async def f():\n    """Opens something"""', "no full stop"),
        ('def f():\n    """Opens something,\n    and closes it.\n    """', "no full stop"),
        (f'def f():\n    """{"Much " * 30}."""', "longer than"),
    ],
)
def test_the_check_finds(text: str, fault: str) -> None:
    ((_, found),) = faults(text)
    assert fault in found


def test_the_check_accepts_a_plain_phrase() -> None:
    assert list(faults('def f():\n    """Opens a file.\n\n    What for, see there.\n    """')) == []
