"""Time and memory of an iteration by the number of parameters, from Newton's method to Adam."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .harness import Timing, alternate, load_ours, progress
from .registry import Options, command
from .report import Report, Table, seconds

SIZES = (300, 1_000, 3_000, 100_000)
# Beyond these a matrix of all parameters is neither kept nor factorized here.
DENSE = 3_000
GRADIENT = "loss and gradient"


@dataclass(frozen=True)
class Contender:
    """A method, and what one call of `step` does.

    Attributes:
        make: Makes the optimizer of a list of parameters.
        iterations: Iterations in one call of `step`.
        largest: The largest number of parameters for it.
    """

    make: Callable[[list[Tensor]], Any]
    iterations: int = 1
    largest: int = SIZES[-1]


def contenders() -> dict[str, Contender]:
    """All methods, by name."""
    found = {"Adam": Contender(lambda params: torch.optim.Adam(params, lr=1e-3))}
    several: dict[str, tuple[dict[str, Any], int, int]] = {
        "Newton": ({"max_iter": 1}, 1, DENSE),
        "BFGS": ({"max_iter": 10}, 10, DENSE),
        "NewtonCG": ({"curvature": "hessian"}, 1, SIZES[-1]),
        "LBFGS": ({"max_iter": 10}, 10, SIZES[-1]),
        "NonlinearCG": ({"max_iter": 10}, 10, SIZES[-1]),
        "AdaHessian": ({"lr": 1e-3}, 1, SIZES[-1]),
    }
    for name, (arguments, iterations, largest) in several.items():
        made = load_ours("torch_secondorder", name)
        if made is not None:
            found[name] = Contender(
                lambda params, made=made, given=arguments: made(params, **given),
                iterations,
                largest,
            )
    return {name: found[name] for name in (*several, "Adam") if name in found}


def chain(x: Tensor) -> Tensor:
    """Rosenbrock's function, chained: each unknown is coupled with the next."""
    return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()


class Run:
    """One method on one chain, a step at each call.

    Args:
        contender: The method; None for loss and gradient alone.
        size: Number of unknowns.
        device: Where they are.
    """

    def __init__(self, contender: Contender | None, size: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        start = 2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1
        self.start = start.to(device)
        self.x = self.start.clone().requires_grad_()
        self.contender = contender
        self._begin()

    def _begin(self) -> None:
        with torch.no_grad():
            self.x.copy_(self.start)
        self.optimizer = None if self.contender is None else self.contender.make([self.x])

    def _closure(self) -> Tensor:
        self.x.grad = None
        loss = chain(self.x)
        loss.backward()
        return loss

    def __call__(self) -> None:
        """One call of `step`; begins anew if the last one has come to an end."""
        if self.optimizer is None:
            self._closure()
            return
        self.optimizer.step(self._closure)
        done = getattr(getattr(self.optimizer, "info", None), "iterations", 1)
        if self.contender is not None and done < self.contender.iterations:
            self._begin()


def peak_memory(contender: Contender, size: int) -> int | None:
    """Bytes by which the process grows at most; None where Linux does not say.

    Over one step, or over 30 iterations of a method that keeps a history.
    """
    marks = Path("/proc/self/clear_refs")
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        marks.write_text("5")  # resets the mark of the highest
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    run = Run(contender, size, torch.device("cpu"))
    for _ in range(3 if contender.iterations > 1 else 1):
        run()
    return max(_status("VmHWM") - before, 0)


def measured(
    makers: dict[str, Contender], size: int, options: Options
) -> dict[str, tuple[Timing, int | None]]:
    """Time of an iteration, and memory at its peak, of all methods with one number of unknowns."""
    on_host = options.device.type == "cpu"
    memory = {name: peak_memory(c, size) if on_host else None for name, c in makers.items()}
    calls: dict[str, Callable[[], object]] = {
        name: Run(contender, size, options.device) for name, contender in makers.items()
    }
    calls[GRADIENT] = Run(None, size, options.device)
    # With matrices, an iteration takes seconds.
    rounds = options.repeat if size < DENSE else min(options.repeat, 3)
    timings = alternate(calls, rounds, options.device)
    found = {}
    for name, timing in timings.items():
        count = makers[name].iterations if name in makers else 1
        each = Timing(tuple(sample / count for sample in timing.samples))
        found[name] = each, memory.get(name)
    return found


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


@command("iteration_costs", "time and memory of an iteration by the number of parameters")
def run(options: Options, report: Report) -> None:
    """Measures each method with each number of parameters."""
    sizes = SIZES[:1] if options.quick else SIZES
    makers = options.chosen(contenders())
    table = Table(
        "An iteration on a chain of coupled unknowns in float64: time, and memory at its peak",
        ["method", *(f"{size:,}" for size in sizes)],
    )
    for contender in makers.values():
        Run(contender, 20, options.device)()  # loads what is loaded at the first use
    cells: dict[str, list[str]] = {name: [] for name in (*makers, GRADIENT)}
    for size in progress(sizes, "iteration costs"):
        fit = {name: c for name, c in makers.items() if size <= c.largest}
        for name, (timing, held) in measured(fit, size, options).items():
            result: dict[str, Any] = {"time": timing.as_dict()}
            text = seconds(timing.median)
            if held is not None:
                result["bytes"] = held
                text += f", {held / 2**20:.1f} MiB"
            report.record(f"iteration_costs.{name}.{size}", result)
            cells[name].append(text)
    for name, row in cells.items():
        table.add(name, *row, *["-"] * (len(sizes) - len(row)))
    report.show(table)
