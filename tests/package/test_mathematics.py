"""The pages of docs/mathematics: all in the contents, with pictures that their script draws."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "draw_mathematics.py"
PICTURES = ROOT / "docs" / "images" / "mathematics"
PAGES = {page.stem: page for page in (ROOT / "docs" / "mathematics").glob("*.md")}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that draws the pictures, as a module."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("draw_mathematics", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_contents_list_each_page_once() -> None:
    listed = re.findall(r"^\| \[[^\]]+\]\((\w+)\.md\)", PAGES["index"].read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(set(PAGES) - {"index"})
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert re.findall(r"- mathematics/(\w+)\.md", nav) == ["index", *listed]


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"index"}))
def test_pages_name_their_sources(page: str) -> None:
    text = PAGES[page].read_text("utf-8")
    assert "\n## References\n" in text
    assert "```python\n" in text


def test_each_picture_is_on_its_page(script: ModuleType) -> None:
    assert {path.name for path in PICTURES.iterdir()} == {f"{name}.svg" for name in script.FIGURES}
    for name in script.FIGURES:
        text = PAGES[name].read_text("utf-8")
        assert f"](../images/mathematics/{name}.svg)" in text
        assert "`scripts/draw_mathematics.py`" in text
        assert (PICTURES / f"{name}.svg").stat().st_size < 80_000


def test_pictures_are_drawn_from_the_numbers_of_the_page(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_default_dtype()
    script.main(["constraints", "--output", str(tmp_path)])
    assert torch.get_default_dtype() == before
    assert [path.name for path in tmp_path.iterdir()] == ["constraints.svg"]
    drawn, committed = (
        (folder / "constraints.svg").read_text("utf-8") for folder in (tmp_path, PICTURES)
    )
    # Digits and fonts differ by machine; the lines drawn do not.
    shapes = [re.findall(r'<g id="(\w+)"', text) for text in (drawn, committed)]
    assert shapes[0] == shapes[1]
    assert "constraints.svg" in capsys.readouterr().out


def test_pages_without_a_picture_are_refused(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main(["index"])
    assert "no picture for index" in capsys.readouterr().err
