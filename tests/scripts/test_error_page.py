"""docs/errors.md has every message of the package, and says what to do."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "torch_secondorder"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts" / "site"))
    try:
        return importlib.import_module("error_page")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def page(script: ModuleType) -> str:
    return script.page()


def test_the_page_is_that_of_the_code(page: str) -> None:
    shown = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert shown == page, "run: python scripts/site/error_page.py"


def test_every_constant_part_of_a_raised_message_is_on_the_page(
    page: str, script: ModuleType
) -> None:
    """Finds messages in another way than the script does: the texts within `raise` statements."""
    in_one_line = " ".join(page.split())
    internal = importlib.import_module("error_messages").INTERNAL
    missing = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            texts = [
                each.value
                for argument in node.exc.args[:1]
                for each in ast.walk(argument)
                if isinstance(each, ast.Constant) and isinstance(each.value, str)
            ]
            kind = ast.unparse(node.exc.func)
            if not kind.endswith("Error") or kind in internal:
                continue
            for text in texts:
                words = " ".join(text.split())
                if len(words) < 25 or any(part in words for part in script.UNSEEN):
                    continue
                if words not in in_one_line:
                    missing.append((path.name, node.lineno, words))
    assert missing == []


def test_every_message_has_a_cause_and_a_fix(script: ModuleType) -> None:
    bare = [
        message.text
        for message in script.seen_messages()
        if not script.says_it_all(message) and not script.explanation_of(message)
    ]
    assert bare == [], "add them to scripts/site/error_explanations.py"


def test_every_explanation_and_every_exception_belongs_to_a_message(script: ModuleType) -> None:
    texts = [message.text for message in script.all_messages()]
    stale = [part for part in script.EXPLANATIONS if not any(part in text for text in texts)]
    stale += [part for part in script.UNSEEN if not any(part in text for text in texts)]
    assert stale == []


def test_placeholders_and_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = importlib.import_module("error_messages")
    monkeypatch.setattr(messages, "PACKAGE", tmp_path)
    checks = tmp_path / "integrations" / "lightning" / "_checks.py"
    checks.parent.mkdir(parents=True)
    checks.write_text('def problems(x):\n    yield f"{x} goes with no {x.y}"\n')
    (tmp_path / "a.py").write_text(
        '_WHY = "because of {}, alas"\n'
        "class Odd(RuntimeError): ...\n"
        "def outer(a, way_out):\n"
        '    kind = "even or" if a else "odd and"\n'
        '    raise Odd(f"it is {kind} {tuple(a.shape)}: {way_out}")\n'
        'def f(): outer(1, "leave it")\n'
        'def g(): outer(2, way_out="take it")\n'
        "def h(x): raise ValueError(_WHY.format(x))\n"
        'def w(): warnings.warn(f"slow {len(x)} times", FutureWarning)\n'
    )
    found = {(m.kind, m.text) for m in messages.Package().messages()}
    assert found == {
        ("Odd", "it is even or <shape>: leave it"),
        ("Odd", "it is even or <shape>: take it"),
        ("Odd", "it is odd and <shape>: leave it"),
        ("Odd", "it is odd and <shape>: take it"),
        ("ValueError", "because of <reason>, alas"),
        ("FutureWarning", "slow <number> times"),
        ("ValueError", "<x> goes with no <y>"),
    }
