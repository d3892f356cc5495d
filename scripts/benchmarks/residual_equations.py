"""Timed training of the examples with physics-informed networks, by the seconds to errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from .harness import say
from .race import Run, load_example, race, show
from .registry import Options
from .report import Report


@dataclass(frozen=True)
class Equation:
    """An equation of the examples, and how to compare optimizers on it.

    Attributes:
        example: Name of the example.
        title: The equation, for tables.
        widths: Widths of the hidden layers; an integer where the network has one.
        small: The same for a quick run.
        contenders: Names of the optimizers, in the table of the example.
        targets: Relative L2 errors, whose times are shown.
        seconds: Time for each optimizer on a CPU.
    """

    example: str
    title: str
    widths: Any
    small: Any
    contenders: tuple[str, ...]
    targets: tuple[float, ...]
    seconds: float


_OURS = ("levenberg-marquardt", "levenberg-marquardt-identity")
EQUATIONS = {
    "poisson": Equation(
        "pinn_poisson",
        "Poisson's equation, 2-64-1",
        widths=64,
        small=8,
        contenders=(*_OURS, "ssbroyden", "lbfgs", "newton-cg", "torch-lbfgs", "adam"),
        targets=(1e-2, 1e-4, 1e-6, 1e-7),
        seconds=60.0,
    ),
    "burgers": Equation(
        "pinn_burgers",
        "Burgers' equation, 2-20-20-20-1",
        widths=[20, 20, 20],
        small=[5, 5],
        contenders=(*_OURS, "ssbroyden", "lbfgs", "newton-cg", "torch-lbfgs", "adam"),
        targets=(1e-2, 1e-3, 1e-4),
        seconds=60.0,
    ),
    "convection": Equation(
        "pinn_convection",
        "Convection with speed 30, 2-50-50-50-1",
        widths=[50, 50, 50],
        small=[5, 5],
        contenders=(*_OURS, "lbfgs-ssbroyden", "torch-lbfgs", "adam"),
        targets=(0.5, 1e-1, 1e-2, 1e-3),
        seconds=300.0,
    ),
}


def run_equation(name: str, options: Options, report: Report) -> None:
    """Trains the network of one equation with each optimizer in turn."""
    equation = EQUATIONS[name]
    example = load_example(equation.example)
    if example is None:
        return
    task = make_task(example, equation, options)
    table = {entry.label: entry for entry in map(example.CONTENDERS.get, equation.contenders)}
    say(f"threads: {torch.get_num_threads()}")
    runs = race(task, options.chosen(table), options, equation.title, 600, seconds=equation.seconds)

    def reached(target: float, run: Run) -> float:
        return run.reached(target)

    results: dict[str, Callable[[Run], float]] = {
        f"seconds to {target:g}": partial(reached, target) for target in equation.targets
    }
    results["final relative L2"] = lambda run: run.score
    show(runs, f"{equation.title} tanh, float64", results, f"residuals.{name}", report)


def make_task(example: ModuleType, equation: Equation, options: Options) -> Any:
    """The training problem of an example."""
    problem = example.make_problem(options.device)
    widths = equation.small if options.quick else equation.widths
    return example.make_task(problem, example.make_network(widths, 0).to(options.device))


run_poisson = partial(run_equation, "poisson")
run_burgers = partial(run_equation, "burgers")
run_convection = partial(run_equation, "convection")
