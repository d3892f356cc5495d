"""The comparison of Jacobians runs and checks its results, and SciPy gains from an exact one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jacobian_speed
from tests.support.examples import run_example

pytest.importorskip("scipy")


@pytest.mark.slow
def test_it_prints_two_tables(tmp_path: Path) -> None:
    arguments = ("--widths", "20,8,3", "--repeat", "2", "--threads", "1")
    done = run_example(*arguments, cwd=tmp_path, script="jacobian_speed.py")
    assert done.returncode == 0, done.stderr
    for name in ("finite differences", "torch.func.jacrev", jacobian_speed.OURS, "least_squares"):
        assert name in done.stdout
    assert not list(tmp_path.iterdir())


def test_wrong_widths_are_rejected(tmp_path: Path) -> None:
    done = run_example("--widths", "20,8", cwd=tmp_path, script="jacobian_speed.py")
    assert done.returncode == 2
    assert "20,8 is not three positive numbers" in done.stderr


def test_a_wrong_jacobian_is_noticed() -> None:
    net = jacobian_speed.Network.make((12, 6, 3), seed=0)
    x = np.linspace(0, 1, 12)
    ways = jacobian_speed.ways(net)
    assert max(jacobian_speed.errors(net, ways, x, seed=0).values()) < 1e-7
    with pytest.raises(RuntimeError, match="shifted is wrong"):
        jacobian_speed.errors(net, {"shifted": lambda x: net.formula(x) + 1e-3}, x, seed=0)


def test_the_search_needs_fewer_evaluations_with_a_jacobian() -> None:
    net = jacobian_speed.Network.make((12, 6, 3), seed=0)
    x = np.linspace(0, 1, 12)
    without = jacobian_speed.search(net, x, None)
    with_ours = jacobian_speed.search(net, x, jacobian_speed.ways(net)[jacobian_speed.OURS])
    assert with_ours.evaluations < without.evaluations / 5
    assert with_ours.cost == pytest.approx(without.cost, rel=1e-3)
