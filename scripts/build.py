"""Builds the sdist, and of its contents the wheel, and uses the wheel in an environment of its own.

    .venv/bin/python scripts/build.py              # what scripts/test.sh runs
    .venv/bin/python scripts/build.py --release    # also refuses what must not be published

The environment sees torch where it is installed already, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from email import message_from_string
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"

#: Folders and files of the repository that a source distribution leaves out.
LEFT_OUT = (".ci/", ".gitignore", ".pre-commit-config.yaml")

#: A domain that nobody can own (RFC 2606), in place of the project's address.
PLACEHOLDER = ".example"

TRAINS = """
import sys, torch, torch_secondorder
assert torch_secondorder.__file__.startswith(sys.prefix), torch_secondorder.__file__
model = torch.nn.Linear(3, 1)
x, y = torch.randn(20, 3), torch.randn(20, 1)
optimizer = torch_secondorder.LBFGS(model.parameters())
def closure():
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss
loss = optimizer.step(closure)
assert closure() < loss, (closure(), loss)
assert {name.partition(".")[0] for name in sys.modules}.isdisjoint({"lightning", "transformers"})
"""


class BuildError(Exception):
    """A fault of what was built, in a sentence."""


def build(dist: Path) -> tuple[Path, Path]:
    """Builds the sdist, unpacks it, and builds the wheel there; returns their paths."""
    shutil.rmtree(dist, ignore_errors=True)
    _run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", dist], cwd=ROOT)
    (sdist,) = dist.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            if hasattr(tarfile, "data_filter"):  # Python 3.12 and 3.13 warn without one
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(folder)
        (unpacked,) = Path(folder).iterdir()
        _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", dist], cwd=unpacked)
    (wheel,) = dist.glob("*.whl")
    return sdist, wheel


def missing_from(sdist: Path, files: Iterable[str]) -> list[str]:
    """The files of the repository that an sdist should have and has not."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    return [file for file in files if not file.startswith(LEFT_OUT) and file not in held]


def metadata_faults(wheel: Path, *, release: bool) -> list[str]:
    """Faults of the name, version and description of a wheel."""
    version = re.search(
        r'^__version__ = "(.+)"',
        (ROOT / "torch_secondorder" / "__init__.py").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert version is not None
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(archive.read(path).decode())
    faults = []
    if metadata["Version"] != version[1]:
        faults.append(f"the wheel is of version {metadata['Version']}, the code of {version[1]}")
    if "torch_secondorder/py.typed" not in names:
        faults.append("the wheel has no py.typed, so type checkers ignore its annotations")
    foreign = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    if foreign != {"torch_secondorder"}:
        faults.append(f"the wheel installs {', '.join(sorted(foreign))}")
    if release:
        addresses = [url for url in metadata.get_all("Project-URL", []) if PLACEHOLDER in url]
        if addresses:
            faults.append(
                "[project.urls] in pyproject.toml has placeholders: write the addresses of the "
                f"project there ({'; '.join(addresses)})"
            )
        changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        if not re.search(rf"^## {re.escape(version[1])} - \d{{4}}-\d\d-\d\d$", changelog, re.M):
            faults.append(f"CHANGELOG.md has no '## {version[1]} - YYYY-MM-DD'")
    return faults


def use(wheel: Path) -> None:
    """Installs a wheel into an environment of its own, and trains with it there."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "venv")
        _run([sys.executable, "-m", "venv", "--without-pip", environment], cwd=folder)
        python = environment / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
        _run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], cwd=folder)
        # torch and what it needs, from here; behind the wheel, and without the editable install,
        # for files that end in .pth count in the environment's own folder only.
        (packages,) = environment.glob("lib/python*/site-packages")
        (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        _run([python, "-W", "error", "-c", TRAINS], cwd=folder)
        _run([python, "-m", "torch_secondorder"], cwd=folder)


def _run(command: Sequence[str | Path], cwd: str | Path) -> None:
    variables = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=variables, capture_output=True, text=True
    )
    if done.returncode:
        shown = " ".join(map(str, command))[:200]
        raise BuildError(f"{shown} failed:\n{done.stdout}{done.stderr}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds and checks; exits with a message if something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--release", action="store_true", help="refuse what must not be published")
    parser.add_argument("--out", type=Path, default=DIST, help="folder, emptied first")
    options = parser.parse_args(arguments)
    try:
        sdist, wheel = build(options.out.resolve())
        faults = metadata_faults(wheel, release=options.release)
        if (ROOT / ".git").exists():
            listed = subprocess.run(
                ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
            )
            missing = missing_from(sdist, listed.stdout.splitlines())
            faults += [f"the sdist lacks {name}" for name in missing]
        if faults:
            raise BuildError("\n".join(faults))
        use(wheel)
    except BuildError as error:
        sys.exit(f"error: {error}")
    print(f"{sdist.name} ({sdist.stat().st_size:,} bytes), {wheel.name}: installed and used")


if __name__ == "__main__":
    main()
