"""Cost of Hessian and Gauss-Newton products, in gradients and compared with curvlinops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .harness import Timing, alternate, load_ours, load_peer, progress, ratio
from .networks import Case, autoencoder, cnn, mlp, tanh_net
from .registry import Options, command
from .report import Report, Table, seconds

Calls = dict[str, Callable[[], object]]
COLUMNS = 8  # of the matrix in a product with a matrix


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


def _vector(case: Case, *columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (sum(p.numel() for p in case.params), *columns)
    like = case.params[0]
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _double_backward(case: Case, vector: Tensor) -> Callable[[], Tensor]:
    """The textbook product with a retained graph, written by hand."""
    params = case.params
    gradients = torch.autograd.grad(case.value(), params, create_graph=True)
    pieces = vector.split([p.numel() for p in params])
    parts = [piece.view_as(p) for piece, p in zip(pieces, params, strict=True)]

    def product() -> Tensor:
        made = torch.autograd.grad(gradients, params, parts, retain_graph=True)
        return torch.cat([piece.reshape(-1) for piece in made])

    return product


def _set_up(case: Case, name: str) -> Callable[[], Any] | None:
    """The work for one of our operators before its first product."""
    objective_class = load_ours("torch_secondorder._objective.closure", "ClosureObjective")
    operator_class = load_ours("torch_secondorder.curvature", name)
    if objective_class is None or operator_class is None:
        return None
    objective = objective_class(partial(_closure, case), case.params)
    return partial(_operator, objective, operator_class)


@torch.no_grad()
def _operator(objective: Any, operator_class: Any) -> Any:
    return operator_class(objective.evaluate(curvature=True))


def _curvlinops(case: Case, name: str) -> Any | None:
    peer = load_peer("curvlinops", "curvlinops-for-pytorch")
    if peer is None:
        return None
    data = [(case.inputs, case.targets)]
    return getattr(peer, name)(case.model, case.loss, case.params, data, check_deterministic=False)


def _agree(case: Case, products: dict[str, Callable[[], Tensor]], base: str, most: float) -> None:
    """Raises unless all products agree with one of them."""
    expected = products[base]()
    for name, call in products.items():
        error = ((call() - expected).norm() / expected.norm()).item()
        if not error < most:
            raise AssertionError(f"{name} on {case.name}: relative error {error:.1e} to {base}")


def hessian_calls(case: Case) -> Calls:
    """A gradient, and all installed Hessian products, which are checked to agree."""
    vector = _vector(case)
    products = {"double backward": _double_backward(case, vector)}
    set_up, theirs = _set_up(case, "Hessian"), _curvlinops(case, "HessianLinearOperator")
    if set_up is not None:
        products["ours"] = partial(set_up().matvec, vector)
    if theirs is not None:
        products["curvlinops"] = partial(theirs.__matmul__, vector)
    _agree(case, products, "double backward", 1e-3)
    return {"gradient": partial(_gradient, case), **products}


def _gauss_newton_products(case: Case) -> dict[str, Callable[[], Tensor]]:
    vector = _vector(case)
    products: dict[str, Callable[[], Tensor]] = {}
    set_up, theirs = _set_up(case, "GaussNewton"), _curvlinops(case, "GGNLinearOperator")
    if set_up is not None:
        products["ours"] = partial(torch.no_grad()(set_up().matvec), vector)
    if theirs is not None:
        products["curvlinops"] = partial(theirs.__matmul__, vector)
    return products


def _in_double(case: Case) -> Case:
    targets = case.targets.double() if case.targets.is_floating_point() else case.targets
    model = copy.deepcopy(case.model).double()
    return Case(case.name, model, case.loss, case.inputs.double(), targets)


def gauss_newton_calls(case: Case) -> Calls:
    """A gradient, Gauss-Newton products, their set-up, and a product with a matrix.

    Products are checked to agree in double precision, so that rounding hides no mistake.
    """
    exact, products = _gauss_newton_products(_in_double(case)), _gauss_newton_products(case)
    if exact:
        _agree(case, exact, next(iter(exact)), 1e-10)
        _agree(case, products, next(iter(products)), 1e-3)
    calls: Calls = {"gradient": partial(_gradient, case), **products}
    set_up = _set_up(case, "GaussNewton")
    if set_up is not None:
        calls["set-up"] = set_up
        calls["matmat"] = partial(torch.no_grad()(set_up().matmat), _vector(case, COLUMNS))
    return calls


def _relative(timings: dict[str, Timing], name: str, base: str, times: int = 1) -> Any:
    """The ratio of one candidate to several calls of another; None if one is missing."""
    ours, theirs = timings.get(name), timings.get(base)
    if ours is None or theirs is None:
        return None
    return ratio(ours, Timing(tuple(times * sample for sample in theirs.samples)))


def _note(report: Report, table: Table, key: str, case: Case, timings: Any, ratios: Any) -> None:
    cells = [found or "-" for found in ratios.values()]
    table.add(case.name, seconds(timings["gradient"].median), *cells)
    result: dict[str, Any] = {name: timing.as_dict() for name, timing in timings.items()}
    result |= {name: found.as_dict() if found else None for name, found in ratios.items()}
    report.record(key, result)


@command("products", "Hessian and Gauss-Newton products, in gradients and compared with curvlinops")
def run(options: Options, report: Report) -> None:
    """Measures each network."""
    kinds = ("ours", "double backward", "curvlinops")
    hessian = Table(
        "Hessian product",
        ["network", "gradient", *(f"{k} / gradient" for k in kinds), "ours / curvlinops"],
    )
    pairs = ("ours / gradient", "curvlinops / gradient", "ours / curvlinops", "set-up / gradient")
    gauss_newton = Table(
        "Gauss-Newton product; set-up: an evaluation with curvature, and making the operator",
        ["network", "gradient", *pairs, f"matmat({COLUMNS}) / {COLUMNS} matvec"],
    )
    makers = [mlp, cnn, autoencoder, tanh_net]
    for make in progress(makers[:2] if options.quick else makers, "products"):
        case = make(options.device)
        rounds = 2 * options.repeat
        timings = alternate(hessian_calls(case), rounds, options.device, min_seconds=0.1)
        ratios = {f"{kind}/gradient": _relative(timings, kind, "gradient") for kind in kinds}
        ratios["ours/curvlinops"] = _relative(timings, "ours", "curvlinops")
        _note(report, hessian, f"products.{case.name}", case, timings, ratios)
        timings = alternate(gauss_newton_calls(case), rounds, options.device, min_seconds=0.1)
        ratios = {
            "ours/gradient": _relative(timings, "ours", "gradient"),
            "curvlinops/gradient": _relative(timings, "curvlinops", "gradient"),
            "ours/curvlinops": _relative(timings, "ours", "curvlinops"),
            "set-up/gradient": _relative(timings, "set-up", "gradient"),
            f"matmat({COLUMNS})/{COLUMNS} matvec": _relative(timings, "matmat", "ours", COLUMNS),
        }
        _note(report, gauss_newton, f"products.gauss_newton.{case.name}", case, timings, ratios)
    report.show(hessian)
    report.show(gauss_newton)
