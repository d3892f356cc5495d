"""The benchmarks run and write their results; the values are not checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.oracles import compiles_gradients

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench.py", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "result", "shown"),
    [
        (["lbfgs", "--part", "direction"], "lbfgs.direction", "ours"),
        (["capture"], "capture.", "ours"),
        (["compile"], "compile.Gauss-Newton product", "first call"),
        (["products"], "products.gauss_newton.", "ours"),
        (["newton", "--part", "cg"], "newton.cg.", "overhead"),
        (["newton", "--part", "softmax"], "newton.softmax.ratios", "NewtonCG / LBFGS (ours)"),
        (["newton", "--part", "problems"], "newton.problems.wood.", "NewtonCG / LBFGS (ours)"),
        (["newton", "--part", "autoencoder"], "newton.autoencoder.NewtonCG", "NewtonCG"),
        (["newton", "--part", "pinn"], "newton.pinn.NewtonCG", "NewtonCG"),
        (["newton", "--part", "exact"], "newton.exact.wood", "scipy trust-exact"),
        (["diagonal", "--part", "steps"], "diagonal.steps.", "AdaHessian/10"),
        (["diagonal", "--part", "memory"], "diagonal.memory.", "Sophia-G"),
        (["diagonal", "--part", "estimates"], "diagonal.estimates.", "Hutchinson, signs"),
        (["diagonal", "--part", "scaling"], "diagonal.scaling.", "AdaHessian, 10 probes"),
        (["distributed", "--part", "communication"], "distributed.communication.", "Sophia, gnb"),
        (["distributed", "--part", "memory"], "distributed.memory.", "2m + "),
        (["jacobian"], "jacobian.one", "ours"),
        (["lightning"], "lightning.MLP", "Lightning's own"),
        (["penalties"], "penalties.64-30", "contractive (code)"),
        (["diagnostics"], "diagnostics.eigenvalues.", "Hutch++"),
    ],
)
def test_a_sub_command_prints_a_table_and_writes_json(
    arguments: list[str], result: str, shown: str, tmp_path: Path
) -> None:
    if arguments == ["compile"] and not compiles_gradients():
        pytest.skip("it compiles a network with derivatives by its input")
    file = tmp_path / "figures.json"
    done = bench(*arguments, "--quick", "--repeat", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert any(key.startswith(result) for key in document["results"])
    assert document["environment"]["torch"]
    assert shown in done.stdout


def test_an_unknown_sub_command_is_rejected_with_the_known_ones() -> None:
    done = bench("newtn")
    assert done.returncode == 2
    assert "lbfgs" in done.stderr
