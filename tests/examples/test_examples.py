"""The examples run, and report mistakes clearly."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.support.examples import run_example


def write_idx(path: Path, array: torch.Tensor) -> None:
    header = bytes([0, 0, 8, array.dim()])
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + sizes + bytes(array.flatten().tolist())))


@pytest.fixture
def tiny_fashion_mnist(tmp_path: Path) -> Path:
    for part, count in (("train", 40), ("t10k", 20)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    return tmp_path


@pytest.mark.slow
def test_the_main_job_prints_a_table_and_draws_a_plot(tmp_path: Path) -> None:
    done = run_example("--seconds", "0.3", "--hidden", "16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    header = ["optimizer", "batch", "training loss", "test accuracy", "evaluations", "seconds"]
    assert lines[1].split("  ")[0] == "optimizer"
    assert all(name in lines[1] for name in header)
    rows = lines[3:-1]
    assert [row.split("  ")[0] for row in rows] == [
        "SGD, momentum 0.9",
        "Adam",
        "AdaHessian (ours)",
        "Sophia (ours)",
        "SOAP (ours)",
        "Shampoo (ours)",
        "KFAC (ours)",
        "torch.optim.LBFGS",
        "LBFGS (ours)",
        "NonlinearCG (ours)",
        "NewtonCG (ours)",
        "LevenbergMarquardt (ours)",
    ]
    assert all(float(row.split()[-5]) < 2.3 for row in rows)  # where all begin
    plot = tmp_path / "compare_optimizers.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "100%" in done.stderr  # a progress bar


def test_fashion_mnist_files_are_read_from_a_directory(tiny_fashion_mnist: Path) -> None:
    done = run_example(
        *("--dataset", "fashion-mnist", "--optimizers", "lbfgs", "--seconds", "0.05"),
        *("--data-dir", tiny_fashion_mnist),
        cwd=tiny_fashion_mnist,
    )
    assert done.returncode == 0, done.stderr
    assert "fashion-mnist: 40 training and 20 test images" in done.stdout


def test_fashion_mnist_files_are_found_through_the_environment(tiny_fashion_mnist: Path) -> None:
    done = run_example(
        *("--dataset", "fashion-mnist", "--optimizers", "sgd", "--seconds", "0.05"),
        cwd=tiny_fashion_mnist,
        environment={"FASHION_MNIST_DIR": str(tiny_fashion_mnist)},
    )
    assert done.returncode == 0, done.stderr


def test_missing_data_are_reported_with_all_three_places(tmp_path: Path) -> None:
    done = run_example(
        *("--dataset", "fashion-mnist"),
        cwd=tmp_path,
        environment={"FASHION_MNIST_DIR": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for place in ("--data-dir", "FASHION_MNIST_DIR", "dataset-fashion-mnist"):
        assert place in done.stderr


@pytest.mark.slow
def test_the_deep_autoencoder(tmp_path: Path) -> None:
    done = run_example(
        *("--dataset", "digits", "--seconds", "1.5", "--optimizers", "newton-cg,kfac,adam"),
        *("--json", "results.json"),
        cwd=tmp_path,
        script="deep_autoencoder.py",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "network 64-50-25-12-6-12-25-50-64" in lines[0]
    header = ("squared error", "test error", "evaluations", "products", "seconds")
    assert all(name in lines[1] for name in header)
    newton, kfac, adam = lines[3:6]
    assert newton.startswith("NewtonCG (ours)") and adam.startswith("Adam")
    assert kfac.startswith("KFAC (ours)")
    assert float(newton.split()[3]) < 3.5  # 4.8 at the start
    assert float(kfac.split()[3]) < 4.5
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert (
        newton.split()[3] == f"{results['examples.deep_autoencoder.NewtonCG (ours)']['error']:.3f}"
    )
    plot = tmp_path / "deep_autoencoder.png"
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_autoencoder_uses_digits_without_fashion_mnist(tmp_path: Path) -> None:
    done = run_example(
        *("--seconds", "0.05", "--optimizers", "adam"),
        cwd=tmp_path,
        environment={"FASHION_MNIST_DIR": str(tmp_path)},
        script="deep_autoencoder.py",
    )
    assert done.returncode == 0, done.stderr
    assert "Fashion-MNIST is not on this machine: using the small digits" in done.stdout


@pytest.mark.slow
def test_the_equation_is_solved(tmp_path: Path) -> None:
    done = run_example(
        *("--optimizers", "newton-cg,adam", "--seconds", "6", "--target", "0.05"),
        cwd=tmp_path,
        script="pinn_poisson.py",
    )
    assert done.returncode == 0, done.stderr
    newton = next(line for line in done.stdout.splitlines() if line.startswith("NewtonCG"))
    assert "the target 0.05 is reached" in done.stdout
    assert float(newton.split()[3]) <= 0.05
    assert "<= 0.05 after" in done.stdout
    assert (tmp_path / "pinn_poisson.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "adam,newton"], "unknown optimizer 'newton'; known: sgd, adam"),
        (["--seconds", "-1"], "-1 is not a positive number"),
        (["--out", "plot.txt"], "does not end in .png"),
        (["--device", "tpu9"], "cannot use device 'tpu9'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run_example(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_broken_idx_file_is_rejected(tiny_fashion_mnist: Path) -> None:
    (tiny_fashion_mnist / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\1"))
    done = run_example(
        *("--dataset", "fashion-mnist", "--data-dir", tiny_fashion_mnist),
        cwd=tiny_fashion_mnist,
    )
    assert done.returncode == 1
    assert "train-images-idx3-ubyte.gz" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_classifier(tmp_path: Path) -> None:
    done = run_example(
        *("--dataset", "digits", "--optimizers", "soap,adasecant,sgd", "--seeds", "2"),
        *("--seconds", "0.3", "--tuning-seconds", "0.1", "--json", "results.json"),
        cwd=tmp_path,
        script="train_classifier.py",
    )
    assert done.returncode == 0, done.stderr
    header = ("learning rate", "steps", "time per step", "training loss", "test accuracy, %")
    start = next(i for i, line in enumerate(done.stdout.splitlines()) if "learning rate " in line)
    lines = done.stdout.splitlines()[start:]
    assert all(name in lines[0] for name in header)
    soap, adasecant, sgd = lines[2:5]
    assert soap.startswith("SOAP (ours)") and sgd.startswith("SGD, momentum 0.9")
    assert adasecant.startswith("AdaSecant (ours)    ") and adasecant.split()[2] == "1"
    assert "±" in soap
    bars = [line for line in done.stderr.replace("\r", "\n").splitlines() if "100%" in line]
    assert sum("SOAP" in bar and "/0.1 s" in bar for bar in bars) == 5
    assert not any("AdaSecant" in bar and "/0.1 s" in bar for bar in bars)  # nothing to choose
    assert any(line.startswith("highest test accuracy: ") for line in lines)
    assert (tmp_path / "train_classifier.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    found = results["examples.train_classifier.SOAP (ours)"]
    shown = f"{found['accuracy']:.2f} ± {found['accuracy deviation']:.2f}"
    assert shown in soap and f"{found['training loss']:.4f} ±" in soap
