"""Trains a classifier that treats two groups alike, and prices the fairness.

The data are scikit-learn's 442 diabetes patients: ten measurements each, and how far the disease
had progressed a year later. The classifier predicts who is above the median, for instance to see
these patients more often. Without a constraint it picks patients of fifty years or more far more
often than younger ones: the gap between the two rates is larger than in the outcomes themselves.

The constraint bounds the gap, `|rate(old) - rate(young)| <= b`. The rate of positive answers jumps
as the weights change, so that the constraint is about a smooth rate, the mean of a steep sigmoid of
the answers; the tables have the true rates as well. The multiplier of the constraint is the price
of fairness: the loss that one unit of the bound costs, which a check confirms by training with
other bounds. A penalty on the gap reaches the same classifiers, but its factor for a bound has to
be found by trial; it is the multiplier over twice the bound.

All measurements are means over five parts of the patients, each held out once.

    python examples/fair_classifier.py
    python examples/fair_classifier.py --group sex --rate opportunity
    python examples/fair_classifier.py --hidden 8 --bounds 0.15,0.1,0.05,0.02
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from _command_line import output_file, positive
from _constrained import Price, check_price, finished, print_prices
from _report import COLOURS, format_table, line_style, pyplot, style_axes
from torch_secondorder import LBFGS, Constrained

DTYPE = torch.float64
STEEPNESS = 4.0  # of the sigmoid in the smooth rate
DECAY = 0.01  # factor of the squared weights in the loss
FIFTY = 50.0
BATCH = 64
LEARNING_RATE = 0.02
CHANGE = 1e-3  # of the bound, to check its price
STEPS = 50  # of L-BFGS, each up to 200 iterations
MULTIPLIER_RATE = 0.02
PENALTIES = (0.1, 0.3, 1.0, 3.0)
RATES = {
    "parity": "positive answers among all",
    "opportunity": "positive answers among those above the median",
}
GROUPS = {"age": ("50 or older", "younger"), "sex": ("sex 2", "sex 1")}


@dataclass(frozen=True)
class Patients:
    """Patients, with a group and an outcome each.

    Attributes:
        x: Standardized measurements, shape `(n, 10)`.
        y: 1 for a progress above the median, else 0, `(n,)`.
        group: A mask of the first group, `(n,)`.
    """

    x: Tensor
    y: Tensor
    group: Tensor

    def __getitem__(self, chosen: Tensor) -> Patients:
        return Patients(self.x[chosen], self.y[chosen], self.group[chosen])


def load_patients(group: str) -> Patients:
    """Loads the patients.

    Args:
        group: `age` or `sex`. The data name the sexes 1 and 2, and do not say which is which.
    """
    from sklearn.datasets import load_diabetes

    x, progress = map(torch.from_numpy, load_diabetes(return_X_y=True, scaled=False))
    mask = x[:, 0] >= FIFTY if group == "age" else x[:, 1] == 2
    y = (progress > progress.median()).to(DTYPE)
    return Patients((x - x.mean(0)) / x.std(0), y, mask)


def split(patients: Patients, parts: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The indices of those to learn from and of those held out, for parts of alike patients."""
    from sklearn.model_selection import StratifiedKFold

    kinds = (2 * patients.y + patients.group).numpy()
    folds = StratifiedKFold(parts, shuffle=True, random_state=seed)
    return [
        (torch.from_numpy(train), torch.from_numpy(test))
        for train, test in folds.split(kinds, kinds)
    ]


def make_model(inputs: int, hidden: int, seed: int) -> nn.Module:
    """A logistic regression, or a network with one hidden layer."""
    torch.manual_seed(seed)
    if not hidden:
        return nn.Linear(inputs, 1, dtype=DTYPE)
    layers = nn.Linear(inputs, hidden, dtype=DTYPE), nn.Linear(hidden, 1, dtype=DTYPE)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def training_loss(model: nn.Module, patients: Patients) -> Tensor:
    """Cross-entropy with a small quadratic penalty."""
    z = model(patients.x)[:, 0]
    decay = sum(p.square().sum() for p in model.parameters())
    return F.binary_cross_entropy_with_logits(z, patients.y) + DECAY * decay


def smooth_gap(z: Tensor, patients: Patients, rate: str) -> Tensor:
    """The difference of the groups' rates, with the step replaced by a sigmoid; 0-dim."""
    return difference(torch.sigmoid(STEEPNESS * z), patients, rate)


def true_gap(z: Tensor, patients: Patients, rate: str) -> float:
    """The difference of the groups' rates of positive answers."""
    return difference((z > 0).to(DTYPE), patients, rate).item()


def difference(answers: Tensor, patients: Patients, rate: str) -> Tensor:
    """The difference of the groups' means of the answers, 0-dim.

    Args:
        answers: `(n,)`.
        patients: `n` of them.
        rate: `parity` for the means over all, `opportunity` for those with a positive outcome.
    """
    counted = patients.y > 0 if rate == "opportunity" else torch.ones_like(patients.group)
    first, second = counted & patients.group, counted & ~patients.group
    # A batch may have nobody of a group: its mean counts as zero then.
    means = [answers[chosen].sum() / chosen.sum().clamp(min=1) for chosen in (first, second)]
    return means[0] - means[1]


@dataclass(frozen=True)
class Settings:
    """Settings of all trainings.

    Attributes:
        rate: `parity` or `opportunity`.
        hidden: Units of the hidden layer, 0 for none.
        epochs: Passes over the patients in mini-batches.
        seed: Of weights and batches.
    """

    rate: str
    hidden: int
    epochs: int
    seed: int

    def model(self, patients: Patients) -> nn.Module:
        """The model before the training."""
        return make_model(patients.x.shape[1], self.hidden, self.seed)


@dataclass(frozen=True)
class Trained:
    """A model after its training.

    Attributes:
        model: The model.
        evaluations: Evaluations of loss and gradient.
        price: The multiplier of the bound on the gap; NaN without a bound.
    """

    model: nn.Module
    evaluations: int
    price: float


class Gap:
    """The constraint: a bound on the gap, on the patients of the present batch.

    Args:
        model: The model.
        settings: See `Settings`.
        bound: The largest gap.

    Attributes:
        patients: The patients to look at; the training loop replaces them.
    """

    def __init__(self, model: nn.Module, settings: Settings, bound: float) -> None:
        self.patients: Patients | None = None
        self._model, self._rate, self._bound = model, settings.rate, bound

    def __call__(self) -> Tensor:
        """Two values that are to be zero or less, one for each sign of the gap."""
        gap = smooth_gap(self._model(self.patients.x)[:, 0], self.patients, self._rate)
        return torch.stack([gap, -gap]) - self._bound


def train_full(
    patients: Patients,
    settings: Settings,
    bound: float | None = None,
    penalty: float = 0.0,
    start: nn.Module | None = None,
) -> Trained:
    """Trains on all patients at once, by L-BFGS.

    Args:
        patients: Those to learn from.
        settings: See `Settings`.
        bound: The largest gap; None for no constraint.
        penalty: Factor of the squared gap in the loss.
        start: A model to go on with.
    """
    model = copy.deepcopy(start) if start is not None else settings.model(patients)
    optimizer: Optimizer = LBFGS(model.parameters(), max_iter=200)
    gap = Gap(model, settings, bound or 0.0)
    gap.patients = patients
    if bound is not None:
        optimizer = Constrained(optimizer, inequalities={"gap": gap})
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = training_loss(model, patients)
        if penalty:
            z = model(patients.x)[:, 0]
            loss = loss + penalty * smooth_gap(z, patients, settings.rate).square()
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
        if finished(optimizer.info):
            break
    return Trained(model, evaluations, price_of(optimizer))


def train_batches(patients: Patients, settings: Settings, bound: float) -> Trained:
    """Trains on mini-batches, by Adam; each batch gives the loss and the gap."""
    model = settings.model(patients)
    gap = Gap(model, settings, bound)
    adam = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    optimizer = Constrained(
        adam, inequalities={"gap": gap}, multiplier_lr=MULTIPLIER_RATE, penalty=0.0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.epochs)
    order = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(patients.y), generator=order).split(BATCH):
            gap.patients = batch = patients[chosen]
            optimizer.zero_grad()
            loss = training_loss(model, batch)
            loss.backward()
            optimizer.step()
        schedule.step()
    steps = settings.epochs * -(-len(patients.y) // BATCH)
    return Trained(model, steps, price_of(optimizer))


def price_of(optimizer: Optimizer) -> float:
    """The multiplier of the bound on the gap: the sum for both signs, of which one is active."""
    if not isinstance(optimizer, Constrained):
        return math.nan
    return optimizer.multipliers["gap"].sum().item()


@dataclass(frozen=True)
class Result:
    """Means over the parts of the data.

    Attributes:
        label: The training, as shown.
        bound: The largest gap; None without one.
        loss: The training loss.
        smooth: The smooth gap of the patients trained on.
        price: The multiplier.
        accuracy: That on held-out patients.
        gap: The true gap of held-out patients.
        rates: Their rates of positive answers, of the first group and the second.
        evaluations: Evaluations in one training.
        seconds: Time of all trainings.
    """

    label: str
    bound: float | None
    loss: float
    smooth: float
    price: float
    accuracy: float
    gap: float
    rates: tuple[float, float]
    evaluations: float
    seconds: float


def evaluate(
    label: str,
    patients: Patients,
    parts: Sequence[tuple[Tensor, Tensor]],
    rate: str,
    train: Callable[[Patients], Trained],
    bound: float | None = None,
) -> Result:
    """Trains once for each part, and answers for the patients of the part."""
    z = torch.zeros_like(patients.y)
    begun, measured = time.perf_counter(), []
    for chosen, held_out in parts:
        seen = patients[chosen]
        trained = train(seen)
        with torch.no_grad():
            loss = training_loss(trained.model, seen).item()
            smooth = smooth_gap(trained.model(seen.x)[:, 0], seen, rate).item()
            z[held_out] = trained.model(patients.x[held_out])[:, 0]
        measured.append((loss, smooth, trained.price, trained.evaluations))
    seconds = time.perf_counter() - begun
    loss, smooth, price, evaluations = torch.tensor(measured, dtype=DTYPE).mean(0).tolist()
    positive = (z > 0).to(DTYPE)
    rates = [positive[mask].mean().item() for mask in (patients.group, ~patients.group)]
    return Result(
        label,
        bound,
        loss,
        smooth,
        price,
        accuracy=(positive == patients.y).to(DTYPE).mean().item(),
        gap=true_gap(z, patients, rate),
        rates=(rates[0], rates[1]),
        evaluations=evaluations,
        seconds=seconds,
    )


def compare(
    patients: Patients, settings: Settings, bounds: Sequence[float], parts: int
) -> list[Result]:
    """Trains without a bound, with all bounds in two ways, and with penalties."""
    folds = split(patients, parts, settings.seed)

    def run(label: str, train: Callable[[Patients], Trained], bound: float | None = None) -> Result:
        return evaluate(label, patients, folds, settings.rate, train, bound)

    def full(b: float | None = None, w: float = 0.0) -> Callable[[Patients], Trained]:
        return lambda seen: train_full(seen, settings, b, w)

    def batches(b: float) -> Callable[[Patients], Trained]:
        return lambda seen: train_batches(seen, settings, b)

    return [
        run("no bound", full()),
        *(run(f"LBFGS, gap <= {b:g}", full(b), b) for b in bounds),
        *(run(f"Adam, gap <= {b:g}", batches(b), b) for b in bounds),
        *(run(f"penalty {w:g}", full(w=w)) for w in PENALTIES),
    ]


def print_table(results: Sequence[Result]) -> None:
    """Prints one row for each training."""
    header = ["training", "loss", "smooth gap", "multiplier", "held out: gap", "accuracy"]
    rows = [
        [
            r.label,
            f"{r.loss:.4f}",
            f"{r.smooth:+.4f}",
            "" if math.isnan(r.price) else f"{r.price:.4f}",
            f"{r.gap:+.3f}",
            f"{r.accuracy:.1%}",
            f"{r.evaluations:,.0f}",
            f"{r.seconds:.1f}",
        ]
        for r in results
    ]
    print(format_table([*header, "evaluations", "seconds"], rows))


def series(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results with bounds by optimizer, and those with penalties."""
    kinds = {"LBFGS": "Constrained(LBFGS)", "Adam": "Constrained(Adam)", "penalty": "penalties"}
    return {
        label: [r for r in results if r.label.startswith(start)] for start, label in kinds.items()
    }


def check_prices(patients: Patients, settings: Settings, bounds: Sequence[float]) -> list[Price]:
    """The prices of bounds, with all patients trained on."""
    prices = []
    for b in bounds:
        found = train_full(patients, settings, b)

        def lowest_loss(bound: float, start: nn.Module = found.model) -> float:
            model = train_full(patients, settings, bound, start=start).model
            with torch.no_grad():
                return training_loss(model, patients).item()

        prices.append(check_price("the gap", b, CHANGE, found.price, lowest_loss))
    return prices


def tune_penalty(patients: Patients, settings: Settings, bound: float) -> tuple[float, int]:
    """The factor of a penalty with a smooth gap just below a bound, and the trainings it took.

    Bisects the logarithm of the factor until the gap is within 2% of the bound.
    """
    low, high, trainings = 1e-3, 1e3, 0
    while True:
        factor = math.sqrt(low * high)
        trainings += 1
        model = train_full(patients, settings, penalty=factor).model
        with torch.no_grad():
            gap = abs(smooth_gap(model(patients.x)[:, 0], patients, settings.rate).item())
        if 0.98 * bound <= gap <= bound or high < 1.001 * low:
            return factor, trainings
        low, high = (low, factor) if gap < bound else (factor, high)


def plot(results: Sequence[Result], names: tuple[str, str], count: int, path: Path) -> None:
    """Draws accuracy and rates over the gap, and the loss over the bound with its prices."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    draw_frontier(left, results, count)
    draw_rates(middle, results, names)
    draw_prices(right, results)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_frontier(axes: Any, results: Sequence[Result], count: int) -> None:
    """Draws accuracy over the gap, both of held-out patients."""
    free = results[0]
    error = math.sqrt(free.accuracy * (1.0 - free.accuracy) / count)
    axes.axhspan(
        100 * (free.accuracy - error),
        100 * (free.accuracy + error),
        color="0.93",
        label="no bound: one standard error",
    )
    axes.plot(free.gap, 100 * free.accuracy, "*", color="black", ms=14, label="no bound")
    for i, (label, some) in enumerate(series(results).items()):
        style = line_style(i) | {"marker": "os^"[i], "linewidth": 1.2}
        axes.plot([r.gap for r in some], [100 * r.accuracy for r in some], label=label, **style)
    for r in series(results)["Constrained(LBFGS)"]:
        axes.annotate(
            f"{r.bound:g}", (r.gap, 100 * r.accuracy), (-5, -22), textcoords="offset points"
        )
    style_axes(axes, xlabel="gap of the true rates", ylabel="accuracy, %")
    axes.set(
        title="held-out patients; numbers are bounds",
        ylim=(100 * free.accuracy - 10, 100 * free.accuracy + 10),
    )
    axes.legend(frameon=False)


def draw_rates(axes: Any, results: Sequence[Result], names: tuple[str, str]) -> None:
    """Draws both groups' rates over the bound."""
    some = series(results)["Constrained(LBFGS)"]
    for k, name in enumerate(names):
        style = line_style(k) | {"marker": "o"}
        axes.plot([r.bound for r in some], [r.rates[k] for r in some], label=name, **style)
        axes.axhline(results[0].rates[k], color=COLOURS[k], lw=1, ls=":", label=f"{name}, no bound")
    style_axes(axes, xlabel="bound on the gap", ylabel="rate of positive answers")
    axes.set(title="held-out patients, Constrained(LBFGS)")
    axes.legend(frameon=False)


def draw_prices(axes: Any, results: Sequence[Result]) -> None:
    """Draws the loss over the bound, with the slopes that the multipliers tell."""
    for i, label in enumerate(("Constrained(LBFGS)", "Constrained(Adam)")):
        some = series(results)[label]
        style = line_style(i) | {"marker": "os"[i], "linestyle": ""}
        axes.plot([r.bound for r in some], [r.loss for r in some], label=label, **style)
        for r in some:
            ends = [r.bound - 0.012, r.bound + 0.012]
            axes.plot(ends, [r.loss - r.price * (b - r.bound) for b in ends], color=COLOURS[i])
    axes.axhline(results[0].loss, color="0.5", lw=1, label="no bound")
    style_axes(axes, xlabel="bound on the gap", ylabel="training loss")
    axes.set(title="price: the slope is minus the multiplier")
    axes.legend(frameon=False)


def main() -> None:
    """Trains in all ways, prints the tables and saves the picture."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    patients = load_patients(arguments.group)
    names = GROUPS[arguments.group]
    settings = Settings(arguments.rate, arguments.hidden, arguments.epochs, arguments.seed)
    outcomes = [patients.y[mask].mean().item() for mask in (patients.group, ~patients.group)]
    print(
        f"{len(patients.y)} patients, {patients.group.sum()} {names[0]}; above the median are "
        f"{outcomes[0]:.1%} of them and {outcomes[1]:.1%} of those {names[1]}; "
        f"rate: {RATES[arguments.rate]}"
    )
    results = compare(patients, settings, arguments.bounds, arguments.parts)
    print_table(results)
    print("prices with all patients trained on, by the multipliers and by training again:")
    print_prices(check_prices(patients, settings, arguments.bounds))
    print(statement(patients, settings, arguments.bounds[-1]))
    plot(results, names, len(patients.y), arguments.out)
    print(f"plot: {arguments.out}")


def statement(patients: Patients, settings: Settings, bound: float) -> str:
    """A sentence about the penalty that keeps a bound."""
    price = train_full(patients, settings, bound).price
    factor, trainings = tune_penalty(patients, settings, bound)
    return (
        f"a penalty keeps the gap to {bound:g} with the factor {factor:.2f}, found by {trainings} "
        f"trainings; multiplier / (2 bound) = {price / (2 * bound):.2f} after one training"
    )


def bounds(text: str) -> list[float]:
    """Parses comma-separated positive numbers."""
    return sorted({positive(float)(part) for part in text.split(",")}, reverse=True)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(description="Train a classifier with a bound on a rate gap.")
    add = parser.add_argument
    add("--group", choices=GROUPS, default="age", help="what the groups differ in; default: age")
    add("--rate", choices=RATES, default="parity", help="which rate is alike; default: parity")
    add(
        "--bounds",
        type=bounds,
        default=[0.15, 0.1, 0.05, 0.02],
        metavar="B,B,...",
        help="on the gap; default: 0.15,0.1,0.05,0.02",
    )
    add("--hidden", type=int, default=0, help="units of a hidden layer; default: 0, without one")
    add("--epochs", type=positive(int), default=100, help="in mini-batches; default: 100")
    add("--parts", type=int, default=5, help="parts of the data, one held out; default: 5")
    add("--quick", action="store_true", help="a small comparison, to try the script")
    add("--seed", type=int, default=0, help="random seed; default: 0")
    add("--threads", type=positive(int), help="CPU threads; default: torch's choice")
    out = "fair_classifier.png"
    add("--out", type=output_file, default=out, help=f"file of the picture; default: {out}")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(bounds=[0.1, 0.05], epochs=10, parts=2)
    return arguments


if __name__ == "__main__":
    main()
