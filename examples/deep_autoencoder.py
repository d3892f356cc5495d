"""Trains a deep autoencoder, the classical problem of Hessian-free optimization.

Layers of sigmoid units encode an image in a few numbers and decode it, and all layers are trained
at once, from Martens' sparse random start (Hinton & Salakhutdinov 2006, "Reducing the
dimensionality of data with neural networks"; Martens 2010, "Deep learning via Hessian-free
optimization"). The error is a sum of squares over pixels and a mean over images.

    python examples/deep_autoencoder.py
    python examples/deep_autoencoder.py --dataset digits --seconds 10
    python examples/deep_autoencoder.py --optimizers kfac,adam --images 20000 --seconds 300
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_secondorder
from _command_line import add_common_arguments, add_json_argument, positive
from _data import DATASETS, Images, find_fashion_mnist, load_images
from _report import format_table, line_style, pyplot, style_axes, write_results
from _training import Contender, Loss, Run, Task, batches, endings, train

# Hidden layers up to the narrowest one; the decoder mirrors them.
ENCODERS = {"fashion-mnist": (400, 200, 100, 25), "digits": (50, 25, 12, 6)}
INCOMING = 15  # initial number of connections of each unit
TEST_IMAGES = 1000
SHOWN = 8

# The settings of each optimizer; to compare another one, add a row.
CONTENDERS = {
    "newton-cg": Contender(
        "NewtonCG (ours)",
        # Few iterations: an exact solution for one batch would fit its noise.
        lambda p: torch_secondorder.NewtonCG(p, preconditioner="kfac", max_cg_iter=5),
        batch_size=1000,
    ),
    "kfac": Contender(
        "KFAC (ours)",
        lambda p: torch_secondorder.KFAC(p, lr=0.1, damping=1e-2, weight_decay=3e-3, kl_clip=1.0),
        batch_size=250,
    ),
    "torch-lbfgs": Contender(
        "torch.optim.LBFGS",
        lambda p: torch.optim.LBFGS(p, max_iter=10, line_search_fn="strong_wolfe"),
    ),
    "adam": Contender("Adam", lambda p: torch.optim.Adam(p, lr=3e-3), batch_size=200),
}


def load_brightness(dataset: str, data_dir: Path | None, count: int, seed: int) -> Images:
    """Loads images with values in [0, 1]: `count` training images, at most 1,000 test images."""
    images = load_images(dataset, data_dir, seed=seed)
    return Images(
        images.name,
        (images.train_x[:count] + 1) / 2,
        images.train_y[:count],
        (images.test_x[:TEST_IMAGES] + 1) / 2,
        images.test_y[:TEST_IMAGES],
    )


def layer_widths(images: Images) -> list[int]:
    """Widths of all layers, from the image through the code to the image."""
    encoder = [images.pixels, *ENCODERS[images.name]]
    return encoder + encoder[-2::-1]


def make_network(widths: Sequence[int], seed: int) -> nn.Sequential:
    """A network with sigmoid units in all layers, the same for the same seed."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layer = nn.Linear(inputs, outputs)
        initialize_sparsely(layer)
        layers += [layer, nn.Sigmoid()]
    return nn.Sequential(*layers)


@torch.no_grad()
def initialize_sparsely(layer: nn.Linear) -> None:
    """Gives each unit a few random weights from N(0, 1), and no bias (Martens 2010, sec. 5)."""
    count = min(INCOMING, layer.in_features)
    chosen = torch.rand_like(layer.weight).topk(count, dim=1).indices
    layer.weight.zero_().scatter_(1, chosen, torch.randn(chosen.shape))
    layer.bias.zero_()


def squared_error(model: nn.Module, x: Tensor) -> Tensor:
    """Squared error of the reconstructions: a sum over pixels and a mean over images."""
    return F.mse_loss(model(x), x, reduction="sum") / len(x)


def make_task(images: Images, model: nn.Module, seed: int) -> Task:
    """The training problem: its losses, and the measurement of a network."""

    def losses(batch_size: int | None) -> Iterator[Loss]:
        for (x,) in batches((images.train_x,), batch_size, seed):
            yield lambda model, x=x: squared_error(model, x)

    def measure(model: nn.Module) -> tuple[float, float]:
        training, test = (squared_error(model, x) for x in (images.train_x, images.test_x))
        return training.item(), test.item()

    def describe(training: float, test: float) -> str:
        return f"squared error {training:.2f}, on test images {test:.2f}"

    return Task(model, losses, measure, describe)


def print_table(runs: list[Run]) -> None:
    """Prints one row for each optimizer."""
    header = ["optimizer", "batch", "squared error", "test error"]
    rows = [
        [
            run.contender.label,
            str(run.contender.batch_size or "full"),
            f"{run.curve.loss[-1]:.3f}",
            f"{run.curve.score[-1]:.3f}",
            f"{run.evaluations:,}",
            f"{run.products:,}",
            f"{run.seconds:.1f}",
        ]
        for run in runs
    ]
    print(format_table([*header, "evaluations", "products", "seconds"], rows))


@torch.no_grad()
def plot(runs: list[Run], images: Images, path: Path) -> None:
    """Plots the error over time, and test images with their reconstructions."""
    plt = pyplot()
    side = round(images.pixels**0.5)
    originals = images.test_x[:SHOWN]
    rows = [("original", originals)]
    rows += [(run.contender.label, run.model(originals)) for run in runs]
    figure = plt.figure(figsize=(13, 4.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.3])
    axes = left.subplots()
    for i, run in enumerate(runs):
        # Without the first point: its time is zero, which a logarithmic axis cannot show.
        curve = run.curve
        axes.plot(curve.seconds[1:], curve.loss[1:], label=run.contender.label, **line_style(i))
    style_axes(
        axes,
        xlabel="seconds",
        ylabel="squared error per training image",
        xscale="log",
        yscale="log",
    )
    axes.legend(frameon=False)
    cells = right.subplots(len(rows), SHOWN, squeeze=False)
    for (label, row), line in zip(rows, cells, strict=True):
        line[0].set_ylabel(label, rotation="horizontal", ha="right", va="center")
        for image, cell in zip(row, line, strict=False):
            cell.imshow(image.reshape(side, side).cpu(), cmap="gray", vmin=0, vmax=1)
        for cell in line:
            cell.set(xticks=[], yticks=[])
    figure.suptitle(f"{images.name}: deep autoencoder")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Trains with each optimizer in turn, then prints the table and saves the plot."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dataset = arguments.dataset or default_dataset(arguments.data_dir)
    try:
        images = load_brightness(dataset, arguments.data_dir, arguments.images, arguments.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    images = images.to(arguments.device)
    widths = layer_widths(images)
    model = make_network(widths, arguments.seed).to(arguments.device)
    print(
        f"{images.name}: {len(images.train_x):,} training and {len(images.test_x):,} test images; "
        f"network {'-'.join(map(str, widths))} "
        f"({sum(p.numel() for p in model.parameters()):,} parameters); "
        f"{arguments.seconds:g} s for each optimizer",
        flush=True,
    )
    task = make_task(images, model, arguments.seed)
    runs = [
        train(task, CONTENDERS, name, seconds=arguments.seconds) for name in arguments.optimizers
    ]
    print_table(runs)
    print(endings(runs), end="")
    results = {
        run.contender.label: {"error": run.curve.loss[-1], "test error": run.curve.score[-1]}
        for run in runs
    }
    write_results(arguments.json, "deep_autoencoder", results)
    plot(runs, images, arguments.out)
    print(f"plot: {arguments.out}")


def default_dataset(data_dir: Path | None) -> str:
    """Returns "fashion-mnist" if a directory is given or the files are found, else "digits"."""
    if data_dir is None:
        try:
            find_fashion_mnist()
        except FileNotFoundError:
            print(
                "Fashion-MNIST is not on this machine: using the small digits and narrower layers"
            )
            return "digits"
    return "fashion-mnist"


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(
        description="Train a deep autoencoder with several optimizers, the same time each."
    )
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="default: fashion-mnist if it is found, else digits")
    add("--data-dir", type=Path, help="directory of the Fashion-MNIST files")
    add("--images", type=positive(int), default=4000, help="training images; default: 4000")
    add("--seconds", type=positive(float), default=60.0, help="for each optimizer; default: 60")
    add_common_arguments(
        parser, contenders=CONTENDERS, chosen=CONTENDERS, out="deep_autoencoder.png"
    )
    add_json_argument(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
