"""docs/gallery.md: every example, with a picture or a table, from runs that are kept."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "images" / "gallery"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "site" / "gallery.py"
    spec = importlib.util.spec_from_file_location("gallery", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["gallery"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_an_entry_and_a_run(script: ModuleType) -> None:
    examples = {path.stem for path in (ROOT / "examples").glob("[a-z]*.py")}
    assert set(script.ENTRIES) == examples
    runs = json.loads(script.RUNS.read_text(encoding="utf-8"))
    assert set(runs) == examples
    for name, found in runs.items():
        assert found["command"] == script.ENTRIES[name].command, f"gallery.py {name}"
        assert found["output"] and found["seconds"] > 0


def test_the_page_is_made_of_the_runs(script: ModuleType) -> None:
    runs = json.loads(script.RUNS.read_text(encoding="utf-8"))
    shown = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert shown == script.page(runs), "run: python scripts/site/gallery.py --page"


def test_pictures_are_there_and_small(script: ModuleType) -> None:
    drawn = {name for name, entry in script.ENTRIES.items() if entry.described}
    assert {path.stem for path in PICTURES.glob("*.png")} == drawn
    large = [p.name for p in PICTURES.glob("*.png") if p.stat().st_size > script.LARGEST_PICTURE]
    assert large == []


def test_commands_name_options_that_the_examples_have(script: ModuleType) -> None:
    shared = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "examples").glob("_*.py"))
    for entry in script.ENTRIES.values():
        text = shared + (ROOT / "examples" / f"{entry.name}.py").read_text(encoding="utf-8")
        for word in shlex.split(entry.arguments):
            assert not word.startswith("--") or f'"{word}"' in text, (entry.name, word)


def test_progress_bars_and_file_names_are_left_out(script: ModuleType) -> None:
    printed = "Epoch 0: 100%|##| 2/2 [00:01<00:00]\n\na table \nplot: some.png\n"
    assert script.shown(printed) == ["a table"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 seconds"), (7.3, "7 seconds"), (44, "45 seconds")]
)
def test_times_are_rounded(script: ModuleType, seconds: float, words: str) -> None:
    assert script.duration(seconds) == words
    assert script.duration(130) == "2 minutes"


def test_pictures_shrink_and_keep_their_lines(script: ModuleType, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    large = image.effect_noise((1500, 900), 40).convert("RGBA")
    large.paste((213, 94, 0, 255), (0, 0, 1500, 4))
    large.save(tmp_path / "large.png")
    with pytest.raises(RuntimeError, match="draw less"):
        script.shrink(tmp_path / "large.png", tmp_path / "small.png")
    plain = image.new("RGBA", (1500, 900), (255, 255, 255, 0))
    plain.paste((213, 94, 0, 255), (0, 0, 1500, 8))
    plain.save(tmp_path / "plain.png")
    script.shrink(tmp_path / "plain.png", tmp_path / "small.png")
    with image.open(tmp_path / "small.png") as found:
        assert found.size == (1200, 720)
        assert found.convert("RGB").getpixel((600, 2)) == (213, 94, 0)
        assert found.convert("RGB").getpixel((600, 700)) == (255, 255, 255)


def test_a_failing_example_is_reported(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.py").write_text("raise SystemExit('no data')")
    monkeypatch.setattr(script, "EXAMPLES", tmp_path)
    entry = script.Entry("odd", "Odd", "It fails.")
    with pytest.raises(RuntimeError, match=r"odd\.py failed:\nno data"):
        script.run(entry)
    (tmp_path / "odd.py").write_text("print('a table')")
    assert script.run(entry)["output"] == ["a table"]
    with pytest.raises(RuntimeError, match="drew 0 pictures"):
        script.run(script.Entry("odd", "Odd", "It fails.", described="A curve"))


def test_unknown_names_are_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["pinn_heat"])
    assert "unknown: pinn_heat; known: compare_optimizers" in capsys.readouterr().err
