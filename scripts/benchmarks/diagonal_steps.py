"""Cost of a step, compared with other implementations, Adam, and bare products."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .harness import alternate, load_ours, load_peer, progress, ratio
from .networks import Case, cnn, deep_mlp, mlp
from .registry import Options
from .report import Report, Table, seconds

RATE = 1e-7  # so small that the networks hardly change
PERIOD = 10
Calls = dict[str, Callable[[], object]]


def bare(case: Case) -> Callable[[], object]:
    """The minimal work: a gradient with its graph, and one product with the Hessian."""
    params = case.params
    direction = [torch.ones_like(p) for p in params]

    def call() -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(case.value(), params, create_graph=True)
        return torch.autograd.grad(gradients, params, direction)

    return call


def stepping(case: Case, make: Callable[..., Any], steps: int = 1) -> Callable[[], None]:
    """Steps of an optimizer with the standard closure, on a copy of the network."""
    model = copy.deepcopy(case.model)
    optimizer = make(model.parameters(), lr=RATE)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = case.loss(model(case.inputs), case.targets)
        loss.backward()
        return loss

    def call() -> None:
        for _ in range(steps):
            optimizer.step(closure)

    return call


def peer_stepping(case: Case, make: Callable[..., Any]) -> Callable[[], None]:
    """Steps of an implementation that needs `create_graph=True`."""
    model = copy.deepcopy(case.model)
    optimizer = make(model.parameters(), lr=RATE)

    def closure() -> Tensor:
        loss: Tensor = case.loss(model(case.inputs), case.targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using backward")
            loss.backward(create_graph=True)
        return loss

    def call() -> None:
        optimizer.step(closure)
        optimizer.zero_grad()  # frees the graph

    return call


def candidates(case: Case) -> Calls:
    """All installed optimizers."""
    # The fastest of torch's: one kernel on a GPU.
    fused = case.params[0].is_cuda
    adam = (
        partial(torch.optim.Adam, fused=True) if fused else partial(torch.optim.Adam, foreach=True)
    )
    calls: Calls = {"bare": bare(case), "Adam": stepping(case, adam)}
    for name, module, kind in (
        ("pytorch_optimizer", "pytorch_optimizer", "AdaHessian"),
        ("torch_optimizer", "torch_optimizer", "Adahessian"),
    ):
        peer = load_peer(module)
        if peer is not None:
            calls[name] = peer_stepping(case, getattr(peer, kind))
    adahessian = load_ours("torch_secondorder", "AdaHessian")
    sophia = load_ours("torch_secondorder", "Sophia")
    if adahessian is not None:
        seldom = partial(adahessian, update_period=PERIOD)
        calls["AdaHessian"] = stepping(case, adahessian)
        calls["AdaHessian/10"] = stepping(case, seldom, PERIOD)
    if sophia is not None:
        calls["Sophia-G/10"] = stepping(case, partial(sophia, estimator="gnb"), PERIOD)
    return calls


def run(options: Options, report: Report) -> None:
    """Measures each network; with an update period, the mean over one period."""
    makers: list[Callable[[torch.device], Case]] = [partial(mlp, batch=128), cnn, deep_mlp]
    kinds: Iterable[Any] = makers[-1:] if options.quick else makers
    columns = ["bare", "Adam", "pytorch_optimizer", "torch_optimizer", "AdaHessian"]
    table = Table(
        "A step with batch size 128; bare: a gradient with graph and a product",
        ["network", *columns, "over bare", "over p_o", "over t_o"],
    )
    seldom = Table(
        f"Mean time of {PERIOD} steps, with an estimate in the first",
        ["network", "Adam", "AdaHessian/10", "ratio", "Sophia-G/10", "ratio"],
    )
    for make in progress(list(kinds), "diagonal steps"):
        case = make(options.device)
        timings = alternate(candidates(case), 4 * options.repeat, options.device, 0.1)
        per_step = {name: t.median / (PERIOD if "/" in name else 1) for name, t in timings.items()}
        cells = [seconds(per_step[c]) if c in per_step else "-" for c in columns]
        ratios = {
            base: str(ratio(timings["AdaHessian"], timings[base])).split(" ")[0]
            for base in ("bare", "pytorch_optimizer", "torch_optimizer")
            if base in timings
        }
        table.add(case.name, *cells, *(ratios.get(b, "-") for b in ("bare", *columns[2:4])))
        adam = per_step["Adam"]
        row = [per_step["AdaHessian/10"], per_step["Sophia-G/10"]]
        seldom.add(
            case.name,
            seconds(adam),
            *(cell for value in row for cell in (seconds(value), f"{value / adam:.2f}")),
        )
        recorded: dict[str, Any] = {n: t.as_dict() for n, t in timings.items()}
        over = {f"AdaHessian / {base}": float(value) for base, value in ratios.items()}
        over |= {f"{n} / Adam": value / adam for n, value in per_step.items() if "/" in n}
        extra = {"time per step": per_step, "ratios": over}
        report.record(f"diagonal.steps.{case.name}", {**recorded, **extra})
    report.show(table)
    report.show(seldom)
