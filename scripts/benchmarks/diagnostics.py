"""Number of products for the ten largest eigenvalues, and errors of traces."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .harness import load_ours, load_peer, progress
from .networks import chain, images, small_cnn
from .registry import Options, command
from .report import Report, Table, number

COUNT, TOLERANCE = 10, 1e-3


def trained_cnn(samples: int, steps: int) -> tuple[nn.Module, Tensor, Tensor, str]:
    """A network of 20,490 parameters after a few steps of Adam, with its data in one batch."""
    torch.manual_seed(0)
    x, y, name = images(samples)
    x = x.view(-1, 1, 28, 28)
    model = small_cnn()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(steps):
        chosen = torch.randint(len(x), (100,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model, x, y, name


Stop = Callable[[float, float, float], bool]


def power_iteration(A: Any, count: int, stop: Stop, limit: int) -> tuple[list[float], int]:
    """The eigenvalues of largest magnitude, one by one, each orthogonal to the earlier ones.

    Args:
        A: The operator.
        count: Number of eigenvalues.
        stop: The stopping test; takes the value, the one of the iteration before, and the residual.
        limit: The largest number of products for each eigenvalue.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    values, products = [], 0
    for _ in range(count):
        v = torch.randn(A.size, dtype=A.dtype, generator=generator).to(A.device)
        before = math.nan
        for _ in range(limit):
            for _ in range(2):
                for u in found:
                    v = v - (u @ v) * u
            v = v / v.norm()
            product = A @ v
            products += 1
            for u in found:
                product = product - (u @ product) * u
            value = float(v @ product)
            if stop(value, before, float((product - value * v).norm())):
                break
            before, v = value, product
        found.append(v / v.norm())
        values.append(value)
    return values, products


def operator_of(problem: Any) -> Any:
    """The counting operator that diagnostics use, for other methods."""
    point = load_peer("torch_secondorder.diagnostics._point")
    assert point is not None
    with point.opened(problem, False, 0, "") as opened:
        return opened.operator


def for_scipy(operator: Any, linalg: Any) -> Any:
    """The operator as a SciPy one."""

    def multiply(v: Any) -> Any:
        product: Tensor = operator @ torch.from_numpy(v).flatten().to(operator.dtype)
        return product.double().numpy()

    return linalg.LinearOperator((operator.size, operator.size), matvec=multiply, dtype="float64")


def _error(values: list[float], reference: Tensor) -> float:
    """The largest relative error, after sorting both by magnitude."""
    sorted_values = torch.tensor(sorted(values, key=abs, reverse=True), dtype=torch.float64)
    return float(((sorted_values - reference) / reference).abs().max())


def eigenvalues(options: Options, report: Report) -> None:
    """Counts the products for a relative error of a thousandth."""
    diagnostics = load_peer("torch_secondorder.diagnostics")
    if diagnostics is None:
        return
    # The quick version only shows that it runs: with few samples there are few large eigenvalues.
    count, samples, steps, limit = (2, 20, 10, 10) if options.quick else (COUNT, 500, 150, 400)
    model, x, y, data = trained_cnn(samples, steps)
    loss = nn.functional.cross_entropy
    problem = diagnostics.from_model(model, loss, (x, y))
    ours = diagnostics.eigenpairs(problem, count, "magnitude", tolerance=TOLERANCE)
    wide = diagnostics.from_model(model.double(), loss, (x.double(), y))
    reference = diagnostics.eigenpairs(wide, count, "magnitude", tolerance=1e-8).values
    model.float()
    operator = operator_of(problem)
    rules: dict[str, Stop] = {
        "value changes by 1e-3 (PyHessian's rule)": lambda value, before, _: (
            abs(value - before) < TOLERANCE * abs(value)
        ),
        "residual below 1e-3 of the value": lambda value, _, residual: (
            residual <= TOLERANCE * abs(value)
        ),
    }
    table = Table(
        f"The {count} eigenvalues of largest magnitude, {problem.size} parameters, {data}",
        ["method", "products", "ours / this", "largest error"],
    )

    def add(name: str, products: int, values: list[float]) -> None:
        error = _error(values, reference)
        share = ours.products / products
        table.add(name, products, number(share, 2), number(error, 2))
        result = {"products": products, "ratio": share, "error": error}
        report.record(f"diagnostics.eigenvalues.{name}", result)

    add("eigenpairs, tolerance 1e-3", ours.products, ours.values.tolist())
    for name in progress(list(rules), "power iteration"):
        values, products = power_iteration(operator, count, rules[name], limit)
        add(f"power iteration, {name}", products, values)
    linalg = load_peer("scipy.sparse.linalg", "scipy")
    if linalg is not None:
        counted = operator_of(problem)
        values = linalg.eigsh(for_scipy(counted, linalg), count, tol=TOLERANCE)[0].tolist()
        add("SciPy's eigsh (ARPACK), tol 1e-3", counted.products, values)
    report.show(table)


def traces(options: Options, report: Report) -> None:
    """Measures relative errors of traces, as root mean squares over draws."""
    diagnostics = load_peer("torch_secondorder.diagnostics")
    hutchinson = load_ours("torch_secondorder.curvature", "Hutchinson")
    if diagnostics is None or hutchinson is None:
        return
    torch.manual_seed(0)
    model = chain([10, 20, 20, 5], nn.Tanh).double()
    x, y = torch.randn(200, 10, dtype=torch.float64), torch.randint(5, (200,))
    problem = diagnostics.from_model(model, nn.functional.cross_entropy, (x, y))
    operator = operator_of(problem)
    exact = diagnostics.trace(operator, operator.size).value
    generator = torch.Generator().manual_seed(0)

    def plain(count: int) -> float:
        estimate: float = hutchinson(count)(operator, generator).sum().item()
        return estimate

    def plus(count: int) -> float:
        estimate: float = diagnostics.trace(operator, count, generator=generator).value
        return estimate

    counts, draws = (12, 30, 90, 240), 3 if options.quick else 30
    table = Table(
        f"Relative error of a trace ({operator.size} parameters) by products",
        ["method", *map(str, counts)],
    )
    for name, method in {"trace (Hutch++)": plus, "Hutchinson": plain}.items():
        errors = []
        for count in progress(counts, name):
            squares = [(method(count) / exact - 1) ** 2 for _ in range(draws)]
            errors.append(math.sqrt(sum(squares) / draws))
        table.add(name, *map(partial(number, digits=2), errors))
        report.record(f"diagnostics.trace.{name}", dict(zip(counts, errors, strict=True)))
    report.show(table)


PARTS = {"eigenvalues": eigenvalues, "trace": traces}


@command(
    "diagnostics", "products for eigenvalues, compared with power iteration; traces", tuple(PARTS)
)
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    for name, part in PARTS.items():
        if options.wants(name):
            part(options, report)
