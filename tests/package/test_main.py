"""`python -m torch_secondorder`: what is installed, as text and as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import torch_secondorder
from torch_secondorder.__main__ import OPTIONAL_PACKAGES, describe, main, report

ROOT = Path(__file__).resolve().parents[2]
WRAPPERS = {"Constrained", "Contractive", "Projected"}


def test_the_command_prints_the_report() -> None:
    command = [sys.executable, "-m", "torch_secondorder"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    first, second, *_ = done.stdout.splitlines()
    assert first == f"torch_secondorder {torch_secondorder.__version__}"
    assert second.startswith(f"torch {torch.__version__}")
    assert done.stderr == ""


def test_each_optimizer_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("`" in line for line in lines)
    for name in ("LBFGS", "NewtonCG", "Sophia", *WRAPPERS):
        summary = getattr(torch_secondorder, name).__doc__.splitlines()[0].replace("`", "")
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert summary.startswith(line.split(maxsplit=1)[1])


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == describe()
    classes = {
        name
        for name in torch_secondorder.optim.__all__
        if isinstance(cls := getattr(torch_secondorder, name, None), type)
        and issubclass(cls, torch.optim.Optimizer)
    }
    assert set(found["wrappers"]) == WRAPPERS
    assert set(found["optimizers"]) | WRAPPERS | {"SecondOrderOptimizer"} == classes
    assert found["devices"][0]["device"] == "cpu"


def test_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    found = describe()
    assert set(found["packages"].values()) == {None}
    assert report(found).count("not found") == len(OPTIONAL_PACKAGES)


def test_accelerators_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    kind = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: kind)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    text = report(describe())
    assert "  cuda:1  H100, 80 GiB, capability 9.0" in text
    assert f"torch {torch.__version__} (CUDA 13.0)" in text
    kind = torch.device("mps")
    assert describe()["devices"][1] == {"device": "mps:0", "properties": []}


def test_wrong_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--jsn"])
    assert "unrecognized arguments: --jsn" in capsys.readouterr().err


def test_optional_packages_are_those_of_the_extras() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = "".join(re.findall(r"^(?:lightning|huggingface|examples) = (.+)$", text, re.MULTILINE))
    names = set(re.findall(r'"([a-z-]+)>=', extras))
    assert len(names) == 8
    assert names | {"pytorch-lightning"} == set(OPTIONAL_PACKAGES)
