"""The notebook runs without a warning, and shows what it prints; the runner stores outputs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "site" / "run_notebook.py"
    spec = importlib.util.spec_from_file_location("run_notebook", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(*lines: str) -> dict[str, Any]:
    source = "\n".join(lines).splitlines(keepends=True)
    return {"cell_type": "code", "source": source, "outputs": [], "execution_count": None}


def test_the_quickstart_has_the_outputs_of_its_code(script: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    script.main([str(QUICKSTART), "--check"])


def test_the_quickstart_is_a_notebook_that_can_be_read() -> None:
    notebook = json.loads(QUICKSTART.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert QUICKSTART.stat().st_size < 80_000
    kinds = [output["output_type"] for cell in cells for output in cell.get("outputs", [])]
    assert kinds.count("display_data") == 1 and "error" not in kinds


def test_outputs_are_stored_and_compared(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"
    cells = [code("x = 3", "print(x)", "x + 1"), {"cell_type": "markdown", "source": ["text"]}]
    path.write_text(json.dumps({"cells": [*cells, code("x * 1.5")]}))
    with pytest.raises(SystemExit, match="has other outputs"):
        script.main([str(path), "--check"])
    script.main([str(path)])
    first, _, last = json.loads(path.read_text())["cells"]
    assert [each["output_type"] for each in first["outputs"]] == ["stream", "execute_result"]
    assert first["outputs"][0]["text"] == ["3\n"]
    assert first["outputs"][1]["data"] == {"text/plain": ["4"]}
    assert (last["execution_count"], last["outputs"][0]["data"]) == (2, {"text/plain": ["4.5"]})
    script.main([str(path), "--check"])


def test_digits_do_not_matter_and_words_do(script: ModuleType) -> None:
    def shape(text: str) -> list[list[str]]:
        return script.without_digits([[{"output_type": "stream", "text": [text]}]])

    assert shape("loss 1.5e-07, 20 steps\n") == shape("loss 2.0e-06,  7 steps\n")
    assert shape("loss 1.5") != shape("gain 1.5")


def test_errors_and_warnings_are_not_hidden(script: ModuleType) -> None:
    with pytest.raises(ZeroDivisionError):
        script.run([code("1 / 0")])
    with pytest.raises(UserWarning, match="beware"):
        script.run([code("import warnings", "warnings.warn('beware')")])
