"""The Lightning examples run and report their results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.examples import run_example

#: What a reader should not have to read past.
NOISE = ("Warning", "GPU", "TPU", "litlogger", "Trainer.fit", "Traceback")


@pytest.mark.slow
def test_images_with_several_optimizers(tmp_path: Path) -> None:
    done = run_example(
        *("--dataset", "digits", "--images", "400", "--epochs", "2"),
        *("--optimizer", "adahessian,sophia,newton-cg,lbfgs,adam"),
        cwd=tmp_path,
        script="lightning_mnist.py",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "digits: 400 training and 360 test images" in lines[0]
    header = next(i for i, line in enumerate(lines) if "training accuracy" in line)
    rows = lines[header + 2 :]
    assert [row.split("  ")[0] for row in rows] == [
        "AdaHessian (ours)",
        "Sophia (ours)",
        "NewtonCG (ours)",
        "LBFGS (ours)",
        "Adam",
    ]
    assert [int(row.split()[-5]) for row in rows] == [8, 8, 2, 2, 8]  # steps
    assert [int(row.split()[-4]) > 2 for row in rows] == [True] * 5  # evaluations
    assert all("%" in row.split()[-2] for row in rows)
    shown = done.stdout + done.stderr
    assert "100%" in shown and "gain=" in shown and "step_length=" in shown
    assert not [word for word in NOISE if word in shown]


@pytest.mark.slow
def test_lbfgs_on_the_full_batch_converges(tmp_path: Path) -> None:
    done = run_example(
        *("--dataset", "digits", "--images", "300", "--tolerance", "1e-5"),
        cwd=tmp_path,
        script="lightning_lbfgs.py",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("digits: 300 images in one batch")
    row = next(line for line in lines if line.startswith("LBFGS (ours)  "))
    loss, gradient = map(float, row.split()[2:4])
    assert loss < 1e-4 and gradient <= 1e-5
    assert lines[-1].startswith("|g| <= 1e-05: LBFGS (ours) after ")
    assert not [word for word in NOISE if word in done.stdout + done.stderr]


@pytest.mark.slow
def test_an_unknown_optimizer_is_rejected(tmp_path: Path) -> None:
    done = run_example("--optimizer", "newton", cwd=tmp_path, script="lightning_mnist.py")
    assert done.returncode == 2
    assert "unknown optimizer 'newton'; known: adahessian, sophia, newton-cg" in done.stderr
