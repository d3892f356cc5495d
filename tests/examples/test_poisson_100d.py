"""The example with an equation in 100 dimensions states it correctly, and solves a small one."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

import _command_line
import poisson_100d
from _training import Contender, take_step
from tests.support.examples import run_example
from torch_secondorder import ClosureObjective
from torch_secondorder.curvature import ResidualJacobian

CPU = torch.device("cpu")
SCRIPT = "poisson_100d.py"


def draws(dimension: int, count: int = 6) -> tuple[Tensor, Tensor]:
    cube, generator = poisson_100d.Cube(dimension, CPU), torch.Generator().manual_seed(1)
    return cube.inside(count, generator), cube.boundary(count, generator)


def test_the_laplacian_is_the_trace_of_the_hessian() -> None:
    net = poisson_100d.make_network(4, [5, 3], seed=0)
    points, _ = draws(4)

    def value(x: Tensor) -> Tensor:
        return net(x).squeeze()

    expected = torch.stack([hessian(value, x).trace() for x in points])
    torch.testing.assert_close(poisson_100d.laplacian(net, points)[:, 0], expected)


def test_the_right_side_is_the_laplacian_of_the_solution() -> None:
    points, _ = draws(4)
    traces = [
        hessian(lambda x: poisson_100d.solution(x[None]).squeeze(), x).trace() for x in points
    ]
    torch.testing.assert_close(
        poisson_100d.laplacian_of_the_solution(points)[:, 0], torch.stack(traces)
    )


def test_points_lie_inside_and_on_the_faces() -> None:
    inside, boundary = draws(7, count=200)
    assert inside.min() > 0.0 and inside.max() < 1.0
    on_a_face = (boundary == 0.0) | (boundary == 1.0)
    assert torch.equal(on_a_face.sum(1), torch.ones(200, dtype=torch.int64))
    assert on_a_face.any(0).all()


def test_all_rows_come_from_one_backward_pass() -> None:
    net = poisson_100d.make_network(6, [5, 5], seed=0)
    inside, boundary = draws(6)

    def closure() -> Tensor:
        return poisson_100d.residual_loss(net, inside, boundary)

    evaluation = ClosureObjective(closure, net.parameters()).evaluate(curvature="jacobian")
    jacobian = ResidualJacobian(evaluation)
    assert (jacobian.method, jacobian.rows) == ("graph", 12)
    expected = ResidualJacobian(evaluation, method="rows").dense()
    torch.testing.assert_close(jacobian.dense(), expected, rtol=1e-10, atol=1e-12)


def steps_of(name: str, steps: int) -> float:
    """The error in 5 dimensions after some steps, with the schedule of the example."""
    torch.manual_seed(0)
    net = poisson_100d.make_network(5, [12, 12], seed=0)
    task = poisson_100d.make_task(poisson_100d.Cube(5, CPU), net, 20, seed=0)
    contender: Contender = poisson_100d.CONTENDERS[name]
    optimizer, losses = contender.make(net.parameters()), task.losses(None)
    (group,) = optimizer.param_groups
    rate = group["lr"]
    for step in range(steps):
        if contender.schedule is not None:
            group["lr"] = rate * contender.schedule(step / steps)
        take_step(net, optimizer, next(losses))
    with torch.no_grad():
        return task.measure(net)[1]


def test_momentum_on_mini_batches_solves_a_small_equation() -> None:
    assert steps_of("levenberg-marquardt", 150) < 0.03


def test_a_quick_run(tmp_path: Path) -> None:
    done = run_example(
        *("--quick", "--threads", "1", "--json", "results.json"), cwd=tmp_path, script=SCRIPT
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "in 5 dimensions: 20 points inside and 10 on the boundary" in lines[0]
    assert "network 5-12-12-1" in lines[0]
    assert all(name in lines[1] for name in ("after 0.125 s", "after 0.5 s", "at the end"))
    labels = [contender.label for contender in poisson_100d.CONTENDERS.values()]
    assert [line.split("  ")[0] for line in lines[3 : 3 + len(labels)]] == labels
    assert (tmp_path / "poisson_100d.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert list(results) == [f"examples.poisson_100d.{label}" for label in labels]
    for line, found in zip(lines[3:], results.values(), strict=False):
        assert f"{found['error']:.2e}" in line and f"{found['loss']:.2e}" in line


@pytest.mark.parametrize(
    ("file", "message"),
    [("results.txt", "does not end in .json"), ("gone/results.json", "no directory gone")],
)
def test_files_that_results_cannot_go_to(file: str, message: str, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    _command_line.add_json_argument(parser)
    with pytest.raises(argparse.ArgumentError, match=re.escape(message)):
        parser.parse_args(["--json", file])
    found = parser.parse_args(["--json", str(tmp_path / "results.json")])
    assert found.json == tmp_path / "results.json"


@pytest.mark.parametrize("option", [("--dimension", "0"), ("--points", "0"), ("--widths", "8,0")])
def test_sizes_that_are_none_are_rejected(option: tuple[str, str], tmp_path: Path) -> None:
    done = run_example(*option, cwd=tmp_path, script=SCRIPT)
    assert done.returncode == 2
    assert "0 is not a positive number" in done.stderr


def test_the_schedule_ends_at_zero() -> None:
    assert [poisson_100d.cosine(share) for share in (0.0, 1.0, 2.0)] == [1.0, 0.0, 0.0]
