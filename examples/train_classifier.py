"""Trains a small convolutional network on images, with several optimizers for the same time.

Each optimizer tries five learning rates, a factor of about three apart, for the same short time,
and keeps the one with the highest accuracy on held-out training images. AdaSecant has nothing to
choose. Then all of them train from several seeds (other weights, other batches) on all training
images. The test images play no part in the choice of the rates. Other settings are the defaults,
but for AdaHessian and Sophia, see CANDIDATES. Only training counts as time.

    python examples/train_classifier.py
    python examples/train_classifier.py --optimizers soap,kfac,adamw --seconds 60 --seeds 3
    python examples/train_classifier.py --dataset digits --seconds 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from _command_line import add_common_arguments, add_json_argument, positive
from _data import DATASETS, Images, best_available, load_images
from _report import draw_spread, format_table, pyplot, style_axes, write_results
from _training import Contender, Loss, Run, Task, batches, endings, train
from torch_secondorder import KFAC, SOAP, AdaHessian, AdaSecant, Shampoo, Sophia

BATCH_SIZE = 128
HELD_OUT = 1 / 6  # of the training images, for the choice of learning rates
MEASURED = 10_000  # largest number of training images that the loss is measured on
CHUNK = 1000  # images measured at a time


@dataclass(frozen=True)
class Candidate:
    """An optimizer with several learning rates.

    Attributes:
        label: Its name in the table and the plot.
        make: Makes it for parameters and a learning rate.
        rates: Learning rates to choose from, rising; a single one for nothing to choose.
    """

    label: str
    make: Callable[[Iterable[nn.Parameter], float], Optimizer]
    rates: tuple[float, ...]

    def name(self, rate: float) -> str:
        """The label with a learning rate."""
        return f"{self.label}, lr {rate:g}"


# To compare another optimizer, add a row with the same number of learning rates.
CANDIDATES = {
    "soap": Candidate("SOAP (ours)", lambda p, lr: SOAP(p, lr=lr), (1e-3, 3e-3, 1e-2, 3e-2, 0.1)),
    "shampoo": Candidate(
        "Shampoo (ours)", lambda p, lr: Shampoo(p, lr=lr), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    ),
    "kfac": Candidate("KFAC (ours)", lambda p, lr: KFAC(p, lr=lr), (1e-2, 3e-2, 0.1, 0.3, 1.0)),
    "adasecant": Candidate("AdaSecant (ours)", lambda p, lr: AdaSecant(p, lr=lr), (1.0,)),
    "adahessian": Candidate(
        "AdaHessian gnb (ours)",
        lambda p, lr: AdaHessian(p, lr=lr, estimator="gnb", update_period=10),
        (0.015, 0.05, 0.15, 0.5, 1.5),
    ),
    "sophia": Candidate(
        "Sophia gnb (ours)",
        lambda p, lr: Sophia(p, lr=lr, betas=(0.9, 0.9), estimator="gnb", target_unclipped=0.9),
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ),
    "adamw": Candidate("AdamW", lambda p, lr: AdamW(p, lr=lr), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "sgd": Candidate(
        "SGD, momentum 0.9",
        lambda p, lr: SGD(p, lr=lr, momentum=0.9),
        (3e-3, 1e-2, 3e-2, 0.1, 0.3),
    ),
}


def contenders(names: Iterable[str]) -> dict[str, Contender]:
    """Every candidate with each of its learning rates."""
    return {
        candidate.name(rate): Contender(
            candidate.name(rate),
            lambda p, make=candidate.make, rate=rate: make(p, rate),
            batch_size=BATCH_SIZE,
        )
        for candidate in map(CANDIDATES.__getitem__, names)
        for rate in candidate.rates
    }


def make_network(images: Images, seed: int) -> nn.Sequential:
    """A network with two convolutions, the same for the same seed."""
    torch.manual_seed(seed)
    side = round(images.pixels**0.5)
    quarter = -(-side // 4)  # each stride of two halves the side, rounded up
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * quarter**2, images.classes),
    )


def hold_out(images: Images, seed: int) -> Images:
    """Replaces the test images by a part of the training images."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.train_y), generator=generator).to(images.train_y.device)
    held, kept = order.tensor_split([round(HELD_OUT * len(order))])
    x, y = images.train_x, images.train_y
    return Images(images.name, x[kept], y[kept], x[held], y[held])


def make_task(images: Images, model: nn.Module, seed: int) -> Task:
    """The training problem: its losses, and the measurement of a network."""

    def losses(batch_size: int | None) -> Iterator[Loss]:
        for x, y in batches((images.train_x, images.train_y), batch_size, seed):
            yield lambda model, x=x, y=y: F.cross_entropy(model(x), y)

    def measure(model: nn.Module) -> tuple[float, float]:
        model.eval()
        loss, _ = loss_and_accuracy(model, images.train_x[:MEASURED], images.train_y[:MEASURED])
        _, accuracy = loss_and_accuracy(model, images.test_x, images.test_y)
        model.train()
        return loss, accuracy

    def describe(loss: float, accuracy: float) -> str:
        return f"loss {loss:.3g}, accuracy {accuracy:.1%}"

    return Task(model, losses, measure, describe, interval=1.3)


def loss_and_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Measures a network on many images, some at a time."""
    outputs = torch.cat([model(part) for part in x.split(CHUNK)])
    return F.cross_entropy(outputs, y).item(), (outputs.argmax(1) == y).double().mean().item()


def choose_rate(task: Task, name: str, every: Mapping[str, Contender], seconds: float) -> float:
    """The learning rate with the highest accuracy; ties go to the lower loss."""
    candidate = CANDIDATES[name]
    if len(candidate.rates) == 1:
        return candidate.rates[0]
    reached = {}
    for rate in candidate.rates:
        curve = train(task, every, candidate.name(rate), seconds=seconds).curve
        reached[rate] = (curve.score[-1], -curve.loss[-1])
    return max(reached, key=reached.__getitem__)


def at_the_edge(chosen: Mapping[str, float]) -> str:
    """One line for each optimizer whose best learning rate is the smallest or largest tried."""
    lines = ""
    for name, rate in chosen.items():
        if len(CANDIDATES[name].rates) == 1:
            continue
        for end, of_them in (("smallest", min), ("largest", max)):
            if rate == of_them(CANDIDATES[name].rates):
                lines += (
                    f"{CANDIDATES[name].label}: the best learning rate, {rate:g}, is the {end} "
                    "one tried\n"
                )
    return lines


def spread(values: Sequence[float], form: str) -> str:
    """Formats the mean and, for two or more values, the standard deviation."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), form)}"


def step_time(runs: Sequence[Run]) -> float:
    """Seconds per step."""
    return sum(run.seconds for run in runs) / sum(run.steps for run in runs)


def print_table(runs: Mapping[str, list[Run]], chosen: Mapping[str, float]) -> None:
    """Prints one row for each optimizer."""
    fastest = min(map(step_time, runs.values()))
    header = ["optimizer", "learning rate", "steps", "time per step"]
    rows = [
        [
            CANDIDATES[name].label,
            f"{chosen[name]:g}",
            f"{statistics.mean(run.steps for run in several):,.0f}",
            f"{1e3 * step_time(several):.1f} ms ({step_time(several) / fastest:.2f} x)",
            spread([run.curve.loss[-1] for run in several], ".4f"),
            spread([100 * run.curve.score[-1] for run in several], ".2f"),
        ]
        for name, several in runs.items()
    ]
    print(format_table([*header, "training loss", "test accuracy, %"], rows))


def results(runs: Mapping[str, list[Run]]) -> dict[str, dict[str, float]]:
    """The numbers of the table, by label."""
    made = {}
    for name, several in runs.items():
        accuracies = [100 * run.curve.score[-1] for run in several]
        found = {
            "accuracy": statistics.mean(accuracies),
            "training loss": statistics.mean(run.curve.loss[-1] for run in several),
            "time": step_time(several),
        }
        if len(several) > 1:
            found["accuracy deviation"] = statistics.stdev(accuracies)
        made[CANDIDATES[name].label] = found
    return made


def verdict(runs: Mapping[str, list[Run]]) -> str:
    """A sentence about the highest accuracy, and the significance of the lead."""
    accuracies = {
        CANDIDATES[name].label: [100 * run.curve.score[-1] for run in several]
        for name, several in runs.items()
    }
    first, second, *_ = sorted(accuracies, key=lambda k: -statistics.mean(accuracies[k]))
    lead = statistics.mean(accuracies[first]) - statistics.mean(accuracies[second])
    text = f"highest test accuracy: {first}, {lead:.2f} points before {second}"
    if len(accuracies[first]) > 1:
        noise = sum(statistics.variance(accuracies[k]) for k in (first, second)) ** 0.5
        relation = "less" if lead < noise else "more"
        text += f": {relation} than the spread of their difference over seeds, {noise:.2f}"
    return text


def plot(runs: Mapping[str, list[Run]], path: Path, *, title: str) -> None:
    """Plots loss and accuracy against seconds and steps, with mean and range over the seeds."""
    plt = pyplot()
    figure, cells = plt.subplots(
        2, 2, figsize=(11, 7.5), sharex="col", sharey="row", layout="constrained"
    )
    for i, (name, several) in enumerate(runs.items()):
        curves = [run.curve for run in several]
        for row, of in zip(cells, ("loss", "score"), strict=True):
            for axes, against in zip(row, ("seconds", "steps"), strict=True):
                lines = [(getattr(c, against)[1:], getattr(c, of)[1:]) for c in curves]
                draw_spread(axes, lines, i, CANDIDATES[name].label)
    (a, b), (c, d) = cells
    style_axes(a, ylabel="training loss", xscale="log", yscale="log")
    style_axes(b, xscale="log", yscale="log")
    style_axes(c, xlabel="seconds", ylabel="test accuracy", xscale="log")
    style_axes(d, xlabel="steps", xscale="log")
    handles, labels = a.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Chooses learning rates, trains from several seeds, prints the table and saves the plot."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dataset = arguments.dataset or best_available(arguments.data_dir)
    try:
        images = load_images(dataset, arguments.data_dir, seed=arguments.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    images = images.to(arguments.device)
    tuning_seconds = arguments.tuning_seconds or arguments.seconds / 3
    every = contenders(arguments.optimizers)
    kept = hold_out(images, arguments.seed)
    model = make_network(images, arguments.seed).to(arguments.device)
    print(f"{describe(images, model)}\nlearning rates: {tuning_seconds:.3g} s for each", flush=True)
    task = make_task(kept, model, arguments.seed)
    chosen = {name: choose_rate(task, name, every, tuning_seconds) for name in arguments.optimizers}
    print(f"{arguments.seeds} seeds: {arguments.seconds:g} s for each optimizer", flush=True)
    runs: dict[str, list[Run]] = {name: [] for name in arguments.optimizers}
    # Seed by seed, so that a temporarily slow machine affects all optimizers.
    for seed in range(arguments.seed + 1, arguments.seed + 1 + arguments.seeds):
        task = make_task(images, make_network(images, seed).to(arguments.device), seed)
        for name, several in runs.items():
            label = CANDIDATES[name].name(chosen[name])
            several.append(train(task, every, label, seconds=arguments.seconds))
    print_table(runs, chosen)
    print(at_the_edge(chosen), end="")
    print(endings(run for several in runs.values() for run in several), end="")
    if len(runs) > 1:
        print(verdict(runs))
    write_results(arguments.json, "train_classifier", results(runs))
    plot(runs, arguments.out, title=f"{images.name}: a small convolutional network")
    print(f"plot: {arguments.out}")


def describe(images: Images, model: nn.Module) -> str:
    """One line about the data and the network."""
    return (
        f"{images.name}: {len(images.train_y):,} training and {len(images.test_y):,} test images; "
        f"two convolutions and a linear layer "
        f"({sum(p.numel() for p in model.parameters()):,} parameters), batches of {BATCH_SIZE}"
    )


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(
        description="Train a convolutional network with several optimizers, the same time each."
    )
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="default: fashion-mnist if it is found, else digits")
    add("--data-dir", type=Path, help="directory of the Fashion-MNIST files")
    add("--seconds", type=positive(float), default=6.0, help="for each run; default: 6")
    add(
        "--tuning-seconds",
        type=positive(float),
        help="for each learning rate; default: a third of --seconds",
    )
    add("--seeds", type=positive(int), default=5, help="runs of each optimizer; default: 5")
    add_common_arguments(
        parser, contenders=CANDIDATES, chosen=CANDIDATES, out="train_classifier.png"
    )
    add_json_argument(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
