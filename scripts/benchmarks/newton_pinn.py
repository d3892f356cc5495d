"""Timed training of the physics-informed network of `examples/pinn_poisson.py`."""

from __future__ import annotations

from .race import load_example, race, show
from .registry import Options
from .report import Report

WIDTH = 64
TARGET = 1e-4
# The others are compared on the CPU; a device may be there for some minutes only.
ON_A_DEVICE = ("levenberg-marquardt", "ssbroyden", "torch-lbfgs", "adam")


def run(options: Options, report: Report) -> None:
    """Trains with each optimizer of the example in turn."""
    example = load_example("pinn_poisson")
    if example is None:
        return
    problem = example.make_problem(options.device)
    task = example.make_task(problem, example.make_network(WIDTH, 0).to(options.device))
    names = list(example.CONTENDERS) if options.device.type == "cpu" else ON_A_DEVICE
    contenders = {example.CONTENDERS[name].label: example.CONTENDERS[name] for name in names}
    runs = race(task, contenders, options, "Poisson PINN", measurements=600)
    results = {
        f"seconds to {TARGET:g}": lambda run: run.reached(TARGET),
        "final relative L2": lambda run: run.score,
    }
    title = f"Poisson's equation, 2-{WIDTH}-1 tanh, float64"
    show(runs, title, results, "newton.pinn", report)
