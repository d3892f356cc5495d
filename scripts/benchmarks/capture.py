"""Cost of an evaluation through the captured closure, relative to the bare closure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .harness import alternate, load_ours, progress, ratio
from .networks import Case, cnn, deep_mlp, mlp
from .registry import Options, command
from .report import Report, Table, seconds


def _closure(case: Case) -> Callable[[], Tensor]:
    params = case.params

    def closure() -> Tensor:
        # As an optimizer's zero_grad().
        for p in params:
            p.grad = None
        loss = case.value()
        loss.backward()
        return loss

    return closure


def _bare_curvature(case: Case) -> tuple[Tensor, ...]:
    """The minimal work of a curvature evaluation: a differentiable gradient."""
    for p in case.params:
        p.grad = None
    return torch.autograd.grad(case.value(), case.params, create_graph=True)


def candidates(case: Case, objective_class: Any | None) -> dict[str, Callable[[], object]]:
    """The bare closure and ours, with and without curvature."""
    closure = _closure(case)
    calls: dict[str, Callable[[], object]] = {
        "bare": closure,
        "bare curvature": partial(_bare_curvature, case),
    }
    if objective_class is not None:
        objective = objective_class(closure, case.params)
        calls["ours"] = partial(objective.evaluate, curvature=False)
        calls["ours curvature"] = partial(objective.evaluate, curvature=True)
    return calls


@command("capture", "evaluations through the captured closure, compared with the bare closure")
def run(options: Options, report: Report) -> None:
    """Measures each network."""
    objective_class = load_ours("torch_secondorder._objective.closure", "ClosureObjective")
    makers: list[Callable[[torch.device], Case]] = [
        deep_mlp,
        partial(deep_mlp, activation=nn.Tanh),
        mlp,
        cnn,
    ]
    header = ["network", "bare", "ours", "ratio", "bare curvature", "ours curvature", "ratio"]
    table = Table("Evaluation through ClosureObjective, compared with the bare closure", header)
    for make in progress(makers[:1] if options.quick else makers, "capture"):
        case = make(options.device)
        calls = candidates(case, objective_class)
        # The differences are a few percent, so more rounds are needed.
        timings = alternate(calls, 4 * options.repeat, options.device, min_seconds=0.05)
        cells: list[object] = []
        result: dict[str, Any] = {name: timing.as_dict() for name, timing in timings.items()}
        for kind in ("", " curvature"):
            bare, ours = timings["bare" + kind], timings.get("ours" + kind)
            compared = ratio(ours, bare) if ours else None
            cells += [seconds(bare.median), seconds(ours.median) if ours else "-", compared or "-"]
            result[f"ratio{kind}"] = compared.as_dict() if compared else None
        table.add(case.name, *cells)
        report.record(f"capture.{case.name}", result)
    report.show(table)
