"""Gain from compiling a pure function on a PINN, and the time of the compiler."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from torch_secondorder import FunctionalObjective
from torch_secondorder._objective.base import Evaluation
from torch_secondorder.curvature import GaussNewton, Hessian, LinearOperator

from .harness import alternate, ratio, say
from .race import load_example
from .registry import Options, command
from .report import Report, Table, seconds

WIDTH = 64
KINDS: dict[str, Callable[[Evaluation], LinearOperator]] = {
    "Hessian product": Hessian,
    "Gauss-Newton product": GaussNewton,
}


def candidates(
    objective: FunctionalObjective, kinds: Sequence[str]
) -> dict[str, Callable[[], Tensor]]:
    """Loss and gradient, and one product of each kind after earlier ones at the same point."""
    evaluation = objective.evaluate(curvature=True)
    v = torch.ones_like(evaluation.grad)
    calls: dict[str, Callable[[], Tensor]] = {
        "loss and gradient": lambda: objective.evaluate().grad
    }
    return calls | {kind: partial(KINDS[kind](evaluation).matvec, v) for kind in kinds}


@command("compile", "a pure function and its products, compiled and not compiled")
def run(options: Options, report: Report) -> None:
    """Measures the network of `examples/pinn_poisson.py`."""
    example = load_example("pinn_poisson")
    if example is None:
        return
    problem = example.make_problem(options.device)
    net = example.make_network(WIDTH, 0).to(options.device)

    def loss(p: dict[str, Tensor]) -> Tensor:
        value: Tensor = example.residual_loss(partial(functional_call, net, p), problem)
        return value

    params = dict(net.named_parameters())
    how: Any = {"backend": "aot_eager"} if options.quick else True
    kinds = list(KINDS)[-1:] if options.quick else list(KINDS)
    eager = candidates(FunctionalObjective(loss, params), kinds)
    objective = FunctionalObjective(loss, params, compile=how)
    compiled: dict[str, Callable[[], Tensor]] = {}
    header = ["", "eager", "compiled", "ratio", "difference", "first call"]
    table = Table(f"Poisson's equation, 2-{WIDTH}-1 tanh, float64: torch.compile", header)
    for name, plain in eager.items():
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the compiler
            try:
                compiled = compiled or candidates(objective, kinds)
            except RuntimeError as error:
                if "cannot be compiled" not in str(error):
                    raise
                say(f"skipped: torch {torch.__version__} cannot compile gradients by the inputs")
                return
            value = compiled[name]()
        first = time.perf_counter() - start
        difference = ((value - plain()).norm() / plain().norm()).item()
        calls = {"eager": plain, "compiled": compiled[name]}
        timings = alternate(calls, 2 * options.repeat, options.device)
        compared = ratio(timings["compiled"], timings["eager"])
        cells = [seconds(timings[key].median) for key in calls]
        table.add(name, *cells, compared, f"{difference:.0e}", seconds(first))
        report.record(
            f"compile.{name}",
            {key: timing.as_dict() for key, timing in timings.items()}
            | {"ratio": compared.as_dict(), "difference": difference, "first call": first},
        )
    report.show(table)
