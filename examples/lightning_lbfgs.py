"""Compares full-batch L-BFGS in Lightning with `torch.optim.LBFGS` in the same module.

The network is the one that did not converge with L-BFGS in Lightning's issue 4083: images, two
hidden layers of 128 and 256 ReLU units, cross-entropy. Every step uses all images and makes 20
iterations, so an epoch has one step. Training ends as soon as the gradient is small enough.

    python examples/lightning_lbfgs.py
    python examples/lightning_lbfgs.py --images 5000 --epochs 30 --tolerance 1e-7
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from _command_line import positive
from _data import DATASETS, Images
from _lightning import Batches, Classifier, accuracy, host, images_for, trainer
from _report import format_table
from torch_secondorder import LBFGS
from torch_secondorder.integrations.lightning import SecondOrderMonitor

CONTENDERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "LBFGS (ours)": LBFGS,
    "torch.optim.LBFGS": torch.optim.LBFGS,
    "torch.optim.LBFGS, strong Wolfe": lambda p: torch.optim.LBFGS(
        p, line_search_fn="strong_wolfe"
    ),
}


@dataclass
class Result:
    """The result of training with one optimizer."""

    label: str
    loss: float
    gradient: float
    epochs: int
    evaluations: int
    accuracy: float
    seconds: float


class SmallGradient(host.Callback):
    """Ends the training once no entry of the gradient is larger than a tolerance.

    Args:
        tolerance: The largest entry allowed.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Computes the gradient after the step; the optimizer's evaluations do not count it."""
        batch = next(iter(trainer.train_dataloader))
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(pl_module.network(batch[0]), batch[1])
            gradients = torch.autograd.grad(loss, list(pl_module.parameters()))
        pl_module.loss = loss.item()
        pl_module.gradient = max(g.abs().max().item() for g in gradients)
        pl_module.log("|g|", pl_module.gradient, prog_bar=True)
        trainer.should_stop = not pl_module.gradient > self.tolerance


def make_network(images: Images, seed: int) -> nn.Sequential:
    """The network of the issue."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(images.pixels, 128),
        nn.ReLU(),
        nn.Linear(128, 256),
        nn.ReLU(),
        nn.Linear(256, images.classes),
    )


def fit(label: str, images: Images, epochs: int, tolerance: float, seed: int) -> Result:
    """Trains with one optimizer."""
    module = Classifier(make_network(images, seed), CONTENDERS[label])
    print(label, flush=True)
    start = time.perf_counter()
    trained = trainer(epochs, [SecondOrderMonitor(), SmallGradient(tolerance)])
    trained.fit(module, Batches(images.train_x, images.train_y, None))
    return Result(
        label,
        module.loss,
        module.gradient,
        trained.current_epoch,
        module.evaluations,
        accuracy(module.network, images.test_x, images.test_y),
        time.perf_counter() - start,
    )


def statement(results: list[Result], tolerance: float) -> str:
    """A sentence about the optimizers that converged."""
    converged = [r for r in results if r.gradient <= tolerance]
    others = [r.label for r in results if r.gradient > tolerance or r.gradient != r.gradient]
    parts = [f"{r.label} after {r.evaluations} evaluations" for r in converged]
    said = f"|g| <= {tolerance:g}: {'; '.join(parts) or 'none'}"
    return said + (f". Not reached: {'; '.join(others)}." if others else ".")


def main() -> None:
    """Trains with each optimizer in turn, then prints the table."""
    arguments = parse_arguments()
    images = images_for(arguments)
    print(f"{images.name}: {len(images.train_y):,} images in one batch, 20 iterations an epoch")
    results = [
        fit(label, images, arguments.epochs, arguments.tolerance, arguments.seed)
        for label in CONTENDERS
    ]
    rows = [
        [
            r.label,
            f"{r.loss:.2e}",
            f"{r.gradient:.1e}",
            str(r.epochs),
            str(r.evaluations),
            f"{r.accuracy:.2%}",
            f"{r.seconds:.1f}",
        ]
        for r in results
    ]
    header = ["optimizer", "training loss", "|g|", "epochs", "evaluations", "test accuracy"]
    print(format_table([*header, "seconds"], rows))
    print(statement(results, arguments.tolerance))


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(description="L-BFGS on the full batch, with Lightning.")
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="default: Fashion-MNIST if it is found, else digits")
    add("--data-dir", type=Path, help="directory of the Fashion-MNIST files")
    add("--images", type=positive(int), default=2000, help="training images; default: 2000")
    add("--epochs", type=positive(int), default=20, help="largest number; default: 20")
    add(
        "--tolerance",
        type=positive(float),
        default=1e-6,
        help="training ends once no entry of the gradient is larger; default: 1e-6",
    )
    add("--seed", type=int, default=0, help="seed of the weights; default: 0")
    add("--threads", type=positive(int), help="CPU threads; default: torch's choice")
    return parser.parse_args()


if __name__ == "__main__":
    main()
