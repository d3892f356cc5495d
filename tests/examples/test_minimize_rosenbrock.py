"""The example that draws the paths of all methods."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

import minimize_rosenbrock
from tests.support.examples import run_example

SCRIPT = "minimize_rosenbrock.py"


def test_the_paths_of_two_methods(tmp_path: Path) -> None:
    done = run_example("--methods", "bfgs,newton", cwd=tmp_path, script=SCRIPT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    header = ("iterations", "evaluations", "Hessians, products", "value", "distance to (1, 1)")
    assert all(name in lines[1] for name in header)
    exact, differences, newton = (line.split() for line in lines[3:6])
    assert exact[:2] == ["BFGS", "exact"]
    assert differences[:2] == ["BFGS", "differences"]
    assert newton[:2] == ["Newton", "exact"]
    assert float(exact[-1]) < 1e-5 and float(newton[-1]) < 1e-5
    # Three evaluations for a gradient of two entries.
    assert int(differences[3]) > 2 * int(exact[3])
    assert (tmp_path / "minimize_rosenbrock.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", minimize_rosenbrock.METHODS)
def test_every_method_finds_its_way(method: str) -> None:
    torch.manual_seed(0)
    run = minimize_rosenbrock.descend(method, "exact", torch.tensor([-1.2, 1.0]).double())
    assert run.distance < 0.2
    assert len(run.path) == len(run.values) == run.result.nit + 1
    torch.testing.assert_close(run.path[-1], run.result.x)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--methods", "simplex"], 2, "unknown method 'simplex'; known: bfgs"),
        (["--methods", "newton", "--jac", "differences"], 1, "need second derivatives"),
    ],
)
def test_bad_arguments(arguments: list[str], status: int, message: str, tmp_path: Path) -> None:
    done = run_example(*arguments, cwd=tmp_path, script=SCRIPT)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["1", "1,2,3", "1,inf"])
def test_a_start_that_is_no_point(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not two finite numbers"):
        minimize_rosenbrock.point(text)
