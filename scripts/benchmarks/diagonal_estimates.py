"""Errors of diagonal estimates, by the number of random vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .harness import load_ours, progress
from .networks import chain
from .registry import Options
from .report import Report, Table, number

SAMPLES = (1, 4, 16, 64)


def _closure(model: nn.Module) -> Callable[[], Tensor]:
    x, y = torch.randn(200, 10, dtype=torch.float64), torch.randint(5, (200,))

    def closure() -> Tensor:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def run(options: Options, report: Report) -> None:
    """Measures relative errors, as root mean squares over entries and draws."""
    objective_class = load_ours("torch_secondorder._objective.closure", "ClosureObjective")
    curvature = load_ours("torch_secondorder", "curvature")
    if objective_class is None or curvature is None:
        return
    torch.manual_seed(0)
    model = chain([10, 20, 20, 5], nn.Tanh).double()
    with torch.no_grad():
        evaluation = objective_class(_closure(model), model.parameters()).evaluate(curvature=True)
        hessian = curvature.Hessian(evaluation)
        exact = curvature.exact_diagonal(hessian)
        gauss_newton = curvature.exact_diagonal(curvature.GaussNewton(evaluation))
    hutchinson = curvature.Hutchinson
    kinds = {
        "Hutchinson, signs": lambda k: (hutchinson(k)(hessian), exact),
        "Hutchinson, Gaussian": lambda k: (hutchinson(k, distribution="gaussian")(hessian), exact),
        "Bekas, Gaussian": lambda k: (
            hutchinson(k, distribution="gaussian", weighted=True)(hessian),
            exact,
        ),
        "Gauss-Newton-Bartlett": lambda k: (
            curvature.GaussNewtonBartlett(k)(evaluation),
            gauss_newton,
        ),
    }
    draws = 5 if options.quick else 50
    table = Table(
        "Relative error of a diagonal (865 parameters) by the number of random vectors",
        ["estimator", *map(str, SAMPLES)],
    )
    for name in progress(list(kinds), "diagonal estimates"):
        errors = []
        for count in SAMPLES:
            squares = []
            for _ in range(draws):
                with torch.no_grad():
                    estimate, truth = kinds[name](count)
                squares.append(((estimate - truth).norm() / truth.norm()).square())
            errors.append(torch.stack(squares).mean().sqrt().item())
        table.add(name, *(number(e) for e in errors))
        report.record(f"diagonal.estimates.{name}", dict(zip(SAMPLES, errors, strict=True)))
    report.show(table)
