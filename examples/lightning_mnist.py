"""Trains a small convolutional network on images with Lightning, with any optimizer by name.

The module is an ordinary one: `configure_optimizers` returns the optimizer, and nothing else is
needed. A `SecondOrderMonitor` shows numbers about the steps on the progress bar.

    python examples/lightning_mnist.py
    python examples/lightning_mnist.py --optimizer newton-cg,lbfgs,adam --epochs 5
    python examples/lightning_mnist.py --optimizer sophia --images 60000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from _command_line import names_among, positive
from _data import DATASETS, Images
from _lightning import Batches, Classifier, accuracy, images_for, trainer
from _report import format_table
from torch_secondorder import LBFGS, AdaHessian, NewtonCG, Sophia
from torch_secondorder.integrations.lightning import SecondOrderMonitor


@dataclass(frozen=True)
class Contender:
    """An optimizer with its batch size.

    Attributes:
        label: Its name in the table.
        make: Makes it for parameters.
        batch_size: Images in a batch; None for all of them.
    """

    label: str
    make: Callable[[Iterable[nn.Parameter]], Optimizer]
    batch_size: int | None = 128


CONTENDERS = {
    "adahessian": Contender("AdaHessian (ours)", lambda p: AdaHessian(p, lr=0.1, update_period=5)),
    "sophia": Contender("Sophia (ours)", lambda p: Sophia(p, lr=1e-3, estimator="gnb")),
    "newton-cg": Contender("NewtonCG (ours)", lambda p: NewtonCG(p, max_cg_iter=10), 1000),
    "lbfgs": Contender("LBFGS (ours)", lambda p: LBFGS(p, max_iter=10), None),
    "adam": Contender("Adam", lambda p: Adam(p, lr=1e-3)),
}


def make_network(images: Images, seed: int) -> nn.Sequential:
    """A network of two convolutions for square grey images, the same for the same seed."""
    torch.manual_seed(seed)
    side = round(images.pixels**0.5)
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (side // 4) ** 2, images.classes),
    )


def fit(name: str, images: Images, epochs: int, seed: int) -> list[str]:
    """Trains with one optimizer; returns its row of the table."""
    contender = CONTENDERS[name]
    module = Classifier(make_network(images, seed), contender.make)
    training = Batches(images.train_x, images.train_y, contender.batch_size, seed)
    print(contender.label, flush=True)
    start = time.perf_counter()
    trained = trainer(epochs, [SecondOrderMonitor()])
    trained.fit(module, training)
    seconds = time.perf_counter() - start
    return [
        contender.label,
        str(contender.batch_size or "full"),
        f"{trained.global_step:,}",
        f"{module.evaluations:,}",
        f"{accuracy(module.network, images.train_x, images.train_y):.2%}",
        f"{accuracy(module.network, images.test_x, images.test_y):.2%}",
        f"{seconds:.1f}",
    ]


def main() -> None:
    """Trains with each optimizer in turn, then prints the table."""
    arguments = parse_arguments()
    images = images_for(arguments)
    size = sum(p.numel() for p in make_network(images, 0).parameters())
    print(
        f"{images.name}: {len(images.train_y):,} training and {len(images.test_y):,} test images; "
        f"{size:,} parameters; {arguments.epochs} epochs"
    )
    rows = [fit(name, images, arguments.epochs, arguments.seed) for name in arguments.optimizer]
    header = ["optimizer", "batch", "steps", "evaluations", "training accuracy", "test accuracy"]
    print(format_table([*header, "seconds"], rows))


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(description="Train on images with Lightning.")
    add = parser.add_argument
    add(
        "--optimizer",
        type=names_among(CONTENDERS),
        default=["adahessian"],
        metavar="NAME",
        help=f"one of {', '.join(CONTENDERS)}, or several with commas; default: adahessian",
    )
    add("--dataset", choices=DATASETS, help="default: Fashion-MNIST if it is found, else digits")
    add("--data-dir", type=Path, help="directory of the Fashion-MNIST files")
    add("--images", type=positive(int), default=6000, help="training images; default: 6000")
    add("--epochs", type=positive(int), default=5, help="default: 5")
    add("--seed", type=int, default=0, help="seed of weights and batches; default: 0")
    add("--threads", type=positive(int), help="CPU threads; default: torch's choice")
    return parser.parse_args()


if __name__ == "__main__":
    main()
