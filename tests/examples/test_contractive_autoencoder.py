"""The example of contractive autoencoders runs, and its measurements are correct."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import contractive_autoencoder as example
from tests.support.examples import run_example

SCRIPT = "contractive_autoencoder.py"
QUICK = ("--dataset", "digits", "--images", "400", "--units", "30", "--epochs", "4")


@pytest.mark.slow
def test_a_table_a_statement_and_a_plot(tmp_path: Path) -> None:
    done = run_example(*QUICK, cwd=tmp_path, script=SCRIPT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "digits: 400 training" in lines[0] and "30 sigmoid units" in lines[0]
    header = ("squared error", "|J|_F", "accuracy", "noisy images", "code moved by", "seconds")
    assert all(name in lines[1] for name in header)
    labels = ["AE", "AE, weight decay", "DAE, noise 0.3", "CAE"]
    assert [line.split("  ")[0] for line in lines[3:7]] == labels
    norms = [float(line.split()[-5]) for line in lines[3:7]]
    assert norms[3] < norms[0]  # contracted
    reproduced = norms[3] < norms[2] < norms[1] < norms[0]
    assert lines[7].startswith("|J|_F on test images, CAE < DAE")
    assert ("not reproduced" not in lines[7]) == reproduced
    assert (tmp_path / "contractive_autoencoder.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_model_is_rejected(tmp_path: Path) -> None:
    done = run_example("--models", "vae", cwd=tmp_path, script=SCRIPT)
    assert done.returncode == 2
    assert "unknown autoencoder 'vae'; known: ae, ae+wd, dae, cae" in done.stderr


def test_norms_and_singular_values_are_those_of_the_jacobian() -> None:
    encoder, x = example.Autoencoder(9, 5).encoder, torch.rand(4, 9)
    jacobians = torch.stack([torch.func.jacrev(encoder)(s) for s in x])
    norms = example.jacobian_norms(encoder, x)
    torch.testing.assert_close(norms, jacobians.flatten(1).norm(dim=1))
    values = example.singular_values(encoder, x)
    torch.testing.assert_close(values, torch.linalg.svdvals(jacobians).mean(0), atol=1e-4, rtol=0)
    (small,) = example.contraction_ratios(encoder, x[:1], torch.tensor([1e-2]))
    assert small <= jacobians[0].norm() * 1.01


def test_the_statement_follows_the_numbers() -> None:
    def result(name: str, norm: float) -> example.Result:
        return example.Result(name, example.Autoencoder(4, 2), 1.0, norm, 0.5, 0.5, 0.1, 1.0)

    falling = [
        result(n, v) for n, v in zip(("ae", "ae+wd", "dae", "cae"), (4, 3, 2, 1), strict=True)
    ]
    assert "as published: reproduced; a stronger" in example.statement(falling)
    falling[1].norm = 1.5
    said = example.statement(falling)
    assert "not reproduced, DAE, noise 0.3 2.000 >= AE, weight decay 1.500." in said
    assert "not all of them ran" in example.statement(falling[:3])
