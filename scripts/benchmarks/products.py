"""Hessian products from a captured evaluation, in gradients and beside curvlinops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .harness import Timing, alternate, load_ours, load_peer, progress, ratio
from .networks import Case, autoencoder, cnn, mlp, tanh_net
from .registry import Options, command
from .report import Report, Table, seconds

COLUMNS = ("ours", "double backward", "curvlinops")


def _gradient(case: Case) -> None:
    for p in case.params:
        p.grad = None
    case.value().backward()


def _closure(case: Case) -> Tensor:
    for p in case.params:
        p.grad = None
    loss = case.value()
    loss.backward()
    return loss


def _double_backward(case: Case, vector: Tensor) -> Callable[[], Tensor]:
    """The textbook product on a retained graph, written by hand."""
    params = case.params
    gradients = torch.autograd.grad(case.value(), params, create_graph=True)
    pieces = vector.split([p.numel() for p in params])
    parts = [piece.view_as(p) for piece, p in zip(pieces, params, strict=True)]

    def product() -> Tensor:
        made = torch.autograd.grad(gradients, params, parts, retain_graph=True)
        return torch.cat([piece.reshape(-1) for piece in made])

    return product


def _ours(case: Case, vector: Tensor) -> Callable[[], Tensor] | None:
    objective_class = load_ours("torch_secondorder.objective", "ClosureObjective")
    hessian_class = load_ours("torch_secondorder.curvature", "Hessian")
    if objective_class is None or hessian_class is None:
        return None
    objective = objective_class(partial(_closure, case), case.params)
    hessian = hessian_class(objective.evaluate(curvature=True))
    return partial(hessian.matvec, vector)


def _curvlinops(case: Case, vector: Tensor) -> Callable[[], Tensor] | None:
    peer = load_peer("curvlinops", "curvlinops-for-pytorch")
    if peer is None:
        return None
    data = [(case.inputs, case.targets)]
    operator = peer.HessianLinearOperator(
        case.model, case.loss, case.params, data, check_deterministic=False
    )
    return partial(operator.__matmul__, vector)


def candidates(case: Case) -> dict[str, Callable[[], object]]:
    """A gradient, and the products that are installed; all products are checked to agree."""
    generator = torch.Generator().manual_seed(1)
    size = sum(p.numel() for p in case.params)
    vector = torch.randn(size, generator=generator).to(case.inputs.device)
    reference = _double_backward(case, vector)
    products = {
        "ours": _ours(case, vector),
        "double backward": reference,
        "curvlinops": _curvlinops(case, vector),
    }
    calls: dict[str, Callable[[], object]] = {"gradient": partial(_gradient, case)}
    expected = reference()
    for name, call in products.items():
        if call is None:
            continue
        error = ((call() - expected).norm() / expected.norm()).item()
        if not error < 1e-3:
            raise AssertionError(f"{name} on {case.name}: relative error {error:.1e}")
        calls[name] = call
    return calls


def _relative(timings: dict[str, Timing], name: str, base: str) -> Any:
    ours, theirs = timings.get(name), timings.get(base)
    return ratio(ours, theirs) if ours and theirs else None


@command("products", "Hessian products in gradients, and beside curvlinops")
def run(options: Options, report: Report) -> None:
    """Measures each network."""
    header = ["network", "gradient", *(f"{name} / gradient" for name in COLUMNS)]
    table = Table("Hessian product", [*header, "ours / curvlinops"])
    makers = [mlp, cnn, autoencoder, tanh_net]
    for make in progress(makers[:2] if options.quick else makers, "products"):
        case = make(options.device)
        timings = alternate(candidates(case), 2 * options.repeat, options.device, min_seconds=0.1)
        ratios = {f"{name}/gradient": _relative(timings, name, "gradient") for name in COLUMNS}
        ratios["ours/curvlinops"] = _relative(timings, "ours", "curvlinops")
        cells = [found or "-" for found in ratios.values()]
        table.add(case.name, seconds(timings["gradient"].median), *cells)
        result: dict[str, Any] = {name: timing.as_dict() for name, timing in timings.items()}
        result |= {name: found.as_dict() if found else None for name, found in ratios.items()}
        report.record(f"products.{case.name}", result)
    report.show(table)
