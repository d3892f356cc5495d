"""Solvers of nonlinear least squares: this library's, SciPy's, optimistix's, a module for torch."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacfwd

from .harness import load_ours, load_peer

Residuals = Callable[[Tensor], Tensor]

# Relative changes of the sum of squares and of the point at which solvers may stop.
FTOL, XTOL = 1e-13, 1e-10
# Most evaluations of a solver.
BUDGET = 1_000
#: Its times are those of its compiler, so they are not taken.
OPTIMISTIX = "optimistix"


@dataclass(frozen=True)
class Outcome:
    """The result of a solver and its cost.

    Attributes:
        point: The final point.
        jacobians: Number of Jacobians.
    """

    point: Tensor
    jacobians: int


Solver = Callable[[Residuals, Tensor], Outcome]


def plain(residuals: Residuals) -> Residuals:
    """The function without the counter around it: a Jacobian is no evaluation."""
    result: Residuals = getattr(residuals, "plain", residuals)
    return result


def ours(
    least_squares: Any, method: dict[str, Any], residuals: Residuals, start: Tensor
) -> Outcome:
    """`least_squares` of this library."""
    result = least_squares(
        residuals, start, ftol=FTOL, xtol=XTOL, gtol=0.0, max_nfev=BUDGET, **method
    )
    return Outcome(result.x, result.njev)


def with_scipy(least_squares: Any, method: str, residuals: Residuals, start: Tensor) -> Outcome:
    """SciPy's, with the exact Jacobian by torch."""
    jacobians = 0

    def values(x: Any) -> Any:
        return residuals(torch.from_numpy(x).to(start.device)).cpu().numpy()

    def jacobian(x: Any) -> Any:
        nonlocal jacobians
        jacobians += 1
        return jacfwd(plain(residuals))(torch.from_numpy(x).to(start.device)).cpu().numpy()

    limit = {"max_nfev": BUDGET}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = least_squares(
            values,
            start.cpu().numpy(),
            jac=jacobian,
            method=method,
            ftol=FTOL,
            xtol=XTOL,
            gtol=1e-15,
            x_scale="jac",
            **limit,
        )
    return Outcome(torch.from_numpy(result.x).to(start), jacobians)


class _Point(nn.Module):
    """A module whose output is the residuals at its only parameter."""

    def __init__(self, residuals: Residuals, start: Tensor) -> None:
        super().__init__()
        self.residuals = residuals
        self.point = nn.Parameter(start.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """The residuals; there is no input."""
        # It calls the module inside `jacrev` as well, which counts as a Jacobian.
        inside = torch._C._functorch.is_functorch_wrapped_tensor(self.point)
        return (plain(self.residuals) if inside else self.residuals)(self.point)[:, None]


def with_module(package: Any, residuals: Residuals, start: Tensor) -> Outcome:
    """torch-levenberg-marquardt with its defaults; it has no tolerances, so they are added."""
    logging.getLogger(package.__name__).setLevel(logging.ERROR)
    logging.getLogger(f"{package.__name__}.training").setLevel(logging.ERROR)
    model = _Point(residuals, start)
    module = package.training.LevenbergMarquardtModule(model, use_vmap=False)
    nothing = torch.zeros_like(plain(residuals)(start))[:, None]
    with torch.no_grad():
        loss, best, jacobians = float("inf"), start, 0
        while jacobians < BUDGET:
            before = model.point.detach().clone()
            _, reached, stopped, _ = module.training_step(nothing, nothing)
            jacobians += 1
            if stopped or not reached.item() < loss:
                break  # it takes the last attempt even if it is worse
            best = model.point.detach().clone()
            change = (best - before).norm() <= XTOL * best.norm()
            if change or (loss < float("inf") and loss - reached.item() <= FTOL * loss):
                break
            loss = reached.item()
    return Outcome(best, jacobians)


def with_optimistix(
    optimistix: Any, jax: Any, numpy: Any, residuals: Residuals, start: Tensor
) -> Outcome:
    """Levenberg-Marquardt of optimistix; it calls torch for residuals and Jacobians."""
    jax.config.update("jax_enable_x64", True)
    rows, jacobians = len(plain(residuals)(start)), 0

    def at(x: Any) -> Tensor:
        return torch.from_numpy(numpy.array(x)).to(start.device)

    def values(x: Any) -> Any:
        return residuals(at(x)).cpu().numpy()

    def jacobian(x: Any) -> Any:
        nonlocal jacobians
        jacobians += 1
        return jacfwd(plain(residuals))(at(x)).cpu().numpy()

    def called(function: Any, x: Any, *shape: int) -> Any:
        return jax.pure_callback(
            function, jax.ShapeDtypeStruct(shape, x.dtype), x, vmap_method="sequential"
        )

    @jax.custom_jvp  # type: ignore[untyped-decorator]
    def function(x: Any) -> Any:
        return called(values, x, rows)

    @function.defjvp  # type: ignore[untyped-decorator]
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        (x,), (t,) = primals, tangents
        return called(values, x, rows), called(jacobian, x, rows, len(start)) @ t

    solver = optimistix.LevenbergMarquardt(rtol=XTOL, atol=XTOL)
    result = optimistix.least_squares(
        lambda y, _: function(y),
        solver,
        jax.numpy.array(start.cpu().numpy()),
        max_steps=BUDGET,
        throw=False,
    )
    return Outcome(torch.from_numpy(numpy.array(result.value)).to(start), jacobians)


def solvers() -> dict[str, Solver]:
    """All installed solvers."""
    table: dict[str, Solver] = {}
    function = load_ours("torch_secondorder", "least_squares")
    if function is not None:
        table["ours"] = partial(ours, function, {})
    optimize = load_peer("scipy.optimize", "scipy")
    if optimize is not None:
        for method in ("lm", "trf"):
            table[f"scipy {method}"] = partial(with_scipy, optimize.least_squares, method)
    module = load_peer("torch_levenberg_marquardt", "torch-levenberg-marquardt")
    if module is not None:
        table["torch-lm"] = partial(with_module, module)
    optimistix = load_peer("optimistix")
    if optimistix is not None:
        jax, numpy = (importlib.import_module(name) for name in ("jax", "numpy"))
        table[OPTIMISTIX] = partial(with_optimistix, optimistix, jax, numpy)
    return table
