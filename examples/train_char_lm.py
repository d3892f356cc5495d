"""Trains a small transformer on the characters of an English text, with several optimizers.

All optimizers start from the same network, with the same weight decay (AdaSecant: none) and the
same schedule: the learning rate rises over the first twentieth of a run and then falls along a
cosine. They first get the same number of seconds, then the same number of steps, as many as the
slowest one made, each from several seeds (other weights, other batches). The loss is in nats per
character.

A lower loss after equally many steps does not tell how many steps an optimizer saves. `--reach`
does: AdamW trains for a number of steps, and the others look for the shortest run, with a schedule
of its own length, that ends with a validation loss as low.

Learning rates are the best of a grid for each width and number of layers. `--tune` searches them
again: each optimizer tries its present rate, and moves along the grid until both neighbors are
worse.

    python examples/train_char_lm.py
    python examples/train_char_lm.py --optimizers adamw,soap,kfac --width 128 --layers 4
    python examples/train_char_lm.py --reach 800 --optimizers soap --width 256 --layers 4
    python examples/train_char_lm.py --tune 800 --optimizers all --width 128,256 --layers 4
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev, variance
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import torch_secondorder
from _char_lm import BATCH, CONTEXT, HEADS, Text, Transformer, load_text, make_task, write
from _command_line import add_common_arguments, add_json_argument, positive
from _report import draw_spread, format_table, pyplot, style_axes, write_results
from _scheduled import Scheduled, train
from _training import Contender, Task

WEIGHT_DECAY = 0.1
TUNING_MEASUREMENTS = 4

# The results of `--tune` by width and layers, with another seed than those of the comparisons.
GRID = tuple(2.5e-4 * 2**k for k in range(14))  # 0.00025, 0.0005, ..., 2.048
RATES = {
    (64, 2): {
        "adamw": 0.016,
        "soap": 0.016,
        "shampoo": 0.032,
        "kfac": 0.512,
        "adahessian": 1.024,
        "sophia-gnb": 0.008,
        "sophia-hutchinson": 0.002,
    },
    (128, 4): {"adamw": 0.004, "soap": 0.008, "shampoo": 0.016},
    (256, 4): {"adamw": 0.004, "soap": 0.004},
}
UNTUNED = ("adasecant",)  # finds its rates itself
STEPS = 800  # of a run of `--tune`, and of AdamW with `--reach`
GAP = 0.02  # between seeds at the same setting; less is no win if there is one seed only

BASELINE = "adamw"
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5)  # of its steps, for `--reach`


def contender(label: str, make: Any, weight_decay: float = WEIGHT_DECAY) -> Contender:
    """A row of `CONTENDERS`: weight decay applies to matrices, not to biases and gains."""

    def make_grouped(params: Iterable[nn.Parameter]) -> Optimizer:
        matrices, vectors = [], []
        for p in params:
            (matrices if p.dim() > 1 else vectors).append(p)
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return make(groups, weight_decay=weight_decay)

    return Contender(label, make_grouped, BATCH)


# To compare another optimizer, add a row, and its learning rate to RATES.
CONTENDERS = {
    "adamw": contender("AdamW", partial(torch.optim.AdamW, betas=(0.9, 0.95))),
    "soap": contender("SOAP (ours)", torch_secondorder.SOAP),
    "shampoo": contender("Shampoo (ours)", torch_secondorder.Shampoo),
    "kfac": contender("KFAC (ours)", torch_secondorder.KFAC),
    "adahessian": contender(
        "AdaHessian gnb (ours)",
        partial(torch_secondorder.AdaHessian, estimator="gnb", update_period=10),
    ),
    "sophia-gnb": contender(
        "Sophia gnb (ours)",
        partial(torch_secondorder.Sophia, betas=(0.9, 0.9), estimator="gnb", target_unclipped=0.9),
    ),
    "sophia-hutchinson": contender(
        "Sophia hutchinson (ours)", partial(torch_secondorder.Sophia, estimator="hutchinson")
    ),
    # Its weight decay is part of the loss, which is another thing.
    "adasecant": contender("AdaSecant (ours)", torch_secondorder.AdaSecant, weight_decay=0.0),
}
CHOSEN = ("adamw", "soap", "shampoo", "sophia-gnb")  # without `--optimizers`


Results = Mapping[str, Sequence[Scheduled]]  # the runs of each optimizer, one for each seed


def tuned_rate(name: str, width: int, layers: int) -> float | None:
    """The rate of an optimizer in RATES, at the size next to this one; None if it needs none."""
    if name in UNTUNED:
        return None

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / width)) + abs(math.log(size[1] / layers))

    sizes = sorted((size for size, rates in RATES.items() if name in rates), key=distance)
    return RATES[sizes[0]][name] if sizes else GRID[len(GRID) // 2]


def compare(
    tasks: Sequence[Task], rates: Mapping[str, float | None], seconds: float
) -> tuple[dict[str, list[Scheduled]], dict[str, list[Scheduled]]]:
    """Trains for the same time on each task, then for as many steps as the slowest made."""
    by_time: dict[str, list[Scheduled]] = {name: [] for name in rates}
    by_steps: dict[str, list[Scheduled]] = {name: [] for name in rates}
    # Seed by seed, so that a temporarily slow machine affects all optimizers.
    for task in tasks:
        for name, rate in rates.items():
            by_time[name].append(train(task, CONTENDERS[name], rate, seconds=seconds))
    steps = min(run.steps for several in by_time.values() for run in several)
    for i, task in enumerate(tasks):
        for name, rate in rates.items():
            run = by_time[name][i]
            if run.steps > steps:
                note = f", {steps:,} steps"
                run = train(task, CONTENDERS[name], rate, steps=steps, note=note)
            by_steps[name].append(run)
    return by_time, by_steps


def spread(losses: Sequence[float]) -> str:
    """Formats the mean and, for two or more losses, the standard deviation."""
    finite = len(losses) > 1 and all(map(math.isfinite, losses))
    return f"{mean(losses):.3f}" + (f" ± {stdev(losses):.3f}" if finite else "")


def step_time(runs: Sequence[Scheduled]) -> float:
    """Seconds per step."""
    return sum(run.seconds for run in runs) / sum(run.steps for run in runs)


def shown_rate(rate: float | None) -> str:
    """A learning rate in the tables; a dash if the optimizer finds its own."""
    return "-" if rate is None else f"{rate:g}"


def print_table(by_time: Results, by_steps: Results) -> None:
    """Prints one row for each optimizer."""
    steps = min(run.steps for several in by_steps.values() for run in several)
    fastest = min(map(step_time, by_time.values()))
    header = ["optimizer", "lr", "steps", "ms per step", "training", "validation"]
    rows = []
    for name, runs in by_time.items():
        unclipped = [share for run in runs for share in run.unclipped]
        rows.append(
            [
                CONTENDERS[name].label,
                shown_rate(runs[0].rate),
                f"{mean(run.steps for run in runs):,.0f}",
                f"{1e3 * step_time(runs):.1f} ({step_time(runs) / fastest:.2f} x)",
                spread([run.curve.loss[-1] for run in runs]),
                spread([run.final for run in runs]),
                spread([run.final for run in by_steps[name]]),
                f"{mean(unclipped):.1%}" if unclipped else "-",
            ]
        )
    print(format_table([*header, f"validation, {steps:,} steps", "unclipped"], rows))


def verdict(results: Results, occasion: str) -> str:
    """A sentence about the lowest validation loss, its lead, and the significance of the lead."""
    if len(results) < 2:
        return ""
    losses = {name: [run.final for run in runs] for name, runs in results.items()}
    first, second = sorted(losses, key=lambda name: mean(losses[name]))[:2]
    lead = mean(losses[second]) - mean(losses[first])
    labels = CONTENDERS[first].label, CONTENDERS[second].label
    if lead < noise(losses[first], losses[second]):
        return "{}: {} and {} are equal, {:.3f} nats per character apart\n".format(
            occasion, *labels, lead
        )
    return f"{occasion}: {labels[0]} wins, {lead:.3f} nats per character below {labels[1]}\n"


def noise(one: Sequence[float], other: Sequence[float]) -> float:
    """The standard deviation of a difference over seeds, or GAP if it cannot be estimated."""
    losses = (*one, *other)
    if len(one) < 2 or not all(map(math.isfinite, losses)):
        return GAP
    return math.sqrt(variance(one) + variance(other))


def plot(panels: Mapping[str, Results], path: Path, *, title: str, target: float | None) -> None:
    """Plots the validation loss against seconds and against steps, mean and range over the seeds.

    Args:
        panels: Runs for the panel of each title; the first is over seconds, the second over steps.
        path: The file.
        title: The title of the figure.
        target: A loss to mark, if any.
    """
    plt = pyplot()
    figure, cells = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    for axes, (heading, results), against in zip(
        cells, panels.items(), ("seconds", "steps"), strict=True
    ):
        for i, (name, runs) in enumerate(results.items()):
            lines = [(getattr(run.curve, against), run.curve.score) for run in runs]
            draw_spread(axes, lines, i, CONTENDERS[name].label)
        if target is not None:
            axes.axhline(target, color="0.4", linewidth=0.8)
        style_axes(axes, xlabel=against, title=heading)
    curves = [run.curve for results in panels.values() for runs in results.values() for run in runs]
    low, start = min(curve.score[-1] for curve in curves), curves[0].score[0]
    # Without the first steps, in which all losses fall steeply.
    cells[0].set(ylim=(low - 0.05, low + 0.5 * (start - low)))
    cells[0].set(ylabel="validation loss (nats per character)")
    handles, labels = cells[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@dataclass(frozen=True)
class Reached:
    """The shortest run of an optimizer that was as good as the baseline.

    Attributes:
        share: Its number of steps over the baseline's; None if no share in SHARES was enough.
        runs: Its runs; without a share the ones with the lowest loss.
    """

    share: float | None
    runs: Sequence[Scheduled]


def shortest(sufficient: Callable[[float], bool]) -> float | None:
    """The smallest of SHARES that is sufficient, by bisection; None if none of them is."""
    low, high = 0, len(SHARES)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sufficient(SHARES[middle]) else (middle + 1, high)
    return SHARES[low] if low < len(SHARES) else None


def reach(
    tasks: Sequence[Task], rates: Mapping[str, float | None], steps: int
) -> dict[str, Reached]:
    """Searches the shortest run of each optimizer that ends as low as the baseline's."""

    def run_all(name: str, count: int) -> list[Scheduled]:
        note = f", {count:,} steps"
        chosen, rate = CONTENDERS[name], rates[name]
        return [train(task, chosen, rate, steps=count, note=note) for task in tasks]

    def lowest(name: str) -> Reached:
        tried: dict[float, list[Scheduled]] = {}

        def sufficient(share: float) -> bool:
            tried[share] = run_all(name, round(share * steps))
            losses = [run.final for run in tried[share]]
            relation = "reached" if mean(losses) <= target else "missed"
            print(
                f"{CONTENDERS[name].label}, {share:g} of the steps: "
                f"validation {spread(losses)}, {relation}",
                flush=True,
            )
            return mean(losses) <= target

        share = shortest(sufficient)
        best = min(tried, key=lambda s: mean(run.final for run in tried[s]))
        return Reached(share, tried[best if share is None else share])

    baseline = run_all(BASELINE, steps)
    target = mean(run.final for run in baseline)
    print(
        f"{CONTENDERS[BASELINE].label}, {steps:,} steps: "
        f"validation {spread([run.final for run in baseline])}, the target",
        flush=True,
    )
    others = {name: lowest(name) for name in rates if name != BASELINE}
    return {BASELINE: Reached(1.0, baseline), **others}


def print_reached(reached: Mapping[str, Reached]) -> None:
    """Prints the steps and seconds that each optimizer needs, and shares of the baseline's."""
    baseline = reached[BASELINE].runs
    target = mean(run.final for run in baseline)
    seconds = mean(run.seconds for run in baseline)
    most = round(SHARES[-1] * baseline[0].steps)
    label = CONTENDERS[BASELINE].label
    rows = []
    for name, found in reached.items():
        runs = found.runs
        used, enough = mean(run.seconds for run in runs), found.share is not None
        rows.append(
            [
                CONTENDERS[name].label,
                shown_rate(runs[0].rate),
                f"{1e3 * step_time(runs):.1f}",
                f"{runs[0].steps:,}" if enough else f"more than {most:,}",
                f"{found.share:.2f}" if enough else "-",
                f"{used:.1f}" if enough else "-",
                f"{used / seconds:.2f}" if enough else "-",
                spread([run.final for run in runs]),
            ]
        )
    header = ["optimizer", "lr", "ms per step", f"steps to {target:.3f}", f"of {label}'s"]
    header += ["seconds", f"of {label}'s", "validation"]
    print(format_table(header, rows))


def search(loss_at: Callable[[float], float], start: float) -> dict[float, float]:
    """Losses at the rates of GRID that were tried: the best one, its neighbors, and others.

    The search moves to the best rate so far until both its neighbors are worse. An end of the grid
    has one neighbor.
    """
    losses: dict[float, float] = {}
    center = GRID.index(start)
    while True:
        for i in (center, center + 1, center - 1):
            if 0 <= i < len(GRID) and GRID[i] not in losses:
                losses[GRID[i]] = loss_at(GRID[i])
        # Of equal losses, as of runs that diverged, the lower rate.
        best = min(losses, key=lambda rate: (losses[rate], rate))
        if GRID.index(best) == center:
            return losses
        center = GRID.index(best)


def tune(task: Task, size: tuple[int, int], names: Sequence[str], steps: int) -> dict[str, float]:
    """Searches the best rate of each optimizer, and prints the validation losses as they come.

    Returns:
        A row of RATES.
    """
    found: dict[str, dict[float, float]] = {}
    width = max(len(CONTENDERS[name].label) for name in names)

    def loss_at(name: str, rate: float) -> float:
        note = f", lr {rate:g}"
        chosen, few = CONTENDERS[name], TUNING_MEASUREMENTS
        run = train(task, chosen, rate, steps=steps, measurements=few, note=note)
        label = chosen.label.ljust(width)
        cost = f"{run.steps:,} steps, {run.seconds:.0f} s"
        print(f"{label}  lr {rate:<8g}  validation {run.final:.4f}  ({cost})", flush=True)
        return run.final

    for name in names:
        start = tuned_rate(name, *size)
        if start is None:
            continue
        found[name] = search(partial(loss_at, name), start)
    tried = sorted({rate for losses in found.values() for rate in losses})
    rows = [
        [CONTENDERS[name].label, *(f"{losses[r]:.3f}" if r in losses else "-" for r in tried)]
        for name, losses in found.items()
    ]
    print(format_table([f"after {steps:,} steps", *(f"{rate:g}" for rate in tried)], rows))
    best = {
        name: min(losses, key=lambda rate, losses=losses: (losses[rate], rate))
        for name, losses in found.items()
    }
    for name, rate in best.items():
        if rate in (GRID[0], GRID[-1]):
            print(f"{CONTENDERS[name].label}: the best learning rate is an end of the grid")
    return best


def main() -> None:
    """Tunes, or compares the optimizers in one of two ways; prints tables and saves the plot."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    text = load_text(arguments.device, arguments.characters)
    if len(text.validation) <= CONTEXT:
        sys.exit(f"error: {arguments.characters} characters are too few to hold out a tenth")
    print(
        f"Python's help topics: {len(text.training):,} characters for training, "
        f"{len(text.validation):,} held out, {len(text.characters)} distinct ones"
    )
    if arguments.tune:
        rows = {}
        for width in arguments.width:
            size = (width, arguments.layers)
            (task,) = make_tasks(text, size, [arguments.seed])
            rows[size] = tune(task, size, arguments.optimizers, arguments.tune)
        print(
            "for RATES:",
            *(f"    {size}: {json.dumps(row)}," for size, row in rows.items()),
            sep="\n",
        )
        return
    size = (arguments.width[0], arguments.layers)
    seeds = range(arguments.seed + 1, arguments.seed + 1 + arguments.seeds)
    tasks = make_tasks(text, size, seeds)
    if arguments.reach:
        run_reach(tasks, size, arguments)
    else:
        run_comparison(tasks, size, arguments, text)
    print(f"plot: {arguments.out}")


def make_tasks(text: Text, size: tuple[int, int], seeds: Iterable[int]) -> list[Task]:
    """The same problem from several seeds, and one line about the network."""
    tasks = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = Transformer(len(text.characters), *size).to(text.training.device)
        tasks.append(make_task(text, model, seed))
    count = sum(p.numel() for p in tasks[0].model.parameters())
    print(
        f"transformer of width {size[0]}, layers: {size[1]}, parameters: {count:,}; "
        f"batches of {BATCH} x {CONTEXT} characters; seeds: {len(tasks)}",
        flush=True,
    )
    return tasks


def run_comparison(
    tasks: Sequence[Task], size: tuple[int, int], arguments: argparse.Namespace, text: Text
) -> None:
    """Compares after equal time and equal steps."""
    seconds, names = arguments.seconds, arguments.optimizers
    most = 2 * len(names) * len(tasks) * seconds
    print(f"{seconds:g} s for each run, then equal steps: at most {most / 60:.1f} min of training")
    rates = {name: tuned_rate(name, *size) for name in names}
    by_time, by_steps = compare(tasks, rates, seconds)
    steps = min(run.steps for runs in by_steps.values() for run in runs)
    print_table(by_time, by_steps)
    write_results(
        arguments.json,
        "train_char_lm",
        {
            CONTENDERS[name].label: {
                "validation loss": mean(run.final for run in runs),
                "time": step_time(runs),
            }
            for name, runs in by_time.items()
        },
    )
    print(verdict(by_time, f"In {seconds:g} s each"), end="")
    print(verdict(by_steps, f"In {steps:,} steps each"), end="")
    for runs in by_time.values():
        sample = write(runs[0].model, text, arguments.seed)
        print(f"\n--- {runs[0].contender.label} writes:\n{sample}")
    panels = {"equal time": by_time, "equal number of steps": by_steps}
    plot(panels, arguments.out, title=figure_title(size), target=None)
    print()


def run_reach(tasks: Sequence[Task], size: tuple[int, int], arguments: argparse.Namespace) -> None:
    """Searches the steps that the others need for the baseline's loss."""
    names = [BASELINE, *(name for name in arguments.optimizers if name != BASELINE)]
    rates = {name: tuned_rate(name, *size) for name in names}
    reached = reach(tasks, rates, arguments.reach)
    print_reached(reached)
    write_results(
        arguments.json,
        f"train_char_lm.reach.width {size[0]}",
        {
            CONTENDERS[name].label: {
                "steps": found.runs[0].steps,
                "validation loss": mean(run.final for run in found.runs),
            }
            for name, found in reached.items()
            if found.share is not None
        },
    )
    results = {name: found.runs for name, found in reached.items()}
    target = mean(run.final for run in reached[BASELINE].runs)
    label = CONTENDERS[BASELINE].label
    panels = {f"until {label}'s final loss": results, "the same runs": results}
    plot(panels, arguments.out, title=figure_title(size), target=target)


def figure_title(size: tuple[int, int]) -> str:
    """The title of the plot."""
    return f"Python's help topics: transformer of width {size[0]}, layers: {size[1]}"


def widths(text: str) -> list[int]:
    """Parses one or more widths, each a multiple of the number of heads."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a list of integers") from None
    for value in values:
        if value <= 0 or value % HEADS:
            raise argparse.ArgumentTypeError(f"{value} is not a positive multiple of {HEADS}")
    return values


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(
        description="Train a small language model with several optimizers, the same time each."
    )
    add = parser.add_argument
    add("--seconds", type=positive(float), default=15.0, help="for each run; default: 15")
    add("--seeds", type=positive(int), default=3, help="runs of each optimizer; default: 3")
    add("--characters", type=positive(int), help="number of characters of the text; default: all")
    add("--width", type=widths, default=[64], help="features of a character; default: 64")
    add("--layers", type=positive(int), default=2, help="blocks of the transformer; default: 2")
    steps: dict[str, Any] = {"type": positive(int), "nargs": "?", "const": STEPS}
    steps["metavar"] = "STEPS"
    add(
        "--reach",
        **steps,
        help=f"only search the steps that the others need for the loss of {BASELINE} after STEPS "
        f"steps; default: {STEPS:,}",
    )
    add(
        "--tune",
        **steps,
        help="only search the learning rates, for one or several widths, with STEPS steps each; "
        f"default: {STEPS:,}",
    )
    add_common_arguments(parser, contenders=CONTENDERS, chosen=CHOSEN, out="train_char_lm.png")
    add_json_argument(parser)
    arguments = parser.parse_args()
    if len(arguments.width) > 1 and not arguments.tune:
        parser.error("several widths need --tune")
    if arguments.reach and arguments.optimizers == [BASELINE]:
        parser.error(f"--reach needs another optimizer than {BASELINE}")
    return arguments


if __name__ == "__main__":
    main()
