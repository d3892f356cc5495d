"""The scripts behind the documentation site: tutorials, notebooks, formulas and links."""

from __future__ import annotations

import base64
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = '''"""# A title

Text with $x^2$.
"""

import matplotlib.pyplot as plt

x = 2

# %%
# ## A heading
#
# More text.

print(x + 1)

# %%
# A picture.

figure, axes = plt.subplots()
axes.set_title("A line")
axes.plot([0, 1])

# %%
# The end.
'''


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of scripts/site."""
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "site"))
    imported: list[str] = []

    def load(name: str) -> Any:
        imported.append(name)
        return importlib.import_module(name)

    yield load
    for name in imported:
        sys.modules.pop(name, None)


def test_a_tutorial_is_cut_into_cells(site: Any) -> None:
    first, second, third, last = site("tutorials").cells(TUTORIAL)
    assert first.text == "# A title\n\nText with $x^2$."
    assert (first.code, first.line) == ("import matplotlib.pyplot as plt\n\nx = 2", 6)
    assert second.text == "## A heading\n\nMore text."
    assert (second.code, second.line) == ("print(x + 1)", 15)
    assert third.code.startswith("figure, axes")
    assert (last.text, last.code) == ("The end.", "")


def test_a_tutorial_without_a_title_is_rejected(site: Any) -> None:
    tutorials = site("tutorials")
    with pytest.raises(tutorials.TutorialError, match="opens with a docstring"):
        list(tutorials.cells("x = 1\n"))


def test_a_tutorial_runs_into_a_page_with_pictures(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    tutorials = site("tutorials")
    folder = tmp_path / "tutorials"
    folder.mkdir()
    (folder / "line.py").write_text(TUTORIAL, encoding="utf-8")
    monkeypatch.setattr(tutorials, "FOLDER", folder)
    monkeypatch.setattr(tutorials, "CACHE", tmp_path / "cache")
    page, picture = tutorials.results()
    text = page.read_text(encoding="utf-8")
    assert "```python\nprint(x + 1)\n```\n\n```text\n3\n```" in text
    assert "![A line](line_1.svg)" in text
    assert "<svg" in picture.read_text(encoding="utf-8")
    # The second time nothing runs.
    page.write_text("kept", encoding="utf-8")
    assert next(tutorials.results()).read_text(encoding="utf-8") == "kept"
    (folder / "line.py").write_text(TUTORIAL.replace("x = 2", "x = y"), encoding="utf-8")
    with pytest.raises(tutorials.TutorialError, match=r"line\.py failed[\s\S]*'y' is not defined"):
        list(tutorials.results())
    assert not list((tmp_path / "cache").iterdir())


def test_a_notebook_becomes_a_page(site: Any, tmp_path: Path) -> None:
    picture = base64.b64encode(b"png").decode()
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": "draw()",
            "outputs": [
                {"output_type": "stream", "text": ["one\n", "two\n"]},
                {"output_type": "display_data", "data": {"image/png": picture, "text/plain": "F"}},
                {"output_type": "execute_result", "data": {"text/plain": "\x1b[31m5\x1b[0m"}},
            ],
        },
        {"cell_type": "code", "source": "", "outputs": []},
    ]
    path = tmp_path / "start.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    page, pictures = site("notebooks").page_of(path)
    assert page == (
        "# Title\ntext\n\n```python\ndraw()\n```\n\n```text\none\ntwo\n```\n\n"
        "![What the code above draws](start_1.png)\n\n```text\n5\n```\n\n"
        "[This page as a notebook](start.ipynb){ download }\n"
    )
    assert pictures == {"start_1.png": b"png"}


def test_formulas_become_mathml(site: Any) -> None:
    mathematics = site("mathematics")
    page = mathematics.to_mathml(
        r'<p><span class="arithmatex">\(a &lt; b\)</span></p>'
        '\n<div class="arithmatex">\\[\n\\frac{1}{2}\n\\]</div>'
    )
    assert page.startswith("<p><math")
    assert "<mo>&lt;</mo>" in page
    assert '<div class="formula"><math display="block">' in page
    assert "<mfrac>" in page
    with pytest.raises(mathematics.FormulaError, match=r"\\gone x\$"):
        mathematics.to_mathml(r'<span class="arithmatex">\(\gone x\)</span>')


def test_links_lead_to_what_the_site_has(site: Any) -> None:
    repository = site("repository")
    text = (
        "[a](../examples/pinn_poisson.py) [b](../CONTRIBUTING.md#the-package) [c](constraints.md)\n"
        "[d](https://example.org) `[e](../README.md)` [f](#here) [g](../examples/)\n"
        "[h](tutorials/which_curvature.py) [i](../README.md) [j](../gone.py)\n"
        "```\n[k](../README.md)\n```\n"
    )
    assert repository.linked(text, "docs/page.md") == {"examples/pinn_poisson.py", "examples"}
    assert repository.relinked(text, "docs/page.md", "page.md") == (
        "[a](source/examples/pinn_poisson.py.md) [b](contributing.md#the-package) "
        "[c](constraints.md)\n"
        "[d](https://example.org) `[e](../README.md)` [f](#here) [g](source/examples.md)\n"
        "[h](tutorials/which_curvature.md) [i](index.md) [j](../gone.py)\n"
        "```\n[k](../README.md)\n```\n"
    )
    # The same from a page in a folder, and from a file of the root.
    deep = repository.relinked("[a](../../CHANGELOG.md)", "docs/api/x.md", "api/x.md")
    assert deep == "[a](../changelog.md)"
    root = repository.relinked("[a](docs/design.md#x)", "CONTRIBUTING.md", "contributing.md")
    assert root == "[a](design.md#x)"
    assert "- `pinn_poisson.py`" in repository.source_page("examples")
    assert "````python\n" in repository.source_page("examples/pinn_poisson.py")


def test_comments_do_not_end_paragraphs(site: Any) -> None:
    text = (
        "a\n<!-- figure: x -->0.5<!-- /figure --> of `<!-- b -->`\n"
        "```\n<!-- c -->\n```\n<!--\nd\n-->"
    )
    assert site("comments").without_comments(text) == (
        "a\n0.5 of `<!-- b -->`\n```\n<!-- c -->\n```\n"
    )


def test_names_become_links(site: Any) -> None:
    names = site("names").Names(
        ["::: torch_secondorder.KFAC\n\n::: torch_secondorder.solvers.KFAC\n"]
    )
    known = {"torch_secondorder.KFAC": "up", "torch_secondorder.KFAC.step": "step"}
    page = names.linked(
        "<code>KFAC</code> <code>KFAC(lr=1)</code> <code>KFAC.step</code> <code>KFAC.gone</code> "
        "<code>torch.KFAC</code> <a><code>KFAC</code></a> <pre><code>KFAC</code></pre>",
        known.get,
    )
    link = '<a class="api-name" href="{}"><code>{}</code></a>'.format
    assert page == (
        f"{link('up', 'KFAC')} {link('up', 'KFAC(lr=1)')} {link('step', 'KFAC.step')} "
        f"{link('up', 'KFAC.gone')} "
        "<code>torch.KFAC</code> <a><code>KFAC</code></a> <pre><code>KFAC</code></pre>"
    )


def test_doctests_are_fenced(site: Any) -> None:
    fenced = site("doctests").fenced
    text = "Summary.\n\nArgs:\n    x: A number.\n\n>>> f(1)\n2\n\nMore.\n\n>>> f(2)\n3"
    assert fenced(text) == (
        "Summary.\n\nArgs:\n    x: A number.\n\n"
        '<p><span class="doc-section-title">Example:</span></p>\n\n'
        "```pycon\n>>> f(1)\n2\n```\n\nMore.\n\n```pycon\n>>> f(2)\n3\n```"
    )
    assert fenced("A.\n\n>>> 1\n1") == "A.\n\n```pycon\n>>> 1\n1\n```"


def test_inherited_attributes_are_described(site: Any) -> None:
    merged = site("inherited").merged
    base = "Base.\n\nAttributes:\n    a: First.\n    b: Second,\n        with more.\n"
    own = "Report.\n\nAttributes:\n    a: Its own.\n\n>>> 1\n1"
    assert merged(own, base) == (
        "Report.\n\nAttributes:\n    a: Its own.\n    b: Second,\n        with more.\n\n>>> 1\n1"
    )
    bare = "Report.\n\n```pycon\n>>> 1\n```"
    described = base.partition("\n\n")[2]
    assert merged(bare, base) == f"Report.\n\n{described}\n```pycon\n>>> 1\n```"
    assert merged(own, "Base.") == own


def test_reports_show_the_fields_of_their_bases(site: Any) -> None:
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(site("inherited").Inherited)
    package = griffe.load("torch_secondorder", search_paths=[ROOT], extensions=extensions)
    described = package["optim.lbfgs.LBFGSInfo"].docstring.value
    for field in ("status", "search_status", "active_bounds", "skipped_pairs"):
        assert described.count(f"\n    {field}: ") == 1


def test_the_site_is_built_strictly(site: Any) -> None:
    script = (ROOT / "scripts" / "docs.sh").read_text(encoding="utf-8")
    (command,) = [line for line in script.splitlines() if "mkdocs build" in line]
    assert "--strict" in command
    assert "--quiet" not in command  # it hides warnings from --strict
    assert "docs.sh" in (ROOT / "scripts" / "test.sh").read_text(encoding="utf-8")
