"""Trains a small transformer on the characters of an English text, with Sophia and with AdamW.

The text is the help on Python's keywords and topics, mostly the language reference: about 370,000
characters that come with every CPython, as `pydoc_data.topics`. Repeated sections are used once.
The last tenth is held out for validation.

All optimizers start from the same network, with the same weight decay and the same schedule: the
learning rate rises over the first twentieth of a run and then falls along a cosine. They first get
the same number of seconds, then the same number of steps, as many as the slowest one made. The loss
is in nats per character.

    python examples/train_char_lm.py
    python examples/train_char_lm.py --optimizers adamw,sophia-gnb --seconds 120
    python examples/train_char_lm.py --tune    # searches the learning rates again
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import torch_secondorder
from _command_line import add_common_arguments, positive
from _report import format_table, line_style, pyplot, style_axes
from _training import (
    Contender,
    Loss,
    Run,
    Task,
    batches,
    clock,
    measure,
    progress_bar,
    take_step,
    warm_up,
)

CONTEXT, BATCH, LAYERS, HEADS = 64, 32, 2, 4
SPREAD = 0.3  # initial standard deviation of the embeddings
WEIGHT_DECAY = 0.1
RISE, FLOOR = 0.05, 0.05  # part of a run with rising rate; final rate, relative to its peak
MEASUREMENTS = 15  # evenly spaced along a run
SAMPLE, TEMPERATURE = 160, 0.8

# `--tune` tries all of GRID with each optimizer, with another seed than the comparison's default;
# RATES has the results. GAP is the difference between seeds at the same setting.
GRID = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
RATES = {"adamw": 1.6e-2, "sophia-gnb": 2e-3, "sophia-hutchinson": 2e-3}
TUNING_SEED, TUNING_STEPS = 1, 800
GAP = 0.02


def contender(label: str, make: Any) -> Contender:
    """A row of `CONTENDERS`: weight decay applies to matrices, not to biases and gains."""

    def make_grouped(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        matrices, vectors = [], []
        for p in params:
            (matrices if p.dim() > 1 else vectors).append(p)
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return make(groups, weight_decay=WEIGHT_DECAY)

    return Contender(label, make_grouped, BATCH)


# To compare another optimizer, add a row, and its learning rate to RATES.
CONTENDERS = {
    "adamw": contender("AdamW", partial(torch.optim.AdamW, betas=(0.9, 0.95))),
    "sophia-gnb": contender(
        "Sophia gnb (ours)", partial(torch_secondorder.Sophia, estimator="gnb")
    ),
    "sophia-hutchinson": contender(
        "Sophia hutchinson (ours)", partial(torch_secondorder.Sophia, estimator="hutchinson")
    ),
}


@dataclass(frozen=True)
class Text:
    """A text as numbers, one for each character.

    Attributes:
        characters: The characters by number.
        training: The first nine tenths, int64.
        validation: The last tenth, int64.
    """

    characters: str
    training: Tensor
    validation: Tensor


def load_text(device: torch.device, length: int | None = None) -> Text:
    """Reads Python's help topics, or their first `length` characters."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs))[:length]
    characters = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(characters)}
    numbers = torch.tensor([number[character] for character in text], device=device)
    training = len(text) * 9 // 10
    return Text(characters, numbers[:training], numbers[training:])


def linear(inputs: int, outputs: int, *, shortcut: bool = False) -> nn.Linear:
    """A linear layer; layers that add to a shortcut start smaller, as in GPT-2."""
    layer = nn.Linear(inputs, outputs)
    variance = 1 / inputs / (2 * LAYERS if shortcut else 1)
    nn.init.normal_(layer.weight, std=variance**0.5)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """Causal self-attention and two linear layers, each with a norm and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inward, self.outward = linear(width, 3 * width), linear(width, width, shortcut=True)
        self.layers = nn.Sequential(
            linear(width, 4 * width), nn.GELU(), linear(4 * width, width, shortcut=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps activations of shape `(batch, length, width)` to the same shape."""
        heads = self.inward(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.outward(attended.transpose(1, 2).flatten(2))
        return x + self.layers(self.norm(x))


class Transformer(nn.Module):
    """A model of the next character, given up to `CONTEXT` characters before it."""

    def __init__(self, characters: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.empty(CONTEXT, width))
        for p in (self.embedding.weight, self.position):
            nn.init.normal_(p, std=SPREAD)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(width), linear(width, characters))

    def forward(self, x: Tensor) -> Tensor:
        """Maps characters, shape `(batch, length)`, to logits `(batch, length, characters)`."""
        return self.head(self.blocks(self.embedding(x) + self.position[: x.shape[1]]))


def cross_entropy(model: nn.Module, windows: Tensor) -> Tensor:
    """Nats per character, in windows of `CONTEXT + 1` characters."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def make_task(text: Text, model: nn.Module, seed: int) -> Task:
    """The training problem: its losses, and measurements on the whole held-out text."""
    anywhere = text.training.unfold(0, CONTEXT + 1, 1)
    held_out = text.validation.unfold(0, CONTEXT + 1, CONTEXT)
    seen = anywhere[:: 4 * len(anywhere) // len(held_out)]

    def losses(batch_size: int | None) -> Iterator[Loss]:
        for (windows,) in batches((anywhere,), batch_size, seed):
            yield lambda model, windows=windows: cross_entropy(model, windows)

    def judge(model: nn.Module) -> tuple[float, float]:
        return cross_entropy(model, seen).item(), cross_entropy(model, held_out).item()

    def describe(training: float, validation: float) -> str:
        return f"training {training:.3f}, validation {validation:.3f}"

    return Task(model, losses, judge, describe)


@dataclass
class Scheduled(Run):
    """A run with a learning-rate schedule.

    Attributes:
        rate: The peak learning rate.
        unclipped: Shares of the entries that were not clipped, if the optimizer reports them.
    """

    rate: float = 0.0
    unclipped: list[float] = field(default_factory=list)


def schedule(used: float) -> float:
    """The learning rate relative to its peak, when a part of the run is over.

    >>> [round(schedule(used), 3) for used in (0.0, 0.025, 0.05, 0.525, 1.0)]
    [0.0, 0.5, 1.0, 0.525, 0.05]
    """
    if used < RISE:
        return used / RISE
    cosine = (1 + math.cos(math.pi * min(1.0, (used - RISE) / (1 - RISE)))) / 2
    return FLOOR + (1 - FLOOR) * cosine


def train(
    task: Task, name: str, rate: float, *, seconds: float, steps: int | None = None
) -> Scheduled:
    """Trains along the schedule, for a number of seconds, or of steps if given.

    With steps, `seconds` is their estimated time, for the progress bar.
    """
    chosen = CONTENDERS[name]
    warm_up(task, chosen)
    run = Scheduled(chosen, copy.deepcopy(task.model), rate=rate)
    optimizer = chosen.make(run.model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = rate

    def used() -> float:
        return run.evaluations / steps if steps else run.seconds / seconds

    scheduler = LambdaLR(optimizer, lambda _: schedule(used()))
    losses = task.losses(chosen.batch_size)
    device = next(run.model.parameters()).device
    with progress_bar(CONTENDERS, chosen.label, seconds) as bar:
        measure(task, run, bar)
        while used() < 1:
            loss_of = next(losses)
            start, before = clock(device), used()
            run.evaluations += take_step(run.model, optimizer, loss_of)
            run.seconds += clock(device) - start
            scheduler.step()
            if int(before * MEASUREMENTS) < int(used() * MEASUREMENTS):
                measure(task, run, bar)
                share = getattr(getattr(optimizer, "info", None), "unclipped", None)
                run.unclipped += [] if share is None else [share]
    return run


def compare(
    task: Task, names: list[str], seconds: float
) -> tuple[list[Scheduled], list[Scheduled]]:
    """Trains with each optimizer for the same time, then for as many steps as the slowest made."""
    by_time = [train(task, name, RATES[name], seconds=seconds) for name in names]
    steps = min(run.evaluations for run in by_time)
    by_steps = []
    for name, run in zip(names, by_time, strict=True):
        if run.evaluations > steps:
            expected = steps * run.seconds / run.evaluations
            run = train(task, name, run.rate, seconds=expected, steps=steps)
        by_steps.append(run)
    return by_time, by_steps


def print_table(by_time: list[Scheduled], by_steps: list[Scheduled]) -> None:
    """Prints one row for each optimizer."""
    steps = by_steps[0].evaluations
    header = ["optimizer", "lr", "steps", "s/step", "training", "validation", "unclipped"]
    rows = [
        [
            run.contender.label,
            f"{run.rate:g}",
            f"{run.evaluations:,}",
            f"{run.seconds / run.evaluations:.4f}",
            f"{run.curve.loss[-1]:.3f}",
            f"{run.curve.score[-1]:.3f}",
            f"{mean(run.unclipped):.1%}" if run.unclipped else "-",
            f"{same_steps.curve.score[-1]:.3f}",
        ]
        for run, same_steps in zip(by_time, by_steps, strict=True)
    ]
    print(format_table([*header, f"validation, {steps:,} steps"], rows))


def final(run: Run) -> float:
    """The final validation loss; infinite instead of NaN."""
    loss = run.curve.score[-1]
    return math.inf if math.isnan(loss) else loss


def verdict(runs: Sequence[Run], occasion: str) -> str:
    """A sentence about the lowest validation loss and its lead."""
    if len(runs) < 2:
        return ""
    ranked = sorted((final(run), run.contender.label) for run in runs)
    (lowest, first), (next_lowest, second) = ranked[:2]
    lead = next_lowest - lowest
    if lead < GAP:
        return f"{occasion}: {first} and {second} are equal, {lead:.3f} nats per character apart\n"
    return f"{occasion}: {first} wins, {lead:.3f} nats per character below {second}\n"


@torch.no_grad()
def write(model: nn.Module, text: Text, seed: int) -> str:
    """Continues the training text, at a temperature below one."""
    generator = torch.Generator(text.training.device).manual_seed(seed)
    numbers = text.training[-CONTEXT:]
    for _ in range(SAMPLE):
        logits = model(numbers[None, -CONTEXT:])[0, -1]
        drawn = (logits / TEMPERATURE).softmax(dim=0).multinomial(1, generator=generator)
        numbers = torch.cat([numbers, drawn])
    return "".join(text.characters[number] for number in numbers[CONTEXT:])


def plot(by_time: list[Scheduled], by_steps: list[Scheduled], path: Path) -> None:
    """Plots the validation loss against seconds and against steps."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for i, (run, same_steps) in enumerate(zip(by_time, by_steps, strict=True)):
        left.plot(run.curve.seconds, run.curve.score, label=run.contender.label, **line_style(i))
        right.plot(same_steps.curve.evaluations, same_steps.curve.score, **line_style(i))
    style_axes(left, xlabel="seconds", ylabel="validation loss (nats per character)")
    style_axes(right, xlabel="steps")
    left.set(title="equal time")
    right.set(title="equal number of steps")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Python's help topics: a small transformer on characters")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def tune(task: Task, names: list[str], steps: int) -> None:
    """Tries all of GRID, and prints the validation losses."""
    rows = []
    for name in names:
        runs = [train(task, name, rate, seconds=steps * 0.03, steps=steps) for rate in GRID]
        losses = [run.curve.score[-1] for run in runs]
        rows.append([CONTENDERS[name].label, *(f"{loss:.3f}" for loss in losses)])
    print(format_table([f"after {steps:,} steps", *(f"{rate:g}" for rate in GRID)], rows))


def main() -> None:
    """Trains with each optimizer in turn, prints table, winners and samples, and saves the plot."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    seed = TUNING_SEED if arguments.tune else arguments.seed
    text = load_text(arguments.device, arguments.characters)
    if len(text.validation) <= CONTEXT:
        sys.exit(f"error: {arguments.characters} characters are too few to hold out a tenth")
    torch.manual_seed(seed)
    model = Transformer(len(text.characters), HEADS * arguments.width).to(arguments.device)
    print(
        f"Python's help topics: {len(text.training):,} characters for training, "
        f"{len(text.validation):,} held out, {len(text.characters)} distinct ones; "
        f"transformer with {sum(p.numel() for p in model.parameters()):,} parameters",
        flush=True,
    )
    task = make_task(text, model, seed)
    if arguments.tune:
        tune(task, arguments.optimizers, arguments.tune)
        return
    by_time, by_steps = compare(task, arguments.optimizers, arguments.seconds)
    print_table(by_time, by_steps)
    print(verdict(by_time, f"In {arguments.seconds:g} s each"), end="")
    print(verdict(by_steps, f"In {by_steps[0].evaluations:,} steps each"), end="")
    for run in by_time:
        print(f"\n--- {run.contender.label} writes:\n{write(run.model, text, arguments.seed)}")
    plot(by_time, by_steps, arguments.out)
    print(f"\nplot: {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(
        description="Train a small language model with Sophia and with AdamW, the same time each."
    )
    add = parser.add_argument
    add("--seconds", type=positive(float), default=30.0, help="for each optimizer; default: 30")
    add("--characters", type=positive(int), help="number of characters of the text; default: all")
    add("--width", type=positive(int), default=16, help="width of an attention head; default: 16")
    add(
        "--tune",
        type=positive(int),
        nargs="?",
        const=TUNING_STEPS,
        metavar="STEPS",
        help=f"only try the grid of learning rates; default: with {TUNING_STEPS:,} steps each",
    )
    add_common_arguments(parser, contenders=CONTENDERS, chosen=CONTENDERS, out="train_char_lm.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
