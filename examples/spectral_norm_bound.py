"""Trains a network whose layers have bounded spectral norms, and shows what that is good for.

The spectral norm of a weight matrix, its largest singular value, is by how much the layer can
stretch a difference between two inputs. The product over the layers bounds how fast the outputs
change, so that a small product certifies answers: if the two largest outputs differ by `m`, no
change of the input that is shorter than `m / (sqrt(2) * product)` changes the answer.

`Constrained` keeps the norm of each layer below a bound, beside Adam on mini-batches and beside
L-BFGS on all images. Weight decay lowers all singular values instead, also where that costs more
than it gives; the parametrization `torch.nn.utils.parametrizations.spectral_norm` makes the largest
one equal to the bound. All singular values are constrained, not only the largest: at the solution
several are at the bound, and each has a multiplier.

The multipliers of a layer tell by how much the loss would fall if its bound were raised, which a
check confirms by training with other bounds. A ReLU network stays the same if one layer is scaled
up and the next one down; so the product of bound and price has to be the same for all layers.

    python examples/spectral_norm_bound.py
    python examples/spectral_norm_bound.py --bound 1 --units 64
    python examples/spectral_norm_bound.py --dataset fashion-mnist --images 5000 --bound 2
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from tqdm import tqdm

from _command_line import output_file, positive
from _constrained import Price, check_price, print_prices
from _data import DATASETS, Images, load_images
from _report import COLOURS, format_table, line_style, pyplot, style_axes
from torch_secondorder import LBFGS, Constrained

DTYPE = torch.float64
BATCH = 64
LEARNING_RATE = 2e-3
MULTIPLIER_RATE = 0.03
PENALTY = 3.0
# With 0.03 the accuracy was two points lower, with 48 units.
DECAY = 0.01
NOISE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # standard deviations, of brightness between -1 and 1
SHOWN_NOISE = 0.6
CHANGE = 0.02  # of the bounds, relative, to check their prices
ACTIVE = 1e-3  # share of the largest multiplier that shows a singular value at the bound
TEST_IMAGES = 1000
SHOWN_RADIUS = 0.5


def make_network(images: Images, units: int, seed: int) -> nn.Sequential:
    """A ReLU network with two hidden layers, the same for the same seed."""
    torch.manual_seed(seed)
    widths = images.pixels, units, units, images.classes
    layers = [nn.Linear(a, b, dtype=DTYPE) for a, b in pairwise(widths)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers with weights, from the input to the output."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def limits(model: nn.Module, bounds: Sequence[float]) -> dict[str, Callable[[], Tensor]]:
    """The constraints: the singular values of each layer minus its bound, to be zero or less."""
    return {
        f"layer {i}": lambda layer=layer, b=b: torch.linalg.svdvals(layer.weight) - b
        for i, (layer, b) in enumerate(zip(linear_layers(model), bounds, strict=True), 1)
    }


def training_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(x), y)


class Scaled(nn.Module):
    """A parametrization: a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        """The weight times the factor."""
        return self.factor * weight


def parametrized(model: nn.Module, bound: float) -> nn.Module:
    """Makes the spectral norm of each layer equal to a bound, by torch's parametrization."""
    for layer in linear_layers(model):
        parametrizations.spectral_norm(layer)
        parametrize.register_parametrization(layer, "weight", Scaled(bound))
    return model


@dataclass(frozen=True)
class Settings:
    """Settings of all trainings.

    Attributes:
        bound: That of each layer.
        units: Width of the hidden layers.
        epochs: Passes over the images in mini-batches.
        evaluations: Most evaluations of L-BFGS.
        seed: Of weights and batches.
    """

    bound: float
    units: int
    epochs: int
    evaluations: int
    seed: int


@dataclass(frozen=True)
class Trained:
    """A network after its training.

    Attributes:
        label: The training, as shown.
        model: The network.
        evaluations: Evaluations of loss and gradient.
        seconds: The time they took.
        multipliers: Those of the singular values by layer; empty without constraints.
        state: The state of the optimizer, to go on with; empty without L-BFGS.
    """

    label: str
    model: nn.Module
    evaluations: int
    seconds: float
    multipliers: dict[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def norms(self) -> list[float]:
        """The spectral norms of the layers."""
        layers = linear_layers(self.model)
        return [torch.linalg.matrix_norm(layer.weight, 2).item() for layer in layers]


def train_batches(
    label: str,
    images: Images,
    settings: Settings,
    *,
    constrained: bool = False,
    norm: bool = False,
    decay: float = 0.0,
) -> Trained:
    """Trains on mini-batches by Adam.

    Args:
        label: The training, as shown.
        images: The data.
        settings: See `Settings`.
        constrained: Whether the norms are bounded by constraints.
        norm: Whether they are made equal to the bound by torch's parametrization.
        decay: Factor of half the squared weights in the loss.
    """
    model: nn.Module = make_network(images, settings.units, settings.seed)
    if norm:
        model = parametrized(model, settings.bound)
    layers = linear_layers(model)
    adam = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.epochs)
    optimizer: Any = adam
    if constrained:
        bounds = limits(model, [settings.bound] * len(layers))
        optimizer = Constrained(
            adam, inequalities=bounds, penalty=PENALTY, multiplier_lr=MULTIPLIER_RATE
        )
    order = torch.Generator().manual_seed(settings.seed)
    begun, steps = time.perf_counter(), 0
    for _ in progress(range(settings.epochs), label):
        for chosen in torch.randperm(len(images.train_y), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss = training_loss(model, images.train_x[chosen], images.train_y[chosen])
            if decay:
                loss = loss + 0.5 * decay * sum(m.weight.square().sum() for m in layers)
            loss.backward()
            optimizer.step()
            steps += 1
        schedule.step()
    seconds = time.perf_counter() - begun
    return Trained(label, model.eval(), steps, seconds, getattr(optimizer, "multipliers", {}))


def train_full(
    label: str,
    images: Images,
    settings: Settings,
    bounds: Sequence[float],
    evaluations: int,
    start: Trained | None = None,
) -> Trained:
    """Trains on all images at once, by L-BFGS with constraints.

    Args:
        label: The training, as shown.
        images: The data.
        settings: See `Settings`.
        bounds: Those of the layers.
        evaluations: How many at least.
        start: A training to go on with, multipliers included.
    """
    model = make_network(images, settings.units, settings.seed)
    # The multipliers move after each hundred iterations: singular values that meet at the bound
    # make a minimum that is too slow to wait for.
    optimizer = Constrained(
        LBFGS(model.parameters(), max_iter=100),
        inequalities=limits(model, bounds),
        method="augmented_lagrangian",
        penalty=1.0,
        multiplier_lr=1.0,
    )
    if start is not None:
        model.load_state_dict(start.model.state_dict())
        optimizer.load_state_dict(copy.deepcopy(start.state))
    used = 0

    def closure() -> Tensor:
        nonlocal used
        used += 1
        optimizer.zero_grad()
        loss = training_loss(model, images.train_x, images.train_y)
        loss.backward()
        return loss

    begun = time.perf_counter()
    with progress(total=evaluations, desc=label) as bar:
        while used < evaluations:
            optimizer.step(closure)
            bar.update(min(used, evaluations) - bar.n)
    seconds = time.perf_counter() - begun
    return Trained(label, model, used, seconds, optimizer.multipliers, optimizer.state_dict())


def progress(steps: Any = None, desc: str = "", **settings: Any) -> Any:
    """A progress bar."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(steps, desc=desc, mininterval=interval, **settings)


@dataclass(frozen=True)
class Robustness:
    """Measurements on test images.

    Attributes:
        loss: The training loss.
        accuracy: Accuracy at each standard deviation of noise, `NOISE`.
        radii: The certified radius of each image; zero if the answer is wrong.
    """

    loss: float
    accuracy: list[float]
    radii: Tensor

    def certified(self, radius: float) -> float:
        """The share of images that are certified to be right up to a distance."""
        return (self.radii > radius).double().mean().item()


@torch.no_grad()
def measure(trained: Trained, images: Images) -> Robustness:
    """Measures loss and robustness."""
    model, x, y = trained.model, images.test_x, images.test_y
    loss = training_loss(model, images.train_x, images.train_y).item()
    generator = torch.Generator().manual_seed(0)  # the same noise for all networks
    accuracy = []
    for level in NOISE:
        noise = torch.randn((8, *x.shape), generator=generator, dtype=DTYPE)
        answers = model(x + level * noise).argmax(-1)
        accuracy.append((answers == y).double().mean().item())
    outputs = model(x)
    best = outputs.topk(2, dim=1).values
    product = torch.tensor(trained.norms).prod().item()
    radii = (best[:, 0] - best[:, 1]) / (2.0**0.5 * product)
    return Robustness(loss, accuracy, radii * (outputs.argmax(1) == y))


def compare(images: Images, settings: Settings) -> list[Trained]:
    """Trains in all ways; the last one is `Constrained(LBFGS)`."""
    bounded = train_batches("Constrained(Adam)", images, settings, constrained=True)
    bounds = [settings.bound] * len(linear_layers(bounded.model))
    return [
        train_batches("Adam", images, settings),
        train_batches(f"Adam, weight decay {DECAY:g}", images, settings, decay=DECAY),
        train_batches("Adam, spectral_norm", images, settings, norm=True),
        bounded,
        train_full("Constrained(LBFGS)", images, settings, bounds, settings.evaluations),
    ]


def print_table(trained: Sequence[Trained], measured: Sequence[Robustness]) -> None:
    """Prints one row for each training."""
    header = ["training", "loss", "product of norms", "accuracy", f"noise {SHOWN_NOISE:g}"]
    header += [f"certified at {SHOWN_RADIUS:g}", "evaluations", "seconds"]
    rows = [
        [
            t.label,
            f"{m.loss:.4f}",
            f"{torch.tensor(t.norms).prod():.2f}",
            f"{m.accuracy[0]:.1%}",
            f"{m.accuracy[NOISE.index(SHOWN_NOISE)]:.1%}",
            f"{m.certified(SHOWN_RADIUS):.1%}",
            f"{t.evaluations:,}",
            f"{t.seconds:.1f}",
        ]
        for t, m in zip(trained, measured, strict=True)
    ]
    print(format_table(header, rows))


def print_multipliers(trained: Sequence[Trained], bound: float) -> None:
    """Prints one row for each layer of each constrained network."""
    header = ["constraint", "norm - bound", "at the bound", "sum of multipliers", "price * bound"]
    rows = [
        [
            f"{t.label}, {name}",
            f"{norm - bound:+.1e}",
            f"{(y > ACTIVE * y.max()).sum()} of {len(y)}",
            f"{y.sum():.5f}",
            f"{bound * y.sum():.5f}",
        ]
        for t in trained
        for (name, y), norm in zip(t.multipliers.items(), t.norms, strict=False)
    ]
    print(format_table(header, rows))


def check_prices(images: Images, settings: Settings, found: Trained) -> list[Price]:
    """The prices of the layers' bounds, each the sum of the multipliers of its singular values."""
    count = len(found.multipliers)

    def again(bounds: Sequence[float]) -> Trained:
        more = settings.evaluations // 4
        return train_full("prices", images, settings, bounds, more, found)

    def lowest_loss(i: int, bound: float) -> float:
        bounds = [settings.bound] * count
        bounds[i] = bound
        return lagrangian(again(bounds), images, bounds)

    multipliers = again([settings.bound] * count).multipliers
    change = CHANGE * settings.bound
    return [
        check_price(name, settings.bound, change, y.sum().item(), partial(lowest_loss, i))
        for i, (name, y) in enumerate(multipliers.items())
    ]


def lagrangian(trained: Trained, images: Images, bounds: Sequence[float]) -> float:
    """The training loss, corrected by the multipliers for small violations of the bounds."""
    with torch.no_grad():
        loss = training_loss(trained.model, images.train_x, images.train_y)
        values = limits(trained.model, bounds)
        return (loss + sum(y @ values[name]() for name, y in trained.multipliers.items())).item()


def plot(trained: Sequence[Trained], measured: Sequence[Robustness], path: Path) -> None:
    """Draws accuracy over noise, certified images over distance, and singular values."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    radii = torch.linspace(0.0, 2.0, 200)
    for i, (t, m) in enumerate(zip(trained, measured, strict=True)):
        left.plot(NOISE, [100 * a for a in m.accuracy], label=t.label, **line_style(i))
        middle.plot(radii, [100 * m.certified(r) for r in radii], **line_style(i))
    style_axes(left, xlabel="standard deviation of noise", ylabel="accuracy, %")
    left.set(title="test images with noise")
    left.legend(frameon=False)
    style_axes(middle, xlabel="distance", ylabel="certified images, %")
    middle.set(title="test images that are certainly right up to a distance")
    draw_singular_values(right, trained[0], trained[-1])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_singular_values(axes: Any, free: Trained, bounded: Trained) -> None:
    """Draws the singular values of the layers, side by side; the size is the multiplier."""
    start, most = 0, max(y.max().item() for y in bounded.multipliers.values())
    pairs = zip(linear_layers(free.model), linear_layers(bounded.model), strict=True)
    for (a, b), (name, y) in zip(pairs, bounded.multipliers.items(), strict=True):
        places = range(start, start + len(y))
        values = [torch.linalg.svdvals(layer.weight.detach()) for layer in (a, b)]
        first = start == 0
        axes.plot(places, values[0], color=COLOURS[0], label=free.label if first else None)
        axes.plot(places, values[1], color=COLOURS[4], label=bounded.label if first else None)
        axes.scatter(
            places,
            values[1],
            s=200 * y / most,
            color=COLOURS[3],
            alpha=0.6,
            zorder=3,
            label="size: multiplier" if first else None,
        )
        axes.annotate(name, (start, values[0][0].item()), (4, 2), textcoords="offset points")
        start += len(y) + 4
    style_axes(axes, xlabel="singular values of the layers, in order", ylabel="singular value")
    axes.set(title="which directions are at the bound", xticks=[])
    axes.legend(frameon=False)


def main() -> None:
    """Trains in all ways, prints the tables and saves the picture."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        images = load(arguments.dataset, arguments.images, arguments.data_dir, arguments.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    settings = Settings(
        arguments.bound,
        arguments.units,
        arguments.epochs,
        arguments.evaluations,
        arguments.seed,
    )
    print(
        f"{images.name}: {len(images.train_y):,} training and {len(images.test_y):,} test images; "
        f"network {images.pixels}-{settings.units}-{settings.units}-{images.classes}; spectral "
        f"norms up to {settings.bound:g}",
        flush=True,
    )
    trained = compare(images, settings)
    measured = [measure(t, images) for t in trained]
    print_table(trained, measured)
    print_multipliers(trained, settings.bound)
    print("prices by the multipliers of Constrained(LBFGS), and by training again:")
    print_prices(check_prices(images, settings, trained[-1]))
    plot(trained, measured, arguments.out)
    print(f"plot: {arguments.out}")


def load(dataset: str, most: int | None, data_dir: Path | None, seed: int) -> Images:
    """Loads images in double precision, some of them for training and at most 1,000 for testing."""
    found = load_images(dataset, data_dir, seed=seed)
    return Images(
        found.name,
        found.train_x[:most].to(DTYPE),
        found.train_y[:most],
        found.test_x[:TEST_IMAGES].to(DTYPE),
        found.test_y[:TEST_IMAGES],
    )


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(description="Train a network with bounded spectral norms.")
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="digits", help="default: digits")
    add("--data-dir", type=Path, help="directory of the Fashion-MNIST files")
    add("--images", type=positive(int), help="training images; default: all")
    add("--bound", type=positive(float), default=1.5, help="of each layer; default: 1.5")
    add("--units", type=positive(int), default=24, help="width of the two layers; default: 24")
    add("--epochs", type=positive(int), default=60, help="of Adam; default: 60")
    add("--evaluations", type=positive(int), default=2000, help="of L-BFGS; default: 2,000")
    add("--quick", action="store_true", help="a small comparison, to try the script")
    add("--seed", type=int, default=0, help="random seed; default: 0")
    add("--threads", type=positive(int), help="CPU threads; default: torch's choice")
    out = "spectral_norm_bound.png"
    add("--out", type=output_file, default=out, help=f"file of the picture; default: {out}")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(bound=1.0, units=10, epochs=60, evaluations=400, images=300)
    return arguments


if __name__ == "__main__":
    main()
