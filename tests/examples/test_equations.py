"""The examples with physics-informed networks state their equations correctly, and solve them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pinn_burgers
import pinn_convection
import pinn_poisson
from _command_line import names_among
from tests.support.examples import run_example

CPU = torch.device("cpu")


class ColeHopf(nn.Module):
    """The exact solution of Burgers' equation: a ratio of integrals against a Gaussian."""

    def forward(self, points: Tensor) -> Tensor:
        x, t = points[:, :1], points[:, 1:].clamp(min=1e-12)
        nodes, weights = map(torch.from_numpy, np.polynomial.hermite.hermgauss(100))
        y = x - torch.sqrt(4.0 * pinn_burgers.VISCOSITY * t) * nodes
        log_density = -torch.cos(math.pi * y) / (2.0 * math.pi * pinn_burgers.VISCOSITY)
        density = torch.softmax(log_density + weights.log(), dim=1)
        return -(torch.sin(math.pi * y) * density).sum(1, keepdim=True)


class Sines(nn.Module):
    def forward(self, points: Tensor) -> Tensor:
        return pinn_poisson.solution(points)


class Wave(nn.Module):
    def forward(self, points: Tensor) -> Tensor:
        return pinn_convection.solution(points)


def test_the_method_of_lines_has_the_accuracy_that_it_states() -> None:
    problem = pinn_burgers.make_problem(CPU)
    exact = ColeHopf()(problem.grid)
    error = (problem.reference - exact).norm() / exact.norm()
    assert error <= problem.accuracy <= 1e-6


def test_halving_the_mesh_quarters_the_error() -> None:
    x, times = np.linspace(-1.0, 1.0, 65), np.linspace(0.0, 1.0, 11)
    points = torch.cartesian_prod(torch.from_numpy(x), torch.from_numpy(times))
    exact = ColeHopf()(points).reshape(65, 11).numpy()
    coarse, fine = (
        np.linalg.norm(pinn_burgers.method_of_lines(x, times, cells) - exact)
        for cells in (250, 500)
    )
    assert coarse / fine == pytest.approx(4.0, rel=0.05)


def test_the_residual_of_the_exact_solutions_vanishes() -> None:
    burgers, poisson = pinn_burgers.make_problem(CPU), pinn_poisson.make_problem(CPU)
    assert pinn_burgers.residual_loss(ColeHopf(), burgers) < 1e-12
    assert pinn_poisson.residual_loss(Sines(), poisson) < 1e-20
    convection = pinn_convection.make_problem(CPU)
    assert pinn_convection.residual_loss(Wave(), convection) < 1e-20
    assert pinn_convection.make_task(convection, Wave()).measure(Wave())[1] < 1e-12


def test_the_convection_problem_starts_from_a_sine_and_is_periodic() -> None:
    problem = pinn_convection.make_problem(CPU, points=10)
    assert [len(problem.inside), len(problem.start), len(problem.left)] == [10, 256, 100]
    torch.testing.assert_close(problem.wave[:, 0], problem.start[:, 0].sin())
    assert problem.start[:, 1].abs().max() == 0
    torch.testing.assert_close(
        problem.right[:, 0] - problem.left[:, 0], torch.full((100,), 2 * math.pi).double()
    )
    assert torch.equal(problem.left[:, 1], problem.right[:, 1])
    assert sum(p.numel() for p in pinn_convection.make_network([50] * 3, 0).parameters()) == 5301


def test_the_network_has_the_initial_and_the_boundary_values() -> None:
    net = pinn_burgers.make_network([5], seed=0)
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    with torch.no_grad():
        at_start = net(torch.stack([x, torch.zeros_like(x)], dim=1))
        at_ends = net(torch.cartesian_prod(x[[0, -1]], 0.5 + 0.5 * x))
    torch.testing.assert_close(at_start[:, 0], -torch.sin(math.pi * x))
    assert at_ends.abs().max() < 1e-12


def test_all_takes_every_name() -> None:
    assert names_among(pinn_poisson.CONTENDERS)("all") == list(pinn_poisson.CONTENDERS)


@pytest.mark.slow
def test_poissons_equation_by_levenberg_and_marquardt(tmp_path: Path) -> None:
    done = run_example(
        *("--seconds", "20", "--target", "1e-3", "--width", "32", "--threads", "1"),
        cwd=tmp_path,
        script="pinn_poisson.py",
    )
    assert done.returncode == 0, done.stderr
    assert "LevenbergMarquardt (ours) ended after" in done.stdout
    assert "the target 0.001 is reached" in done.stdout


@pytest.mark.slow
def test_the_convection_equation(tmp_path: Path) -> None:
    names = "levenberg-marquardt,adam"
    done = run_example(
        *("--optimizers", names, "--seconds", "2", "--widths", "10,10", "--points", "100"),
        cwd=tmp_path,
        script="pinn_convection.py",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "100 points inside" in lines[0] and "network 2-10-10-1 (151 parameters)" in lines[0]
    ours, adam = lines[3:5]
    assert ours.startswith("LevenbergMarquardt (ours)") and adam.startswith("Adam")
    assert float(ours.split()[2]) < 0.5  # the loss, 1.5 at the start
    assert (tmp_path / "pinn_convection.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_poissons_equation_by_a_self_scaled_update(tmp_path: Path) -> None:
    done = run_example(
        *("--optimizers", "ssbroyden", "--seconds", "20", "--target", "0.01", "--threads", "1"),
        cwd=tmp_path,
        script="pinn_poisson.py",
    )
    assert done.returncode == 0, done.stderr
    assert "BFGS, ssbroyden (ours) ended after" in done.stdout
    assert "the target 0.01 is reached" in done.stdout


@pytest.mark.slow
def test_burgers_equation(tmp_path: Path) -> None:
    done = run_example(
        *("--optimizers", "lbfgs,adam", "--seconds", "1.5", "--widths", "8,8"),
        cwd=tmp_path,
        script="pinn_burgers.py",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "network 2-8-8-1 (105 parameters)" in lines[0]
    assert "relative L2 error about" in lines[1]
    lbfgs = next(line for line in lines if line.startswith("LBFGS (ours)"))
    assert float(lbfgs.split()[3]) < 0.59  # where it begins
    assert (tmp_path / "pinn_burgers.png").read_bytes().startswith(b"\x89PNG")


def test_widths_that_are_none_are_rejected(tmp_path: Path) -> None:
    done = run_example("--widths", "8,0", cwd=tmp_path, script="pinn_burgers.py")
    assert done.returncode == 2
    assert "0 is not a positive number" in done.stderr
