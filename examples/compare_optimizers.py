"""Trains one network on real images with several optimizers, and compares them.

Every optimizer starts from the same weights, is driven by the same closure, and has the same
number of seconds. The clock stops while the loss and the accuracy over the whole data are measured.

    python examples/compare_optimizers.py
    python examples/compare_optimizers.py --dataset fashion-mnist --seconds 60
    python examples/compare_optimizers.py --optimizers adam,lbfgs --hidden 128
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import torch_secondorder
from _data import DATASETS, Images, load_images
from _report import Curve, format_table, plot_curves

WEIGHT_PENALTY = 1e-4
TOTAL_SECONDS = 64.0


@dataclass(frozen=True)
class Contender:
    """An optimizer as it takes part: how it is made, and what one closure call sees.

    Attributes:
        label: Its name in the table and the plot.
        make: Makes it for the parameters of a network.
        batch_size: Images a closure call sees, drawn anew for each step; None for all of them.
    """

    label: str
    make: Callable[[Iterable[nn.Parameter]], Optimizer]
    batch_size: int | None = None


# To compare another optimizer, add a row.
CONTENDERS = {
    "sgd": Contender(
        "SGD, momentum 0.9", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), batch_size=128
    ),
    "adam": Contender("Adam", lambda p: torch.optim.Adam(p, lr=1e-3), batch_size=128),
    "torch-lbfgs": Contender(
        "torch.optim.LBFGS",
        lambda p: torch.optim.LBFGS(p, max_iter=10, line_search_fn="strong_wolfe"),
    ),
    "lbfgs": Contender("LBFGS (ours)", lambda p: torch_secondorder.LBFGS(p, max_iter=10)),
}


@dataclass
class Run:
    """What came of training with one optimizer."""

    contender: Contender
    curve: Curve = field(default_factory=Curve)
    accuracy: float = math.nan
    seconds: float = 0.0
    evaluations: int = 0
    converged: bool = False


def make_network(images: Images, hidden: int, seed: int) -> nn.Sequential:
    """Makes a smooth network with two hidden layers, the same one for the same seed."""
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


def batches(images: Images, batch_size: int | None, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches for ever: random ones, reshuffled each epoch, or always all the images."""
    count = len(images.train_y)
    if batch_size is None:
        while True:
            yield images.train_x, images.train_y
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).to(images.train_y.device)
        for indices in order.split(batch_size):
            yield images.train_x[indices], images.train_y[indices]


def take_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> int:
    """Takes one step of any optimizer; this closure is all that any of them needs.

    Returns:
        How often the optimizer evaluated the closure.
    """
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = training_loss(model, x, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return evaluations


def train(
    contender: Contender, model: nn.Module, images: Images, *, seconds: float, seed: int
) -> Run:
    """Trains until time is up, a step changes nothing any more, or the loss is not finite."""
    run = Run(contender)
    warm_up(contender, model, images)
    optimizer = contender.make(model.parameters())
    data = batches(images, contender.batch_size, seed)
    next_measurement = 0.0
    with progress_bar(contender.label, seconds) as bar:
        measure(run, model, images, bar)
        while run.seconds < seconds and math.isfinite(run.curve.loss[-1]):
            before = copy_parameters(model) if contender.batch_size is None else None
            x, y = next(data)
            start = clock(images)
            run.evaluations += take_step(model, optimizer, x, y)
            run.seconds += clock(images) - start
            if before is not None and same_parameters(model, before):
                run.converged = True
                break
            if run.seconds >= next_measurement:
                measure(run, model, images, bar)
                next_measurement = 1.1 * run.seconds
        measure(run, model, images, bar)
    return run


def warm_up(contender: Contender, model: nn.Module, images: Images) -> None:
    """Steps on a copy, so that nobody's clock pays for what torch loads at first use."""
    model = copy.deepcopy(model)
    optimizer = contender.make(model.parameters())
    data = batches(images, contender.batch_size, seed=0)
    for _ in range(2):
        take_step(model, optimizer, *next(data))


@torch.no_grad()
def measure(run: Run, model: nn.Module, images: Images, bar: tqdm) -> None:
    """Records loss and accuracy over the whole data; this is not on the clock."""
    loss = training_loss(model, images.train_x, images.train_y).item()
    predicted = model(images.test_x).argmax(dim=1)
    run.accuracy = (predicted == images.test_y).double().mean().item()
    run.curve.add(run.seconds, run.evaluations, loss)
    ending = ", cannot get lower" if run.converged else ""
    bar.set_postfix_str(f"loss {loss:.3g}, test accuracy {run.accuracy:.1%}{ending}", refresh=False)
    bar.update(min(run.seconds, bar.total) - bar.n)


def clock(images: Images) -> float:
    """Reads the time, once the device has done what it was given."""
    if images.train_x.is_cuda:
        torch.cuda.synchronize(images.train_x.device)
    return time.perf_counter()


def copy_parameters(model: nn.Module) -> list[Tensor]:
    """Copies the parameters, to see later whether they moved."""
    return [p.detach().clone() for p in model.parameters()]


def same_parameters(model: nn.Module, before: list[Tensor]) -> bool:
    """Tells whether no parameter moved: the optimizer has converged, or cannot go on."""
    return all(map(torch.equal, model.parameters(), before))


def progress_bar(label: str, seconds: float) -> tqdm:
    """Makes a bar that counts seconds of training; it writes rarely where nobody watches."""
    return tqdm(
        total=seconds,
        desc=label.ljust(max(len(c.label) for c in CONTENDERS.values())),
        bar_format="{desc} {percentage:3.0f}%|{bar:24}| {n:.1f}/{total:.1f} s  {postfix}",
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )


def print_table(runs: list[Run]) -> None:
    """Prints one row for each optimizer."""
    header = ["optimizer", "batch", "training loss", "test accuracy", "evaluations", "seconds"]
    rows = [
        [
            run.contender.label,
            str(run.contender.batch_size or "full"),
            f"{run.curve.loss[-1]:.5f}",
            f"{run.accuracy:.2%}",
            f"{run.evaluations:,}",
            f"{run.seconds:.1f}",
        ]
        for run in runs
    ]
    print(format_table(header, rows))


def main() -> None:
    """Trains with each optimizer in turn, then prints the table and draws the plot."""
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
    runs = [
        train(CONTENDERS[name], copy.deepcopy(model), images, seconds=seconds, seed=arguments.seed)
        for name in arguments.optimizers
    ]
    print_table(runs)
    curves = {run.contender.label: run.curve for run in runs}
    plot_curves(curves, arguments.out, title=f"{images.name}: training loss of one network")
    print(f"plot: {arguments.out}")


def describe(images: Images, model: nn.Sequential, seconds: float) -> str:
    """Says in one line what is trained on what."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    widths = "-".join(str(n) for n in (layers[0].in_features, *(m.out_features for m in layers)))
    return (
        f"{images.name}: {len(images.train_y):,} training and {len(images.test_y):,} test images; "
        f"network {widths} ({sum(p.numel() for p in model.parameters()):,} parameters); "
        f"{seconds:g} s for each optimizer"
    )


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; what is wrong with it is said before any work is done."""
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
    add(
        "--optimizers",
        type=contender_names,
        default=list(CONTENDERS),
        metavar="A,B,...",
        help=f"default: {','.join(CONTENDERS)}",
    )
    add("--hidden", type=positive(int), default=64, help="width of the two layers; default: 64")
    add("--seed", type=int, default=0, help="of weights, batches and the digits' split")
    add("--threads", type=positive(int), help="CPU threads; default: torch's choice")
    add("--device", type=usable_device, default="cpu", help="default: cpu")
    add("--out", type=output_file, default="compare_optimizers.png", help="the plot's file")
    return parser.parse_args()


def positive(number: type[int] | type[float]) -> Callable[[str], float]:
    """Makes a parser of finite numbers greater than zero."""

    def parse(text: str) -> float:
        value = number(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    parse.__name__ = number.__name__  # argparse shows it where `text` is no number at all
    return parse


def contender_names(text: str) -> list[str]:
    """Parses comma-separated names of optimizers."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(
                f"unknown optimizer {name!r}; known: {', '.join(CONTENDERS)}"
            )
    return list(dict.fromkeys(names))


def usable_device(text: str) -> torch.device:
    """Parses the name of a device that this machine has."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use device {text!r}: {reason}") from error


def output_file(text: str) -> Path:
    """Parses the name of an image file to write in a directory that exists."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no directory {path.parent}")
    return path


if __name__ == "__main__":
    main()
