"""The example that compares ways to solve linear least squares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import least_squares
from tests.support.examples import run_example
from torch_secondorder.linear import lstsq, ridge

SCRIPT = "least_squares.py"


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    done = run_example("--radii", "2,8,1e9", cwd=tmp_path, script=SCRIPT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    header = ("method", "iterations", "|Ax - b|", "gradient", "|x|", "multiplier", "error")
    assert all(name in lines[1] for name in header)
    exact, descent, lsqr, lsmr, tight, loose, idle = lines[3:10]
    assert exact.startswith("pseudoinverse, rank 12") and descent.startswith("gradient iteration")
    assert lsqr.startswith("LSQR") and lsmr.startswith("LSMR")
    assert [lsqr.split()[2], lsmr.split()[2]] == [exact.split()[4]] * 2  # the residual
    assert float(descent.split()[3]) > 2 * float(exact.split()[4])
    assert float(tight.split()[-2]) > float(loose.split()[-2]) > float(idle.split()[-2]) == 0
    assert float(loose.split()[-1]) < 0.5 * float(exact.split()[-1])
    assert idle.split()[-3] == exact.split()[-2]  # the norm: the bound is not active
    assert (tmp_path / "least_squares.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("samples", [6, 30])
def test_the_gradient_iteration_finds_the_shortest_solution(samples: int) -> None:
    problem = least_squares.make_problem(samples, 4, 0.1, 0)
    A, b = problem.A, problem.b
    A[:, 1] = A[:, 0]  # the rank falls, and solutions are many
    x, norms = least_squares.gradient_iteration(A, b, 20_000)
    assert norms[-1] <= least_squares.TOLERANCE * norms[0] and len(norms) < 20_000
    torch.testing.assert_close(x, lstsq(A, b).x, rtol=1e-5, atol=1e-6)


def test_multipliers_are_penalties() -> None:
    problem = least_squares.make_problem(15, 11, 0.2, 1)
    fits, gradients = least_squares.compare(problem, [0.5, 3.0], 50)
    for fit in fits[-2:]:
        assert fit.multiplier is not None
        expected = ridge(problem.A, problem.b, fit.multiplier).x
        torch.testing.assert_close(fit.x, expected, rtol=1e-7, atol=1e-8)
    assert set(gradients) == {"gradient iteration", "LSQR", "LSMR"}
    assert len(gradients["gradient iteration"]) == 51
    starts = {round(norms[0], 10) for norms in gradients.values()}
    assert len(starts) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "0 is not a positive number"),
        (["--noise", "-1"], "-1 is not a positive number"),
        (["--radii", "1,0"], "0 is not a positive number"),
        (["--radii", "1,x"], "invalid radii value: '1,x'"),
        (["--out", "picture"], "picture does not end in .png"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["least_squares.py", *arguments])
    with pytest.raises(SystemExit):
        least_squares.parse_arguments()
    assert message in capsys.readouterr().err
