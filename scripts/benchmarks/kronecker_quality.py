"""Validation loss of the transformer after equally many steps, at the best of a few rates."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from .harness import progress
from .kronecker_contenders import contenders
from .race import load_example
from .registry import Options
from .report import Report, Table, seconds

WIDTH, LAYERS, STEPS = 64, 2, 300
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
# Step sizes in another unit than a learning rate of Adam.
OTHER_RATES = {"pytorch_optimizer Shampoo": 30.0, "KFAC (ours)": 30.0}


def run(options: Options, report: Report) -> None:
    """Trains with each optimizer and rate along the schedule of the example."""
    language, scheduled, training = map(load_example, ("_char_lm", "_scheduled", "_training"))
    if language is None or scheduled is None or training is None:
        return
    text = language.load_text(options.device, 5000 if options.quick else None)
    torch.manual_seed(0)
    width, steps, rates = (8, 4, RATES[2:4]) if options.quick else (WIDTH, STEPS, RATES)
    model = language.Transformer(len(text.characters), width, LAYERS).to(options.device)
    task = language.make_task(text, model, 0)
    table = Table(
        f"Transformer {LAYERS} x {width}: validation loss after {steps} steps, no weight decay",
        ["optimizer", *(f"{rate:g}" for rate in rates), "best", "step"],
    )
    makers = contenders(options)
    pairs = [(name, rate) for name in makers for rate in rates]
    found: dict[str, dict[float, Any]] = {name: {} for name in makers}
    for name, rate in progress(pairs, "kronecker quality"):
        scaled = rate * OTHER_RATES.get(name, 1.0)
        make = partial(makers[name], lr=scaled, weight_decay=0.0)
        chosen = training.Contender(name, make, language.BATCH)
        # Some optimizers decompose statistics that are not finite, once they have diverged.
        with suppress(torch.linalg.LinAlgError):
            found[name][rate] = scheduled.train(
                task, chosen, scaled, steps=steps, measurements=2, silent=True
            )
    for name, runs in found.items():
        losses = [runs[rate].final if rate in runs else math.inf for rate in rates]
        ended = sum(run.steps for run in runs.values())
        cost = sum(run.seconds for run in runs.values()) / ended if ended else math.nan
        scale = OTHER_RATES.get(name)
        label = name if scale is None else f"{name}, rates x {scale:g}"
        table.add(label, *(cell(x) for x in losses), cell(min(losses)), seconds(cost))
        by_rate = {f"{rate:g}": loss for rate, loss in zip(rates, losses, strict=True)}
        report.record(f"kronecker.quality.{name}", {"losses": by_rate, "best": min(losses)})
    report.show(table)


def cell(loss: float) -> str:
    """A loss in the table; a dash for a run that diverged."""
    return f"{loss:.3f}" if math.isfinite(loss) else "-"
