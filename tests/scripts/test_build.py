"""Checks of what is built: each fault is found. `scripts/test.sh` builds and installs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import torch_secondorder

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
METADATA = "Metadata-Version: 2.4\nName: torch-secondorder\nVersion: {}\n"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "scripts" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel_of(folder: Path, metadata: str, *files: str) -> Path:
    path = folder / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("torch_secondorder-1.dist-info/METADATA", metadata)
        for name in files:
            archive.writestr(name, "")
    return path


def test_a_sound_wheel_has_no_faults(script: ModuleType, tmp_path: Path) -> None:
    metadata = METADATA.format(torch_secondorder.__version__)
    wheel = wheel_of(tmp_path, metadata, "torch_secondorder/py.typed")
    assert script.metadata_faults(wheel, release=False) == []


def test_faults_of_a_wheel_are_found(script: ModuleType, tmp_path: Path) -> None:
    metadata = METADATA.format("7.0") + "Project-URL: Docs, https://x.example/\n"
    wheel = wheel_of(tmp_path, metadata, "torch_secondorder/__init__.py", "tests/__init__.py")
    code = torch_secondorder.__version__
    assert script.metadata_faults(wheel, release=False) == [
        f"the wheel is of version 7.0, the code of {code}",
        "the wheel has no py.typed, so type checkers ignore its annotations",
        "the wheel installs tests, torch_secondorder",
    ]
    assert "has placeholders" in script.metadata_faults(wheel, release=True)[3]


def test_files_that_an_sdist_lacks_are_found(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "some.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(__file__, "torch_secondorder-1/mkdocs.yml")
    files = ["mkdocs.yml", "docs/index.md", ".gitignore"]
    assert script.missing_from(path, files) == ["docs/index.md"]


def test_a_failing_command_is_shown(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(script.BuildError, match=r"failed:\nTraceback(.|\n)*ZeroDivisionError"):
        script._run([sys.executable, "-c", "1 / 0"], cwd=tmp_path)


def test_the_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == torch_secondorder.__version__
    assert citation["license"] == "MIT"


def test_workflows_cover_the_pythons_and_the_oldest_torch() -> None:
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert tests["jobs"]["pinned"]["strategy"]["matrix"]["python"] == classified
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', PYPROJECT)
    versions = tests["jobs"]["torch"]["strategy"]["matrix"]["torch"]
    assert versions == [f"{oldest}.0", "newest", "nightly"]


def test_nightly_builds_need_an_index() -> None:
    environment = {
        name: value for name, value in os.environ.items() if name != "TORCH_NIGHTLY_INDEX"
    }
    command = ["bash", str(ROOT / "scripts/test.sh"), "--torch", "nightly"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 1 and "set TORCH_NIGHTLY_INDEX" in found.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_scripts_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for job in yaml.safe_load(text)["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest" and job["steps"]
    named = re.findall(r"scripts/\w+\.\w+", text)
    assert named and all((ROOT / name).exists() for name in named)


def test_issue_forms_are_complete() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem == "config":
            continue
        assert form["name"] and form["description"]
        for field in form["body"]:
            assert field["type"] == "markdown" or field["id"]
            assert field["attributes"].get("label") or field["attributes"]["value"]
