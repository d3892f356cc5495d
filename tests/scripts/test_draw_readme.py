"""The picture of the README: how its curves are measured, thinned and drawn."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch

from tests.support.processes import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; it looks for the examples by itself."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(
        "draw_readme", ROOT / "scripts" / "draw_readme.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_best_setting_is_drawn_and_no_step_that_ends_too_late(script: ModuleType) -> None:
    pytest.importorskip("tqdm")
    threads = torch.get_num_threads()
    try:
        data = script.measure(0.1, ["Adam"])
    finally:
        torch.set_num_threads(threads)
    (result,) = data["results"].values()
    times, losses = zip(*result["curve"], strict=True)
    assert times[0] == 0.0 and list(times) == sorted(times) and times[-1] <= 0.1
    assert losses[-1] == float(f"{min(result['last_loss'].values()):.4g}")
    assert len(result["last_loss"]) == 4
    assert result["last_loss"][result["setting"]] == min(result["last_loss"].values())
    text = script.in_short_lines(data)
    assert json.loads(text) == data
    assert f"   [{times[0]}, {losses[0]}],\n" in text
    assert ">Adam</text>" in script.draw(data)


def test_curves_are_thinned_with_both_ends(script: ModuleType) -> None:
    times = [0.01 * i for i in range(1001)]
    curve = script.thinned(times, [float(i) for i in range(1001)], 10.0)
    assert curve[0] == [0.0, 0.0] and curve[-1] == [10.0, 1000.0]
    assert 50 < len(curve) <= 60
    assert curve[1][0] - curve[0][0] < curve[-1][0] - curve[-2][0]
    assert script.thinned([0.0, 3.0], [1.0, 0.5], 10.0) == [[0.0, 1.0], [3.0, 0.5]]


def test_labels_keep_their_distance(script: ModuleType) -> None:
    assert script.labels_apart({"a": 0.0, "b": 50.0}, 17) == {"a": 0.0, "b": 50.0}
    placed = script.labels_apart({"b": 101.0, "a": 100.0, "c": 200.0}, 17)
    assert placed["b"] - placed["a"] == 17
    assert placed["c"] - placed["b"] >= 17
    assert abs(placed["a"] - 100) <= 8
