"""The examples run, and say clearly what is wrong where they cannot."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def run_example(
    *arguments: str | Path, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / "compare_optimizers.py", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


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
        "torch.optim.LBFGS",
        "LBFGS (ours)",
    ]
    assert float(rows[-1].split()[-4]) < 1.0  # the loss fell, from 2.3
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


def test_all_three_places_are_named_where_there_is_no_data(tmp_path: Path) -> None:
    done = run_example(
        *("--dataset", "fashion-mnist"),
        cwd=tmp_path,
        environment={"FASHION_MNIST_DIR": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for place in ("--data-dir", "FASHION_MNIST_DIR", "dataset-fashion-mnist"):
        assert place in done.stderr


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


def test_a_broken_idx_file_is_refused(tiny_fashion_mnist: Path) -> None:
    (tiny_fashion_mnist / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\1"))
    done = run_example(
        *("--dataset", "fashion-mnist", "--data-dir", tiny_fashion_mnist),
        cwd=tiny_fashion_mnist,
    )
    assert done.returncode == 1
    assert "train-images-idx3-ubyte.gz" in done.stderr
    assert "Traceback" not in done.stderr
