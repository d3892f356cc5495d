"""Trains one network on real images with several optimizers, and compares them.

Every optimizer starts from the same weights and gets the same closure and the same number of
seconds. The time for measuring loss and accuracy over the whole data does not count.

    python examples/compare_optimizers.py
    python examples/compare_optimizers.py --dataset fashion-mnist --seconds 60
    python examples/compare_optimizers.py --optimizers adam,lbfgs --hidden 128
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import torch_secondorder
from _command_line import add_common_arguments, positive
from _data import DATASETS, Images, load_images
from _report import format_table, plot_curves
from _training import Contender, Loss, Run, Task, batches, endings, train

WEIGHT_PENALTY = 1e-4
TOTAL_SECONDS = 64.0


# To compare another optimizer, add a row.
CONTENDERS = {
    "sgd": Contender(
        "SGD, momentum 0.9", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), batch_size=128
    ),
    "adam": Contender("Adam", lambda p: torch.optim.Adam(p, lr=1e-3), batch_size=128),
    "adahessian": Contender(
        "AdaHessian (ours)",
        lambda p: torch_secondorder.AdaHessian(p, lr=0.03, update_period=10),
        batch_size=128,
    ),
    "sophia": Contender(
        "Sophia (ours)",
        lambda p: torch_secondorder.Sophia(p, lr=3e-4, gamma=1.0, estimator="gnb"),
        batch_size=128,
    ),
    "soap": Contender("SOAP (ours)", lambda p: torch_secondorder.SOAP(p, lr=1e-2), batch_size=128),
    "shampoo": Contender(
        "Shampoo (ours)", lambda p: torch_secondorder.Shampoo(p, lr=3e-3), batch_size=128
    ),
    "kfac": Contender("KFAC (ours)", lambda p: torch_secondorder.KFAC(p, lr=0.1), batch_size=128),
    "torch-lbfgs": Contender(
        "torch.optim.LBFGS",
        lambda p: torch.optim.LBFGS(p, max_iter=10, line_search_fn="strong_wolfe"),
    ),
    "lbfgs": Contender("LBFGS (ours)", lambda p: torch_secondorder.LBFGS(p, max_iter=10)),
    "nonlinear-cg": Contender(
        "NonlinearCG (ours)", lambda p: torch_secondorder.NonlinearCG(p, max_iter=10)
    ),
    "newton-cg": Contender(
        "NewtonCG (ours)", lambda p: torch_secondorder.NewtonCG(p, curvature="hessian")
    ),
    # 9 residuals for each image: far fewer than there are parameters.
    "levenberg-marquardt": Contender(
        "LevenbergMarquardt (ours)",
        lambda p: torch_secondorder.LevenbergMarquardt(
            p, lr=0.1, momentum=0.9, max_norm=0.5, globalization=None
        ),
        batch_size=128,
    ),
}


def make_network(images: Images, hidden: int, seed: int) -> nn.Sequential:
    """A smooth network with two hidden layers, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(images.pixels, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, images.classes),
    )


def training_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with a small quadratic penalty, without which no minimum would exist."""
    penalty = sum(p.square().sum() for p in model.parameters())
    return nn.functional.cross_entropy(model(x), y) + 0.5 * WEIGHT_PENALTY * penalty


def make_task(images: Images, model: nn.Module, seed: int) -> Task:
    """The training problem: its losses, and the measurement of a network."""

    def losses(batch_size: int | None) -> Iterator[Loss]:
        for x, y in batches((images.train_x, images.train_y), batch_size, seed):
            yield lambda model, x=x, y=y: training_loss(model, x, y)

    def measure(model: nn.Module) -> tuple[float, float]:
        loss = training_loss(model, images.train_x, images.train_y).item()
        predicted = model(images.test_x).argmax(dim=1)
        return loss, (predicted == images.test_y).double().mean().item()

    def describe(loss: float, accuracy: float) -> str:
        return f"loss {loss:.3g}, test accuracy {accuracy:.1%}"

    return Task(model, losses, measure, describe)


def print_table(runs: list[Run]) -> None:
    """Prints one row for each optimizer."""
    header = ["optimizer", "batch", "training loss", "test accuracy"]
    header += ["evaluations", "products", "seconds"]
    rows = [
        [
            run.contender.label,
            str(run.contender.batch_size or "full"),
            f"{run.curve.loss[-1]:.5f}",
            f"{run.curve.score[-1]:.2%}",
            f"{run.evaluations:,}",
            f"{run.products:,}",
            f"{run.seconds:.1f}",
        ]
        for run in runs
    ]
    print(format_table(header, rows))


def main() -> None:
    """Trains with each optimizer in turn, then prints the table and saves the plot."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        images = load_images(arguments.dataset, arguments.data_dir, seed=arguments.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    images = images.to(arguments.device)
    model = make_network(images, arguments.hidden, arguments.seed).to(arguments.device)
    seconds = arguments.seconds or TOTAL_SECONDS / len(arguments.optimizers)
    print(describe(images, model, seconds), flush=True)
    task = make_task(images, model, arguments.seed)
    runs = [train(task, CONTENDERS, name, seconds=seconds) for name in arguments.optimizers]
    print_table(runs)
    print(endings(runs), end="")
    curves = {run.contender.label: run.curve for run in runs}
    plot_curves(curves, arguments.out, title=f"{images.name}: training loss of one network")
    print(f"plot: {arguments.out}")


def describe(images: Images, model: nn.Sequential, seconds: float) -> str:
    """One line about the data and the network."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    widths = "-".join(str(n) for n in (layers[0].in_features, *(m.out_features for m in layers)))
    return (
        f"{images.name}: {len(images.train_y):,} training and {len(images.test_y):,} test images; "
        f"network {widths} ({sum(p.numel() for p in model.parameters()):,} parameters); "
        f"{seconds:.3g} s for each optimizer"
    )


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(
        description="Compare optimizers: same network, same closure, same number of seconds."
    )
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="digits", help="default: digits")
    add("--data-dir", type=Path, help="directory of the Fashion-MNIST files")
    add(
        "--seconds",
        type=positive(float),
        help=f"for each optimizer; default: {TOTAL_SECONDS:g} shared between them",
    )
    add("--hidden", type=positive(int), default=64, help="width of the two layers; default: 64")
    add_common_arguments(
        parser, contenders=CONTENDERS, chosen=CONTENDERS, out="compare_optimizers.png"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
