"""NIST's reference problems, and the example that fits them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import curve_fitting
from _nist import digits, load_problems
from tests.support.examples import run_example
from torch_secondorder import least_squares

PROBLEMS = load_problems()
# The squares of Lanczos1 are those of rounding errors in the thirteenth digit of its data.
MEANINGFUL = [name for name in PROBLEMS if name != "Lanczos1"]
# Evaluations and digits that are enough for a quick run of the tests; the others are marked slow.
MANY = {("MGH17", 0), ("MGH10", 0), ("MGH10", 1), ("MGH09", 0), ("Nelson", 0)}


def test_all_problems_are_there() -> None:
    assert len(PROBLEMS) == 27
    assert {problem.level for problem in PROBLEMS.values()} == {"lower", "average", "higher"}
    for problem in PROBLEMS.values():
        assert problem.x.shape[-1:] == problem.y.shape
        for start in problem.starts:
            assert start.shape == problem.certified.shape == problem.standard_deviations.shape


@pytest.mark.parametrize("name", MEANINGFUL)
def test_certified_values_belong_to_the_data(name: str) -> None:
    problem = PROBLEMS[name]
    r = problem.residuals(problem.certified)
    squares = r @ r
    assert digits(squares, problem.residual_sum_of_squares) > 9.9
    variance = squares / (len(r) - len(problem.certified))
    assert digits(variance.sqrt(), problem.residual_standard_deviation) > 9.9
    J = torch.func.jacrev(problem.residuals)(problem.certified)
    covariance = variance * torch.linalg.inv(torch.linalg.qr(J)[1]).square().sum(1)
    assert digits(covariance.sqrt(), problem.standard_deviations) > 9.0


@pytest.mark.parametrize(
    ("name", "start"),
    [
        pytest.param(name, k, marks=pytest.mark.slow if (name, k) in MANY else ())
        for name in PROBLEMS
        for k in (0, 1)
    ],
)
def test_six_digits_by_default(name: str, start: int) -> None:
    problem = PROBLEMS[name]
    result = least_squares(problem.residuals, problem.starts[start])
    assert result.success
    assert digits(result.x, problem.certified) >= 6.0
    if name != "Lanczos1":
        assert digits(2.0 * result.cost, problem.residual_sum_of_squares) >= 9.5


def test_digits() -> None:
    assert digits(1.0001, 1.0) == pytest.approx(4.0, abs=1e-3)
    assert digits(torch.tensor([2.0, 1.1]), torch.tensor([2.0, 1.0])) == pytest.approx(
        1.0, abs=1e-3
    )
    assert digits(1.0, 1.0) == 11.0
    assert digits(-1.0, 1.0) == digits(math.nan, 1.0) == 0.0


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    done = run_example(
        *("--problems", "Misra1a,Nelson,Rat42"), cwd=tmp_path, script="curve_fitting.py"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    header = ("digits", "of squares", "of errors", "evaluations", "Jacobians", "SciPy: digits")
    assert all(name in lines[1] for name in header)
    rows = [line.split() for line in lines[3:9]]
    assert [row[0] for row in rows] == ["Misra1a"] * 2 + ["Nelson"] * 2 + ["Rat42"] * 2
    assert all(float(row[5]) >= 6.0 for row in rows)
    assert "six digits of all parameters: 6 of 6 fits" in done.stdout
    assert "geometric mean of the ratios" in done.stdout
    assert done.stderr == ""
    assert (tmp_path / "curve_fitting.png").read_bytes().startswith(b"\x89PNG")


def test_without_scipy(capsys: pytest.CaptureFixture[str]) -> None:
    problem = PROBLEMS["Misra1a"]
    ours = {("Misra1a", 2): curve_fitting.fit(problem, problem.starts[1])}
    curve_fitting.print_table(PROBLEMS, ours, {})
    curve_fitting.print_summary(ours, {})
    printed = capsys.readouterr().out
    assert "SciPy: digits" not in printed and "SciPy is not installed" in printed


def test_the_error_of_a_curve_is_the_spread_of_fits_to_noisy_data() -> None:
    """By 300 fits to data with independent noise; the standard error of a spread is 4 percent."""
    problem = PROBLEMS["Misra1a"]
    found = curve_fitting.fit(problem, problem.starts[1])
    assert found is not None
    curve, error = curve_fitting.curve_with_error(problem, problem.x, found)
    generator = torch.Generator().manual_seed(0)
    deviation = problem.residual_standard_deviation
    J = torch.func.jacrev(lambda b: problem.model(problem.x, *b))(found.solution)
    noise = deviation * torch.randn(300, len(curve), generator=generator, dtype=torch.float64)
    moves = torch.linalg.lstsq(J, noise.T).solution
    assert torch.allclose((J @ moves).std(1), error, rtol=0.15)


def test_an_unknown_problem(tmp_path: Path) -> None:
    done = run_example("--problems", "Misra1e", cwd=tmp_path, script="curve_fitting.py")
    assert done.returncode == 2
    assert "unknown problem 'Misra1e'; known: Bennett5" in done.stderr
