"""Growth of memory over thousands of steps, without the garbage collector."""

from __future__ import annotations

import copy
import gc
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .harness import load_ours, progress
from .registry import Options
from .report import Report, Table

STEPS, FIRST = 2000, 200


def network() -> nn.Sequential:
    """A small CNN with normalization."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 3 * 3, 10),
    )


def resident() -> int:
    """Resident memory of the process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watch(make: Any, steps: int) -> tuple[int, int]:
    """Memory after the first steps, and after all steps."""
    torch.manual_seed(0)
    model = copy.deepcopy(network())
    optimizer = make(model.parameters())
    x, y = torch.randn(steps, 32, 1, 16, 16), torch.randint(10, (steps, 32))
    early = 0

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[step]), y[step])
        loss.backward()
        return loss

    gc.collect()
    gc.disable()
    try:
        for step in range(steps):
            optimizer.step(closure)
            if step + 1 == min(FIRST, steps // 2):
                early = resident()
        return early, resident()
    finally:
        gc.enable()


def run(options: Options, report: Report) -> None:
    """Measures AdaHessian and both kinds of Sophia."""
    adahessian = load_ours("torch_secondorder", "AdaHessian")
    sophia = load_ours("torch_secondorder", "Sophia")
    if adahessian is None or sophia is None or not Path("/proc/self/statm").exists():
        return
    makers = {
        "AdaHessian": adahessian,
        "AdaHessian, every 10 steps": partial(adahessian, update_period=10),
        "Sophia-H": sophia,
        "Sophia-G": partial(sophia, estimator="gnb"),
    }
    steps = 100 if options.quick else STEPS
    title = f"Resident memory over {steps} steps of a small CNN, collector off"
    table = Table(title, ["optimizer", "early", "late", "change"])
    for name in progress(list(makers), "diagonal memory"):
        early, late = watch(makers[name], steps)
        change = late / early - 1
        table.add(name, f"{early / 2**20:.1f} MiB", f"{late / 2**20:.1f} MiB", f"{change:+.2%}")
        report.record(f"diagonal.memory.{name}", {"early": early, "late": late})
    report.show(table)
